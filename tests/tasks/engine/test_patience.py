"""Waiting for a Qdrant that is away: as long as told, and no longer than the run."""

from __future__ import annotations

import threading

import pytest

from tasks.engine.patience import Patience
from tasks.errors import RunStopped, StoreRejected, StoreUnavailable


class Away:
    """Fails so many times, then answers."""

    def __init__(self, failures: int, error: type[Exception] = StoreUnavailable) -> None:
        self.failures = failures
        self.error = error
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error("connection refused")
        return "answer"


def test_an_answer_comes_without_a_word() -> None:
    notes: list[str] = []
    assert Patience(60, threading.Event(), notes.append).wait_for(Away(0)) == "answer"
    assert notes == []


def test_what_is_away_for_a_moment_is_asked_again_and_told() -> None:
    notes: list[str] = []
    request = Away(1)
    assert Patience(60, threading.Event(), notes.append).wait_for(request) == "answer"
    assert request.calls == 2
    (note,) = notes
    assert "60 s at most" in note
    assert "connection refused" in note


@pytest.mark.parametrize("error", [StoreRejected, ValueError])
def test_what_waiting_does_not_mend_is_not_repeated(error: type[Exception]) -> None:
    request = Away(1, error)
    with pytest.raises(error):
        Patience(60, threading.Event()).wait_for(request)
    assert request.calls == 1


def test_patience_ends() -> None:
    request = Away(100)
    with pytest.raises(StoreUnavailable):
        Patience(0, threading.Event()).wait_for(request)
    assert request.calls == 1


def test_a_thread_may_have_less_patience_than_the_others() -> None:
    patience = Patience(3600, threading.Event(), lambda _note: None)
    impatient = Away(100)
    with patience.patient_for(0), pytest.raises(StoreUnavailable):
        patience.wait_for(impatient)
    assert impatient.calls == 1
    answers: list[str] = []
    with patience.patient_for(0):
        other = threading.Thread(target=lambda: answers.append(patience.wait_for(Away(1))))
        other.start()
        other.join()
    assert answers == ["answer"]
    assert patience.wait_for(Away(1)) == "answer"


def test_stop_ends_the_wait() -> None:
    stop = threading.Event()
    patience = Patience(3600, stop, lambda _note: stop.set())
    with pytest.raises(RunStopped):
        patience.wait_for(Away(100))
