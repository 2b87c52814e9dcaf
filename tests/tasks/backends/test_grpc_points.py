"""Points over gRPC: byte for byte what numpy held, in batches measured by what is really sent."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from qdrant_client import QdrantClient, grpc, models
from qdrant_client.conversions.conversion import RestToGrpc

from tasks.backends.fake_qdrant_grpc import LoopbackQdrantGrpc
from tasks.backends.grpc_points import to_grpc_points, upsert_grpc_points
from tasks.backends.points import DENSE_VECTOR, check_points
from tasks.backends.qdrant import QdrantStore

DIMENSION = 1024


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[LoopbackQdrantGrpc, QdrantClient]]:
    with LoopbackQdrantGrpc() as double:
        client = QdrantClient(
            url="http://127.0.0.1", grpc_port=double.port, prefer_grpc=True, timeout=30, check_compatibility=False
        )
        with closing(client):
            yield double, client


def make_ids(count: int) -> list[str]:
    return [str(uuid.uuid4()) for _ in range(count)]


def unit_rows(count: int) -> Any:
    rows = np.random.default_rng(5).normal(size=(count, DIMENSION)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(
    rows=st.integers(1, 40).flatmap(
        lambda dimension: arrays.arrays(
            np.float32,
            st.tuples(st.integers(1, 5), st.just(dimension)),
            elements={"allow_nan": False, "allow_infinity": False},
        )
    )
)
@settings(deadline=None, max_examples=40)
def test_rows_come_back_byte_for_byte(wire: tuple[LoopbackQdrantGrpc, QdrantClient], rows: Any) -> None:
    _, client = wire
    # Dot: a Cosine collection normalises what it stores.
    dot = models.VectorParams(size=rows.shape[1], distance=models.Distance.DOT)
    name = str(uuid.uuid4())
    client.create_collection(name, vectors_config={DENSE_VECTOR: dot})
    ids = make_ids(len(rows))
    result = upsert_grpc_points(client, name, to_grpc_points(ids, rows, [{"number": n} for n in range(len(rows))]))
    assert result.status == models.UpdateStatus.COMPLETED
    found = {record.id: record for record in client.retrieve(name, ids, with_vectors=True)}
    stored = np.array([found[point_id].vector[DENSE_VECTOR] for point_id in ids], dtype=np.float32)  # type: ignore[call-overload,index]
    assert stored.tobytes() == rows.tobytes()
    assert [found[point_id].payload for point_id in ids] == [{"number": n} for n in range(len(rows))]
    client.delete_collection(name)


@pytest.mark.parametrize("rows", [unit_rows(4), unit_rows(8)[::2], np.asfortranarray(unit_rows(3)), -unit_rows(2)])
def test_a_point_is_what_the_client_itself_would_send(rows: Any) -> None:
    payload = {
        "text": "straße 🙂",
        "nothing": None,
        "is": True,
        "list": [1, 2.5, "x", [], {}],
        "nested": {"deep": {"er": -(2**63)}},
        "big": 2**63 - 1,
        "": "empty key",
    }
    ids = make_ids(len(rows))
    theirs = [
        RestToGrpc.convert_point_struct(models.PointStruct(id=point_id, vector={DENSE_VECTOR: row}, payload=payload))
        for point_id, row in zip(ids, rows.tolist(), strict=True)
    ]
    assert to_grpc_points(ids, rows, [payload] * len(ids)) == theirs


@pytest.mark.parametrize(
    "payload",
    [
        {"_node_content": "x" * 1500, "doc_id": "guide/a.md", "generation": "0" * 64, "ballast_nodes": 3},
        {"_node_content": "ж" * 700, "doc_id": "b.md", "title": "Т" * 40},
        {f"key {number}": "value" for number in range(40)},
        {},
    ],
    ids=["text", "cyrillic", "many keys", "empty"],
)
def test_a_batch_is_measured_by_what_grpc_sends(payload: dict[str, Any]) -> None:
    ids, rows = make_ids(50), unit_rows(50)
    sizes = check_points(ids, rows, [payload] * 50, dimension=DIMENSION, over_grpc=True)
    sent = grpc.UpsertPoints(points=to_grpc_points(ids, rows, [payload] * 50)).ByteSize()
    assert 0.85 * sent <= sum(sizes) <= 1.15 * sent


def test_batches_over_grpc_hold_four_times_as_many_points(wire: tuple[LoopbackQdrantGrpc, QdrantClient]) -> None:
    double, client = wire
    store = QdrantStore(client, place="at x", is_embedded=False, batch_bytes=100_000)
    physical = store.prepare_collection("batches", dimension=DIMENSION, fingerprint="a" * 32, model="mini")
    double.requests.clear()
    store.upsert(physical, make_ids(60), unit_rows(60), [{"doc_id": "a.md"}] * 60)
    sent = [message for request, _, message in double.requests if request == "Points/Upsert"]
    assert [len(message.points) for message in sent] == [23, 23, 14]  # 4 over REST, of 22 KB each
    assert max(message.ByteSize() for message in sent) <= 100_000
    assert store.count(physical) == 60


def test_answers_of_32_mib_arrive(wire: tuple[LoopbackQdrantGrpc, QdrantClient]) -> None:
    _, client = wire
    store = QdrantStore(client, place="at x", is_embedded=False)
    physical = store.prepare_collection("large", dimension=DIMENSION, fingerprint="a" * 32, model="mini")
    ids = make_ids(9)
    store.upsert(physical, ids, unit_rows(9), [{"text": "x" * 4 * 1024**2}] * 9)
    found = client.retrieve(physical, ids, with_payload=True)
    assert sum(len((record.payload or {})["text"]) for record in found) == 36 * 1024**2
