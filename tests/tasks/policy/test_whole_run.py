"""When changed paths are not enough."""

from __future__ import annotations

import pytest

from tasks.policy.whole_run import explain_whole_run
from tasks.records import LedgerRecord, LedgerStatus

CLOSED = "2026-11-22T12:00:00+00:00"


def mark(status: LedgerStatus, updated_at: str = "") -> LedgerRecord:
    return LedgerRecord("marks", "docs", status, "", updated_at=updated_at)


@pytest.mark.parametrize(
    ("before", "rebuild_reason", "has_leftovers", "expected"),
    [
        (mark("done", CLOSED), "", False, ""),
        (mark("failed"), "", False, ""),  # its failed documents have records
        (mark("pending"), "", False, "cut off"),
        (mark("done"), "", False, "cut off"),
        (None, "", False, "nothing of this source yet"),
        (
            mark("done", CLOSED),
            "It was built with model m.",
            False,
            "builds a new collection. It was built with model m.",
        ),
        (mark("done", CLOSED), "", True, "could not store"),
    ],
)
def test_why_a_run_takes_the_whole_source(
    before: LedgerRecord | None, rebuild_reason: str, expected: str, *, has_leftovers: bool
) -> None:
    why = explain_whole_run(before, rebuild_reason=rebuild_reason, has_leftovers=has_leftovers)
    assert (expected in why) if expected else why == ""
