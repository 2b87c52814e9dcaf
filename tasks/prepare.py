"""Task: open a run. Whatever can be refused is refused here, before a model is loaded."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import IngestSettings
from tasks.engine.ingest_run import IngestRun, open_run


@task(name="prepare", cache_policy=NO_CACHE, persist_result=False)
def prepare(settings: IngestSettings) -> IngestRun:
    """Source, model files and collection, checked against each other. Raises the errors of open_run()."""
    return open_run(settings)
