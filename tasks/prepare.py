"""Task: open a run. Whatever can be refused is refused here, before a model is loaded."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.backends.qdrant_connection import load_client
from tasks.config import IngestSettings
from tasks.engine.ingest_run import IngestRun
from tasks.engine.open_run import open_run
from tasks.pool_runs import PoolRuns
from tasks.secrets import read_environment
from tasks.server_calls import ask_server


def load_libraries() -> None:
    """What every run imports before its first document, while there is something to wait for. No torch, no LlamaIndex."""
    import prefect.flow_engine
    import prefect.task_engine  # noqa: F401  Prefect itself imports them at the first run

    load_client()


@task(name="prepare", task_run_name="prepare", cache_policy=NO_CACHE, persist_result=False)
def prepare(
    settings: IngestSettings, changed: Sequence[str] | None = None, stop: threading.Event | None = None
) -> IngestRun:
    """Source, model files and collection, checked against each other. Arguments and errors as open_run()'s."""
    if settings.pools.enabled:
        PoolRuns(settings, stop).end_orphans()
    environment = ask_server(read_environment, settings.pools.server_outage_s, stop)
    return open_run(settings, environment, changed=changed, stop=stop)
