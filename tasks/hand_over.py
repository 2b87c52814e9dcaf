"""Tasks: hand a group of partitions to a work pool, and take back what came of each."""

from __future__ import annotations

from typing import cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.embed import judge_report
from tasks.engine.ingest_run import IngestRun
from tasks.policy.groups import Group
from tasks.pool_runs import PoolRuns
from tasks.records import Partition, PartitionReport, PoolReport
from tasks.states import complete
from tasks.upsert import RETRY_DELAYS_S, is_transient


@task(
    name="hand over",
    task_run_name="hand group {group.number} to {group.pool}-pool",
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def hand_over_group(run: IngestRun, runs: PoolRuns, group: Group) -> str:
    """The ledger says that the group's documents are begun, then a worker may take them. Returns the run's id."""
    run.refuse_if_stopped()
    ordered = run.shared.begin(group)
    run.refuse_if_stopped()
    run_id = runs.start(ordered, key=f"{run.shared.token}-group-{group.number}")
    indexes = [partition.index for partition in group.partitions]
    return complete(run_id, f"{group.tokens:,} tokens, partitions {', '.join(map(str, indexes[:20]))}: run {run_id}")


@task(
    name="collect",
    task_run_name="collect partition {partition.index} from {report.pool}-pool",
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def collect_partition(run: IngestRun, partition: Partition, report: PoolReport) -> PartitionReport:
    """Into the books, and every document committed that is whole with it. The state says what the worker's did."""
    run.shared.take(partition, report)
    left = f"; {len(report.left_rows)} nodes go on to cpu-pool" if report.left_rows else ""
    return cast(PartitionReport, judge_report(report.partition, left))
