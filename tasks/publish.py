"""What a run shows in the Prefect UI: progress, the table of partitions, the report, and an event for each ladder step."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from tasks.records import LadderStep, Partition, PartitionReport, RunSummary
from tasks.report import ladder_rows, partition_rows, render_report, slugify


class ProgressArtifact:
    """How much of the source is in Qdrant, as a bar on the run's page."""

    def __init__(self, collection: str) -> None:
        artifact = create_progress_artifact(
            progress=0.0, key=f"progress-{slugify(collection)}", description="Share of the source that is in Qdrant"
        )
        self._id = artifact if isinstance(artifact, UUID) else UUID(str(artifact))

    def update(self, partition: Partition) -> None:
        update_progress_artifact(artifact_id=self._id, progress=round(100 * partition.source_fraction, 1))

    def finish(self) -> None:
        update_progress_artifact(artifact_id=self._id, progress=100.0)


def publish_run(summary: RunSummary, off: Sequence[str]) -> None:
    """The tables and the report, at the end of a run, whether its books close or not."""
    key = slugify(summary.collection)
    if summary.partitions:
        create_table_artifact(
            key=f"partitions-{key}", table=partition_rows(summary), description="Partitions of this run"
        )
    steps = ladder_rows(summary)
    if steps:
        create_table_artifact(key=f"ladder-{key}", table=steps, description="Every step of the ladder, and why")
    create_markdown_artifact(key=f"report-{key}", markdown=render_report(summary, off), description="Ingest report")


def emit_ladder_step(collection: str, partition_index: int, step: LadderStep) -> None:
    """An event `ballast.ladder.<kind>` an automation can react to. Costs 0.2 ms, sent in the background."""
    emit_event(
        event=f"ballast.ladder.{step.kind}",
        resource={
            "prefect.resource.id": f"ballast.collection.{slugify(collection)}",
            "prefect.resource.name": collection,
        },
        payload={
            "partition": partition_index,
            "reason": step.reason,
            "nodes_before": step.nodes_before,
            "nodes_after": step.nodes_after,
            "padded_tokens": step.padded_tokens,
            "budget_before_bytes": step.budget_before_bytes,
            "budget_after_bytes": step.budget_after_bytes,
            "free_bytes": step.free_bytes,
        },
    )


def emit_ladder_steps(collection: str, report: PartitionReport) -> None:
    for step in report.steps:
        emit_ladder_step(collection, report.index, step)
