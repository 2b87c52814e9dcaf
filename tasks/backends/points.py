"""What goes into Qdrant and comes back: points, batches, search hits. Pure converters, no connection."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.errors import StoreError, StoreRejected
from tasks.records import Payload, SearchHit, StoredPoints, Vectors

if TYPE_CHECKING:
    from qdrant_client import models

DENSE_VECTOR = "text-dense"
"""The vector name that LlamaIndex's QdrantVectorStore looks for."""

# Over REST a float32 travels as the decimals of a Python float, up to 18 digits: 22 KB a point measured at 1024-d.
_JSON_BYTES_PER_NUMBER = 22
_GRPC_BYTES_PER_NUMBER = 4
_BYTES_PER_POINT = 100  # id, keys, braces or tags

# fp16 models leave 1e-3 at most after a float32 normalisation; a vector further off was never normalised.
NORM_TOLERANCE = 1e-2


def check_points(
    ids: Sequence[str], vectors: Vectors, payloads: Sequence[Payload], *, dimension: int, over_grpc: bool = False
) -> list[int]:
    """Refuse nonsense before it is sent, since embedded Qdrant takes what a server refuses; returns each point's size.

    vectors: float32, shape (points, dimension), finite, unit length. Sizes are bytes of the request, estimated: the payload
    as JSON, the vector as decimals or, `over_grpc`, as raw floats.
    Raises StoreRejected, naming the first point at fault.
    """
    if not len(ids) == len(vectors) == len(payloads):
        raise StoreRejected(
            f"{len(ids)} ids, {len(vectors)} vectors and {len(payloads)} payloads: they must be as many."
        )
    _check_ids(ids)
    _check_vectors(ids, vectors, dimension=dimension)
    number_bytes = _GRPC_BYTES_PER_NUMBER if over_grpc else _JSON_BYTES_PER_NUMBER
    vector_bytes = dimension * number_bytes + _BYTES_PER_POINT
    return [vector_bytes + measure_payload(point_id, payload) for point_id, payload in zip(ids, payloads, strict=True)]


def measure_payload(point_id: str, payload: Payload) -> int:
    """Bytes of a payload as UTF-8 JSON. Raises StoreRejected for what JSON can't hold: NaN, lone surrogates."""
    try:
        # allow_nan: the client would write null instead, without a word.
        return len(json.dumps(payload, ensure_ascii=False, allow_nan=False).encode())
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise StoreRejected(
            f"Point {point_id}: its payload is not JSON ({type(error).__name__}: {str(error)[:120]}). "
            "Clean the document's metadata: no NaN or infinity, no lone surrogates, only text, numbers, lists, objects."
        ) from error


def check_text(text: str) -> None:
    """Raises StoreRejected for text that no request can hold: lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StoreRejected(
            f"{text[:120]!r} holds lone surrogates, which UTF-8 can't encode. Replace them where the document is listed."
        ) from error


def split_batches(sizes: Sequence[int], *, max_points: int, max_bytes: int) -> Iterator[slice]:
    """Cut consecutive points into batches within both caps; a point above `max_bytes` travels alone."""
    start, taken = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start >= max_points or taken + size > max_bytes):
            yield slice(start, index)
            start, taken = index, 0
        taken += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def to_points(ids: Sequence[str], vectors: Vectors, payloads: Sequence[Payload]) -> list[models.PointStruct]:
    from qdrant_client import models

    return [
        models.PointStruct(id=point_id, vector={DENSE_VECTOR: row}, payload=payload)
        for point_id, row, payload in zip(ids, vectors.tolist(), payloads, strict=True)
    ]


STORED_FIELDS = ("ballast_source", "doc_id", "generation", "ballast_nodes", "ballast_content")
"""Of a point's payload: what to_stored_points() needs."""


def to_stored_points(records: Sequence[models.Record], *, with_vectors: bool) -> StoredPoints:
    payloads = [record.payload or {} for record in records]
    return StoredPoints(
        ids=[str(record.id) for record in records],
        sources=[_read_text(payload, "ballast_source") for payload in payloads],
        doc_ids=[_read_text(payload, "doc_id") for payload in payloads],
        generations=[_read_text(payload, "generation") for payload in payloads],
        document_nodes=[_read_count(payload, "ballast_nodes") for payload in payloads],
        content_hashes=[_read_text(payload, "ballast_content") for payload in payloads],
        vectors=[_read_dense_vector(record.vector) for record in records] if with_vectors else None,
    )


def _read_text(payload: Payload, field: str) -> str:
    value = payload.get(field)
    return value if isinstance(value, str) else ""


def _read_count(payload: Payload, field: str) -> int:
    value = payload.get(field)
    return value if isinstance(value, int) and value > 0 else 0


def _read_dense_vector(vector: object) -> NDArray[np.float32] | None:
    row = vector.get(DENSE_VECTOR) if isinstance(vector, dict) else None
    return None if row is None else np.asarray(row, np.float32)


def to_search_hit(point: models.ScoredPoint) -> SearchHit:
    """Read LlamaIndex's payload. Raises StoreError for a point without it."""
    payload = point.payload or {}
    try:
        content: dict[str, Any] = json.loads(payload["_node_content"])
        text = content["text"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise StoreError(
            f"Point {point.id} has no readable LlamaIndex node in its payload ({type(error).__name__}: {error}): "
            "it was not written by Ballast. Delete it, or ingest into another --collection."
        ) from error
    return SearchHit(
        score=float(point.score),
        doc_id=str(payload.get("doc_id", "")),
        node_id=str(point.id),
        text=text,
        start_char=content.get("start_char_idx"),
        end_char=content.get("end_char_idx"),
        metadata=content.get("metadata", {}),
    )


def _check_ids(ids: Sequence[str]) -> None:
    for point_id in ids:
        try:
            uuid.UUID(point_id)
        except ValueError as error:
            raise StoreRejected(
                f"Point id {point_id!r} is not a UUID; Qdrant takes nothing else. Ids come from the chunker's id_func."
            ) from error
    if len(set(ids)) != len(ids):
        repeated = next(point_id for index, point_id in enumerate(ids) if point_id in ids[:index])
        raise StoreRejected(f"Point id {repeated} comes twice in {len(ids)} points: one would overwrite the other.")


def _check_vectors(ids: Sequence[str], vectors: Vectors, *, dimension: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != dimension or vectors.dtype != np.float32:
        raise StoreRejected(
            f"Vectors of shape {vectors.shape} and type {vectors.dtype}; "
            f"the collection takes float32 of shape (points, {dimension})."
        )
    norms = np.linalg.norm(vectors, axis=1)  # not finite where a component is not
    wrong = np.flatnonzero(~(np.abs(norms - 1.0) <= NORM_TOLERANCE))
    if wrong.size:
        row = int(wrong[0])
        raise StoreRejected(
            f"{wrong.size} of {len(ids)} vectors are not finite or not unit length; the first is point {ids[row]} "
            f"with norm {norms[row]:.4g}. The encoder must report such rows as failed instead of storing them."
        )
