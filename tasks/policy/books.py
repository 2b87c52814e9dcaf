"""Closed books: no document and no node of a run unaccounted for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tasks.records import Books, Rejection


@dataclass(slots=True)
class _Entry:
    planned: int = 0
    stored: int = 0
    reused: int = 0
    unchanged: int = 0
    failed: int = 0
    is_committed: bool = False

    @property
    def is_whole(self) -> bool:
        return self.stored + self.reused == self.planned


@dataclass(slots=True)
class Ledgerbook:
    """Follows every document from its nodes to its commit. Not thread-safe: one writer at a time."""

    _entries: dict[str, _Entry] = field(default_factory=dict)
    _unchanged: set[str] = field(default_factory=set)
    _parked: set[str] = field(default_factory=set)
    _rejections: dict[str, Rejection] = field(default_factory=dict)
    _duplicates: list[str] = field(default_factory=list)
    _miscounted: dict[str, int] = field(default_factory=dict)
    _whole: list[str] = field(default_factory=list)
    nodes_gpu: int = 0
    nodes_cpu: int = 0
    documents_deleted: int = 0
    documents_withheld: int = 0

    # ------------------------------------------------------------------------------------------ documents

    def skip_unchanged(self, doc_id: str) -> None:
        """The ledger has it as it is: nothing of it was chunked."""
        if self._is_known(doc_id):
            self._duplicates.append(doc_id)
            return
        self._unchanged.add(doc_id)

    def plan_document(self, doc_id: str, nodes: int) -> None:
        if self._is_known(doc_id):
            self._duplicates.append(doc_id)
        # Its nodes go their way all the same: without an entry to count them in, the run would end without its books.
        self._entries.setdefault(doc_id, _Entry()).planned += nodes

    def reject(self, rejection: Rejection, *, is_parked: bool = False) -> None:
        """`is_parked`: skipped because it failed too often; it is in the source all the same."""
        if self._is_known(rejection.doc_id):
            self._duplicates.append(rejection.doc_id)
            return
        self._rejections[rejection.doc_id] = rejection
        if is_parked:
            self._parked.add(rejection.doc_id)

    def check_count(self, doc_id: str, counted: int) -> bool:
        """Whether Qdrant counts as many points of it as it has nodes; only then it may be committed."""
        if counted == self._entries[doc_id].planned:
            self._miscounted.pop(doc_id, None)
            return True
        self._miscounted[doc_id] = counted
        return False

    def commit_documents(self, doc_ids: Iterable[str]) -> None:
        """Their records are in the ledger: not before."""
        for doc_id in doc_ids:
            self._entries[doc_id].is_committed = True

    def _is_known(self, doc_id: str) -> bool:
        return doc_id in self._entries or doc_id in self._unchanged or doc_id in self._rejections

    def is_in_source(self, doc_id: str) -> bool:
        """Whether the source has it, readable or not. One that is empty now, or of a format not read, is as good as gone."""
        rejection = self._rejections.get(doc_id)
        if rejection is not None and rejection.status == "failed":
            return True
        return doc_id in self._entries or doc_id in self._unchanged or doc_id in self._parked

    def list_seen(self) -> set[str]:
        """Every document that went by, whatever became of it."""
        return self._entries.keys() | self._unchanged | self._rejections.keys()

    @property
    def documents_in_source(self) -> int:
        """As is_in_source() counts them."""
        failed = {doc_id for doc_id, each in self._rejections.items() if each.status == "failed"}
        return len(self._entries.keys() | self._unchanged | self._parked | failed)

    # ------------------------------------------------------------------------------------------ nodes

    def reuse_nodes(self, doc_ids: Iterable[str], *, unchanged: bool) -> None:
        """Nodes whose vectors are stored already; `unchanged` where the stored generation is the document's own."""
        for doc_id in doc_ids:
            entry = self._entries[doc_id]
            entry.reused += 1
            entry.unchanged += unchanged
            self._note_whole(doc_id, entry)

    def store_nodes(self, doc_ids: Iterable[str]) -> None:
        for doc_id in doc_ids:
            entry = self._entries[doc_id]
            entry.stored += 1
            self._note_whole(doc_id, entry)

    def fail_nodes(self, doc_ids: Iterable[str], reason: str) -> None:
        for doc_id in doc_ids:
            self._entries[doc_id].failed += 1
            self._rejections.setdefault(doc_id, Rejection(doc_id, "failed", "embed", reason))

    def _note_whole(self, doc_id: str, entry: _Entry) -> None:
        if entry.is_whole:
            self._whole.append(doc_id)

    def list_whole(self, limit: int) -> list[str]:
        """At most `limit` documents whose last node has been stored or found: ready to commit."""
        return self._whole[:limit]

    def forget_whole(self, doc_ids: Sequence[str]) -> None:
        """What list_whole() said first has been dealt with. An error before it leaves them to the next try."""
        self._whole = self._whole[len(doc_ids) :]

    @property
    def nodes_reused(self) -> int:
        return sum(entry.reused for entry in self._entries.values())

    def rejections(self) -> tuple[Rejection, ...]:
        return tuple(self._rejections.values())

    # ------------------------------------------------------------------------------------------ the end

    def _should_be_done(self, doc_id: str) -> bool:
        entry = self._entries.get(doc_id)
        return doc_id in self._unchanged or (entry is not None and entry.is_committed)

    def close(
        self, points_counted: int, points_expected: int, *, pending: Sequence[str] = ()
    ) -> tuple[Books, tuple[str, ...]]:
        """The books, and what is off: one line a discrepancy, none when they close.

        points_counted: what Qdrant has of the source's committed documents; points_expected: what the ledger has.
        pending: documents of the source that the ledger still has as begun and not committed.
        """
        written = unchanged = 0
        open_documents: list[str] = []
        for doc_id, entry in self._entries.items():
            if entry.failed:
                continue
            if not entry.is_whole:
                open_documents.append(
                    f"{doc_id}: {entry.planned} nodes planned, {entry.stored} stored, {entry.reused} reused"
                )
            elif not entry.is_committed:
                counted = self._miscounted.get(doc_id)
                found = "was not committed" if counted is None else f"Qdrant counts {counted}"
                open_documents.append(f"{doc_id}: {entry.planned} nodes stored or reused, {found}")
            elif entry.unchanged == entry.planned:
                unchanged += 1
            else:
                written += 1
        entries = self._entries.values()
        failed = {r.doc_id for r in self._rejections.values() if r.status == "failed"}
        books = Books(
            documents_seen=len(self.list_seen()),
            documents_unchanged=unchanged + len(self._unchanged),
            documents_written=written,
            documents_failed=len(failed),
            documents_skipped=sum(r.status == "skipped" for r in self._rejections.values()),
            nodes_planned=sum(e.planned for e in entries),
            nodes_gpu=self.nodes_gpu,
            nodes_cpu=self.nodes_cpu,
            nodes_reused=self.nodes_reused,
            nodes_failed=sum(e.failed for e in entries),
            points_counted=points_counted,
            documents_deleted=self.documents_deleted,
            documents_withheld=self.documents_withheld,
        )
        return books, (
            *check_books(books),
            *_list_some("document not whole", open_documents),
            *_list_some(
                "document pending in the ledger", [doc_id for doc_id in pending if self._should_be_done(doc_id)]
            ),
            *_list_some("document seen twice", self._duplicates),
            *_check_points(points_counted, points_expected),
        )


def check_books(books: Books) -> tuple[str, ...]:
    """Which of the two equations does not hold, with its figures; empty when both do."""
    off = []
    parts = books.documents_unchanged + books.documents_written + books.documents_failed + books.documents_skipped
    if parts != books.documents_seen:
        off.append(
            f"documents: {books.documents_seen} seen, but {books.documents_unchanged} unchanged"
            f" + {books.documents_written} written + {books.documents_failed} failed"
            f" + {books.documents_skipped} skipped = {parts}"
        )
    parts = books.nodes_gpu + books.nodes_cpu + books.nodes_reused + books.nodes_failed
    if parts != books.nodes_planned:
        off.append(
            f"nodes: {books.nodes_planned} planned, but {books.nodes_gpu} GPU + {books.nodes_cpu} CPU"
            f" + {books.nodes_reused} reused + {books.nodes_failed} failed = {parts}"
        )
    return tuple(off)


def _check_points(counted: int, expected: int) -> tuple[str, ...]:
    return (
        ()
        if counted == expected
        else (
            f"points: Qdrant counts {counted} of this source's committed documents, the ledger has {expected}. "
            "`ballast verify --repair` finds which and mends it",
        )
    )


def _list_some(what: str, lines: Sequence[str], limit: int = 10) -> tuple[str, ...]:
    rest = (f"{what}: and {len(lines) - limit} more",) if len(lines) > limit else ()
    return tuple(f"{what}: {line}" for line in lines[:limit]) + rest
