"""Identity: node ids, fingerprints and generations. All are hashes of an unambiguous encoding, so equal means equal."""

from __future__ import annotations

import datetime
import decimal
import enum
import hashlib
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Set
from pathlib import PurePath
from typing import Any

import numpy as np

# Never change it: every stored point's id depends on it, so a new value would embed every corpus again.
NAMESPACE = uuid.UUID("6f1c6a52-5a0e-5a58-9f0b-0b1d7e7c3a41")


def compute_node_id(source: str, doc_id: str, content_hash: str, occurrence: int) -> str:
    """UUIDv5 of the `occurrence`-th node (from 0) with this content in this document: the Qdrant point's id.

    Neither the device nor the run takes part, and without the occurrence repeated text in a document would collapse.
    `source`: two sources in one collection may both have a README.md, with the same words in it.
    """
    name = _encode([source, doc_id, content_hash, occurrence])
    # uuid.uuid5 takes text only, which can't hold the lone surrogates that file names on Linux may contain.
    digest = hashlib.sha1(NAMESPACE.bytes + name, usedforsecurity=False).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


def compute_nodes_digest(node_ids: Iterable[str]) -> str:
    """Digest (hex) of a set of node ids, whatever their order: made page by page, and compared without holding the ids.

    The exclusive or of the ids. They are hashes themselves, so two sets that differ are as good as never equal.
    """
    digest = 0
    for node_id in node_ids:
        digest ^= uuid.UUID(node_id).int
    return f"{digest:032x}"


def compute_fingerprint(parts: Mapping[str, Any]) -> str:
    """sha256 (hex) of everything that decides a vector: model revision, precision, pooling, chunker, tokenizer, ...

    The order of the keys does not count. Raises ValueError for a value that has no stable encoding.
    """
    return hashlib.sha256(_encode(parts)).hexdigest()


def compute_generation(fingerprint: str, source: str, doc_id: str, text: str, metadata: Mapping[str, Any]) -> str:
    """sha256 (hex) of fingerprint and document: which version of which document a point belongs to.

    No two documents share one, be their text the same: so a count of a generation is a count of one document.
    All metadata counts, embedded or not: the points carry it. Raises ValueError for a value without a stable encoding.
    """
    return hashlib.sha256(_encode([fingerprint, source, doc_id, text, metadata])).hexdigest()


def _encode(value: Any) -> bytes:
    # Not ensure_ascii: there the two halves of a surrogate pair and the character they spell look the same.
    return json.dumps(_canonical(value), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _canonical(value: Any) -> Any:
    """A JSON value in which all but text, bool, int and null is tagged with its type: none looks like another."""
    if isinstance(value, enum.Enum):
        return _canonical(value.value)
    if isinstance(value, np.generic | np.ndarray):
        return _canonical(value.tolist())
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return ["float", "nan" if math.isnan(value) else float(value).hex()]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, Mapping):
        pairs = [[_canonical(key), _canonical(item)] for key, item in value.items()]
        return ["map", sorted(pairs, key=lambda pair: json.dumps(pair[0]))]
    if isinstance(value, Set):
        return ["set", sorted((_canonical(item) for item in value), key=json.dumps)]
    if isinstance(value, list | tuple):
        return ["list", *(_canonical(item) for item in value)]
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal | uuid.UUID | PurePath):
        return [type(value).__name__, str(value)]
    # An object's default text holds its address: it would look changed at every run.
    raise ValueError(
        f"A value of type {type(value).__name__} in a document's metadata has no stable encoding; the limit is text, "
        "numbers, dates and lists or mappings of them. Convert it where the document is read."
    )
