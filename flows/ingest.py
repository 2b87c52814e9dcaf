"""The ingest flow: documents -> nodes -> partitions -> vectors -> points -> closed books."""

from __future__ import annotations

from collections import deque
from typing import Any, TypeAlias, cast

from prefect import allow_failure, flow
from prefect.futures import PrefectFuture
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
from tasks.start_devices import start_devices
from tasks.states import complete
from tasks.upsert import upsert_partition

# Partitions between the device and Qdrant at most: one on the device, one whose spilled nodes the CPU pool finishes, one
# on its way to Qdrant. More would only take disk and memory: a stage that is behind holds the others back.
IN_FLIGHT = 3

InFlight: TypeAlias = tuple[Partition, PrefectFuture[PartitionReport], PrefectFuture[int]]


def _name_run() -> str:
    settings: Any = flow_run.parameters["settings"]
    settings = IngestSettings.model_validate(settings)
    return f"{settings.qdrant.collection} from {hide_credentials(settings.source.uri)}"


@flow(
    name="ingest",
    flow_run_name=_name_run,
    task_runner=ThreadPoolTaskRunner(max_workers=2 * IN_FLIGHT + 2),  # type: ignore[arg-type]
    persist_result=False,
)
def ingest(settings: IngestSettings) -> RunSummary:
    """Ingest a source into a Qdrant collection. Green means that every node of every document is there and counted."""
    run = prepare(settings)
    try:
        devices = start_devices.submit(run)
        embed_source(run, devices)
        devices.result()  # raises what kept the device from starting
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
    return complete(summary, f"{summary.books.points_counted} points counted in {summary.collection}")


def embed_source(run: IngestRun, devices: PrefectFuture[str]) -> None:
    """Three stages side by side: a partition is chunked while the one before is embedded and the one before that stored."""
    progress = ProgressArtifact(run.settings.qdrant.collection)
    in_flight: deque[InFlight] = deque()
    chunked = chunk_partition.submit(run, 0)
    while (partition := chunked.result()) is not None:
        chunked = chunk_partition.submit(run, partition.index + 1)
        devices.result()
        embedded = embed_partition.submit(run, partition)
        # Where some nodes failed to embed, the others are stored all the same.
        stored = upsert_partition.submit(run, partition, wait_for=[allow_failure(embedded)])  # type: ignore[call-overload]
        in_flight.append((partition, embedded, stored))
        if len(in_flight) >= IN_FLIGHT:
            finish_partition(run, progress, *in_flight.popleft())
    while in_flight:
        finish_partition(run, progress, *in_flight.popleft())


def finish_partition(
    run: IngestRun,
    progress: ProgressArtifact,
    partition: Partition,
    embedded: PrefectFuture[PartitionReport],
    stored: PrefectFuture[int],
) -> None:
    """Wait until the partition is in Qdrant. Failed nodes are in its report; an error that left none ends the run here."""
    embedded.wait()
    if partition.index not in run.reports:
        embedded.result()
    stored.result()
    progress.update(partition)
