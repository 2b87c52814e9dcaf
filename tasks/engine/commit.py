"""Commits documents in the order that leaves no hole: all points stored, counted, older ones deleted, ledger last.

Before the first point of a document is touched, its ledger record says "pending": whatever happens then, the next run knows
that the points of this document may be mixed, and finishes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from tasks.backends.changed_listing import ChangedPaths, is_table
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


@dataclass(slots=True)
class _LedgerFacts:
    """What one pass over a ledger says of this source."""

    known: int = 0  # documents with points
    points: int = 0  # of the committed ones
    gone: list[LedgerRecord] = field(default_factory=list)  # not in the source any more
    pending: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Settled:
    """The end of a source: what was deleted, and what Qdrant should have of its committed documents."""

    decision: DeleteDecision
    points_expected: int
    points_counted: int
    pending: tuple[
        str, ...
    ] = ()  # documents of the source that are not committed, though nothing says that they failed
    lost: DeleteDecision | None = (
        None  # of a rebuild: what readers would lose with the switch, against the live collection
    )


class Committer:
    """One source's documents in one collection. Safe to call from several threads; `lock` guards the books."""

    def __init__(
        self,
        collection: RunCollection,
        books: Ledgerbook,
        lock: threading.Lock,
        *,
        max_attempts: int,
        changed: ChangedPaths | None = None,
    ) -> None:
        """`changed`: the documents that the run looks at; None: all of the source."""
        self.collection = collection
        self.books = books
        self.max_attempts = max_attempts
        self._changed = changed
        self._lock = lock
        self._open: dict[str, _Open] = {}
        self._commit_lock = threading.Lock()
        self._growth_points = 0

    def open_documents(self, documents: Iterable[ChunkedDocument], records: Mapping[str, LedgerRecord]) -> None:
        """Remember what will be committed; `records` are what the ledger has of them."""
        with self._lock:
            for document in documents:
                done = to_done(self.collection.source, document, now="")
                before = records.get(document.doc_id)
                self._open.setdefault(document.doc_id, _Open(before, done))
                self._growth_points += done.nodes - (before.nodes if before is not None else 0)

    def begin(self, doc_ids: Iterable[str]) -> None:
        """Say in the ledger that points of these documents are about to be touched. Once a document."""
        with self._lock:
            starting = [
                (doc_id, self._open[doc_id])
                for doc_id in dict.fromkeys(doc_ids)
                if doc_id in self._open and not self._open[doc_id].is_begun
            ]
        now = get_now()
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

    @property
    def growth_points(self) -> int:
        """How many points more the documents opened so far have, once they are all committed, than they had before."""
        return self._growth_points

    def commit_whole(self, *, at_least: int = 1) -> None:
        """Commit every document whose nodes are all stored by now, where there are `at_least` so many.

        Repeatable: what an outage cut off, in whichever of its steps, is done again from its count on.
        """
        with self._commit_lock:
            while True:
                with self._lock:
                    doc_ids = self.books.list_whole(max(COMMIT_DOCUMENTS, at_least))
                if not doc_ids or len(doc_ids) < at_least:
                    return
                self._commit(doc_ids)
                with self._lock:
                    self.books.forget_whole(doc_ids)

    def _commit(self, doc_ids: Sequence[str]) -> None:
        with self._lock:
            opened = {doc_id: self._open[doc_id] for doc_id in doc_ids if doc_id in self._open}
        counts = self.collection.count_generations(list(opened))
        good = self._keep_counted(opened, counts)
        if counts.keys() - {each.done.generation for each in opened.values()} and good:
            keep = {each.done.generation for each in good.values()}
            self.collection.delete_other_generations(list(good), keep)
            # Another run of this source, on another machine, may have done the same at the same time to what this one wrote.
            good = self._keep_counted(good, self.collection.count_generations(list(good)))
        now = get_now()
        self.collection.write_records([replace(each.done, updated_at=now) for each in good.values()])
        with self._lock:
            self.books.commit_documents(good)
            for doc_id in good:
                del self._open[doc_id]

    def _keep_counted(self, opened: Mapping[str, _Open], counts: Mapping[str, int]) -> dict[str, _Open]:
        """Those of which Qdrant has every point; the others are in the books as miscounted."""
        with self._lock:
            return {
                doc_id: each
                for doc_id, each in opened.items()
                if self.books.check_count(doc_id, counts.get(each.done.generation, 0))
            }

    def begin_leftovers(self, nodes: Sequence[Node]) -> None:
        """As begin(), for nodes that an earlier run of this source embedded and could not store."""
        contents = {node.doc_id: str(node.payload.get("ballast_content", "")) for node in nodes}
        records = self.collection.read_written_records(list(contents))
        now = get_now()
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
        content_hash, reason = rejection.content_hash, rejection.reason
        if decide_document(record, content_hash, max_attempts=self.max_attempts, reason=reason) != "parked":
            return rejection, False
        return replace(rejection, status="skipped", reason=describe_parked(record)), True

    def settle(self, deletes: DeleteSettings) -> Settled:
        """Write the failures, delete what has left the source, count what is there. Only after a whole listing.

        Where the run looked at changed paths only: all of it about these, and their points are counted, not the source's.
        Raises StoreError; nothing is half done that the next run would not finish.
        """
        self.commit_whole()
        self._write_failures()
        if self._changed is not None:
            return self._settle_changed(deletes, self._changed)
        ledger = self.collection.wait_for(lambda: self._read_ledger(self.collection.scroll_records()))
        decision = self._decide(ledger, deletes, is_whole=True)
        self._delete((*decision.delete, *decision.forget))
        lost = None
        if self.collection.plan.is_rebuild:
            live = self.collection.wait_for(lambda: self._read_ledger(self.collection.scroll_live_records()))
            lost = self._decide(live, deletes, is_whole=True)
        deleted = {record.doc_id for record in (*decision.delete, *decision.forget)}
        with self._lock:
            self.books.documents_deleted = len(decision.delete)
            self.books.documents_withheld = len(decision.withheld) + (len(lost.withheld) if lost is not None else 0)
        uncommitted = [doc_id for doc_id in (*ledger.pending, *ledger.failed) if doc_id not in deleted]
        counted = self.collection.count_source(except_doc_ids=uncommitted)
        expected = ledger.points - sum(record.nodes for record in decision.delete if record.status == "done")
        pending = tuple(doc_id for doc_id in ledger.pending if doc_id not in deleted)
        return Settled(decision, points_expected=expected, points_counted=counted, pending=pending, lost=lost)

    def _settle_changed(self, deletes: DeleteSettings, changed: ChangedPaths) -> Settled:
        records, known = self._read_changed(changed)
        facts = self._read_ledger(records)
        if known is None and sum(record.has_points for record in facts.gone) > deletes.max_documents:
            # Only now does it matter of how many documents these are.
            known = self.collection.wait_for(lambda: sum(each.has_points for each in self.collection.scroll_records()))
        facts.known = known or 0
        decision = self._decide(facts, deletes, is_whole=False)
        self._delete((*decision.delete, *decision.forget))
        with self._lock:
            self.books.documents_deleted = len(decision.delete)
            self.books.documents_withheld = len(decision.withheld)
        deleted = {record.doc_id for record in (*decision.delete, *decision.forget)}
        # By document, the deleted ones too: what the whole source has would take its whole ledger to compare with.
        committed = [record for record in records if record.status == "done"]
        counts = self.collection.count_generations([record.doc_id for record in committed]) if committed else {}
        return Settled(
            decision,
            points_expected=sum(record.nodes for record in committed if record.doc_id not in deleted),
            points_counted=sum(counts.values()),
            pending=tuple(doc_id for doc_id in facts.pending if doc_id not in deleted),
        )

    def _read_changed(self, changed: ChangedPaths) -> tuple[list[LedgerRecord], int | None]:
        """What the ledger has of the documents looked at, and how many documents of the source have points, if that is known.

        By id, unless a path may stand for others: a table, a folder, and what is neither in the source nor in the ledger.
        """
        with self._lock:
            seen = self.books.list_seen()
        named = {path: f"./{path}" for path in changed.paths}  # Listed.set_row_names_apart()
        found = dict(self.collection.read_written_records([*named, *named.values()]))
        is_alone = all(
            not is_table(path) and (path in seen or path in found or apart in seen) for path, apart in named.items()
        )
        if is_alone:
            found |= self.collection.read_written_records(sorted(seen - found.keys()))
            return list(found.values()), None

        def read_all() -> tuple[list[LedgerRecord], int]:
            records, known = [], 0
            for record in self.collection.scroll_records():
                known += record.has_points
                if changed.has(record.doc_id) or record.doc_id in seen:
                    records.append(record)
            return records, known

        return self.collection.wait_for(read_all)

    def _read_ledger(self, records: Iterable[LedgerRecord]) -> _LedgerFacts:
        """One pass, in memory bounded by what is not in order."""
        facts = _LedgerFacts()
        for record in records:
            facts.known += record.has_points
            with self._lock:
                is_there = self.books.is_in_source(record.doc_id)
            if not is_there:
                facts.gone.append(record)
            if record.status == "done":
                facts.points += record.nodes
            else:
                (facts.pending if record.status == "pending" else facts.failed).append(record.doc_id)
        return facts

    def _decide(self, facts: _LedgerFacts, deletes: DeleteSettings, *, is_whole: bool) -> DeleteDecision:
        with self._lock:
            covered = [each.covers for each in self.books.rejections() if each.covers is not None]
            # A listing of changed paths is empty where all of them are gone; that the source is there, it has made sure.
            listed = self.books.documents_in_source if is_whole else None
        return decide_deletes(
            facts.gone,
            known=facts.known,
            covered=covered,
            max_documents=deletes.max_documents,
            max_fraction=deletes.max_fraction,
            confirmed=deletes.confirmed,
            propagate=deletes.propagate,
            listed=listed,
        )

    def _write_failures(self) -> None:
        with self._lock:
            failed = [each for each in self.books.rejections() if each.status == "failed"]
            partial = {doc_id for doc_id, each in self._open.items() if each.is_begun}
        for start in range(0, len(failed), COMMIT_DOCUMENTS):
            some = failed[start : start + COMMIT_DOCUMENTS]
            records = self.collection.read_written_records([each.doc_id for each in some])
            now = get_now()
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
                now = get_now()
                self.collection.write_records(
                    [
                        to_pending(record, record.source, record.doc_id, record.content_hash, now=now)
                        for record in some
                        if record.has_points
                    ]
                )
                self.collection.delete_documents(with_points)
            self.collection.remove_records([record.doc_id for record in some])


def get_now() -> str:
    """ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
