"""Points of whole documents: counted by generation, deleted and counted again, read page by page."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.qdrant import QdrantStore
from tasks.backends.qdrant_calls import RetryPolicy
from tasks.errors import StoreRejected, StoreUnavailable

DIMENSION = 4
ODD_IDS = [
    "a\nb.md",
    'say "hi" \\ there',
    "日本語/文書.pdf",
    "👩‍👩‍👧.txt",
    "\u00e9.md",
    "e\u0301.md",
    "table.csv#1,5",
    "\x00",
    " ",
]

# (source, doc_id, generation or None, points)
Stored = tuple[str, str, str | None, int]


def open_server(server: LoopbackQdrant, *, attempts: int = 6) -> QdrantStore:
    client = QdrantClient(url=server.url, timeout=5, check_compatibility=False)
    retry = RetryPolicy(attempts=attempts)
    return QdrantStore(client, place=f"at {server.url}", is_embedded=False, retry=retry, sleep=lambda _: None)


def prepare(store: QdrantStore) -> str:
    return store.prepare_collection("docs", dimension=DIMENSION, fingerprint="a" * 32, model="mini")


def fill(store: QdrantStore, physical: str, stored: Sequence[Stored]) -> list[str]:
    """Store points of these documents; returns their ids."""
    rows = [row for row in stored for _ in range(row[3])]
    ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{index} {rows[index]}")) for index in range(len(rows))]
    vectors = np.random.default_rng(1).normal(size=(len(rows), DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    payloads: list[dict[str, Any]] = [
        {
            "ballast_source": source,
            "doc_id": doc_id,
            "ballast_nodes": points,
            "ballast_content": "c",
            **({} if generation is None else {"generation": generation}),
        }
        for source, doc_id, generation, points in rows
    ]
    store.upsert(physical, ids, vectors, payloads)
    return ids


def count_documents(store: QdrantStore, physical: str) -> Counter[tuple[str, str]]:
    pages = store.scroll_points(physical, with_vectors=False)
    return Counter(pair for page in pages for pair in zip(page.sources, page.doc_ids, strict=True))


# ---------------------------------------------------------------------------------------------- counting


def test_generations_are_counted_for_these_documents_only(store: QdrantStore) -> None:
    physical = prepare(store)
    assert store.count_generations(physical, "s", ["a", "b"]) == {}
    fill(store, physical, [("s", "a", "a1", 3), ("s", "a", "a2", 2), ("s", "b", "b1", 1), ("s", "c", "c1", 4)])
    fill(store, physical, [("other", "a", "o1", 5)])
    assert store.count_generations(physical, "s", ["a", "b", "b", "gone"]) == {"a1": 3, "a2": 2, "b1": 1}
    assert store.count_generations(physical, "other", ["a"]) == {"o1": 5}
    assert store.count_generations(physical, "s", []) == {}
    assert store.count_source(physical, "s") == 10
    assert store.count_source(physical, "s", except_doc_ids=["a", "a", "gone"]) == 5
    assert store.count_source(physical, "other", except_doc_ids=["a"]) == 0
    assert store.count_source(physical, "nobody") == 0


def test_ids_of_any_spelling_are_told_apart(store: QdrantStore) -> None:
    physical = prepare(store)
    fill(store, physical, [("s", doc_id, f"g{index}", index + 1) for index, doc_id in enumerate(ODD_IDS)])
    assert store.count_generations(physical, "s", ODD_IDS) == {f"g{index}": index + 1 for index in range(len(ODD_IDS))}
    for index, doc_id in enumerate(ODD_IDS):
        assert store.count_generations(physical, "s", [doc_id]) == {f"g{index}": index + 1}
        store.delete_documents(physical, "s", [doc_id])
        assert store.count_generations(physical, "s", [doc_id]) == {}
    assert store.count(physical) == 0


def test_an_id_that_no_request_holds_is_refused(store: QdrantStore) -> None:
    physical = prepare(store)
    with pytest.raises(StoreRejected, match=r"'bad\\udce9' holds lone surrogates"):
        store.count_generations(physical, "s", ["bad\udce9"])
    with pytest.raises(StoreRejected, match="lone surrogates"):
        store.delete_documents(physical, "bad\udce9", ["a"])


def test_thousands_of_documents(store: QdrantStore) -> None:
    physical = prepare(store)
    fill(store, physical, [("s", f"folder/{number}.md", f"g{number}", 1) for number in range(1300)])
    doc_ids = [f"folder/{number}.md" for number in range(1300)]
    assert store.count_generations(physical, "s", doc_ids) == {f"g{number}": 1 for number in range(1300)}
    assert store.count_source(physical, "s", except_doc_ids=doc_ids[:1299]) == 1
    store.delete_other_generations(physical, "s", doc_ids, {f"g{number}" for number in range(1200)})
    assert store.count(physical) == 1200
    store.delete_documents(physical, "s", doc_ids)
    assert store.count(physical) == 0


def test_requests_stay_small(server: LoopbackQdrant) -> None:
    with closing(open_server(server)) as store:
        physical = prepare(store)
        server.requests.clear()
        store.count_generations(physical, "s", [f"{number}.md" for number in range(1300)])
        sizes = [len(body["filter"]["must"][1]["match"]["any"]) for _, _, body in server.requests]
        assert sizes == [512, 512, 276]
        server.requests.clear()
        store.count_generations(physical, "s", [f"{number}{'x' * 2**20}" for number in range(9)])
        sizes = [len(body["filter"]["must"][1]["match"]["any"]) for _, _, body in server.requests]
        assert sizes == [3, 3, 3]


def test_an_answer_that_was_cut_off_is_asked_for_again(store: QdrantStore) -> None:
    physical = prepare(store)
    fill(store, physical, [("s", "a", f"g{number}", 1) for number in range(100)])
    assert len(store.count_generations(physical, "s", ["a"])) == 100


# ---------------------------------------------------------------------------------------------- deleting


def test_other_generations_go_and_nothing_else(store: QdrantStore) -> None:
    physical = prepare(store)
    fill(store, physical, [("s", "a", "a1", 3), ("s", "a", "a2", 2), ("s", "b", "b1", 1), ("s", "c", "c1", 4)])
    fill(store, physical, [("s", "b", None, 2), ("other", "a", "a1", 1), ("other", "b", None, 1)])
    for _ in range(2):
        store.delete_other_generations(physical, "s", ["a", "b"], {"a2", "b1"})
        expected = {("s", "a"): 2, ("s", "b"): 1, ("s", "c"): 4, ("other", "a"): 1, ("other", "b"): 1}
        assert count_documents(store, physical) == expected
    assert store.count_generations(physical, "s", ["a", "b"]) == {"a2": 2, "b1": 1}


def test_documents_go_from_their_source_only(store: QdrantStore) -> None:
    physical = prepare(store)
    fill(store, physical, [("s", "a", "a1", 3), ("s", "b", "b1", 1), ("s", "b", None, 1), ("other", "a", "o1", 2)])
    for _ in range(2):
        store.delete_documents(physical, "s", ["a", "b", "gone"])
        assert count_documents(store, physical) == {("other", "a"): 2}


def test_points_go_by_id(store: QdrantStore) -> None:
    physical = prepare(store)
    ids = fill(store, physical, [("s", "a", "a1", 1500)])
    for _ in range(2):
        store.delete_points(physical, [*ids[:1400], str(uuid.uuid4())])
        assert store.existing_ids(physical, ids) == set(ids[1400:])
    store.delete_points(physical, [])
    assert store.count(physical) == 100


def test_no_delete_goes_without_a_condition(store: QdrantStore) -> None:
    physical = prepare(store)
    fill(store, physical, [("s", "a", "a1", 3)])
    store.delete_documents(physical, "s", [])
    store.delete_other_generations(physical, "s", [], {"a1"})
    with pytest.raises(StoreRejected, match="No generation to keep"):
        store.delete_other_generations(physical, "s", ["a"], set())
    assert store.count(physical) == 3


@pytest.mark.parametrize("is_embedded", [True, False])
def test_what_was_not_deleted_after_all_is_noticed(is_embedded: bool) -> None:
    class Deaf(QdrantClient):
        def delete(self, *args: Any, **kwargs: Any) -> models.UpdateResult:
            assert kwargs["wait"] is True
            return models.UpdateResult(operation_id=1, status=models.UpdateStatus.COMPLETED)

        create_payload_index = delete  # the one in memory would warn that it has none

    with closing(QdrantStore(Deaf(":memory:"), place="in memory", is_embedded=is_embedded)) as store:
        physical = prepare(store)
        fill(store, physical, [("s", "a", "a1", 3), ("s", "a", "a2", 2)])
        with pytest.raises(StoreUnavailable, match=r"delete points of 1 documents .*3 are still there"):
            store.delete_other_generations(physical, "s", ["a"], {"a2"})
        with pytest.raises(StoreUnavailable, match="5 are still there"):
            store.delete_documents(physical, "s", ["a"])


@pytest.mark.parametrize("fault", [Fault(reset=True), Fault(reset=True, after_effect=True), Fault(status=503)])
def test_faults_are_outlived_at_every_request(server: LoopbackQdrant, fault: Fault) -> None:
    stored: list[Stored] = [("s", "a", "a1", 3), ("s", "a", "a2", 2), ("s", "b", "b1", 1), ("other", "a", "o1", 2)]
    with closing(open_server(server)) as store:
        physical = prepare(store)
        for index in range(6):
            ids = fill(store, physical, stored)
            asked = len(server.requests)
            server.faults = [Fault(on=".*", reset=fault.reset, after_effect=fault.after_effect, skip=index)]
            assert store.count_generations(physical, "s", ["a"]) == {"a1": 3, "a2": 2}
            store.delete_other_generations(physical, "s", ["a"], {"a2"})
            store.delete_documents(physical, "s", ["b"])
            store.delete_points(physical, ids[-1:])
            assert len(server.requests) - asked == 7
            assert count_documents(store, physical) == {("s", "a"): 2, ("other", "a"): 1}


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("page_points", [1, 7, 512])
def test_points_are_read_once_each(store: QdrantStore, page_points: int) -> None:
    physical = prepare(store)
    assert list(store.scroll_points(physical, with_vectors=True)) == []
    ids = fill(store, physical, [("s", "a", "a1", 20), ("other", "b", None, 1)])
    pages = list(store.scroll_points(physical, with_vectors=True, page_points=page_points))
    assert all(0 < len(page.ids) <= page_points for page in pages)
    rows = {
        point_id: row
        for page in pages
        for point_id, row in zip(page.ids, zip(page.sources, page.doc_ids, page.generations, strict=True), strict=True)
    }
    assert rows == {**dict.fromkeys(ids, ("s", "a", "a1")), ids[-1]: ("other", "b", "")}
    assert sum(len(page.ids) for page in pages) == 21
    assert {count for page in pages for count in page.document_nodes} == {20, 1}
    assert {content for page in pages for content in page.content_hashes} == {"c"}
    assert all(page.vectors is not None and len(page.vectors) == len(page.ids) for page in pages)


def test_vectors_are_read_as_they_were_stored(store: QdrantStore) -> None:
    physical = prepare(store)
    vectors = np.random.default_rng(2).normal(size=(30, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [str(uuid.uuid4()) for _ in vectors]
    store.upsert(physical, ids, vectors, [{"doc_id": "a"} for _ in ids])
    [page] = store.scroll_points(physical, with_vectors=True)
    assert page.vectors is not None
    read = dict(zip(page.ids, page.vectors, strict=True))
    np.testing.assert_allclose(np.array([read[point_id] for point_id in ids]), vectors, atol=1e-6)
    [page] = store.scroll_points(physical, with_vectors=False)
    assert page.vectors is None


def test_points_that_somebody_else_wrote_are_read_too(server: LoopbackQdrant) -> None:
    with closing(open_server(server)) as store:
        physical = prepare(store)
        odd: dict[str, Any] = {"doc_id": 7, "generation": None, "ballast_nodes": "3", "ballast_source": ["s"]}
        server.memory.upsert(physical, [models.PointStruct(id=42, vector={}, payload=odd)])
        [page] = store.scroll_points(physical, with_vectors=True)
    assert (page.ids, page.sources, page.doc_ids, page.generations) == (["42"], [""], [""], [""])
    assert (page.document_nodes, page.vectors) == ([0], [None])


def test_points_may_be_deleted_while_they_are_read(store: QdrantStore) -> None:
    physical = prepare(store)
    ids = fill(store, physical, [("s", "a", "a1", 50)])
    seen: list[str] = []
    for page in store.scroll_points(physical, with_vectors=False, page_points=8):
        seen += page.ids
        store.delete_points(physical, page.ids)
    assert sorted(seen) == sorted(ids)
    assert store.count(physical) == 0


def test_a_page_that_fails_is_asked_for_again(server: LoopbackQdrant) -> None:
    with closing(open_server(server)) as store:
        physical = prepare(store)
        ids = fill(store, physical, [("s", "a", "a1", 50)])
        server.faults = [Fault(on=".*/scroll", reset=True, skip=3), Fault(on=".*/scroll", status=503)]
        pages = list(store.scroll_points(physical, with_vectors=False, page_points=8))
    assert sorted(point_id for page in pages for point_id in page.ids) == sorted(ids)
