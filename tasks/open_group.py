"""Task: open a worker's run of a group. What this worker must not do is refused here, before a model is loaded."""

from __future__ import annotations

from functools import partial

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from tasks.backends.processes import read_process_age_s
from tasks.config import EmbedGroup, IngestSettings
from tasks.engine import embed_run
from tasks.secrets import read_environment
from tasks.server_calls import ask_server


@task(name="open group", task_run_name="open group", cache_policy=NO_CACHE, persist_result=False)
def open_group(settings: IngestSettings, group: EmbedGroup) -> embed_run.EmbedRun:
    """Raises the errors of engine.embed_run.open_group()."""
    # Asked for once the signs of life beat: the server may be away for longer than a silent run may.
    read = partial(ask_server, read_environment, settings.pools.server_outage_s)
    return embed_run.open_group(settings, group, read, run_id=str(flow_run.get_id()), age_s=read_process_age_s())
