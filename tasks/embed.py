"""Task: embed one partition. The ladder runs inside; its steps show in the state's name and message, and as events."""

from __future__ import annotations

from typing import Any, Protocol, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from tasks.config import IngestSettings
from tasks.publish import publish_ladder
from tasks.records import Partition, PartitionReport
from tasks.report import describe_steps
from tasks.states import complete


class EmbeddingRun(Protocol):
    """An ingest run, or a worker's run of a group."""

    @property
    def settings(self) -> IngestSettings: ...

    def embed_partition(self, partition: Partition) -> PartitionReport: ...


@task(name="embed", task_run_name="embed partition {partition.index}", cache_policy=NO_CACHE, persist_result=False)
def embed_partition(run: EmbeddingRun, partition: Partition) -> PartitionReport:
    """Completed, CompletedDegraded after a step down, OOMExhausted where nodes found no place on any device.

    No Prefect retries: there is nothing to wait for, and what is done must not be done again.
    """
    report = run.embed_partition(partition)
    publish_ladder(run.settings.qdrant.collection, report)
    return cast(PartitionReport, judge_report(report))


def judge_report(report: PartitionReport, told: str = "") -> Any:
    """The state that a partition's task ends in, with its reason; `told` is added to it."""
    # By name: the log of the flow run shows these lines without their tasks.
    partition = f"partition {report.index}"
    done = f"{report.nodes} nodes, {report.tokens_per_s:,.0f} tokens/s on {report.device}{told}"
    if report.failed_nodes:
        reason = next(iter(report.failed_nodes.values()))
        message = f"{partition}: {len(report.failed_nodes)} of {report.nodes} nodes have no vector: {reason}"
        out_of_memory = any(step.kind in ("oom", "spill", "exhausted") for step in report.steps)
        return Failed(name="OOMExhausted" if out_of_memory else "NodesFailed", message=message)
    if report.is_degraded:
        return complete(report, f"{partition}: {describe_steps(report)}; {done}", name="CompletedDegraded")
    return complete(report, f"{partition}: {done}")
