"""The collection a run writes to, with its ledger; waits for a Qdrant that went away, as long as the settings say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tasks.backends.qdrant import QdrantStore
from tasks.config import QdrantSettings
from tasks.errors import RunStopped, StoreUnavailable
from tasks.records import LedgerRecord, ModelFiles, Payload, Vectors

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOPPED = "The run was told to stop. Run it again: what is stored is not embedded twice."
LONGEST_WAIT_S = 30.0


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
        self._note = note
        self._lock = threading.Lock()
        self._patience = threading.local()
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

    # ------------------------------------------------------------------------------------------ reading

    def count(self) -> int:
        """All points, of other sources too."""
        return self._wait_for(lambda: self.store.count(self.physical)) if self._is_made else 0

    def count_source(self, *, except_doc_ids: Sequence[str] = ()) -> int:
        if not self._is_made:
            return 0
        return self._wait_for(
            lambda: self.store.count_source(self.physical, self.source, except_doc_ids=except_doc_ids)
        )

    def read_records(self, doc_ids: Sequence[str]) -> Mapping[str, LedgerRecord]:
        return {} if self.is_empty else self.read_written_records(doc_ids)

    def read_written_records(self, doc_ids: Sequence[str]) -> Mapping[str, LedgerRecord]:
        """Also those that this run has written."""
        return self._wait_for(lambda: self.ledger.read(self.source, doc_ids)) if self._is_made else {}

    def scroll_records(self) -> Iterator[LedgerRecord]:
        """The ledger's records of this source. Not repeated where Qdrant goes away midway."""
        if self._is_made:
            for page in self.ledger.scroll(self.source):
                self._refuse_if_stopped()
                yield from page

    def existing_generations(self, ids: Sequence[str]) -> Mapping[str, str]:
        if self.is_empty:
            return {}
        return self._wait_for(lambda: self.store.existing_generations(self.physical, ids))

    def count_generations(self, doc_ids: Sequence[str]) -> Mapping[str, int]:
        return self._wait_for(lambda: self.store.count_generations(self.physical, self.source, doc_ids))

    # ------------------------------------------------------------------------------------------ writing

    def refresh_payloads(self, ids: Sequence[str], payloads: Sequence[Payload]) -> None:
        self._wait_for(lambda: self.store.refresh_payloads(self.physical, ids, payloads))

    def upsert(self, ids: Sequence[str], vectors: Vectors, payloads: Sequence[Payload]) -> None:
        self.make()
        self._wait_for(lambda: self.store.upsert(self.physical, ids, vectors, payloads))

    def write_records(self, records: Sequence[LedgerRecord]) -> None:
        if records:
            self.make()
            self._wait_for(lambda: self.ledger.write(records))

    def remove_records(self, doc_ids: Sequence[str]) -> None:
        if doc_ids:
            self._wait_for(lambda: self.ledger.remove(self.source, doc_ids))

    def delete_other_generations(self, doc_ids: Sequence[str], keep: Collection[str]) -> None:
        self._wait_for(lambda: self.store.delete_other_generations(self.physical, self.source, doc_ids, keep))

    def delete_documents(self, doc_ids: Sequence[str]) -> None:
        self._wait_for(lambda: self.store.delete_documents(self.physical, self.source, doc_ids))

    # ------------------------------------------------------------------------------------------ switching

    def switch(self, *, documents_failed: int) -> str:
        """Point the alias here if all is there that the old collection has; returns what happened, for people.

        Called when the books have closed. Empty where the alias pointed here before.
        """
        if not self.plan.is_rebuild or self.plan.live is None:
            return ""
        kept = f"{self.name!r} stays {self.plan.live} for now"
        if documents_failed:
            return f"{kept}: {documents_failed} documents failed. Mend them and run again; or see `ballast failures`."
        live = self.plan.live
        sources = self._wait_for(lambda: self.store.ledger(live).list_sources() - self.ledger.list_sources())
        if sources and not self._settings.switch_incomplete:
            return (
                f"{kept}: it has documents of {', '.join(sorted(sources))}, which are not in {self.physical} yet. Ingest "
                "them with these settings, too; or leave them behind with --set qdrant.switch_incomplete=true."
            )
        self.make()
        self._wait_for(lambda: self.store.switch_alias(self.name, self.physical))
        return (
            f"{self.name!r} is {self.physical} now. The old one, {live}, is kept: "
            f"`ballast collections --collection {self.name} --drop-old` removes it."
        )

    @contextmanager
    def patient_for(self, seconds: float) -> Iterator[None]:
        """In this thread, wait no longer than this for Qdrant: the caller repeats what fails, and shows it."""
        self._patience.seconds = seconds
        try:
            yield
        finally:
            del self._patience.seconds

    def _wait_for(self, request: Callable[[], T]) -> T:
        """The request's answer; asked again while Qdrant is away, up to qdrant.outage_s.

        What a request does can be done twice. Raises StoreUnavailable, RunStopped.
        """
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception_type,
            stop_after_delay,
            wait_random_exponential,
        )

        seconds = getattr(self._patience, "seconds", self._settings.outage_s)

        def tell(state: RetryCallState) -> None:
            if state.attempt_number == 1:
                error = state.outcome.exception() if state.outcome else None
                self._note(f"waiting for Qdrant, {self._settings.outage_s:g} s at most; embedding goes on: {error}")

        def sleep(pause_s: float) -> None:
            self._stop.wait(pause_s)
            self._refuse_if_stopped()

        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            stop=stop_after_delay(seconds),
            wait=wait_random_exponential(multiplier=1, max=LONGEST_WAIT_S),
            sleep=sleep,
            before_sleep=tell,
            reraise=True,
        )
        return retrying(request)

    def _refuse_if_stopped(self) -> None:
        if self._stop.is_set():
            raise RunStopped(STOPPED)
