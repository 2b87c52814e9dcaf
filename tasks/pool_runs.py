"""Runs of the embed-partitions deployments: started, looked at, ended. What the ingest run asks of the Prefect server."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Cancelling, Crashed

from tasks.config import EmbedGroup, IngestSettings, SourceSettings
from tasks.errors import ConfigError
from tasks.records import Pool
from tasks.server_calls import ask_server

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

OPEN_STATES = (StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.PAUSED, StateType.CANCELLING)
LOOK_PATIENCE_S = 0.0  # a look is repeated anyway, by the next one
END_PATIENCE_S = 10.0  # an ingest run that ends does not wait for the server longer than this, to tell its workers


@dataclass(frozen=True, slots=True)
class RunLook:
    """How the server sees a run."""

    phase: Literal["waiting", "pending", "running", "ended"]
    state: str  # its name and message, for people
    is_crashed: bool = False  # as somebody else says: the run itself can't have


class PoolRuns:
    """`stop`, once set, ends every wait for the server."""

    def __init__(self, settings: IngestSettings, stop: threading.Event | None = None) -> None:
        self._settings = settings
        self._stop = stop or threading.Event()

    def start(self, group: EmbedGroup, *, key: str) -> str:
        """The run's id. `key` is its idempotency key: repeated after an answer that got lost, it starts no second one.

        Called in a task: the run is linked below it. Raises ConfigError where there is no such deployment, ApiUnavailable.
        """
        pools = self._settings.pools
        name = pools.gpu_deployment if group.pool == "gpu" else pools.cpu_deployment
        settings = to_worker_settings(self._settings)
        parameters = {"settings": settings.model_dump(mode="json"), "group": group.model_dump(mode="json")}

        def start() -> Any:
            return run_deployment(
                name,
                parameters=parameters,
                timeout=0,
                idempotency_key=key,
                tags=[to_tag(self._settings.qdrant.collection)],
            )

        try:
            run: FlowRun = ask_server(start, pools.server_outage_s, self._stop)
        except ObjectNotFound as error:
            raise ConfigError(
                f"There is no deployment {name} on this Prefect server. `ballast setup` makes it; "
                f"pools.{group.pool}_deployment names another one; pools.enabled=false embeds in this process."
            ) from error
        return str(run.id)

    def look(self, run_ids: Collection[str]) -> Mapping[str, RunLook]:
        """Runs that the server does not know are missing. Raises ApiUnavailable at once where it is away."""
        if not run_ids:
            return {}
        wanted = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(each) for each in run_ids]))
        runs = ask_server(lambda: _read_runs(wanted), LOOK_PATIENCE_S, self._stop)
        return {str(run.id): _to_look(run) for run in runs}

    def end(self, run_id: str, reason: str, *, crashed: bool) -> None:
        """Crashed: nobody works on it any more. Else it is cancelled: its worker ends its process. Raises ApiUnavailable."""
        with contextlib.suppress(ObjectNotFound):  # somebody has deleted it
            if crashed:
                ask_server(lambda: _set_state(run_id, Crashed(message=reason)), END_PATIENCE_S)
            else:
                ask_server(lambda: _cancel(UUID(run_id), reason), END_PATIENCE_S)

    def end_orphans(self) -> list[str]:
        """Cancel what an ingest run of this collection that was killed has left open, and see it end; returns the runs' ids.

        One that does not end is taken for dead after pools.silent_s: it finds its partitions gone, should it live.
        """
        wanted = FlowRunFilter(
            tags=FlowRunFilterTags(all_=[to_tag(self._settings.qdrant.collection)]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(OPEN_STATES))),
        )
        patience_s = self._settings.pools.server_outage_s
        orphans = ask_server(lambda: _read_runs(wanted), patience_s, self._stop)
        for run in orphans:
            ask_server(partial(_cancel, run.id, "its ingest run is gone"), patience_s, self._stop)
        deadline = time.monotonic() + self._settings.pools.silent_s
        while orphans and time.monotonic() < deadline and not self._stop.wait(self._settings.pools.poll_s):
            if not ask_server(lambda: _read_runs(wanted), patience_s, self._stop):
                break
        for run in ask_server(lambda: _read_runs(wanted), patience_s, self._stop) if orphans else []:
            ask_server(
                partial(_set_state, str(run.id), Crashed(message="its ingest run is gone")), patience_s, self._stop
            )
        return [str(run.id) for run in orphans]

    def is_served(self, pool: Pool) -> bool:
        """Whether a worker polls the deployment's work pool. Raises ApiUnavailable."""
        pools = self._settings.pools
        name = pools.gpu_deployment if pool == "gpu" else pools.cpu_deployment
        return ask_server(lambda: _is_served(name), LOOK_PATIENCE_S, self._stop)


def to_worker_settings(settings: IngestSettings) -> IngestSettings:
    """Without the source: a worker reads partitions only, and its parameters are one more place where a URL is stored."""
    return settings.model_copy(update={"source": SourceSettings(uri="-", name=settings.source.name)})


def to_tag(collection: str) -> str:
    """What the worker runs of a collection's ingest are tagged with."""
    return f"ballast:{collection}"


def _client() -> SyncPrefectClient:
    return get_client(sync_client=True)


def _read_runs(wanted: FlowRunFilter) -> list[FlowRun]:
    with _client() as client:
        return client.read_flow_runs(flow_run_filter=wanted)


def _set_state(run_id: str, state: State[Any]) -> None:
    with _client() as client:
        client.set_flow_run_state(UUID(run_id), state, force=True)


def _cancel(run_id: UUID, reason: str) -> None:
    """A run that no worker has taken is cancelled at once; another one's worker has to do it."""
    with _client() as client:
        run = client.read_flow_run(run_id)
        if run.state_type is None or run.state_type not in OPEN_STATES:
            return
        has_begun = run.state_type in (StateType.RUNNING, StateType.CANCELLING)
        client.set_flow_run_state(run_id, (Cancelling if has_begun else Cancelled)(message=reason), force=True)


def _is_served(deployment: str) -> bool:
    with _client() as client:
        found = client.read_deployment_by_name(deployment)
        if found.work_pool_name is None:
            return True  # a deployment that serves itself
        pool = client.read_work_pool(found.work_pool_name)
        return pool.status is None or pool.status.value == "READY"


def _to_look(run: FlowRun) -> RunLook:
    state = run.state
    told = "unknown" if state is None else f"{state.name}: {state.message}" if state.message else str(state.name)
    match run.state_type:
        case None | StateType.SCHEDULED | StateType.PAUSED:
            return RunLook("waiting", told)
        case StateType.PENDING:
            return RunLook("pending", told)
        case StateType.RUNNING | StateType.CANCELLING:
            return RunLook("running", told)
    return RunLook("ended", told, is_crashed=run.state_type == StateType.CRASHED)
