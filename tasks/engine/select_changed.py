"""Which items of a source go on to be chunked: those that the ledger does not know as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from tasks.policy.books import Ledgerbook
from tasks.policy.changes import decide_document, describe_parked, needs_hash
from tasks.records import Document, FileRef, LedgerRecord, Rejection

Item = FileRef | Document | Rejection

LOOKUP_ITEMS = 512
LOOKUP_BYTES = 8 * 1024**2  # of rows, whose text is in memory already
HASH_THREADS = 8  # hashing lets go of the interpreter, and waits for the disk or the network


class Records(Protocol):
    """This source's part of the ledger."""

    def read_records(self, doc_ids: Sequence[str]) -> Mapping[str, LedgerRecord]: ...


class Seen(Protocol):
    """How much of the source has gone by."""

    def add(self, source_bytes: int) -> None: ...


class ChangeSelector:
    """Looks items up by the hundred. `records` keeps what the ledger has of those that go on, until they are taken."""

    def __init__(
        self,
        ledger: Records,
        hash_content: Callable[[FileRef], str | Rejection],
        books: Ledgerbook,
        lock: threading.Lock,
        seen: Seen,
        *,
        max_attempts: int,
    ) -> None:
        self.records: dict[str, LedgerRecord] = {}
        self._ledger = ledger
        self._hash_content = hash_content
        self._books = books
        self._lock = lock
        self._seen = seen
        self._max_attempts = max_attempts

    def take(self, doc_id: str) -> LedgerRecord | None:
        """The record of an item that came out of select(); None where the ledger has none."""
        return self.records.pop(doc_id, None)

    def select(self, items: Iterable[Item]) -> Generator[Item, None, None]:
        """The items to chunk, and the rejections, in their order; unchanged and parked ones are entered in the books."""
        with ThreadPoolExecutor(HASH_THREADS, "hash") as pool:
            waiting: list[Item] = []
            waiting_bytes = 0
            for item in items:
                waiting.append(item)
                waiting_bytes += len(item.text) if isinstance(item, Document) else 0
                if len(waiting) >= LOOKUP_ITEMS or waiting_bytes >= LOOKUP_BYTES:
                    yield from self._select_some(waiting, pool)
                    waiting, waiting_bytes = [], 0
            yield from self._select_some(waiting, pool)

    def _select_some(self, items: Sequence[Item], pool: ThreadPoolExecutor) -> list[Item]:
        if not items:
            return []
        records = self._ledger.read_records([item.doc_id for item in items])
        if not records:
            return list(items)
        files = [item for item in items if isinstance(item, FileRef) and needs_hash(records.get(item.doc_id))]
        hashes = dict(zip((file.doc_id for file in files), pool.map(self._hash_content, files), strict=True))
        going_on: list[Item] = []
        for item in items:
            record = records.get(item.doc_id)
            if record is None:
                going_on.append(item)
                continue
            content = item.content_hash if not isinstance(item, FileRef) else hashes.get(item.doc_id, "")
            if isinstance(content, Rejection):
                item, content = content, content.content_hash
            if not self._ends_here(item, record, content):
                self.records[item.doc_id] = record
                going_on.append(item)
        return going_on

    def _ends_here(self, item: Item, record: LedgerRecord, content_hash: str) -> bool:
        if isinstance(item, Rejection):
            return False  # judged where all rejections are
        if isinstance(item, FileRef) and not needs_hash(record):
            return False
        decision = decide_document(record, content_hash, max_attempts=self._max_attempts)
        with self._lock:
            if decision == "unchanged":
                self._books.skip_unchanged(item.doc_id)
            elif decision == "parked":
                reason = describe_parked(record)
                self._books.reject(Rejection(item.doc_id, "skipped", "read", reason), is_parked=True)
            else:
                return False
        self._seen.add(item.source_bytes)
        return True
