"""The budget's course over a run, kept short enough to show."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.records import BudgetMark


def thin_marks(marks: Sequence[BudgetMark], limit: int) -> list[BudgetMark]:
    """`marks` as they are up to `limit`; above it every second one goes, over the whole length. The first and the last stay.

    Steps of the ladder stay as long as they are less than half of `limit`: what happened is worth more than how it went on.
    """
    if len(marks) <= limit:
        return list(marks)
    keeps_steps = sum(mark.step is not None for mark in marks) < limit // 2
    last = len(marks) - 1
    return [
        mark
        for index, mark in enumerate(marks)
        if index % 2 == 0 or index == last or (keeps_steps and mark.step is not None)
    ]
