"""Between a spooled partition and its points: in this process, or on the work pools. The ingest flow sees only Stages."""

from __future__ import annotations

import threading
from collections import deque
from typing import Generic, Literal, Protocol, TypeVar, cast

from prefect.futures import PrefectConcurrentFuture, PrefectFuture

from tasks.config import IngestSettings
from tasks.embed import embed_partition
from tasks.publish import ProgressArtifact
from tasks.records import Partition, PartitionReport
from tasks.upsert import count_retries, upsert_partition

Result = TypeVar("Result")

# One partition on the device, and one whose spilled nodes the CPU pool finishes. More would only take memory.
EMBEDDING_AT_ONCE = 2


class Stages(Protocol):
    """Takes partitions, and is busy until all of their points are stored. Driven by one thread: advance(), wait()."""

    def follow(self, future: PrefectFuture[Result]) -> Followed[Result]:
        """A task whose end wakes wait()."""
        ...

    def embed(self, partition: Partition) -> None: ...

    def advance(self) -> None:
        """Hand on whatever a stage is done with. Raises what ended a stage for good."""
        ...

    def is_full(self) -> bool: ...

    def complete(self) -> None:
        """No more partitions come."""
        ...

    def is_busy(self) -> bool: ...

    def wait(self) -> None:
        """Until there may be something to advance."""
        ...

    def finish(self) -> None:
        """All is stored."""
        ...

    def close(self) -> None:
        """The end, also after an error: nothing goes on elsewhere."""
        ...


class LocalRun(Protocol):
    """What embeds and stores in this process: an ingest run, or a worker's run of a group."""

    @property
    def settings(self) -> IngestSettings: ...

    @property
    def reports(self) -> dict[int, PartitionReport]: ...

    def embed_partition(self, partition: Partition) -> PartitionReport: ...

    def upsert_partition(self, partition: Partition) -> int: ...

    def is_spool_full(self) -> bool: ...


class Followed(Generic[Result]):
    """A task under way; `wake` is set when it ends."""

    def __init__(self, future: PrefectConcurrentFuture[Result], wake: threading.Event) -> None:
        self.future = future
        self.is_done = False
        self._wake = wake
        future.add_done_callback(self._end)

    def _end(self, _future: PrefectFuture[Result]) -> None:
        self.is_done = True
        self._wake.set()


def follow(future: PrefectFuture[Result], wake: threading.Event) -> Followed[Result]:
    return Followed(cast("PrefectConcurrentFuture[Result]", future), wake)


class LocalStages:
    """Partitions on the device, embedded ones that wait for Qdrant in the spool, and the one on its way into it.

    Qdrant away holds up only the last stage, until the spool is full.
    """

    def __init__(self, run: LocalRun, what: Literal["source", "group"] = "source") -> None:
        self._run = run
        self._progress = ProgressArtifact(run.settings.qdrant.collection, what)
        self._wake = threading.Event()
        self._embedding: deque[tuple[Partition, Followed[PartitionReport]]] = deque()
        self._embedded: deque[Partition] = deque()
        self._storing: tuple[Partition, Followed[int]] | None = None
        self._upsert = upsert_partition.with_options(retries=count_retries(run.settings.qdrant.outage_s))

    def follow(self, future: PrefectFuture[Result]) -> Followed[Result]:
        return follow(future, self._wake)

    def embed(self, partition: Partition) -> None:
        self._embedding.append((partition, self.follow(embed_partition.submit(self._run, partition))))

    def advance(self) -> None:
        while self._embedding and self._embedding[0][1].is_done:
            partition, embedded = self._embedding.popleft()
            if partition.index not in self._run.reports:
                embedded.future.result()  # failed nodes are in its report; an error that left none ends the run here
            self._embedded.append(partition)
        if self._storing is not None and self._storing[1].is_done:
            partition, stored = self._storing
            stored.future.result()
            self._storing = None
            self._progress.update(partition)
        if self._storing is None and self._embedded:
            partition = self._embedded.popleft()
            self._storing = partition, self.follow(self._upsert.submit(self._run, partition))

    def is_full(self) -> bool:
        return len(self._embedding) >= EMBEDDING_AT_ONCE or (bool(self._embedded) and self._run.is_spool_full())

    def complete(self) -> None:
        """Nothing waits for company here."""

    def is_busy(self) -> bool:
        return bool(self._embedding or self._embedded or self._storing)

    def finish(self) -> None:
        self._progress.finish()

    def wait(self) -> None:
        self._wake.wait()
        self._wake.clear()

    def close(self) -> None:
        """The run itself ends its processes."""
