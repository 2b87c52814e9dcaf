"""The collections of one Qdrant: which are there, which one a name means, and making, switching and dropping them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.backends.points import DENSE_VECTOR
from tasks.backends.qdrant_calls import CheckedCalls
from tasks.backends.qdrant_collections import (
    INDEXED_FIELDS,
    LEDGER_INDEXED_FIELDS,
    MARKS_SOURCE,
    CollectionPlan,
    CollectionSpec,
    check_fingerprint,
    check_name,
    check_owner,
    check_vectors,
    find_ledgers,
    is_ours,
    is_physical_name,
    is_points_of,
    name_ledger,
    plan_live,
    read_dense_vector,
)
from tasks.backends.qdrant_connection import set_write_ahead_log
from tasks.errors import StoreError, StoreMismatch, StoreMissing, StoreRejected, StoreUnavailable
from tasks.records import CollectionState

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

log = logging.getLogger(__name__)


class Catalog:
    """Names, physical collections and their ledgers. Every change can be repeated, and completed by the next call."""

    def __init__(self, client: QdrantClient, calls: CheckedCalls, *, is_embedded: bool) -> None:
        self._client = client
        self._calls = calls
        self._is_embedded = is_embedded
        self._dimensions: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------ reading

    def aliases(self) -> dict[str, str]:
        answer = self._calls.run("list its aliases", self._client.get_aliases)
        return {alias.alias_name: alias.collection_name for alias in answer.aliases}

    def collections(self) -> set[str]:
        """All physical ones, ledgers and other people's included."""
        return {each.name for each in self._calls.run("list its collections", self._client.get_collections).collections}

    def list_names(self) -> list[str]:
        """What a user may name: aliases, and collections that no alias points to. No ledgers."""
        aliases, collections = self.aliases(), self.collections()
        return sorted(set(aliases) | (collections - set(aliases.values()) - find_ledgers(collections)))

    def list_our_names(self) -> list[str]:
        """The names of our physical collections, whether an alias points to one of them or not."""
        collections = self.collections()
        found = (self._info(each).config.metadata or {} for each in collections - find_ledgers(collections))
        return sorted({str(metadata.get("collection")) for metadata in found if is_ours(metadata)})

    def has(self, name: str) -> bool:
        return name in self.collections() or name in self.aliases()

    def missing(self, name: str) -> StoreMissing:
        there = self.list_names()
        listed = f"it has {', '.join(there)}" if there else "it has none: run `ballast ingest` first"
        return StoreMissing(f"Qdrant {self._calls.place} has no collection {name!r}; {listed}.")

    def read_model(self, name: str) -> dict[str, Any]:
        collections = self.collections()
        physical = self.aliases().get(name, name)
        if physical not in collections or physical in find_ledgers(collections):
            raise self.missing(name)
        metadata = self._info(physical).config.metadata
        if metadata is None or not is_ours(metadata):
            raise StoreMismatch(
                f"Collection {name!r} was not made by Ballast: it does not say which model embedded it."
            )
        return dict(metadata)

    def read_dimension(self, physical: str) -> int:
        if physical not in self._dimensions:
            vector = read_dense_vector(self._info(physical))
            if vector is None:
                raise StoreMismatch(
                    f"Collection {physical!r} has no vector named {DENSE_VECTOR!r}: Ballast did not make it."
                )
            self._dimensions[physical] = vector.size
        return self._dimensions[physical]

    def list_physical(self, name: str) -> list[CollectionState]:
        """Ours of this name, the live one first; of any schema version."""
        live = self.aliases().get(name)
        states = []
        collections = self.collections()
        for physical in sorted(each for each in collections if is_physical_name(name, each)):
            metadata = self._info(physical).config.metadata or {}
            if not is_points_of(name, metadata):
                continue
            ledger = name_ledger(physical)
            state = CollectionState(
                physical=physical,
                is_live=physical == live,
                fingerprint=str(metadata.get("fingerprint", "")),
                model=str(metadata.get("model", "")),
                revision=str(metadata.get("revision", "")),
                dimension=int(metadata.get("dimension") or 0),
                points=self._count(physical),
                documents=self.count_documents(ledger) if ledger in collections else 0,
            )
            states.append(state)
        return sorted(states, key=lambda state: (not state.is_live, state.physical))

    def count_documents(self, ledger: str) -> int:
        """Records of documents in a ledger, exactly: its marks of sources are none."""
        from qdrant_client import models

        if not self._count(ledger):  # it may not be indexed yet, and strict mode refuses a filter then
            return 0
        marks = models.FieldCondition(key="source", match=models.MatchValue(value=MARKS_SOURCE))
        read = partial(self._client.count, ledger, count_filter=models.Filter(must_not=[marks]), exact=True)
        return int(self._calls.run(f"count the documents in {ledger!r}", read).count)

    # ------------------------------------------------------------------------------------------ deciding

    def plan(self, spec: CollectionSpec, on_change: Literal["rebuild", "refuse"]) -> CollectionPlan:
        check_name(spec.name)
        collections = self.collections()
        live = self.aliases().get(spec.name)
        if live not in collections:  # also an alias that was left behind by its collection
            live = None
        if live is None and spec.name in collections:
            check_owner(spec.name, spec.name, self._info(spec.name))  # somebody else's, or a physical one: refused
        physical, reason = spec.physical, ""
        if live is not None:
            physical, reason = plan_live(spec, live, self._info(live), on_change)
        exists = physical in collections
        if exists and physical != live:
            self._check(spec, physical)
        return CollectionPlan(physical, live, exists, reason)

    def _check(self, spec: CollectionSpec, physical: str) -> models.CollectionInfo:
        info = self._info(physical)
        check_owner(spec.name, physical, info)
        check_vectors(spec, physical, info)
        check_fingerprint(spec, physical, info)
        return info

    # ------------------------------------------------------------------------------------------ changing

    def prepare(self, spec: CollectionSpec) -> str:
        """Order: points, their ledger, the indexes of both, the alias if the name has none. Returns the physical name."""
        from qdrant_client import models

        plan = self.plan(spec, "rebuild")
        dense = {DENSE_VECTOR: models.VectorParams(size=spec.dimension, distance=models.Distance.COSINE)}
        ledger = name_ledger(plan.physical)
        collections = self.collections()
        if plan.physical not in collections:
            self._create(plan.physical, dense, spec.to_metadata())
        if ledger not in collections:
            self._create(ledger, {}, spec.to_ledger_metadata())
        info = self._check(spec, plan.physical)  # another process may have been faster, with other settings
        if self._is_embedded:
            self._speed_up_writes(plan.physical)
            self._speed_up_writes(ledger)
        else:
            self._index(plan.physical, INDEXED_FIELDS, info)
            self._index(ledger, LEDGER_INDEXED_FIELDS, self._info(ledger))
        if plan.live is None:
            self.switch(spec.name, plan.physical)
        return plan.physical

    def switch(self, name: str, physical: str) -> None:
        """Point the alias to `physical`, in one call: a reader finds the old collection or the new one, never none."""
        from qdrant_client import models

        before = self.aliases().get(name)
        if before == physical:
            return
        changes: list[models.AliasOperations] = []
        if before is not None:
            changes.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=name)))
        created = models.CreateAlias(collection_name=physical, alias_name=name)
        changes.append(models.CreateAliasOperation(create_alias=created))
        self._calls.run(f"name {physical!r} {name!r}", lambda: self._client.update_collection_aliases(changes))
        if self.aliases().get(name) != physical:
            raise StoreUnavailable(
                f"Qdrant {self._calls.place} took the switch of {name!r} to {physical!r}, but does not show it. Run again."
            )
        log.info("qdrant alias=%s collection=%s before=%s", name, physical, before)

    def drop(self, name: str, physical: str) -> None:
        """The ledger first: killed in between, the collection is still listed, and dropping it again completes it."""
        collections, aliases = self.collections(), self.aliases()
        if physical in aliases or physical not in collections:
            raise self.missing(physical)
        named = sorted(alias for alias, target in aliases.items() if target == physical)
        if named:
            raise StoreRejected(
                f"Collection {physical!r} is what {', '.join(map(repr, named))} stands for now: dropping it would leave "
                "its readers with nothing. Switch the name to another collection first."
            )
        if not is_points_of(name, self._info(physical).config.metadata):
            raise StoreRejected(
                f"Collection {physical!r} is not one of {name!r}: Ballast drops none that it did not make for this name."
            )
        ledger = name_ledger(physical)
        for each in (ledger, physical):
            if each in collections:
                self._delete(each)
        self._dimensions.pop(physical, None)

    def _create(self, physical: str, vectors: Mapping[str, models.VectorParams], metadata: dict[str, Any]) -> None:
        try:
            self._calls.run(
                f"create collection {physical!r}",
                lambda: self._client.create_collection(physical, vectors_config=vectors, metadata=metadata),
            )
        except StoreRejected:
            # "Already exists": a first attempt whose answer was lost, or another process. What it is gets checked next.
            if physical not in self.collections():
                raise

    def _delete(self, physical: str) -> None:
        self._calls.run(f"drop collection {physical!r}", lambda: self._client.delete_collection(physical))
        # A server says False, not an error, for what it could not drop in time.
        if physical in self.collections():
            raise StoreUnavailable(f"Qdrant {self._calls.place} still has collection {physical!r}. Drop it again.")
        folder = self._embedded_folder()
        left = folder / "collection" / physical if folder is not None else None
        if left is not None and left.exists():
            # Embedded Qdrant ignores files that it can't remove; made again, the collection would have its old points.
            raise StoreError(
                f"Collection {physical!r} is dropped, but its files in {left} could not be removed. Remove that folder."
            )
        log.info("qdrant dropped=%s", physical)

    def _speed_up_writes(self, physical: str) -> None:
        folder = self._embedded_folder()
        if folder is not None:
            with self._calls.lock:
                set_write_ahead_log(folder, physical)

    def _embedded_folder(self) -> Path | None:
        folder = self._client.init_options.get("path") if self._is_embedded else None
        return Path(folder) if folder is not None else None

    def _index(self, physical: str, fields: Sequence[str], info: models.CollectionInfo) -> None:
        for field in fields:
            if field not in info.payload_schema:
                self._index_field(physical, field)

    def _index_field(self, physical: str, field: str) -> None:
        from qdrant_client import models

        def send() -> None:
            keyword = models.PayloadSchemaType.KEYWORD
            self._calls.check_completed(self._client.create_payload_index(physical, field, keyword, wait=True))

        self._calls.run(f"index {field!r} of {physical!r}", send)

    def _info(self, physical: str) -> models.CollectionInfo:
        return self._calls.run(f"describe {physical!r}", lambda: self._client.get_collection(physical))

    def _count(self, physical: str) -> int:
        return int(self._calls.run(f"count {physical!r}", lambda: self._client.count(physical, exact=True)).count)
