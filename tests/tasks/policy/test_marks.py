"""The budget's course, thinned: its ends and the ladder stay."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.marks import thin_marks
from tasks.records import BudgetMark


@given(steps=st.lists(st.booleans(), max_size=200), limit=st.integers(4, 50))
@settings(deadline=None)
def test_a_long_course_keeps_its_ends_and_its_steps(steps: list[bool], limit: int) -> None:
    marks = [BudgetMark(float(at), 1000, 4, step="oom" if is_step else None) for at, is_step in enumerate(steps)]
    thinned = thin_marks(marks, limit)
    assert [mark.seconds for mark in thinned] == sorted({mark.seconds for mark in thinned})
    assert thinned[:1] == marks[:1]
    assert thinned[-1:] == marks[-1:]
    if len(marks) <= limit or sum(steps) < limit // 2:
        assert sum(mark.step is not None for mark in thinned) == sum(steps)


def test_a_series_that_grows_for_ever_stays_short() -> None:
    marks: list[BudgetMark] = []
    for at in range(5000):
        marks = thin_marks([*marks, BudgetMark(float(at), 1000, at, step="grow" if at % 3 == 0 else None)], 100)
        assert len(marks) <= 101
    assert marks[0].seconds == 0
    assert marks[-1].seconds == 4999
