"""Requests repeated while they fail for a passing reason: how often, after what wait, and who ends it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from tasks.backends.qdrant_calls import CheckedCalls, RetryPolicy
from tasks.backends.qdrant_faults import BatchTooLarge
from tasks.errors import RunStopped, StoreRejected, StoreUnavailable


def answer(status: int) -> UnexpectedResponse:
    return UnexpectedResponse(status, "Reason", b"", httpx.Headers())


def fail_first(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def request() -> str:
        if left:
            raise left.pop(0)
        return "stored"

    return request


def make_calls(sleeps: list[float], **knobs: Any) -> CheckedCalls:
    return CheckedCalls(
        "at x", is_embedded=False, retry=knobs.pop("retry", None), sleep=knobs.pop("sleep", sleeps.append), **knobs
    )


def test_waits_grow_with_full_jitter_up_to_the_longest() -> None:
    policy = RetryPolicy(attempts=8, first_wait_s=0.5, longest_wait_s=4.0)
    runs = []
    for _ in range(200):
        sleeps: list[float] = []
        assert make_calls(sleeps, retry=policy).run("ask", fail_first(*[answer(503)] * 7)) == "stored"
        runs.append(sleeps)
    for number, most in enumerate([0.5, 1, 2, 4, 4, 4, 4]):
        waits = [sleeps[number] for sleeps in runs]
        assert max(waits) <= most
        assert min(waits) < 0.2 * most < 0.8 * most < max(waits)  # of 200 draws


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422])
def test_what_is_refused_is_asked_once(status: int) -> None:
    sleeps: list[float] = []
    with pytest.raises(StoreRejected):
        make_calls(sleeps).run("ask", fail_first(answer(status)))
    assert sleeps == []


def test_a_wait_that_was_told_is_kept() -> None:
    sleeps: list[float] = []
    make_calls(sleeps).run("ask", fail_first(ResourceExhaustedResponse("slow down", 9), answer(507)))
    assert 9 <= sleeps[0] < 9.6
    assert 15 <= sleeps[1] < 15.6


def test_a_throttled_batch_waits_before_its_halves_are_sent_and_one_too_large_does_not() -> None:
    sleeps: list[float] = []
    calls = make_calls(sleeps)
    with pytest.raises(BatchTooLarge):
        calls.run("upsert", fail_first(answer(413)), can_split=True)
    assert sleeps == []
    with pytest.raises(BatchTooLarge):
        calls.run("upsert", fail_first(answer(429)), can_split=True)
    assert len(sleeps) == 1


def test_a_run_that_is_told_to_stop_does_not_wait_out_a_backoff() -> None:
    stop = threading.Event()
    slept = 0.0

    def sleep(seconds: float) -> None:
        nonlocal slept
        slept += seconds
        if slept >= 1:
            stop.set()

    calls = make_calls([], sleep=sleep, should_stop=stop.is_set)
    with pytest.raises(RunStopped, match=r"waited for Qdrant at x.*Run it again"):
        calls.run("ask", fail_first(ResourceExhaustedResponse("slow down", 50)))
    assert 1 <= slept < 2


def test_a_stop_ends_no_request_that_works() -> None:
    """What a stopping run still has to say, its ledger's last records, goes through."""
    calls = make_calls([])
    calls.should_stop = lambda: True
    assert calls.run("ask", fail_first()) == "stored"
    with pytest.raises(RunStopped):
        calls.run("ask", fail_first(answer(503)))


def test_a_wait_in_parts_is_as_long_as_told() -> None:
    sleeps: list[float] = []
    make_calls(sleeps, should_stop=lambda: False).run("ask", fail_first(ResourceExhaustedResponse("slow down", 3)))
    assert 3 <= sum(sleeps) < 3.6
    assert max(sleeps) <= 0.2


def test_a_retry_says_why_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    reset = ResponseHandlingException(httpx.ReadError("reset by peer"))
    with caplog.at_level(logging.WARNING):
        make_calls([]).run("ask", fail_first(reset, answer(503)))
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "attempt=1" in caplog.messages[0]
    assert "reset by peer" in caplog.messages[0]
    assert "HTTP 503" in caplog.messages[1]


def test_an_exhausted_request_keeps_its_last_reason() -> None:
    with pytest.raises(StoreUnavailable, match="HTTP 504"):
        make_calls([], retry=RetryPolicy(attempts=2)).run("ask", fail_first(answer(503), answer(504)))
