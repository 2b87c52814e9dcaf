"""The Prefect side: a run that collects, and its release. Every call is safe to repeat."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Scheduled
from prefect.types._datetime import now
from prefect.utilities.urls import url_for

from tasks.server_calls import is_server_away

logger = logging.getLogger(__name__)

# Prefect's own client waits a minute for an answer. Here the next try is the caller's; see also serve().
CALL_TIMEOUT_S = 10.0
COLLECTING = "Collecting"
_ANY_RUN = UUID(int=0)

Outcome = Literal["released", "missed", "gone"]
"""released: the run starts, or has started, with these paths. missed: it had begun, or was cancelled, before it had them.
gone: it was deleted."""


class FlowRuns(Protocol):
    """Raises RunsUnavailable where the server is away or refuses."""

    async def create(self, deployment: str, changed: Sequence[str] | None, *, key: str, hook: str) -> str: ...

    async def release(self, run: str, changed: Sequence[str] | None) -> Outcome: ...

    async def check(self, deployment: str) -> None: ...

    def page(self, run: str) -> str | None: ...


@dataclass(slots=True)
class RunsUnavailable(Exception):  # noqa: N818  a state of the server
    """`is_away`: no answer, or 5xx; else it answered that it won't."""

    reason: str
    is_away: bool

    def __str__(self) -> str:
        return self.reason


class PrefectRuns:
    """Flow runs on the Prefect server that the environment names (PREFECT_API_URL)."""

    def __init__(self, client: PrefectClient, start_in_any_case_s: float) -> None:
        self._client = client
        self._start_in_any_case = timedelta(seconds=start_in_any_case_s)
        # Once: it reads all of Prefect's settings, and each answer holds a page.
        self._page = url_for("flow-run", _ANY_RUN)

    async def create(self, deployment: str, changed: Sequence[str] | None, *, key: str, hook: str) -> str:
        """A run of the deployment that waits for its release; the one of that key, if there is one already."""
        async with _calling("create a run"):
            # By name each time: a deployment that was deleted and made again has another id.
            found = await self._client.read_deployment_by_name(deployment)
            run = await self._client.create_flow_run_from_deployment(
                found.id,
                parameters={"changed": _to_parameter(changed)},
                # Far ahead: workers take runs some seconds before their time (prefetch). Should the receiver never come
                # back, the run starts then with what was known here.
                state=Scheduled(
                    scheduled_time=now("UTC") + self._start_in_any_case,
                    name=COLLECTING,
                    message=f"Collects deliveries of the webhook {hook} until the burst is over.",
                ),
                name=f"webhook {hook}",
                tags=["webhook", f"webhook:{hook}"],
                idempotency_key=key,
            )
        return str(run.id)

    async def release(self, run: str, changed: Sequence[str] | None) -> Outcome:
        """Give the run its final paths and let it start now. Again for the same run: no harm, and the same outcome."""
        async with _calling("release a run"):
            try:
                before = await self._client.read_flow_run(UUID(run))
                if not _waits(before):
                    # Released before a crash; or else it began without us: by hand, or since its time had come.
                    return "released" if before.parameters.get("changed") == _to_parameter(changed) else "missed"
                # All parameters: an update replaces them, and these hold the deployment's own.
                parameters = {**before.parameters, "changed": _to_parameter(changed)}
                await self._client.update_flow_run(UUID(run), parameters=parameters)
                # A run reads its parameters as it starts: it has ours if it had not started until now.
                if not _waits(await self._client.read_flow_run(UUID(run))):
                    return "missed"
                await self._client.set_flow_run_state(UUID(run), Scheduled(message="The burst is over."))
            except ObjectNotFound:
                return "gone"
        return "released"

    async def check(self, deployment: str) -> None:
        """Raises RunsUnavailable: no server, no such deployment, or one whose flow has no parameter `changed`."""
        async with _calling("look for the deployment"):
            found = await self._client.read_deployment_by_name(deployment)
        properties = (found.parameter_openapi_schema or {}).get("properties")
        if "changed" not in (properties or {}):
            raise RunsUnavailable(
                f"The flow of {deployment} has no parameter changed. Deploy one that has.", is_away=False
            )

    def page(self, run: str) -> str | None:
        return None if self._page is None else self._page.replace(str(_ANY_RUN), run)


def _to_parameter(changed: Sequence[str] | None) -> list[str] | None:
    return None if changed is None else list(changed)


def _waits(run: FlowRun) -> bool:
    """Whether the run has not started yet: a later start reads what its parameters are then."""
    return run.state is not None and run.state.is_scheduled() and not run.run_count


@asynccontextmanager
async def _calling(what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            yield
    except TimeoutError:
        raise RunsUnavailable(
            f"The Prefect server took more than {CALL_TIMEOUT_S:g} s to {what}.", is_away=True
        ) from None
    except (httpx.HTTPError, ConnectionError) as error:
        is_away = is_server_away(error)
        said = f" ({error.response.text[:300]})" if isinstance(error, httpx.HTTPStatusError) and not is_away else ""
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        way_out = " Start it, or check PREFECT_API_URL." if is_away else ""
        raise RunsUnavailable(f"The Prefect server can't {what}: {reason}{said}.{way_out}", is_away=is_away) from error
    except ObjectNotFound as error:
        raise RunsUnavailable(
            f"The Prefect server can't {what}: {error}. Is the deployment set up (ballast setup)?", is_away=False
        ) from error
    except PrefectException as error:
        raise RunsUnavailable(
            f"The Prefect server can't {what}: {type(error).__name__}: {error}.", is_away=False
        ) from error


@asynccontextmanager
async def connect_runs(start_in_any_case_s: float) -> AsyncIterator[PrefectRuns]:
    """The server may be away, now or later."""
    async with get_client() as client:
        yield PrefectRuns(client, start_in_any_case_s)
