"""What a run shows in the Prefect UI: progress, the table of partitions, the report, and an event for each ladder step."""

from __future__ import annotations

import re
from collections.abc import Sequence
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from tasks.policy.delete_guard import DeleteDecision
from tasks.records import LadderStep, Partition, PartitionReport, RunSummary
from tasks.report import (
    describe_steps,
    render_report,
    tabulate_documents,
    tabulate_ladder,
    tabulate_nodes,
    tabulate_partitions,
)
from tasks.tables import to_artifact_rows


class ProgressArtifact:
    """How much of the source is in Qdrant, as a bar on the run's page."""

    def __init__(self, collection: str) -> None:
        artifact = create_progress_artifact(
            progress=0.0, key=f"progress-{to_key(collection)}", description="Share of the source that is in Qdrant"
        )
        self._id = artifact if isinstance(artifact, UUID) else UUID(str(artifact))

    def update(self, partition: Partition) -> None:
        update_progress_artifact(artifact_id=self._id, progress=round(100 * partition.source_fraction, 1))

    def finish(self) -> None:
        update_progress_artifact(artifact_id=self._id, progress=100.0)


def publish_run(summary: RunSummary, off: Sequence[str]) -> None:
    """The tables and the report, at the end of a run, whether its books close or not."""
    key = to_key(summary.collection)
    partitions = to_artifact_rows(tabulate_partitions(summary.partitions))
    create_table_artifact(key=f"partitions-{key}", table=partitions, description="Partitions of this run")
    create_table_artifact(
        key=f"books-{key}",
        table=[*to_artifact_rows(tabulate_documents(summary.books)), *to_artifact_rows(tabulate_nodes(summary.books))],
        description="The books close" if not off else f"The books don't close: {'; '.join(off)}",
    )
    create_markdown_artifact(key=f"report-{key}", markdown=render_report(summary, off), description="Ingest report")


def publish_ladder(collection: str, report: PartitionReport) -> None:
    """A table of the partition's steps, and an event for each, `ballast.ladder.<kind>`, that an automation can react to."""
    if not report.steps:
        return
    create_table_artifact(
        key=f"ladder-{to_key(collection)}",
        table=to_artifact_rows(tabulate_ladder(report)),
        description=f"Ladder of partition {report.index}: {describe_steps(report)}",
    )
    for step in report.steps:
        _emit_step(collection, report.index, step)


def publish_withheld(collection: str, decision: DeleteDecision) -> None:
    """An event that an automation can react to: somebody has to look and confirm."""
    emit_event(
        event="ballast.deletes.withheld",
        resource=_to_resource(collection),
        payload={
            "documents": len(decision.withheld),
            "first": [record.doc_id for record in decision.withheld[:20]],
            "reason": decision.reason,
        },
    )


def to_key(collection: str) -> str:
    """An artifact's key holds lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", collection.lower()).strip("-") or "collection"


def _to_resource(collection: str) -> dict[str, str]:
    return {
        "prefect.resource.id": f"ballast.collection.{to_key(collection)}",
        "prefect.resource.name": collection,
    }


def _emit_step(collection: str, partition_index: int, step: LadderStep) -> None:
    emit_event(
        event=f"ballast.ladder.{step.kind}",
        resource=_to_resource(collection),
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
