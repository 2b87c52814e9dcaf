"""The ledger: one record a document, beside its collection."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient

from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.qdrant_ledger import Ledger, to_point_id
from tasks.config import QdrantSettings
from tasks.errors import StoreRejected
from tasks.records import LedgerRecord

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RECORDS = st.builds(
    LedgerRecord,
    source=TEXT,
    doc_id=TEXT,
    status=st.sampled_from(["pending", "done", "failed", "parked"]),
    content_hash=TEXT,
    generation=TEXT,
    nodes=st.integers(0, 10**9),
    nodes_digest=TEXT,
    is_partial=st.booleans(),
    attempts=st.integers(0, 100),
    stage=TEXT,
    reason=TEXT,
    updated_at=TEXT,
)


def prepare(store: QdrantStore) -> Ledger:
    return store.ledger(store.prepare_collection("docs", dimension=4, fingerprint="a" * 32, model="mini"))


def open_server(server: LoopbackQdrant) -> QdrantStore:
    client = QdrantClient(url=server.url, timeout=5, check_compatibility=False)
    return QdrantStore(client, place=f"at {server.url}", is_embedded=False, sleep=lambda _: None)


def make(doc_ids: Sequence[str], source: str = "s") -> list[LedgerRecord]:
    return [LedgerRecord(source, doc_id, "done", f"hash of {doc_id}", f"g {doc_id}", 3) for doc_id in doc_ids]


def read_all(ledger: Ledger, source: str | None = None) -> list[LedgerRecord]:
    records = [record for page in ledger.scroll(source) for record in page]
    return sorted(records, key=lambda record: (record.source, record.doc_id))


def test_records_come_back_as_they_were_written(store: QdrantStore) -> None:
    ledger = prepare(store)
    whole = LedgerRecord(
        "s", "a.md", "failed", "hash", "gen", 7, "digest", True, 3, "embed", "a\nreason", "2026-11-22T10:00:00+00:00"
    )
    sparse = LedgerRecord("s", "b.md", "pending", "")
    ledger.write([whole, sparse])
    assert ledger.read("s", ["b.md", "a.md", "a.md", "gone"]) == {"a.md": whole, "b.md": sparse}
    assert ledger.read("s", []) == {}
    later = replace(whole, status="done", attempts=0)
    for _ in range(2):
        ledger.write([whole, later])  # the last word on a document counts
        assert read_all(ledger) == [later, sparse]
    assert ledger.count() == 2
    ledger.write([])


@settings(deadline=None, max_examples=50)
@given(records=st.lists(RECORDS, max_size=8, unique_by=lambda record: (record.source, record.doc_id)))
def test_any_record_comes_back(records: list[LedgerRecord]) -> None:
    with closing(QdrantStore(QdrantClient(":memory:"), place="in memory", is_embedded=True)) as store:
        ledger = prepare(store)
        ledger.write(records)
        assert read_all(ledger) == sorted(records, key=lambda record: (record.source, record.doc_id))
        sources = {record.source for record in records}
        assert ledger.list_sources() == sources
        for source in sources:
            mine = {record.doc_id: record for record in records if record.source == source}
            assert ledger.read(source, list(mine)) == mine
            assert ledger.count(source) == len(mine)


def test_a_ledger_that_was_not_made_is_empty(store: QdrantStore) -> None:
    ledger = store.ledger("docs--aaaaaaaaaaaa")
    assert ledger.read("s", ["a.md"]) == {}
    assert ledger.count() == ledger.count("s") == 0
    assert list(ledger.scroll()) == list(ledger.scroll("s")) == []
    assert ledger.list_sources() == set()
    ledger.remove("s", ["a.md"])
    with pytest.raises(StoreRejected, match="could not write 1 records to 'docs--aaaaaaaaaaaa--ledger'"):
        ledger.write(make(["a.md"]))
    assert store.list_collections() == []


def test_two_sources_do_not_touch_each_other(store: QdrantStore) -> None:
    ledger = prepare(store)
    mine, theirs = make(["README.md", "b.md"]), make(["README.md"], "other")
    ledger.write([*mine, *theirs])
    assert ledger.read("other", ["README.md", "b.md"]) == {"README.md": theirs[0]}
    assert (ledger.count(), ledger.count("s"), ledger.count("other"), ledger.count("nobody")) == (3, 2, 1, 0)
    assert ledger.list_sources() == {"s", "other"}
    assert (read_all(ledger, "s"), read_all(ledger, "other")) == (mine, theirs)
    for _ in range(2):
        ledger.remove("s", ["README.md", "gone.md"])
        assert read_all(ledger) == [*theirs, mine[1]]
    ledger.remove("s", [])
    ledger.remove("other", ["README.md"])
    assert ledger.list_sources() == {"s"}


def test_a_mark_of_a_source_is_no_document(store: QdrantStore) -> None:
    ledger = prepare(store)
    assert ledger.read_marks() == {}
    ledger.write(make(["a.md"]))
    for closed_at in ("2026-11-22T10:00:00+00:00", "2026-11-23T10:00:00+00:00"):
        for source in ("s", "s3://bucket/ä", "no documents"):
            ledger.write_mark(source, closed_at)
        assert ledger.read_marks() == dict.fromkeys(["s", "s3://bucket/ä", "no documents"], closed_at)
    ledger.write_mark("s", "")
    assert ledger.read_marks()["s"] == ""
    ledger.write_mark("s", "", "pending")
    mark = ledger.read_mark("s")
    assert mark is not None
    assert (mark.status, mark.updated_at, ledger.read_mark("never")) == ("pending", "", None)

    assert (ledger.count(), ledger.count("s"), ledger.count("no documents")) == (1, 1, 0)
    assert (read_all(ledger), read_all(ledger, "s"), read_all(ledger, "no documents")) == (make(["a.md"]),) * 2 + ([],)
    assert ledger.list_sources() == {"s"}
    assert ledger.read("s", ["s", "", "a.md"]) == {"a.md": make(["a.md"])[0]}
    assert store.list_physical("docs")[0].documents == 1
    ledger.remove("s", ["a.md", "s"])
    assert (ledger.count(), ledger.list_sources(), len(ledger.read_marks())) == (0, set(), 3)


def test_marks_go_with_their_ledger(store: QdrantStore) -> None:
    prepare(store)
    other = store.prepare_collection("docs", dimension=4, fingerprint="b" * 32, model="mini")
    store.ledger(other).write_mark("s", "2026-11-22T10:00:00+00:00")
    assert prepare(store).read_marks() == {}
    store.drop_physical("docs", other)
    assert store.ledger(other).read_marks() == {}
    store.prepare_collection("docs", dimension=4, fingerprint="b" * 32, model="mini")
    assert store.ledger(other).read_marks() == {}


def test_two_collections_have_a_ledger_each(store: QdrantStore) -> None:
    ledger = prepare(store)
    ledger.write(make(["a.md"]))
    other = store.ledger(store.prepare_collection("docs", dimension=4, fingerprint="b" * 32, model="mini"))
    assert other.read("s", ["a.md"]) == {}
    other.write(make(["b.md"]))
    assert (ledger.count(), other.count()) == (1, 1)


def test_thousands_of_documents(store: QdrantStore) -> None:
    ledger = prepare(store)
    doc_ids = [f"folder/文書 {number}\n.md" for number in range(1300)]
    records = make(doc_ids)
    ledger.write([*records, *make(["one.md"], "other")])
    assert ledger.read("s", doc_ids) == {record.doc_id: record for record in records}
    assert sorted(record.doc_id for record in read_all(ledger, "s")) == sorted(doc_ids)
    ledger.remove("s", doc_ids[1:])
    assert read_all(ledger, "s") == records[:1]


def test_many_sources_are_listed_as_they_are_spelled(store: QdrantStore) -> None:
    ledger = prepare(store)
    sources = {"0123456789abcdef0123456789abcdef", "s3://bucket/ä", *(f"source {number}" for number in range(300))}
    ledger.write([LedgerRecord(source, "a.md", "done", "h") for source in sources])
    if store.is_embedded:
        assert ledger.list_sources() == sources
    else:  # the doubles' facets respell what looks like a UUID, as embedded Qdrant does
        respelled = "01234567-89ab-cdef-0123-456789abcdef"
        assert {source.replace(respelled, respelled.replace("-", "")) for source in ledger.list_sources()} == sources


def test_what_no_request_holds(store: QdrantStore) -> None:
    ledger = prepare(store)
    with pytest.raises(StoreRejected, match=r"'bad\\udce9.md' holds lone surrogates"):
        ledger.write(make(["bad\udce9.md"]))
    with pytest.raises(StoreRejected, match="lone surrogates"):
        ledger.read("s", ["bad\udce9.md"])
    ledger.write([LedgerRecord("s", "a.md", "failed", "", reason="can't read bad\udce9.md")])
    assert ledger.read("s", ["a.md"])["a.md"].reason == "can't read bad?.md"


def test_a_ledger_survives_a_reopening(tmp_path: Path) -> None:
    with closing(open_store(QdrantSettings(), str(tmp_path), environment={})) as store:
        records = make([f"{number}.md" for number in range(20)])
        prepare(store).write(records)
        prepare(store).remove("s", ["3.md"])
    with closing(open_store(QdrantSettings(), str(tmp_path), environment={})) as store:
        assert set(prepare(store).read("s", [f"{number}.md" for number in range(20)])) == {
            f"{number}.md" for number in range(20) if number != 3
        }


def test_a_body_over_the_servers_limit_is_halved() -> None:
    records = [replace(record, reason="x" * 20_000) for record in make([f"{number}.md" for number in range(20)])]
    with LoopbackQdrant(largest_body=100_000) as server, closing(open_server(server)) as store:
        ledger = prepare(store)
        ledger.write(records)
        assert ledger.read("s", [record.doc_id for record in records]) == {each.doc_id: each for each in records}


@pytest.mark.parametrize("after_effect", [False, True])
def test_faults_are_outlived_at_every_request(server: LoopbackQdrant, after_effect: bool) -> None:
    with closing(open_server(server)) as store:
        ledger = prepare(store)
        for index in range(12):
            server.faults = [Fault(on=".*", reset=True, after_effect=after_effect, skip=index)]
            ledger.write(make(["a.md", "b.md"]))
            ledger.write(make(["b.md"], "other"))
            ledger.remove("s", ["b.md"])
            assert ledger.read("s", ["a.md", "b.md"]) == {"a.md": make(["a.md"])[0]}
            assert read_all(ledger, "s") == make(["a.md"])
            assert (ledger.count("s"), ledger.list_sources()) == (1, {"s", "other"})
            ledger.remove("s", ["a.md"])
            ledger.remove("other", ["b.md"])
            assert ledger.count() == 0
            assert server.faults == []


def test_a_record_keeps_its_id() -> None:
    """Every ledger's records are found by it."""
    assert to_point_id("docs", "a.md") == "30dfa84a-7ad6-5bce-81e6-efabc18ddd61"
    ids = {to_point_id(source, doc_id) for source in ("a", "b", "") for doc_id in ("x", "y", "", 'a", "x')}
    assert len(ids) == 12
