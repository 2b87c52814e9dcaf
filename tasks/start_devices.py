"""Task: load the model on its device and calibrate, while the first documents are chunked."""

from __future__ import annotations

from typing import Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.states import complete


class StartingRun(Protocol):
    """An ingest run, or a worker's run of a group."""

    def start_devices(self) -> str: ...


@task(name="start devices", task_run_name="start devices", cache_policy=NO_CACHE, persist_result=False)
def start_devices(run: StartingRun) -> str:
    """The state's message says what the run embeds on, and why. Raises ModelError or DeviceError."""
    note = run.start_devices()
    return complete(note, note)
