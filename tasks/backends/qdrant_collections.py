"""What a collection of ours looks like: its physical name, its metadata, and whether an existing one is the one meant.

A collection name is an alias from its first run on; the physical collection behind it carries the fingerprint in its
name and in its metadata, so a changed model or chunker can build a new one beside it, never a mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.backends.points import DENSE_VECTOR
from tasks.errors import ConfigError, StoreMismatch

if TYPE_CHECKING:
    from qdrant_client import models

OWNER = "ballast"
SCHEMA_VERSION = 1
INDEXED_FIELDS = (
    "doc_id",
    "generation",
)  # keyword indexes, made before loading: strict mode refuses filters without one

_FINGERPRINT_CHARS = 12
_LONGEST_NAME = 255 - len("--") - _FINGERPRINT_CHARS  # Qdrant's limit for the physical name
_FORBIDDEN_CHARS = frozenset('<>:"/\\|?*\0\x1f')


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """The collection a run means to write: known before any model is loaded."""

    name: str
    dimension: int
    fingerprint: str
    model: str = ""
    revision: str = ""  # of the model: a question must be embedded with the same weights

    @property
    def physical(self) -> str:
        return f"{self.name}--{self.fingerprint[:_FINGERPRINT_CHARS]}"

    def to_metadata(self) -> dict[str, Any]:
        return {
            "owner": OWNER,
            "schema_version": SCHEMA_VERSION,
            "collection": self.name,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "revision": self.revision,
            "dimension": self.dimension,
        }


def check_name(name: str) -> None:
    """Raises ConfigError for a name that Qdrant refuses, or that leaves no room for the fingerprint."""
    forbidden = sorted(set(name) & _FORBIDDEN_CHARS)
    if forbidden:
        raise ConfigError(
            f"Collection name {name!r} holds {' '.join(map(repr, forbidden))}, which Qdrant forbids. "
            "Use letters, digits, - and _."
        )
    if name in ("", ".", "..") or len(name) > _LONGEST_NAME:
        raise ConfigError(
            f"Collection name {name!r} has {len(name)} characters; it takes 1 to {_LONGEST_NAME}, and can't be . or .."
        )


def is_ours(metadata: Mapping[str, Any] | None) -> bool:
    return metadata is not None and metadata.get("owner") == OWNER


def read_dense_vector(info: models.CollectionInfo) -> models.VectorParams | None:
    """The parameters of `text-dense`; None for a collection without it, or with one unnamed vector."""
    vectors = info.config.params.vectors
    return vectors.get(DENSE_VECTOR) if isinstance(vectors, dict) else None


def check_collection_info(spec: CollectionSpec, physical: str, info: models.CollectionInfo) -> None:
    """Raises StoreMismatch unless the collection is ours and made for this dimension, distance and fingerprint."""
    from qdrant_client import models

    way_out = "Choose another --collection"
    shown = f"Collection {spec.name!r}" if physical == spec.name else f"Collection {spec.name!r} ({physical})"
    metadata = info.config.metadata
    built_with = (metadata or {}).get("model")
    if metadata is None or not is_ours(metadata):
        raise StoreMismatch(
            f"{shown} was not made by Ballast: its owner is {(metadata or {}).get('owner')!r}, not {OWNER!r}. "
            f"Nothing was written to it. {way_out}."
        )
    if physical == spec.name:
        raise StoreMismatch(
            f"{shown} is a physical collection of Ballast, not a name to ingest into. "
            f"Use --collection {metadata.get('collection')}."
        )
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise StoreMismatch(
            f"{shown} has schema version {metadata.get('schema_version')}; this Ballast writes {SCHEMA_VERSION}. "
            f"{way_out}, or use the Ballast that made it."
        )
    vector = read_dense_vector(info)
    if vector is None:
        vectors = info.config.params.vectors
        names = ", ".join(sorted(vectors)) if isinstance(vectors, dict) else "one unnamed vector"
        raise StoreMismatch(f"{shown} has no vector named {DENSE_VECTOR!r} (it has: {names or 'none'}). {way_out}.")
    if vector.size != spec.dimension:
        raise StoreMismatch(
            f"{shown} holds vectors of dimension {vector.size} (model {built_with}); {spec.model or 'this model'} "
            f"gives {spec.dimension}. {way_out}, or embed with the model it was built with."
        )
    if vector.distance != models.Distance.COSINE:
        raise StoreMismatch(
            f"{shown} compares vectors by {vector.distance.value}; Ballast's are made for Cosine. {way_out}."
        )
    if metadata.get("fingerprint") != spec.fingerprint:
        raise StoreMismatch(
            f"{shown} was built with {_describe_difference(metadata, spec)}. Their vectors can't be compared. {way_out}, "
            f"or go back to the settings it was built with. Fingerprints: {str(metadata.get('fingerprint'))[:12]}, "
            f"now {spec.fingerprint[:12]}."
        )


def _describe_difference(metadata: Mapping[str, Any], spec: CollectionSpec) -> str:
    """What the collection had that this run has not, as far as its metadata tells."""
    model, revision = str(metadata.get("model")), str(metadata.get("revision"))
    if spec.revision and revision == spec.revision:
        return f"this model ({spec.model or model}) but another chunking, precision, prompt or version of the parsers"
    if spec.revision and model == spec.model:
        return f"revision {revision[:12]} of {model}; this run has {spec.revision[:12]}"
    if model == spec.model:
        return f"{model}, but with other settings"
    return f"model {model}; this run has {spec.model or 'another one'}"
