"""When a holder counts as gone, from what one who waits has seen of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.claim import HoldTimes, Watched, describe_process, is_process_gone

TIMES = HoldTimes(poll_s=3.0, renew_s=10.0, ended_s=45.0, silent_s=300.0)


@dataclass
class Record:
    value: Any
    id: UUID = field(default_factory=uuid4)


def look(looks: Sequence[tuple[float, Record]], *, has_ended: bool = False) -> str | None:
    """What the last of some looks, each (seconds, record), finds."""
    clock = iter([looks[0][0], *(at for at, _ in looks)])
    watched = Watched(TIMES, clock=lambda: next(clock))
    found = None
    for _, record in looks:
        found = watched.find_end(cast(Any, record), lambda _run_id: has_ended)
    return found


def every(seconds: float, until: float) -> list[float]:
    return [step * seconds for step in range(int(until / seconds) + 1)]


@pytest.mark.parametrize(
    ("until", "has_ended", "expected"),
    [
        (42, True, None),
        (45, True, "its flow run has ended"),
        (45, False, None),
        (297, False, None),
        (300, False, "it gave no sign of life for 300 s"),
    ],
)
def test_a_count_that_stands_still(until: float, has_ended: bool, expected: str | None) -> None:
    record = Record({"count": 1, "run_id": str(uuid4())})
    assert look([(at, record) for at in every(3, until)], has_ended=has_ended) == expected


@given(st.lists(st.floats(0.1, 23.0), min_size=1, max_size=60))
@settings(deadline=None)
def test_one_that_counts_is_never_gone(pauses: list[float]) -> None:
    at, record_id, looks = 0.0, uuid4(), []
    for count, pause in enumerate(pauses):
        at += pause
        looks.append((at, Record({"count": count, "run_id": str(uuid4())}, record_id)))
    assert look(looks, has_ended=True) is None


@given(st.floats(24.0, 100_000.0))
@settings(deadline=None)
def test_after_an_outage_the_holder_has_all_its_time_again(outage_s: float) -> None:
    record = Record({"count": 1, "run_id": str(uuid4())})
    before = every(3, 297)
    after = [before[-1] + outage_s + at for at in every(3, 42)]
    assert look([(at, record) for at in before + after], has_ended=True) is None


def test_another_holder_has_all_its_time() -> None:
    looks = [(at, Record({"count": 0})) for at in every(3, 900)]
    assert look(looks, has_ended=True) is None


def test_what_somebody_else_wrote_there_counts_as_silent() -> None:
    record = Record("mine")
    assert look([(at, record) for at in every(3, 300)]) == "it gave no sign of life for 300 s"


def test_a_process_of_this_machine_that_is_gone() -> None:
    here = describe_process()
    assert here is not None
    place = here.rpartition(" ")[0]
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert not is_process_gone(here)
    assert not is_process_gone(f"{place} {os.getppid()}")
    assert is_process_gone(f"{place} {ended.pid}")
    assert not is_process_gone(f"another-boot pid:[1] {ended.pid}")
    assert not is_process_gone(None)
    assert not is_process_gone("nonsense")
