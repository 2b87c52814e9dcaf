"""Requests to Qdrant: one at a time where it is embedded, failures in our words, repeated while they are transient."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tasks.backends.qdrant_faults import BatchTooLarge, client_errors, to_store_error
from tasks.errors import RunStopped, StoreUnavailable

if TYPE_CHECKING:
    from qdrant_client import models
    from tenacity import RetryCallState

log = logging.getLogger(__name__)

T = TypeVar("T")

_STOP_CHECK_S = 0.2  # a wait is cut into these, so that Ctrl-C ends it at once


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a transient failure is waited for: `attempts` in all, exponential waits with full jitter between."""

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0  # a server that asks for more is left alone: its wait is for the caller to decide


class CheckedCalls:
    """What every request to one Qdrant goes through. `place` is for messages: "at http://...", "in .ballast/qdrant".

    `should_stop`, once it is true, ends a wait between two attempts with RunStopped; it may be set later than the store
    is opened. A request under way is never cut off.
    """

    def __init__(
        self,
        place: str,
        *,
        is_embedded: bool,
        retry: RetryPolicy | None,
        sleep: Callable[[float], None],
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.place = place
        self.should_stop = should_stop
        # The embedded Qdrant is plain Python over numpy arrays and SQLite: one call at a time.
        self.lock: contextlib.AbstractContextManager[object] = (
            threading.RLock() if is_embedded else contextlib.nullcontext()
        )
        self._policy = retry or RetryPolicy()
        self._sleep = sleep

    def run(self, action: str, request: Callable[[], T], *, can_split: bool = False) -> T:
        """Send one request, repeated while it fails for a passing reason.

        can_split: BatchTooLarge is raised where fewer points in the request may work. Raises StoreUnavailable once the
        attempts are used up, StoreRejected for what Qdrant refuses, RunStopped where a wait was cut short.
        """
        from tenacity import Retrying, retry_if_exception, stop_after_attempt

        def attempt() -> T:
            try:
                with self.lock:
                    return request()
            except client_errors() as error:
                raise to_store_error(error, action=action, place=self.place, can_split=can_split) from error

        retrying = Retrying(
            stop=stop_after_attempt(self._policy.attempts),
            retry=retry_if_exception(self._should_retry),
            wait=self._choose_wait,
            sleep=self._wait,
            before_sleep=_log_retry,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except BatchTooLarge as error:
            if error.is_throttled:
                # Halves sent at once would be twice as many requests to a server that asked for fewer.
                self._wait(random.uniform(0, self._policy.first_wait_s))  # noqa: S311  jitter, no secret
            raise

    def _wait(self, seconds: float) -> None:
        """Raises RunStopped as soon as the run is told to stop."""
        if self.should_stop is None:
            self._sleep(seconds)
            return
        while True:
            if self.should_stop():
                raise RunStopped(
                    f"The run was told to stop while it waited for Qdrant {self.place}. Run it again: what is stored is not "
                    "embedded twice."
                )
            if seconds <= 0:
                return
            self._sleep(min(seconds, _STOP_CHECK_S))
            seconds -= _STOP_CHECK_S

    def check_completed(self, result: models.UpdateResult) -> None:
        """Raises StoreUnavailable for a write that was taken but not applied, inside `run`: so it is sent again."""
        from qdrant_client import models

        if result.status != models.UpdateStatus.COMPLETED:
            raise StoreUnavailable(
                f"Qdrant {self.place} answered {result.status.value!r} to a write that waits, not 'completed'."
            )

    def _should_retry(self, error: BaseException) -> bool:
        return isinstance(error, StoreUnavailable) and (error.retry_after_s or 0.0) <= self._policy.longest_wait_s

    def _choose_wait(self, state: RetryCallState) -> float:
        from tenacity import wait_random, wait_random_exponential

        error = state.outcome.exception() if state.outcome else None
        if isinstance(error, StoreUnavailable) and error.retry_after_s is not None:
            # Jitter on top, never below: many workers are told the same number.
            return error.retry_after_s + wait_random(0, self._policy.first_wait_s)(state)
        wait = wait_random_exponential(multiplier=self._policy.first_wait_s, max=self._policy.longest_wait_s)
        return wait(state)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("qdrant attempt=%d wait_s=%.1f reason=%s", state.attempt_number, state.upcoming_sleep, error)
