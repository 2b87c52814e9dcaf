"""What becomes of a document, and that no sequence of runs makes a half-written one look finished."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.changes import decide_document, describe_parked, needs_hash, to_done, to_failed, to_pending
from tasks.policy.identity import compute_nodes_digest
from tasks.records import ChunkedDocument, LedgerRecord, LedgerStatus, Node, Rejection

NOW = "2026-11-22T12:00:00+00:00"
IDS = ("7d444840-9dc0-51d1-b245-5ffdce74fad2", "7d444840-9dc0-51d1-b245-5ffdce74fad3")


def make_record(status: LedgerStatus, content_hash: str = "a", **fields: object) -> LedgerRecord:
    return replace(LedgerRecord("docs", "guide.md", status, content_hash), **fields)  # type: ignore[arg-type]


def make_chunked(content_hash: str) -> ChunkedDocument:
    nodes = tuple(Node(node_id, "guide.md", f"g-{content_hash}", np.zeros(3, np.int32), {}) for node_id in IDS)
    return ChunkedDocument("guide.md", f"g-{content_hash}", nodes, content_hash=content_hash)


@pytest.mark.parametrize(
    ("record", "content_hash", "decision"),
    [
        (None, "a", "new"),
        (None, "", "new"),
        (make_record("done"), "a", "unchanged"),
        (make_record("done"), "b", "changed"),
        (make_record("done"), "", "changed"),
        (make_record("done", ""), "", "changed"),  # neither could be hashed: nothing is known to be equal
        (make_record("done", is_partial=True), "a", "resume"),
        (make_record("pending"), "a", "resume"),
        (make_record("pending"), "b", "resume"),
        (make_record("failed", attempts=1), "a", "retry"),
        (make_record("failed", attempts=1), "b", "changed"),
        (make_record("parked", attempts=3), "a", "parked"),
        (make_record("parked", "", attempts=3), "", "changed"),  # nothing is known to be equal, not even the reason
        (make_record("parked", attempts=3), "b", "changed"),
        (make_record("parked", "", attempts=3), "a", "changed"),
        (make_record("parked", attempts=2), "a", "retry"),  # source.max_attempts was raised since
    ],
)
def test_the_decision(record: LedgerRecord | None, content_hash: str, decision: str) -> None:
    assert decide_document(record, content_hash, max_attempts=3) == decision


@pytest.mark.parametrize(
    ("record", "decision"),
    [
        (make_record("failed", "", attempts=2, reason="torn"), "retry"),
        (make_record("failed", "", attempts=9, reason="torn"), "retry"),  # covers others, or it would be parked
        (make_record("parked", "", attempts=3, reason="torn"), "parked"),
        (make_record("parked", "", attempts=3, reason="1,001 bytes"), "changed"),
        (make_record("parked", "a", attempts=3, reason="torn"), "changed"),
    ],
)
def test_without_a_hash_only_what_fails_for_the_same_reason_is_the_same(record: LedgerRecord, decision: str) -> None:
    assert decide_document(record, "", max_attempts=3, reason="torn") == decision


def test_another_reason_without_a_hash_has_its_attempts_before_it() -> None:
    record = make_record("parked", "", attempts=3, reason="1,001 bytes; the limit is 1,000")
    assert (fail(record, "").status, fail(record, "").attempts) == ("failed", 1)
    assert (fail(fail(fail(record, ""), ""), "").status) == "parked"


records = st.none() | st.builds(
    LedgerRecord,
    st.just("docs"),
    st.just("guide.md"),
    st.sampled_from(["pending", "done", "failed", "parked"]),
    st.sampled_from(["", "a", "b"]),
    nodes=st.integers(0, 3),
    is_partial=st.booleans(),
    attempts=st.integers(0, 5),
)


@given(records, st.sampled_from(["", "a", "b"]), st.integers(1, 5))
@settings(deadline=None)
def test_only_a_document_that_may_end_here_is_worth_a_hash(
    record: LedgerRecord | None, content_hash: str, max_attempts: int
) -> None:
    if not needs_hash(record):
        assert decide_document(record, content_hash, max_attempts=max_attempts) not in ("unchanged", "parked")


def test_the_intent_keeps_what_is_committed() -> None:
    done = to_done("docs", make_chunked("a"), NOW)
    assert (done.status, done.nodes, done.generation, done.is_partial) == ("done", 2, "g-a", False)
    assert done.nodes_digest == compute_nodes_digest(reversed(IDS))
    pending = to_pending(done, "docs", "guide.md", "b", NOW)
    assert (pending.status, pending.content_hash, pending.is_partial) == ("pending", "b", True)
    assert (pending.generation, pending.nodes, pending.nodes_digest) == ("g-a", 2, done.nodes_digest)
    first = to_pending(None, "docs", "guide.md", "a", NOW)
    assert (first.generation, first.nodes) == ("", 0)
    assert first.has_points


def fail(record: LedgerRecord | None, content_hash: str, covers: str | None = None) -> LedgerRecord:
    rejection = Rejection("guide.md", "failed", "chunk", "torn", covers=covers, content_hash=content_hash)
    return to_failed(record, "docs", rejection, max_attempts=3, now=NOW, is_partial=False)


def test_a_document_is_parked_after_its_attempts_and_tried_again_when_it_changes() -> None:
    record = to_done("docs", make_chunked("a"), NOW)
    statuses = []
    for _ in range(3):
        record = fail(record, "b")
        statuses.append((record.status, record.attempts))
    assert statuses == [("failed", 1), ("failed", 2), ("parked", 3)]
    assert (record.generation, record.nodes, record.stage, record.reason) == ("g-a", 2, "chunk", "torn")
    assert describe_parked(record) == "parked after 3 attempts: torn"
    changed = fail(record, "c")
    assert (changed.status, changed.attempts) == ("failed", 1)


def test_the_attempts_go_on_over_the_intent_of_the_next_run() -> None:
    once = fail(None, "a")
    begun = to_pending(once, "docs", "guide.md", "a", NOW)
    assert fail(begun, "a").attempts == 2
    assert to_pending(once, "docs", "guide.md", "b", NOW).attempts == 0


def test_a_half_written_document_is_never_parked() -> None:
    record = to_pending(to_done("docs", make_chunked("a"), NOW), "docs", "guide.md", "b", NOW)
    for attempts in range(1, 6):
        record = fail(record, "b")
        assert (record.status, record.attempts, record.is_partial) == ("failed", attempts, True)
    assert decide_document(record, "b", max_attempts=3) == "retry"


def test_what_covers_more_than_itself_is_never_parked() -> None:
    record: LedgerRecord | None = None
    for _ in range(5):
        record = fail(record, "", covers="sub/")
    assert record is not None
    assert (record.status, record.attempts) == ("failed", 5)
    assert decide_document(record, "", max_attempts=3, reason="torn") == "retry"


steps = st.lists(
    st.tuples(st.sampled_from(["begin", "commit", "fail", "fail_partial"]), st.sampled_from(["", "a", "b"])),
    max_size=12,
)


@given(steps, st.integers(1, 3))
@settings(deadline=None)
def test_mixed_points_are_never_unchanged(sequence: list[tuple[str, str]], max_attempts: int) -> None:
    """Played against what the points are really like: begun and not committed means mixed, whatever came in between."""
    record: LedgerRecord | None = None
    is_mixed = False
    committed = ""
    for action, content_hash in sequence:
        if action == "begin":
            record, is_mixed = to_pending(record, "docs", "guide.md", content_hash, NOW), True
        elif action == "commit":
            record, is_mixed, committed = to_done("docs", make_chunked(content_hash), NOW), False, content_hash
        else:
            rejection = Rejection("guide.md", "failed", "embed", "no", content_hash=content_hash)
            is_partial = action == "fail_partial"
            record = to_failed(record, "docs", rejection, max_attempts=max_attempts, now=NOW, is_partial=is_partial)
            is_mixed = is_mixed or is_partial
        for asked in ("", "a", "b"):
            if decide_document(record, asked, max_attempts=max_attempts) == "unchanged":
                assert not is_mixed
                assert asked == committed != ""
        assert record is not None
        assert not (is_mixed and record.status == "parked")  # the run would be green, with both versions found
        assert record.has_points or not is_mixed
        assert (record.generation == "") == (not committed and record.nodes == 0)
