"""Task: upsert one partition's points and commit the documents that are whole with them."""

from __future__ import annotations

import math
from typing import Any, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from tasks.engine.ingest_run import UPSERT_PATIENCE_S
from tasks.errors import StoreUnavailable
from tasks.records import Partition
from tasks.states import complete

RETRY_DELAYS_S = [5.0, 10.0, 20.0, 30.0]  # the last one from then on


class StoringRun(Protocol):
    """An ingest run, or a worker's run of a group."""

    def upsert_partition(self, partition: Partition) -> int: ...


def is_transient(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Qdrant away or overloaded is worth another try; a refused point is not."""
    result = state.result(raise_on_failure=False)
    return isinstance(result, StoreUnavailable)


def count_retries(outage_s: float) -> int:
    """How many tries, with the delays between them, last as long as an outage that is waited for."""
    first_s = sum(RETRY_DELAYS_S) + len(RETRY_DELAYS_S) * UPSERT_PATIENCE_S
    rest = math.ceil(max(0.0, outage_s - first_s) / (RETRY_DELAYS_S[-1] + UPSERT_PATIENCE_S))
    return (len(RETRY_DELAYS_S) if outage_s else 0) + rest


@task(
    name="upsert",
    task_run_name="upsert partition {partition.index}",
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_jitter_factor=0.5,
    retry_condition_fn=is_transient,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def upsert_partition(run: StoringRun, partition: Partition) -> int:
    """The vectors are in the spool: a retry repeats no device work, and point ids make the writes repeatable."""
    stored = run.upsert_partition(partition)
    # The partition by its name: the flow run's log shows this line without its task.
    return complete(stored, f"partition {partition.index}: {stored} points stored")
