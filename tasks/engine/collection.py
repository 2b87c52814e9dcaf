"""The collection a run writes to, with its ledger; waits for a Qdrant that went away, as long as the settings say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from tasks.backends.qdrant import QdrantStore
from tasks.backends.qdrant_ledger import Ledger
from tasks.config import QdrantSettings
from tasks.engine.patience import STOPPED, Patience
from tasks.errors import RunStopped
from tasks.records import LedgerRecord, ModelFiles, Payload, Vectors

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RunCollection:
    """One physical collection, one source's part of its ledger.

    Made with its first points: a run that fails before leaves no empty collection that carries the fingerprint of settings
    that never worked. Safe to call from several threads. `stop`, once set, ends every wait with RunStopped.
    """

    def __init__(
        self,
        store: QdrantStore,
        settings: QdrantSettings,
        files: ModelFiles,
        fingerprint: str,
        source: str,
        *,
        recipe: Mapping[str, Any] | None = None,
        stop: threading.Event | None = None,
        note: Callable[[str], None] = logger.warning,
    ) -> None:
        """Raises StoreMismatch where the name is of another owner, or of other settings and those must not change it."""
        self.store = store
        self.name = settings.collection
        self.source = source
        self._settings = settings
        self._files = files
        self._fingerprint = fingerprint
        self._recipe = recipe
        self._stop = stop or threading.Event()
        store.calls.should_stop = self._stop.is_set  # the store's own waits between two attempts end as well
        self._lock = threading.Lock()
        self._patience = Patience(settings.outage_s, self._stop, note)
        self.plan = store.plan_collection(
            self.name,
            dimension=files.dimension,
            fingerprint=fingerprint,
            model=files.name,
            revision=files.revision,
            recipe=recipe,
            on_change=settings.on_change,
        )
        self.physical = self.plan.physical
        self.ledger = store.ledger(self.physical)
        self._is_made = False
        self._is_written = False
        self._is_whole_run = True
        self._mark_before: LedgerRecord | None = None  # of a changed-paths run
        if self.plan.exists:
            self.make()  # there already: completed where an earlier run was killed while it made it
        # A source without any record and any point can be embedded while Qdrant is away: there is nothing to ask it.
        self.is_empty = not self.plan.exists or not (
            self.ledger.count(source) or store.count_source(self.physical, source)
        )

    def make(self) -> None:
        """Make it unless it is there."""
        with self._lock:
            if not self._is_made:
                self.store.prepare_collection(
                    self.name,
                    dimension=self._files.dimension,
                    fingerprint=self._fingerprint,
                    model=self._files.name,
                    revision=self._files.revision,
                    recipe=self._recipe,
                )
                self._is_made = True

    def read_mark(self) -> LedgerRecord | None:
        """What the ledger says of this source as a whole."""
        return self.wait_for(lambda: self.ledger.read_mark(self.source)) if self._is_made else None

    def begin_changed(self, mark: LedgerRecord | None) -> None:
        """This run looks at some documents only; `mark` is what read_mark() said, None: it looks at none.

        The source counts as cut off from here on, until finish(): where this run is killed before its first point, nobody
        else knows which documents it was to look at.
        """
        self._is_whole_run = False
        self._mark_before = mark
        if mark is not None:
            self.wait_for(lambda: self.ledger.write_mark(self.source, "", "pending"))

    # ------------------------------------------------------------------------------------------ reading

    def count(self) -> int:
        """All points, of other sources too."""
        return self.wait_for(lambda: self.store.count(self.physical)) if self._is_made else 0

    def count_source(self, *, except_doc_ids: Sequence[str] = ()) -> int:
        if not self._is_made:
            return 0
        return self.wait_for(lambda: self.store.count_source(self.physical, self.source, except_doc_ids=except_doc_ids))

    def read_records(self, doc_ids: Sequence[str]) -> Mapping[str, LedgerRecord]:
        return {} if self.is_empty else self.read_written_records(doc_ids)

    def read_written_records(self, doc_ids: Sequence[str]) -> Mapping[str, LedgerRecord]:
        """Also those that this run has written."""
        return self.wait_for(lambda: self.ledger.read(self.source, doc_ids)) if self._is_made else {}

    def scroll_records(self) -> Iterator[LedgerRecord]:
        """The ledger's records of this source. Not repeated where Qdrant goes away midway: see wait_for()."""
        if self._is_made:
            yield from self._scroll(self.ledger)

    def scroll_live_records(self) -> Iterator[LedgerRecord]:
        """The same of the collection that readers have now; where this is a rebuild, another one."""
        if self.plan.live is not None:
            yield from self._scroll(self.store.ledger(self.plan.live))

    def _scroll(self, ledger: Ledger) -> Iterator[LedgerRecord]:
        for page in ledger.scroll(self.source):
            self._refuse_if_stopped()
            yield from page

    def existing_generations(self, ids: Sequence[str]) -> Mapping[str, str]:
        if self.is_empty:
            return {}
        return self.wait_for(lambda: self.store.existing_generations(self.physical, ids))

    def count_generations(self, doc_ids: Sequence[str]) -> Mapping[str, int]:
        return self.wait_for(lambda: self.store.count_generations(self.physical, self.source, doc_ids))

    # ------------------------------------------------------------------------------------------ writing

    def refresh_payloads(self, ids: Sequence[str], payloads: Sequence[Payload]) -> None:
        self.wait_for(lambda: self.store.refresh_payloads(self.physical, ids, payloads))

    def upsert(self, ids: Sequence[str], vectors: Vectors, payloads: Sequence[Payload]) -> None:
        self.make()
        self.wait_for(lambda: self.store.upsert(self.physical, ids, vectors, payloads))

    def write_records(self, records: Sequence[LedgerRecord]) -> None:
        """Whatever a run changes begins here: with it, the source counts as whole no more, until finish()."""
        if not records:
            return
        self.make()
        if not self._is_written:
            self.wait_for(lambda: self.ledger.write_mark(self.source, "", "pending"))
            self._is_written = True
        self.wait_for(lambda: self.ledger.write(records))

    def remove_records(self, doc_ids: Sequence[str]) -> None:
        if doc_ids:
            self.wait_for(lambda: self.ledger.remove(self.source, doc_ids))

    def delete_other_generations(self, doc_ids: Sequence[str], keep: Collection[str]) -> None:
        self.wait_for(lambda: self.store.delete_other_generations(self.physical, self.source, doc_ids, keep))

    def delete_documents(self, doc_ids: Sequence[str]) -> None:
        self.wait_for(lambda: self.store.delete_documents(self.physical, self.source, doc_ids))

    # ------------------------------------------------------------------------------------------ switching

    def finish(self, closed_at: str, *, documents_failed: int, lost: str = "") -> str:
        """Called when the books have closed: mark the source as whole here, and switch a rebuilt collection.

        closed_at: ISO time. lost: why readers would lose documents of this source with the switch; empty where they don't.
        Returns what happened, for people; empty where this is no rebuild.
        """
        if not self._is_whole_run:
            self._finish_changed(closed_at, documents_failed)
            return ""
        kept = f"{self.name!r} stays {self.plan.live} for now"
        if documents_failed:
            # Not closed: others that wait for this source go on waiting.
            self.wait_for(lambda: self.ledger.write_mark(self.source, "", "failed"))
            told = f"{kept}: {documents_failed} documents failed. Mend them and run again; or see `ballast failures`."
            return told if self.plan.is_rebuild else ""
        if self._is_written or not self.wait_for(self.ledger.read_marks).get(self.source):
            self.make()
            self.wait_for(lambda: self.ledger.write_mark(self.source, closed_at))
        live = self.plan.live
        if not self.plan.is_rebuild or live is None:
            return ""
        if lost:
            return f"{kept}: {lost}"
        lacking = self._find_lacking_sources(live)
        if lacking and not self._settings.switch_incomplete:
            return (
                f"{kept}: it has documents of {', '.join(lacking)}, and {self.physical} has not, or not as new ones. Ingest "
                "them with these settings, too; or leave them behind with --set qdrant.switch_incomplete=true."
            )
        self.make()
        self.wait_for(lambda: self.store.switch_alias(self.name, self.physical))
        return (
            f"{self.name!r} is {self.physical} now. The old one, {live}, is kept: "
            f"`ballast collections --collection {self.name} --drop-old` removes it."
        )

    def _finish_changed(self, closed_at: str, documents_failed: int) -> None:
        """As whole as the source was before, unless a document failed; as new as this run where it wrote anything.

        It never goes into a collection that is being built, so a mark never makes one look newer than what readers have.
        """
        before = self._mark_before
        if before is None:
            return
        if documents_failed or before.status == "failed":
            self.wait_for(lambda: self.ledger.write_mark(self.source, "", "failed"))
        else:
            at = closed_at if self._is_written else before.updated_at
            self.wait_for(lambda: self.ledger.write_mark(self.source, at))

    def _find_lacking_sources(self, live: str) -> list[str]:
        """Sources of the live collection whose last green run here is missing, or older than their last one there."""
        there = self.store.ledger(live)
        marks, live_marks = self.wait_for(self.ledger.read_marks), self.wait_for(there.read_marks)
        others = self.wait_for(there.list_sources) - {self.source}
        return sorted(each for each in others if not marks.get(each) or marks[each] < live_marks.get(each, ""))

    def patient_for(self, seconds: float) -> AbstractContextManager[None]:
        """In this thread, wait no longer than this for Qdrant: the caller repeats what fails, and shows it."""
        return self._patience.patient_for(seconds)

    def wait_for(self, request: Callable[[], T]) -> T:
        """See Patience.wait_for()."""
        return self._patience.wait_for(request)

    def _refuse_if_stopped(self) -> None:
        if self._stop.is_set():
            raise RunStopped(STOPPED)
