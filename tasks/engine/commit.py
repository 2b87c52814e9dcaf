"""Commits documents in the order that leaves no hole: all points stored, counted, older ones deleted, ledger last.

Before the first point of a document is touched, its ledger record says "pending": whatever happens then, the next run knows
that the points of this document may be mixed, and finishes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from tasks.config import DeleteSettings
from tasks.engine.collection import RunCollection
from tasks.policy.books import Ledgerbook
from tasks.policy.changes import decide_document, describe_parked, to_done, to_failed, to_pending
from tasks.policy.delete_guard import DeleteDecision, decide_deletes
from tasks.records import ChunkedDocument, LedgerRecord, Node, Rejection

COMMIT_DOCUMENTS = 256  # of one count, one delete and one write of the ledger


@dataclass(slots=True)
class _Open:
    """A document between its chunking and its commit: all that the ledger needs, without its nodes."""

    before: LedgerRecord | None
    done: LedgerRecord
    is_begun: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of a source: what was deleted, and what Qdrant should have of its committed documents."""

    decision: DeleteDecision
    points_expected: int
    points_counted: int


class Committer:
    """One source's documents in one collection. Safe to call from several threads; `lock` guards the books."""

    def __init__(
        self, collection: RunCollection, books: Ledgerbook, lock: threading.Lock, *, max_attempts: int
    ) -> None:
        self.collection = collection
        self.books = books
        self.max_attempts = max_attempts
        self._lock = lock
        self._open: dict[str, _Open] = {}
        self._commit_lock = threading.Lock()

    def open_documents(self, documents: Iterable[ChunkedDocument], records: Mapping[str, LedgerRecord]) -> None:
        """Remember what will be committed; `records` are what the ledger has of them."""
        with self._lock:
            for document in documents:
                done = to_done(self.collection.source, document, now="")
                self._open.setdefault(document.doc_id, _Open(records.get(document.doc_id), done))

    def begin(self, doc_ids: Iterable[str]) -> None:
        """Say in the ledger that points of these documents are about to be touched. Once a document."""
        with self._lock:
            starting = [
                (doc_id, self._open[doc_id])
                for doc_id in dict.fromkeys(doc_ids)
                if doc_id in self._open and not self._open[doc_id].is_begun
            ]
        now = _now()
        for start in range(0, len(starting), COMMIT_DOCUMENTS):
            some = starting[start : start + COMMIT_DOCUMENTS]
            self.collection.write_records(
                [
                    to_pending(opened.before, self.collection.source, doc_id, opened.done.content_hash, now=now)
                    for doc_id, opened in some
                ]
            )
            for _, opened in some:
                opened.is_begun = True

    def commit_whole(self) -> None:
        """Commit every document whose nodes are all stored by now."""
        while True:
            with self._lock:
                doc_ids = self.books.take_whole(COMMIT_DOCUMENTS)
            if not doc_ids:
                return
            # One at a time: a document's deletes must not cross another commit's counts for no reason.
            with self._commit_lock:
                self._commit(doc_ids)

    def _commit(self, doc_ids: Sequence[str]) -> None:
        with self._lock:
            opened = {doc_id: self._open[doc_id] for doc_id in doc_ids if doc_id in self._open}
        counts = self.collection.count_generations(list(opened))
        with self._lock:
            good = {
                doc_id: each
                for doc_id, each in opened.items()
                if self.books.commit_document(doc_id, counts.get(each.done.generation, 0))
            }
        if not good:
            return
        keep = {each.done.generation for each in good.values()}
        if counts.keys() - {each.done.generation for each in opened.values()}:
            self.collection.delete_other_generations(list(good), keep)
        now = _now()
        self.collection.write_records([replace(each.done, updated_at=now) for each in good.values()])
        with self._lock:
            for doc_id in good:
                del self._open[doc_id]

    def begin_leftovers(self, nodes: Sequence[Node]) -> None:
        """As begin(), for nodes that an earlier run of this source embedded and could not store."""
        contents = {node.doc_id: str(node.payload.get("ballast_content", "")) for node in nodes}
        records = self.collection.read_written_records(list(contents))
        now = _now()
        self.collection.write_records(
            [
                to_pending(records.get(doc_id), self.collection.source, doc_id, content, now=now)
                for doc_id, content in contents.items()
            ]
        )

    # ------------------------------------------------------------------------------------------ the end of the source

    def judge(self, rejection: Rejection, record: LedgerRecord | None) -> tuple[Rejection, bool]:
        """The rejection as the books should have it, and whether it is parked: failed too often with this content."""
        if rejection.status != "failed" or rejection.covers is not None or record is None:
            return rejection, False
        if decide_document(record, rejection.content_hash, max_attempts=self.max_attempts) != "parked":
            return rejection, False
        return replace(rejection, status="skipped", reason=describe_parked(record)), True

    def settle(self, deletes: DeleteSettings) -> Settled:
        """Write the failures, delete what has left the source, count what is there. Only after a whole listing.

        Raises StoreError; nothing is half done that the next run would not finish.
        """
        self.commit_whole()
        self._write_failures()
        gone: list[LedgerRecord] = []
        uncommitted: list[str] = []
        known = points = 0
        for record in self.collection.scroll_records():
            known += record.has_points
            with self._lock:
                is_there = self.books.is_in_source(record.doc_id)
            if not is_there:
                gone.append(record)
            if record.status == "done":
                points += record.nodes
            else:
                uncommitted.append(record.doc_id)
        with self._lock:
            covered = [each.covers for each in self.books.rejections() if each.covers is not None]
            listed = self.books.documents_in_source
        decision = decide_deletes(
            gone,
            known=known,
            covered=covered,
            max_documents=deletes.max_documents,
            max_fraction=deletes.max_fraction,
            confirmed=deletes.confirmed,
            propagate=deletes.propagate,
            listed=listed,
        )
        self._delete((*decision.delete, *decision.forget))
        points -= sum(record.nodes for record in decision.delete if record.status == "done")
        deleted = {record.doc_id for record in (*decision.delete, *decision.forget)}
        uncommitted = [doc_id for doc_id in uncommitted if doc_id not in deleted]
        with self._lock:
            self.books.documents_deleted = len(decision.delete)
            self.books.documents_withheld = len(decision.withheld)
        counted = self.collection.count_source(except_doc_ids=uncommitted)
        return Settled(decision, points_expected=points, points_counted=counted)

    def _write_failures(self) -> None:
        with self._lock:
            failed = [each for each in self.books.rejections() if each.status == "failed"]
            partial = {doc_id for doc_id, each in self._open.items() if each.is_begun}
        for start in range(0, len(failed), COMMIT_DOCUMENTS):
            some = failed[start : start + COMMIT_DOCUMENTS]
            records = self.collection.read_written_records([each.doc_id for each in some])
            now = _now()
            self.collection.write_records(
                [
                    to_failed(
                        records.get(each.doc_id),
                        self.collection.source,
                        self._with_content_hash(each),
                        max_attempts=self.max_attempts,
                        now=now,
                        is_partial=each.doc_id in partial,
                    )
                    for each in some
                ]
            )

    def _with_content_hash(self, rejection: Rejection) -> Rejection:
        """A document that failed while it was embedded has been read: its content is known."""
        opened = self._open.get(rejection.doc_id)
        if opened is None or rejection.content_hash:
            return rejection
        return replace(rejection, content_hash=opened.done.content_hash)

    def _delete(self, records: Sequence[LedgerRecord]) -> None:
        """Points first, their records after: killed in between, the next run finds the record and deletes again.

        The record says "pending" meanwhile: a document that comes back as it was must not be taken for unchanged.
        """
        for start in range(0, len(records), COMMIT_DOCUMENTS):
            some = records[start : start + COMMIT_DOCUMENTS]
            with_points = [record.doc_id for record in some if record.has_points]
            if with_points:
                now = _now()
                self.collection.write_records(
                    [
                        to_pending(record, record.source, record.doc_id, record.content_hash, now=now)
                        for record in some
                        if record.has_points
                    ]
                )
                self.collection.delete_documents(with_points)
            self.collection.remove_records([record.doc_id for record in some])


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
