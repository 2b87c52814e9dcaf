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

from tasks.records import LadderStep, MemoryReading, Partition, PartitionReport, RunSummary, VerifyReport


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

    def micro_batch_measured(self, nodes: int, budget_bytes: int, predicted_bytes: int, peak_bytes: int | None) -> None:
        """What a micro-batch might take, was to take and took, on top of the weights; None: the device does not tell."""
        ...

    def memory_read(self, reading: MemoryReading) -> None:
        """The sampler read a device's memory."""
        ...

    def ladder_step(self, partition_index: int, step: LadderStep) -> None:
        """The ladder moved."""
        ...

    def points_stored(self, points: int, seconds: float) -> None:
        """Qdrant has applied these points; `seconds` from the first request to the last answer."""
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

    def micro_batch_measured(
        self, nodes: int, budget_bytes: int, predicted_bytes: int, peak_bytes: int | None
    ) -> None: ...

    def memory_read(self, reading: MemoryReading) -> None: ...

    def ladder_step(self, partition_index: int, step: LadderStep) -> None: ...

    def points_stored(self, points: int, seconds: float) -> None: ...

    def partition_done(self, report: PartitionReport) -> None: ...

    def note(self, message: str) -> None: ...

    def run_finished(self, summary: RunSummary, off: Sequence[str]) -> None: ...

    def verify_finished(self, report: VerifyReport) -> None: ...


class BothObservers:
    """Tells two observers the same, the first one first."""

    def __init__(self, first: Observer, second: Observer) -> None:
        self._both = (first, second)

    def stage(self, name: str, detail: str = "") -> None:
        for observer in self._both:
            observer.stage(name, detail)

    def partition_spooled(self, partition: Partition) -> None:
        for observer in self._both:
            observer.partition_spooled(partition)

    def micro_batch_done(
        self, partition_index: int, nodes_done: int, nodes_total: int, tokens: int, device: str
    ) -> None:
        for observer in self._both:
            observer.micro_batch_done(partition_index, nodes_done, nodes_total, tokens, device)

    def micro_batch_measured(self, nodes: int, budget_bytes: int, predicted_bytes: int, peak_bytes: int | None) -> None:
        for observer in self._both:
            observer.micro_batch_measured(nodes, budget_bytes, predicted_bytes, peak_bytes)

    def memory_read(self, reading: MemoryReading) -> None:
        for observer in self._both:
            observer.memory_read(reading)

    def ladder_step(self, partition_index: int, step: LadderStep) -> None:
        for observer in self._both:
            observer.ladder_step(partition_index, step)

    def points_stored(self, points: int, seconds: float) -> None:
        for observer in self._both:
            observer.points_stored(points, seconds)

    def partition_done(self, report: PartitionReport) -> None:
        for observer in self._both:
            observer.partition_done(report)

    def note(self, message: str) -> None:
        for observer in self._both:
            observer.note(message)

    def run_finished(self, summary: RunSummary, off: Sequence[str]) -> None:
        for observer in self._both:
            observer.run_finished(summary, off)

    def verify_finished(self, report: VerifyReport) -> None:
        for observer in self._both:
            observer.verify_finished(report)


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
