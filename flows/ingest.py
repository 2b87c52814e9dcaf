"""The ingest flow: documents -> nodes -> partitions -> vectors -> points -> ledger -> closed books."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, Generic, TypeVar, cast

from prefect import flow
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.chunk import chunk_partition
from tasks.config import IngestSettings
from tasks.embed import embed_partition
from tasks.engine.ingest_run import IngestRun, refuse_open_books
from tasks.observe import current_observer
from tasks.prepare import prepare
from tasks.publish import ProgressArtifact, publish_run
from tasks.records import Partition, PartitionReport, RunSummary
from tasks.report import hide_credentials
from tasks.settle import settle_source
from tasks.start_devices import start_devices
from tasks.states import complete
from tasks.upsert import count_retries, upsert_partition

Result = TypeVar("Result")

# One partition on the device, and one whose spilled nodes the CPU pool finishes. More would only take memory.
EMBEDDING_AT_ONCE = 2


def _name_run() -> str:
    settings: Any = flow_run.parameters["settings"]
    settings = IngestSettings.model_validate(settings)
    return f"{settings.qdrant.collection} from {hide_credentials(settings.source.uri)}"


@flow(
    name="ingest",
    flow_run_name=_name_run,
    task_runner=ThreadPoolTaskRunner(max_workers=EMBEDDING_AT_ONCE + 4),  # type: ignore[arg-type]
    persist_result=False,
)
def ingest(settings: IngestSettings) -> RunSummary:
    """Ingest a source into a Qdrant collection. Green means that every node of every document is there and counted."""
    run = prepare(settings)
    try:
        devices = start_devices.submit(run)
        embed_source(run, devices)
        devices.result()  # raises what kept the device from starting
        settle_source(run)
        summary, off = run.close_books()
    finally:
        run.close()
    publish_run(summary, off)
    current_observer.get().run_finished(summary, off)
    refuse_open_books(off)
    if summary.books.documents_failed:
        names = ", ".join(r.doc_id for r in summary.rejections if r.status == "failed")
        message = f"{summary.books.documents_failed} of {summary.books.documents_seen} documents failed: {names[:500]}"
        return cast(RunSummary, Failed(name="DocumentsFailed", message=message))
    counted = f"{summary.books.points_counted} points counted in {summary.collection}"
    if summary.books.documents_withheld:
        return complete(summary, f"{' '.join(summary.notes)} {counted}", name="DeletesWithheld")
    return complete(summary, counted)


def embed_source(run: IngestRun, devices: PrefectFuture[str]) -> None:
    """Three stages side by side: a partition is chunked while the one before is embedded and those before it stored."""
    stages = Stages(run)
    chunked = stages.follow(chunk_partition.submit(run, 0))
    while True:
        stages.advance()
        if chunked.is_done and not stages.is_full():
            partition = chunked.future.result()
            if partition is None:
                break
            chunked = stages.follow(chunk_partition.submit(run, partition.index + 1))
            devices.result()
            stages.embed(partition)
        else:
            stages.wait()
    while stages.is_busy():
        stages.wait()
        stages.advance()
    stages.finish()


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


class Stages:
    """Partitions on the device, embedded ones that wait for Qdrant in the spool, and the one on its way into it.

    Qdrant away holds up only the last stage, until the spool is full.
    """

    def __init__(self, run: IngestRun) -> None:
        self._run = run
        self._progress = ProgressArtifact(run.settings.qdrant.collection)
        self._wake = threading.Event()
        self._embedding: deque[tuple[Partition, Followed[PartitionReport]]] = deque()
        self._embedded: deque[Partition] = deque()
        self._storing: tuple[Partition, Followed[int]] | None = None
        self._upsert = upsert_partition.with_options(retries=count_retries(run.settings.qdrant.outage_s))

    def follow(self, future: PrefectFuture[Result]) -> Followed[Result]:
        return Followed(cast("PrefectConcurrentFuture[Result]", future), self._wake)

    def embed(self, partition: Partition) -> None:
        self._embedding.append((partition, self.follow(embed_partition.submit(self._run, partition))))

    def advance(self) -> None:
        """Hand on whatever a stage is done with. Raises what ended a stage for good."""
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

    def finish(self) -> None:
        self._progress.finish()

    def is_busy(self) -> bool:
        return bool(self._embedding or self._embedded or self._storing)

    def wait(self) -> None:
        """Until some task has ended."""
        self._wake.wait()
        self._wake.clear()
