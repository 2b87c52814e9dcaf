"""Who watches a run: the stages tell what happens, the command line decides how it is shown.

The engine reports to `current_observer.get()`; nobody watches by default (a worker, a test). Prefect's thread pool
copies the context into its tasks, a bare `threading.Thread` does not: take the observer before starting one, and hand
it over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from tasks.records import LadderStep, Partition, PartitionReport, RunSummary, VerifyReport


class Observer(Protocol):
    """Called from several threads at once; must return at once and never raise."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage begins: "model", "calibrate", "chunk", ...; `detail` is for people."""
        ...

    def partition_spooled(self, partition: Partition) -> None:
        """A partition waits to be embedded."""
        ...

    def micro_batch_done(
        self, partition_index: int, nodes_done: int, nodes_total: int, tokens: int, device: str
    ) -> None:
        """`nodes_done` of the partition's `nodes_total` have vectors now; `tokens` came with this micro-batch."""
        ...

    def ladder_step(self, partition_index: int, step: LadderStep) -> None:
        """The ladder moved."""
        ...

    def partition_done(self, report: PartitionReport) -> None:
        """A partition's vectors are all there, or failed for good."""
        ...

    def note(self, message: str) -> None:
        """One sentence that the user should read now."""
        ...

    def run_finished(self, summary: RunSummary, off: Sequence[str]) -> None:
        """The run's books; `off` says line by line what keeps them from closing, and is empty where they close."""
        ...

    def verify_finished(self, report: VerifyReport) -> None:
        """What a verify found, repaired and left."""
        ...


class SilentObserver:
    """Watches nothing."""

    def stage(self, name: str, detail: str = "") -> None: ...

    def partition_spooled(self, partition: Partition) -> None: ...

    def micro_batch_done(
        self, partition_index: int, nodes_done: int, nodes_total: int, tokens: int, device: str
    ) -> None: ...

    def ladder_step(self, partition_index: int, step: LadderStep) -> None: ...

    def partition_done(self, report: PartitionReport) -> None: ...

    def note(self, message: str) -> None: ...

    def run_finished(self, summary: RunSummary, off: Sequence[str]) -> None: ...

    def verify_finished(self, report: VerifyReport) -> None: ...


# One instance for all contexts is right: it keeps no state.
current_observer: ContextVar[Observer] = ContextVar("current_observer", default=SilentObserver())  # noqa: B039


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Everything that runs in this context, and in contexts copied from it, reports to `observer`."""
    token = current_observer.set(observer)
    try:
        yield
    finally:
        current_observer.reset(token)
