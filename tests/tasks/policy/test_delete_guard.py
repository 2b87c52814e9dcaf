"""Which documents may be deleted: the two limits, what is covered, and that every record goes one way."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.delete_guard import DeleteDecision, decide_deletes
from tasks.records import LedgerRecord

LIMITS: dict[str, Any] = {"max_documents": 10, "max_fraction": 0.1, "confirmed": False, "propagate": True}


def make_gone(count: int, folder: str = "") -> list[LedgerRecord]:
    return [LedgerRecord("docs", f"{folder}{number}.md", "done", "h", nodes=2) for number in range(count)]


def decide(gone: list[LedgerRecord], **changes: Any) -> DeleteDecision:
    return decide_deletes(gone, **{**LIMITS, "known": 100, "covered": (), **changes})


@pytest.mark.parametrize(
    ("gone", "known", "deleted"),
    [
        (0, 100, 0),
        (1, 1, 1),
        (10, 10, 10),
        (11, 110, 11),
        (11, 109, 0),
        (100, 100, 0),
        (100, 1000, 100),
        (101, 1000, 0),
    ],
)
def test_only_above_both_limits_is_withheld(gone: int, known: int, deleted: int) -> None:
    decision = decide(make_gone(gone), known=known)
    assert len(decision.delete) == deleted
    assert len(decision.withheld) == gone - deleted
    assert (decision.reason == "") == (deleted == gone)


def test_the_reason_has_the_figures_and_the_way_out() -> None:
    reason = decide(make_gone(12), known=80).reason
    assert "12 documents of 80 would be deleted, 15.0%; above both 10 documents" in reason
    assert "--confirm-deletes" in reason
    assert decide(make_gone(12), known=80, confirmed=True).withheld == ()


def test_a_source_that_lists_nothing_deletes_nothing_unless_confirmed() -> None:
    decision = decide(make_gone(3), known=3, listed=0)
    assert (decision.delete, len(decision.withheld)) == ((), 3)
    assert "lists no document at all" in decision.reason
    assert len(decide(make_gone(3), known=3, listed=0, confirmed=True).delete) == 3
    assert len(decide(make_gone(3), known=3, listed=1).delete) == 3


def test_what_may_still_be_there_is_kept_even_when_confirmed() -> None:
    hidden = make_gone(3, "sub/") + [
        LedgerRecord("docs", doc_id, "done", "h", nodes=1) for doc_id in ("sub", "t.csv#7", "t.csv")
    ]
    near = [LedgerRecord("docs", doc_id, "done", "h", nodes=1) for doc_id in ("subway.md", "t.csv2", "a/sub/1.md")]
    decision = decide([*hidden, *near], covered=("sub/", "t.csv#"), confirmed=True)
    assert list(decision.withheld) == hidden
    assert list(decision.delete) == near
    assert "under sub/, t.csv#, which could not be read in full" in decision.reason


def test_covered_documents_do_not_count_against_the_limits() -> None:
    decision = decide(make_gone(30, "sub/") + make_gone(5), known=50, covered=("sub/",))
    assert len(decision.delete) == 5


def test_nothing_is_deleted_with_propagate_off() -> None:
    decision = decide(make_gone(2), propagate=False, confirmed=True)
    assert (decision.delete, len(decision.withheld)) == ((), 2)
    assert "deletes.propagate" in decision.reason


def test_failures_without_points_are_forgotten_and_do_not_count() -> None:
    failures = [LedgerRecord("docs", f"bad{number}.pdf", "parked", "", attempts=3) for number in range(50)]
    begun = LedgerRecord("docs", "begun.md", "pending", "h", is_partial=True)
    decision = decide([*failures, begun], known=51)
    assert list(decision.forget) == failures
    assert decision.delete == (begun,)
    assert decision.reason == ""


prefixes = st.lists(st.sampled_from(["", "a/", "a/b/", "t.csv#", "a"]), max_size=2)
doc_ids = st.sampled_from(["a", "a/b", "a/b/c", "t.csv", "t.csv#1", "x"])


@given(
    st.lists(st.tuples(doc_ids, st.integers(0, 1), st.booleans()), max_size=30),
    prefixes, st.integers(0, 40), st.integers(0, 5), st.floats(0, 1), st.booleans(), st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_every_record_goes_one_way_and_the_limits_hold(
    gone: list[tuple[str, int, bool]], covered: list[str], more: int, max_documents: int, max_fraction: float,
    confirmed: bool, propagate: bool,
) -> None:  # fmt: skip
    known = len(gone) + more
    found = [
        replace(LedgerRecord(f"s{index}", doc_id, "done", "h"), nodes=nodes, is_partial=is_partial)
        for index, (doc_id, nodes, is_partial) in enumerate(gone)
    ]
    decision = decide_deletes(
        found, known=known, covered=covered, max_documents=max_documents, max_fraction=max_fraction,
        confirmed=confirmed, propagate=propagate,
    )  # fmt: skip
    gone_ways = [*decision.delete, *decision.withheld, *decision.forget]
    assert len(set(gone_ways)) == len(gone_ways)
    assert {record for record in found if record.has_points} == {*decision.delete, *decision.withheld}
    for record in (*decision.delete, *decision.forget):
        assert not any(record.doc_id.startswith(prefix) for prefix in covered)
    if not confirmed:
        assert len(decision.delete) <= max(max_documents, max_fraction * known)
    assert propagate or not decision.delete
    assert bool(decision.reason) == bool(decision.withheld)
