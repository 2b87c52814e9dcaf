"""Task: read, chunk and compare documents until a partition is full."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.engine.ingest_run import IngestRun
from tasks.records import Partition
from tasks.states import complete


@task(name="chunk", task_run_name="chunk partition {index}", cache_policy=NO_CACHE, persist_result=False)
def chunk_partition(run: IngestRun, index: int) -> Partition | None:
    """The next partition, spooled; None when the source has no more."""
    partition = run.spool_next_partition()
    if partition is None:
        return complete(None, "the source has no more new nodes")
    message = (
        f"partition {index}: {partition.nodes} nodes, {partition.tokens:,} tokens, longest {partition.longest_tokens}"
    )
    return complete(partition, message)
