"""The embed-partitions flow, what a worker of either pool runs: a group of partitions, from the spool into Qdrant."""

from __future__ import annotations

import os
from typing import Any

from prefect import flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.stages import LocalStages
from tasks.config import EmbedGroup, IngestSettings
from tasks.engine.embed_run import EmbedRun
from tasks.metrics import start_metrics
from tasks.open_group import open_group
from tasks.publish import publish_group
from tasks.start_devices import start_devices
from tasks.states import complete


def _name_run() -> str:
    settings: Any = flow_run.parameters["settings"]
    group: Any = flow_run.parameters["group"]
    settings, group = IngestSettings.model_validate(settings), EmbedGroup.model_validate(group)
    first, last = group.partitions[0].index, group.partitions[-1].index
    return f"{settings.qdrant.collection}: group {group.number} on {group.pool}-pool, partitions {first}-{last}"


@flow(
    name="embed-partitions",
    flow_run_name=_name_run,
    task_runner=ThreadPoolTaskRunner(max_workers=4),  # type: ignore[arg-type]
    persist_result=False,
)
def embed_partitions(settings: IngestSettings, group: EmbedGroup) -> str:
    """Embed and store the group's partitions; each one's report is in the spool as soon as its points are in Qdrant.

    What this pool's device can't place is reported as left: the ingest run hands it to cpu-pool.
    """
    with start_metrics(os.environ, collection=settings.qdrant.collection, pool=group.pool):
        run = open_group(settings, group)
        try:
            devices = start_devices.submit(run)
            embed_group(run, devices)
        finally:
            run.close()
    publish_group(run.summarise())
    return complete("", run.describe())


def embed_group(run: EmbedRun, devices: PrefectFuture[str]) -> None:
    """One partition on the device while the one before it is stored."""
    devices.result()
    stages = LocalStages(run, "group")
    for partition in run.partitions():
        while stages.is_full():
            stages.wait()
            stages.advance()
        stages.embed(partition)
    while stages.is_busy():
        stages.wait()
        stages.advance()
    stages.finish()
