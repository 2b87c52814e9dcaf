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


@dataclass(slots=True)
class Ledgerbook:
    """Follows every document from its nodes to its points. Not thread-safe: one writer at a time."""

    _entries: dict[str, _Entry] = field(default_factory=dict)
    _rejections: dict[str, Rejection] = field(default_factory=dict)
    _duplicates: list[str] = field(default_factory=list)
    nodes_gpu: int = 0
    nodes_cpu: int = 0

    def plan_document(self, doc_id: str, nodes: int) -> None:
        if doc_id in self._entries or doc_id in self._rejections:
            self._duplicates.append(doc_id)
        # Its nodes go their way all the same: without an entry to count them in, the run would end without its books.
        self._entries.setdefault(doc_id, _Entry()).planned += nodes

    def reject(self, rejection: Rejection) -> None:
        if rejection.doc_id in self._entries or rejection.doc_id in self._rejections:
            self._duplicates.append(rejection.doc_id)
            return
        self._rejections[rejection.doc_id] = rejection

    def reuse_nodes(self, doc_ids: Iterable[str], *, unchanged: bool) -> None:
        """Nodes whose vectors are stored already; `unchanged` where the stored generation is the document's own."""
        for doc_id in doc_ids:
            entry = self._entries[doc_id]
            entry.reused += 1
            entry.unchanged += unchanged

    def store_nodes(self, doc_ids: Iterable[str]) -> None:
        for doc_id in doc_ids:
            self._entries[doc_id].stored += 1

    def fail_nodes(self, doc_ids: Iterable[str], reason: str) -> None:
        for doc_id in doc_ids:
            self._entries[doc_id].failed += 1
            self._rejections.setdefault(doc_id, Rejection(doc_id, "failed", "embed", reason))

    @property
    def nodes_reused(self) -> int:
        return sum(entry.reused for entry in self._entries.values())

    def rejections(self) -> tuple[Rejection, ...]:
        return tuple(self._rejections.values())

    def close(self, points_counted: int) -> tuple[Books, tuple[str, ...]]:
        """The books, and what is off: one line a discrepancy, none when they close."""
        written = unchanged = 0
        open_documents: list[str] = []
        for doc_id, entry in self._entries.items():
            if entry.failed:
                continue
            if entry.stored + entry.reused != entry.planned:
                open_documents.append(
                    f"{doc_id}: {entry.planned} nodes planned, {entry.stored} stored, {entry.reused} reused"
                )
            elif entry.unchanged == entry.planned:
                unchanged += 1
            else:
                written += 1
        entries = self._entries.values()
        failed = {r.doc_id for r in self._rejections.values() if r.status == "failed"}
        books = Books(
            documents_seen=len(self._entries.keys() | self._rejections.keys()),
            documents_unchanged=unchanged,
            documents_written=written,
            documents_failed=len(failed),
            documents_skipped=sum(r.status == "skipped" for r in self._rejections.values()),
            nodes_planned=sum(e.planned for e in entries),
            nodes_gpu=self.nodes_gpu,
            nodes_cpu=self.nodes_cpu,
            nodes_reused=self.nodes_reused,
            nodes_failed=sum(e.failed for e in entries),
            points_counted=points_counted,
        )
        expected_points = sum(e.stored + e.reused for e in entries)
        return books, (
            *check_books(books),
            *_list_some("document not whole", open_documents),
            *_list_some("document seen twice", self._duplicates),
            *_check_points(points_counted, expected_points),
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
        else (f"points: Qdrant counts {counted} of this run's points, {expected} were stored or reused",)
    )


def _list_some(what: str, lines: Sequence[str], limit: int = 10) -> tuple[str, ...]:
    rest = (f"{what}: and {len(lines) - limit} more",) if len(lines) > limit else ()
    return tuple(f"{what}: {line}" for line in lines[:limit]) + rest
