"""Collapse a backlog of missed schedules: of the runs that pile up while no worker is there, one has anything to do."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from pydantic import ValidationError

from tasks.config import IngestSettings
from tasks.errors import ConfigError
from tasks.server_calls import ask_server

SUPERSEDED = "Superseded"
LOOKED_AT = 50


def find_later_run(
    changed: Sequence[str] | None, *, patience_s: float, stop: threading.Event | None = None, run: FlowRun | None = None
) -> str | None:
    """The name of a run that makes this one superfluous; None where this one has to work.

    Only a run that a schedule made, over the whole source, can be superfluous: where a later one of its deployment, with
    the same settings and over the whole source as well, began after this one was due and ended green, it has seen all that
    this one would see.
    To be asked while the collection is held. `run`: this flow run, unless given. Raises ApiUnavailable, RunStopped.
    """
    if run is None:
        context = FlowRunContext.get()
        run = context.flow_run if context else None
    if changed is not None or run is None or not run.auto_scheduled:
        return None
    if run.deployment_id is None or run.expected_start_time is None:
        return None
    wanted = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[run.deployment_id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.COMPLETED])),
        start_time=FlowRunFilterStartTime(after_=_to_datetime(run.expected_start_time)),
    )

    def read() -> list[FlowRun]:
        with get_client(sync_client=True) as client:
            return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.START_TIME_DESC, limit=LOOKED_AT)

    for other in ask_server(read, patience_s, stop):
        if other.id == run.id or other.state_name == SUPERSEDED or other.parameters.get("changed") is not None:
            continue
        if _is_same(run.parameters, other.parameters):
            return other.name
    return None


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs have equal settings, however they are spelt. The server has put the deployment's own into both."""
    settings, others = one.get("settings"), other.get("settings")
    if settings == others:
        return True
    try:
        return IngestSettings.model_validate(settings) == IngestSettings.model_validate(others)
    except (ValidationError, ConfigError):  # of another version: nobody knows what it has seen
        return False


def _to_datetime(moment: datetime) -> datetime:
    return datetime.fromisoformat(moment.isoformat())
