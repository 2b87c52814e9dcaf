"""Task: upsert one partition's points and count them."""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task, exponential_backoff

from tasks.engine.ingest_run import IngestRun
from tasks.errors import StoreUnavailable
from tasks.records import Partition
from tasks.states import complete


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Qdrant away or overloaded is worth another try; a refused point is not."""
    result = state.result(raise_on_failure=False)
    return isinstance(result, StoreUnavailable)


@task(
    name="upsert",
    task_run_name="upsert partition {partition.index}",
    retries=4,
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def upsert_partition(run: IngestRun, partition: Partition) -> int:
    """The vectors are in the spool: a retry repeats no device work, and point ids make the writes repeatable."""
    counted = run.upsert_partition(partition)
    return complete(counted, f"{counted} points stored and counted")
