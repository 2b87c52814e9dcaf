"""The ingest flow: documents -> nodes -> partitions -> vectors -> points -> ledger -> closed books."""

from __future__ import annotations

import os
import threading
from typing import Any, cast

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.pool_stages import PoolStages
from flows.stages import LocalStages, Stages
from tasks.chunk import chunk_partition
from tasks.config import IngestSettings
from tasks.engine.ingest_run import IngestRun, refuse_open_books
from tasks.exclusive import hold_collection
from tasks.metrics import start_metrics
from tasks.observe import current_observer
from tasks.pool_runs import PoolRuns
from tasks.prepare import prepare
from tasks.publish import publish_run
from tasks.records import RunSummary
from tasks.report import describe_outcome, hide_credentials
from tasks.settle import settle_source
from tasks.start_devices import start_devices
from tasks.states import complete
from tasks.superseded import SUPERSEDED, find_later_run

# In this process: two partitions embedded, one stored, one chunked, and the devices. With work pools each hand-over may wait
# for the server; what is collected must not wait behind them.
TASKS_AT_ONCE = 12


def _name_run() -> str:
    settings: Any = flow_run.parameters["settings"]
    settings = IngestSettings.model_validate(settings)
    changed: Any = flow_run.parameters.get("changed")
    what = "" if changed is None else f" ({len(changed)} changed)"
    return f"{settings.qdrant.collection} from {hide_credentials(settings.source.uri)}{what}"


@flow(
    name="ingest",
    flow_run_name=_name_run,
    task_runner=ThreadPoolTaskRunner(max_workers=TASKS_AT_ONCE),  # type: ignore[arg-type]
    persist_result=False,
)
def ingest(settings: IngestSettings, changed: list[str] | None = None) -> RunSummary:
    """Ingest a source into a Qdrant collection. Green means that every node of every document is there and counted.

    changed: doc ids, as a trigger names them: paths of files, tables or folders relative to the source's root. Only these are
    looked at; those that are there are ingested, those that are gone are deleted. None: the whole source.
    """
    stop, note = threading.Event(), current_observer.get().note
    name = settings.qdrant.collection
    with (
        start_metrics(os.environ, collection=name, embeds=not settings.pools.enabled),
        hold_collection(name, patience_s=settings.collection_wait_s, stop=stop, note=note),
    ):
        later = find_later_run(changed, patience_s=settings.pools.server_outage_s, stop=stop)
        if later is not None:
            return cast(RunSummary, complete(None, f"{later} began later and has seen all of this", name=SUPERSEDED))
        summary, off = ingest_source(settings, changed, stop)
        current_observer.get().run_finished(summary, off)
    publish_run(summary, off, alert_spilled_fraction=settings.alert_spilled_fraction)
    refuse_open_books(off)
    if summary.books.documents_failed:
        names = ", ".join(r.doc_id for r in summary.rejections if r.status == "failed")
        message = f"{summary.books.documents_failed} of {summary.books.documents_seen} documents failed: {names[:500]}"
        return cast(RunSummary, Failed(name="DocumentsFailed", message=message))
    if summary.books.documents_withheld:
        return complete(summary, f"{' '.join(summary.notes)} {describe_outcome(summary)}", name="DeletesWithheld")
    return complete(summary, describe_outcome(summary))


def ingest_source(
    settings: IngestSettings, changed: list[str] | None, stop: threading.Event
) -> tuple[RunSummary, tuple[str, ...]]:
    """From the source to the books: the run's summary, and what is off in its books. `stop`, once set, ends it."""
    run = prepare(settings, changed, stop)
    try:
        devices = start_devices.submit(run)
        embed_source(run, devices)
        devices.result()  # raises what kept the device from starting
        settle_source(run)
        return run.close_books()
    finally:
        run.close()


def embed_source(run: IngestRun, devices: PrefectFuture[str]) -> None:
    """Three stages side by side: a partition is chunked while the one before is embedded and those before it stored."""
    stages = open_stages(run)
    try:
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
        stages.complete()
        while stages.is_busy():
            stages.wait()
            stages.advance()
        stages.finish()
    finally:
        stages.close()


def open_stages(run: IngestRun) -> Stages:
    """The seam between one process and many: where partitions are embedded and stored."""
    if run.settings.pools.enabled:
        return PoolStages(run, PoolRuns(run.settings, run.stop))
    return LocalStages(run)
