"""Calls to the Prefect API that outlast a server which is away: restarted, redeployed, cut off for a minute."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential
from tenacity.stop import stop_base

from tasks.errors import ApiUnavailable, RunStopped

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_PAUSE_S = 10.0


def is_server_away(error: BaseException) -> bool:
    """Whether the same call may succeed later: no connection, no answer in time, 429 or 5xx. A 4xx stays what it is."""
    if isinstance(error, PrefectHTTPStatusError | httpx.HTTPStatusError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError | ConnectionError)


def ask_server(request: Callable[[], T], patience_s: float, stop: threading.Event | None = None) -> T:
    """The request's answer; asked again while the server is away, so it must be safe to repeat.

    Raises ApiUnavailable after `patience_s`, RunStopped where `stop` is set meanwhile, and what the request itself raises.
    """
    stop = stop or threading.Event()

    def sleep(pause_s: float) -> None:
        stop.wait(pause_s)

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1:
            logger.warning("prefect_api away patience_s=%g reason=%r", patience_s, str(error))

    retrying = Retrying(
        retry=retry_if_exception(is_server_away),
        stop=_StopWhen(stop) | stop_after_delay(patience_s),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
        sleep=sleep,
        before_sleep=tell,
        reraise=True,
    )

    def request_once() -> T:
        # A flow's client repeats by itself, for a minute or more, once it has seen its server: patience is ours to have.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            return request()

    try:
        return retrying(request_once)
    except (PrefectHTTPStatusError, httpx.HTTPError, ConnectionError) as error:
        if not is_server_away(error):
            raise
        reason = f"{type(error).__name__}: {error}"
    if stop.is_set():
        raise RunStopped("The run was told to stop while the Prefect server was away. Run it again.")
    raise ApiUnavailable(
        f"The Prefect server did not answer for {patience_s:g} s ({reason}). Start it and run again: what is stored is not "
        "embedded twice. pools.server_outage_s sets how long a run waits."
    )


class _StopWhen(stop_base):
    def __init__(self, stop: threading.Event) -> None:
        self._event = stop

    def __call__(self, _state: RetryCallState) -> bool:
        return self._event.is_set()
