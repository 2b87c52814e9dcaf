"""The embed-partitions flow, what a worker of either pool runs: a group of partitions, from the spool into Qdrant."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from tasks.config import EmbedGroup, IngestSettings


def _name_run() -> str:
    settings: Any = flow_run.parameters["settings"]
    group: Any = flow_run.parameters["group"]
    settings, group = IngestSettings.model_validate(settings), EmbedGroup.model_validate(group)
    return f"{settings.qdrant.collection}: group {group.number} on {group.pool}-pool"


@flow(name="embed-partitions", flow_run_name=_name_run, persist_result=False)
def embed_partitions(settings: IngestSettings, group: EmbedGroup) -> str:
    """Embed and store the group's partitions; each one's report is in the spool as soon as its points are in Qdrant."""
    raise NotImplementedError
