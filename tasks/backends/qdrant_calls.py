"""Requests to Qdrant: one at a time where it is embedded, failures in our words, repeated while they are transient."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tasks.backends.qdrant_faults import client_errors, to_store_error
from tasks.errors import StoreUnavailable

if TYPE_CHECKING:
    from qdrant_client import models
    from tenacity import RetryCallState

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long a transient failure is waited for: `attempts` in all, exponential waits with full jitter between."""

    attempts: int = 6
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0  # a server that asks for more is left alone: its wait is for the caller to decide


class CheckedCalls:
    """What every request to one Qdrant goes through. `place` is for messages: "at http://...", "in .ballast/qdrant"."""

    def __init__(
        self, place: str, *, is_embedded: bool, retry: RetryPolicy | None, sleep: Callable[[float], None]
    ) -> None:
        self.place = place
        # The embedded Qdrant is plain Python over numpy arrays and SQLite: one call at a time.
        self.lock: contextlib.AbstractContextManager[object] = (
            threading.RLock() if is_embedded else contextlib.nullcontext()
        )
        self._policy = retry or RetryPolicy()
        self._sleep = sleep

    def run(self, action: str, request: Callable[[], T], *, can_split: bool = False) -> T:
        """Send one request, repeated while it fails for a passing reason.

        can_split: BatchTooLarge is raised where fewer points in the request may work. Raises StoreUnavailable once the
        attempts are used up, StoreRejected for what Qdrant refuses.
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
            sleep=self._sleep,
            before_sleep=_log_retry,
            reraise=True,
        )
        return retrying(attempt)

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
