"""Waits for a Qdrant that went away, as long as the settings say, and no longer than the run itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tasks.errors import RunStopped, StoreUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOPPED = "The run was told to stop. Run it again: what is stored is not embedded twice."
LONGEST_WAIT_S = 30.0


class Patience:
    """Safe to use from several threads. `stop`, once set, ends every wait with RunStopped."""

    def __init__(self, outage_s: float, stop: threading.Event, note: Callable[[str], None] = logger.warning) -> None:
        self._outage_s = outage_s
        self._stop = stop
        self._note = note
        self._own = threading.local()

    @contextmanager
    def patient_for(self, seconds: float) -> Iterator[None]:
        """In this thread, wait no longer than this for Qdrant: the caller repeats what fails, and shows it."""
        self._own.seconds = seconds
        try:
            yield
        finally:
            del self._own.seconds

    def wait_for(self, request: Callable[[], T]) -> T:
        """The request's answer; asked again while Qdrant is away, up to qdrant.outage_s.

        What a request does can be done twice. Raises StoreUnavailable, RunStopped.
        """
        from tenacity import (
            RetryCallState,
            Retrying,
            retry_if_exception_type,
            stop_after_delay,
            wait_random_exponential,
        )

        seconds = getattr(self._own, "seconds", self._outage_s)

        def tell(state: RetryCallState) -> None:
            if state.attempt_number == 1:
                error = state.outcome.exception() if state.outcome else None
                self._note(
                    f"waiting for Qdrant, {self._outage_s:g} s at most; what is chunked is embedded meanwhile: {error}"
                )

        def sleep(pause_s: float) -> None:
            self._stop.wait(pause_s)
            if self._stop.is_set():
                raise RunStopped(STOPPED)

        retrying = Retrying(
            retry=retry_if_exception_type(StoreUnavailable),
            stop=stop_after_delay(seconds),
            wait=wait_random_exponential(multiplier=1, max=LONGEST_WAIT_S),
            sleep=sleep,
            before_sleep=tell,
            reraise=True,
        )
        return retrying(request)
