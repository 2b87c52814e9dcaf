"""What a collection of ours looks like: its physical name, its ledger's, its metadata, and whether it is the one meant.

A collection name is an alias from its first run on; the physical collection behind it carries the fingerprint in its
name and in its metadata, so a changed model or chunker can build a new one beside it, never a mix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tasks.backends.points import DENSE_VECTOR
from tasks.errors import ConfigError, StoreMismatch

if TYPE_CHECKING:
    from qdrant_client import models

OWNER = "ballast"
SCHEMA_VERSION = 2
# Keyword indexes, made before loading: a facet needs one, and strict mode refuses filters without one.
INDEXED_FIELDS = ("doc_id", "generation", "ballast_source")
LEDGER_INDEXED_FIELDS = ("source",)
# The source of a ledger's points that are marks of sources and no documents': so the one index tells them apart. The
# control character keeps it from being the name of anybody's source.
MARKS_SOURCE = "\x1fballast-marks"

LEDGER_SUFFIX = "--ledger"
_SEPARATOR = "--"
_FINGERPRINT_CHARS = 12
# Qdrant's limit is for the longest of the physical names: the ledger's.
_LONGEST_NAME = 255 - len(_SEPARATOR) - _FINGERPRINT_CHARS - len(LEDGER_SUFFIX)
_FORBIDDEN_CHARS = frozenset('<>:"/\\|?*\0\x1f')

_SHOWN_KNOBS = 4
_SHOWN_CHARS = 40

WAY_OUT = "Choose another --collection"


@dataclass(frozen=True, slots=True)
class CollectionSpec:
    """The collection a run means to write: known before any model is loaded."""

    name: str
    dimension: int
    fingerprint: str
    model: str = ""
    revision: str = ""  # of the model: a question must be embedded with the same weights
    recipe: Mapping[str, Any] = field(default_factory=dict)  # the parts of the fingerprint, JSON-ready; empty: unsaid

    @property
    def physical(self) -> str:
        return f"{self.name}{_SEPARATOR}{self.fingerprint[:_FINGERPRINT_CHARS]}"

    def to_metadata(self) -> dict[str, Any]:
        return {
            "owner": OWNER,
            "kind": "points",
            "schema_version": SCHEMA_VERSION,
            "collection": self.name,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "revision": self.revision,
            "dimension": self.dimension,
            "recipe": dict(self.recipe),
        }

    def to_ledger_metadata(self) -> dict[str, Any]:
        return {
            "owner": OWNER,
            "kind": "ledger",
            "schema_version": SCHEMA_VERSION,
            "collection": self.name,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class CollectionPlan:
    """Which physical collection a run writes to, and what the name means until then."""

    physical: str
    live: str | None  # what the alias points to; None: there is no alias yet
    exists: bool  # `physical` is there: made by an earlier run
    reason: str = ""  # of a rebuild: what differs from the live one

    @property
    def is_rebuild(self) -> bool:
        return self.live is not None and self.live != self.physical


def name_ledger(physical: str) -> str:
    return physical + LEDGER_SUFFIX


def find_ledgers(collections: Collection[str]) -> set[str]:
    """Those of `collections` that are another's ledger."""
    return {
        name for name in collections if name.endswith(LEDGER_SUFFIX) and name.removesuffix(LEDGER_SUFFIX) in collections
    }


def is_physical_name(name: str, collection: str) -> bool:
    """Whether `collection` may be a physical collection of `name`: the fingerprint's beginning is all that differs."""
    return (
        collection.startswith(name + _SEPARATOR) and len(collection) == len(name) + len(_SEPARATOR) + _FINGERPRINT_CHARS
    )


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


def is_points_of(name: str, metadata: Mapping[str, Any] | None) -> bool:
    """Whether the metadata is of a physical collection of `name`, of any schema version, and of no ledger."""
    if metadata is None or not is_ours(metadata):
        return False
    return metadata.get("collection") == name and metadata.get("kind") != "ledger"


def read_dense_vector(info: models.CollectionInfo) -> models.VectorParams | None:
    """The parameters of `text-dense`; None for a collection without it, or with one unnamed vector."""
    vectors = info.config.params.vectors
    return vectors.get(DENSE_VECTOR) if isinstance(vectors, dict) else None


def check_owner(name: str, physical: str, info: models.CollectionInfo) -> Mapping[str, Any]:
    """The metadata. Raises StoreMismatch unless the collection is ours, behind an alias, and of this schema version."""
    shown, metadata = _show(name, physical), info.config.metadata
    if metadata is None or not is_ours(metadata):
        raise StoreMismatch(
            f"{shown} was not made by Ballast: its owner is {(metadata or {}).get('owner')!r}, not {OWNER!r}. "
            f"Nothing was written to it. {WAY_OUT}."
        )
    if physical == name:
        raise StoreMismatch(
            f"{shown} is a physical collection of Ballast, not a name to ingest into. "
            f"Use --collection {metadata.get('collection')}."
        )
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise StoreMismatch(
            f"{shown} has schema version {metadata.get('schema_version')}; this Ballast writes {SCHEMA_VERSION}. "
            f"{WAY_OUT}, or use the Ballast that made it."
        )
    return metadata


def check_vectors(spec: CollectionSpec, physical: str, info: models.CollectionInfo) -> None:
    """Raises StoreMismatch unless the collection's vectors are of our name, this dimension and our distance."""
    from qdrant_client import models

    shown, vector = _show(spec.name, physical), read_dense_vector(info)
    if vector is None:
        vectors = info.config.params.vectors
        names = ", ".join(sorted(vectors)) if isinstance(vectors, dict) else "one unnamed vector"
        raise StoreMismatch(f"{shown} has no vector named {DENSE_VECTOR!r} (it has: {names or 'none'}). {WAY_OUT}.")
    if vector.size != spec.dimension:
        raise StoreMismatch(
            f"{shown} holds vectors of dimension {vector.size} (model {(info.config.metadata or {}).get('model')}); "
            f"{spec.model or 'this model'} gives {spec.dimension}. {WAY_OUT}, or embed with the model it was built with."
        )
    if vector.distance != models.Distance.COSINE:
        raise StoreMismatch(
            f"{shown} compares vectors by {vector.distance.value}; Ballast's are made for Cosine. {WAY_OUT}."
        )


def check_fingerprint(spec: CollectionSpec, physical: str, info: models.CollectionInfo) -> None:
    """Raises StoreMismatch for a collection of another fingerprint, and says what differs."""
    metadata = info.config.metadata or {}
    if metadata.get("fingerprint") != spec.fingerprint:
        raise StoreMismatch(
            f"{_show(spec.name, physical)} was built with {describe_difference(metadata, spec)}. "
            f"Their vectors can't be compared. {WAY_OUT}, go back to the settings it was built with, or let "
            "qdrant.on_change=rebuild make a new collection beside it. "
            f"Fingerprints: {str(metadata.get('fingerprint'))[:12]}, now {spec.fingerprint[:12]}."
        )


def plan_live(
    spec: CollectionSpec, live: str, info: models.CollectionInfo, on_change: Literal["rebuild", "refuse"]
) -> tuple[str, str]:
    """The physical collection to write to where the alias points to `live`, and the reason if it is another one.

    Raises StoreMismatch.
    """
    metadata = check_owner(spec.name, live, info)
    if on_change == "refuse" or metadata.get("fingerprint") == spec.fingerprint:
        check_vectors(spec, live, info)
        check_fingerprint(spec, live, info)
        return live, ""
    return spec.physical, f"{_show(spec.name, live)} was built with {describe_difference(metadata, spec)}."


def describe_difference(metadata: Mapping[str, Any], spec: CollectionSpec) -> str:
    """What the collection had that this run has not, as far as its metadata tells."""
    model, revision = str(metadata.get("model")), str(metadata.get("revision"))
    knobs = _describe_knobs(metadata.get("recipe") or {}, spec.recipe)
    if spec.revision and revision == spec.revision:
        other = f"other settings: {knobs}" if knobs else "another chunking, precision, prompt or version of the parsers"
        return f"this model ({spec.model or model}) but {other}"
    if spec.revision and model == spec.model:
        return f"revision {revision[:12]} of {model}; this run has {spec.revision[:12]}"
    if model == spec.model:
        return f"{model}, but with other settings{f': {knobs}' if knobs else ''}"
    return f"model {model}; this run has {spec.model or 'another one'}"


def _describe_knobs(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The knobs that differ, with both values; empty where one of the two recipes is unsaid."""
    if not before or not now:
        return ""
    was, has = dict(_flatten(before)), dict(_flatten(now))
    differing = [knob for knob in {**has, **was} if was.get(knob) != has.get(knob)]
    shown = [f"{knob} {_shorten(was.get(knob))} (now {_shorten(has.get(knob))})" for knob in differing[:_SHOWN_KNOBS]]
    more = len(differing) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _flatten(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            # A tuple comes back from Qdrant as a list: equal here.
            yield f"{prefix}{key}", str(list(value)) if isinstance(value, list | tuple) else str(value)


def _shorten(value: str | None) -> str:
    if value is None:
        return "unset"
    return repr(value) if not value else value if len(value) <= _SHOWN_CHARS else f"{value[:_SHOWN_CHARS]}..."


def _show(name: str, physical: str) -> str:
    return f"Collection {name!r}" if physical == name else f"Collection {name!r} ({physical})"
