"""What verify finds in one document: each kind of damage by itself, nothing in a healthy one, whatever its state."""

import uuid
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.changes import decide_document
from tasks.policy.identity import compute_nodes_digest
from tasks.policy.reconcile import DocumentFacts, GenerationFacts, rebuild_record, reconcile_document
from tasks.records import LedgerRecord

NOW = "2026-11-22T12:00:00+00:00"
IDS = [str(uuid.UUID(int=number + 1, version=5)) for number in range(6)]


def make_generation(ids: list[str], nodes: int | None = None, **damage: int) -> GenerationFacts:
    generation = GenerationFacts()
    for point_id in ids:
        generation.add_point(point_id, len(ids) if nodes is None else nodes, "h")
    for name, count in damage.items():
        setattr(generation, name, count)
    return generation


def make_facts(**changes: Any) -> DocumentFacts:
    """A healthy document of three points, with `changes`; `record` takes changes of the record."""
    record = LedgerRecord("docs", "a.md", "done", "h", "g", 3, compute_nodes_digest(IDS[:3]), updated_at=NOW)
    facts = DocumentFacts("docs", "a.md", "readable", "h", "", record, {"g": make_generation(IDS[:3])})
    for name, value in changes.items():
        setattr(facts, name, replace(record, **value) if name == "record" and value is not None else value)
    return facts


NO_POINTS: dict[str, Any] = {"generations": {}}
FAILED = {"status": "failed", "generation": "", "nodes": 0, "nodes_digest": "", "reason": "torn", "stage": "read"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"state": "unknown"}, []),
        ({"state": "covered"}, []),
        ({"record": None, **NO_POINTS}, ["missing_document ingest"]),
        ({"record": None, "state": "unreadable", **NO_POINTS}, ["unreadable nothing"]),
        ({"record": None, "state": "skipped", **NO_POINTS}, []),
        ({"record": None}, ["orphan_points write_ledger"]),
        ({"record": None, "state": "absent"}, ["surplus_document delete_document"]),
        ({"state": "absent"}, ["surplus_document delete_document"]),
        ({"state": "skipped"}, ["surplus_document delete_document"]),
        ({"state": "absent", "record": FAILED, **NO_POINTS}, []),
        ({"content_hash": "new"}, ["stale_document ingest"]),
        ({"state": "unreadable", "content_hash": "", "reason": "no permission"}, ["unreadable nothing"]),
        ({"record": {"status": "pending", "is_partial": True}}, ["half_written ingest"]),
        ({"record": {"status": "failed", "is_partial": True}}, ["half_written ingest"]),
        ({"record": {"status": "parked", "is_partial": True}}, ["half_written write_ledger"]),
        ({"record": FAILED, **NO_POINTS}, ["unreadable ingest"]),
        ({"record": {**FAILED, "status": "parked"}, **NO_POINTS}, []),
        ({"record": {**FAILED, "status": "parked"}, "content_hash": "new", **NO_POINTS}, ["stale_document ingest"]),
        ({"generations": {"g": make_generation(IDS[:2], 3)}}, ["missing_points write_ledger"]),
        (NO_POINTS, ["missing_points write_ledger"]),
        ({"generations": {"g": make_generation(IDS[:4], 3)}}, ["surplus_points delete_points"]),
        ({"generations": {"g": make_generation(IDS[1:4])}}, ["surplus_points delete_points"]),
        (
            {"generations": {"g": make_generation(IDS[:3]), "old": make_generation(IDS[3:])}},
            ["other_generation delete_points"],
        ),
        (
            {"generations": {"old": make_generation(IDS[3:])}},
            ["missing_points write_ledger", "other_generation write_ledger"],
        ),
        ({"generations": {"g": make_generation(IDS[:3], wrong_dimension=1)}}, ["wrong_dimension delete_points"]),
        ({"generations": {"g": make_generation(IDS[:3], bad_vectors=2)}}, ["bad_vector delete_points"]),
        ({"doc_id": "", "record": None, "state": "unknown"}, ["orphan_points delete_points"]),
        (
            {"generations": {"g": make_generation(IDS[:3]), "": make_generation(["17"], 0)}},
            ["orphan_points delete_points"],
        ),
    ],
    ids=str,
)  # fmt: skip
def test_each_damage_is_found_alone_with_what_mends_it(changes: dict[str, Any], expected: list[str]) -> None:
    findings = reconcile_document(make_facts(**changes))
    assert [f"{finding.kind} {finding.repair}" for finding in findings] == expected


def test_a_finding_says_what_was_expected_and_what_is_there() -> None:
    (finding,) = reconcile_document(make_facts(generations={"g": make_generation(IDS[:1], 3)}))
    assert (finding.expected, finding.found) == ("3 points", "1")
    (finding,) = reconcile_document(make_facts(state="unreadable", content_hash="", reason="no permission"))
    assert finding.found == "no permission; stored as before"


@pytest.mark.parametrize(
    "generations",
    [
        {"g": make_generation(IDS[:2], 3)},
        {"g": make_generation(IDS[:3], 2)},
        {"g": make_generation(IDS[:3], 0)},
        {"g": make_generation(IDS[:3], bad_vectors=1)},
        {"g": make_generation(IDS[:3]), "old": make_generation(IDS[3:4])},
        {"g": make_generation(IDS[:3]), "old": make_generation(IDS[3:])},
    ],
)
def test_only_one_whole_generation_makes_a_done_record(generations: dict[str, GenerationFacts]) -> None:
    rebuilt = rebuild_record(make_facts(record=None, generations=generations), NOW)
    assert (rebuilt.status, rebuilt.is_partial) == ("pending", True)


def test_a_rebuilt_record_is_the_one_that_was_lost() -> None:
    facts = make_facts()
    assert rebuild_record(make_facts(record=None), NOW) == facts.record


def test_points_that_disagree_on_their_document_are_no_whole_generation() -> None:
    generation = GenerationFacts()
    for point_id, nodes in zip(IDS[:3], (3, 2, 3), strict=True):
        generation.add_point(point_id, nodes, "h")
    assert not generation.is_whole


generations = st.dictionaries(
    st.sampled_from(["g", "old", "older"]),
    st.builds(
        make_generation,
        st.lists(st.sampled_from(IDS), max_size=4, unique=True),
        st.none() | st.integers(0, 4),
        wrong_dimension=st.integers(0, 1),
        bad_vectors=st.integers(0, 1),
    ),
    max_size=3,
)
records = st.none() | st.builds(
    LedgerRecord,
    st.just("docs"), st.just("a.md"), st.sampled_from(["pending", "done", "failed", "parked"]),
    st.sampled_from(["", "h", "i"]), st.sampled_from(["", "g", "old"]), st.integers(0, 4),
    st.just("") | st.integers(0, 4).map(lambda count: compute_nodes_digest(IDS[:count])), st.booleans(),
)  # fmt: skip


@given(
    generations, records, st.sampled_from(["readable", "unreadable", "skipped", "covered", "absent", "unknown"]),
    st.sampled_from(["h", "i"]),
)  # fmt: skip
@settings(deadline=None)
def test_nothing_is_found_only_where_a_run_would_leave_it_and_its_points_are_whole(
    found: dict[str, GenerationFacts], record: LedgerRecord | None, state: Any, content_hash: str
) -> None:
    found = {name: facts for name, facts in found.items() if facts.points}
    facts = DocumentFacts("docs", "a.md", state, content_hash if state == "readable" else "", "why", record, found)
    kinds = [finding.kind for finding in reconcile_document(facts)]
    assert len(set(kinds)) == len(kinds)
    if kinds:
        return
    assert not any(each.damaged for each in found.values()) or state in ("absent", "skipped")
    if record is None:
        assert not facts.points
    elif state not in ("absent", "skipped"):
        assert not record.is_partial
        own = found.get(record.generation, GenerationFacts())
        assert own.points == facts.points == record.nodes
        if state == "readable":
            assert decide_document(record, content_hash, max_attempts=1) in ("unchanged", "parked", "retry")
    else:
        assert not facts.points
