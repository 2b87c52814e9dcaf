"""The store: points and collections in Qdrant. Every write waits, is checked, and can be repeated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.backends.grpc_points import to_grpc_points
from tasks.backends.points import DENSE_VECTOR, check_points, measure_payload, split_batches, to_points, to_search_hit
from tasks.backends.qdrant_calls import CheckedCalls, RetryPolicy
from tasks.backends.qdrant_collections import (
    INDEXED_FIELDS,
    CollectionSpec,
    check_collection_info,
    check_name,
    is_ours,
    read_dense_vector,
)
from tasks.backends.qdrant_connection import (
    SERVER_HINT,
    choose_url,
    connect_server,
    open_embedded,
    set_write_ahead_log,
    speaks_grpc,
)
from tasks.backends.qdrant_faults import BatchTooLarge
from tasks.config import QdrantSettings
from tasks.errors import StoreError, StoreMismatch, StoreMissing, StoreRejected, StoreUnavailable
from tasks.records import Payload, SearchHit, Vectors

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, grpc, models

log = logging.getLogger(__name__)

EMBEDDED_WARN_POINTS = 10_000
EMBEDDED_MAX_POINTS = 50_000  # brute-force search; reopening takes 28 s and 6 GB at 100,000 points of 1024-d

_IDS_PER_REQUEST = 1_000


def open_store(settings: QdrantSettings, data_folder: str, *, environment: Mapping[str, str]) -> QdrantStore:
    """The store that settings and environment name: a server that has answered, else the embedded one in `data_folder`.

    Raises ConfigError, StoreUnavailable, StoreLocked or StoreError.
    """
    url = choose_url(settings, environment)
    if url is not None:
        client, place = connect_server(url, settings, environment), f"at {url}"
    else:
        folder = Path(data_folder) / "qdrant"
        client, place = open_embedded(folder), f"in {folder}"
    return QdrantStore(
        client,
        place=place,
        is_embedded=url is None,
        batch_points=settings.batch_points,
        batch_bytes=settings.batch_bytes,
    )


class QdrantStore:
    """Collections and points behind one client. Methods may be called from several threads.

    Every method raises StoreUnavailable once its retries are used up, and StoreRejected for what Qdrant refuses.
    `collection` is a name (alias) or a physical collection; `physical` is what prepare_collection returned.
    """

    def __init__(
        self,
        client: QdrantClient,
        *,
        place: str,
        is_embedded: bool,
        batch_points: int = 256,
        batch_bytes: int = 8 * 1024**2,
        retry: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._speaks_grpc = speaks_grpc(client)
        self.is_embedded = is_embedded
        self.calls = CheckedCalls(place, is_embedded=is_embedded, retry=retry, sleep=sleep)
        self._batch_points = batch_points
        self._batch_bytes = batch_bytes
        self._dimensions: dict[str, int] = {}
        self._warned: set[str] = set()

    def close(self) -> None:
        with self.calls.lock:
            self._client.close()

    # ------------------------------------------------------------------------------------------ collections

    def check_collection(
        self, name: str, *, dimension: int, fingerprint: str, model: str = "", revision: str = ""
    ) -> str:
        """The physical collection that `name` would be written to; changes nothing. Ask before loading a model.

        Raises StoreMismatch for a collection of another dimension or fingerprint, or one that is not ours.
        """
        spec = CollectionSpec(name, dimension, fingerprint, model, revision)
        return self._find_physical(spec)[0]

    def prepare_collection(self, name: str, *, dimension: int, fingerprint: str, model: str, revision: str = "") -> str:
        """Make the collection if it is not there, with its indexes and its alias; returns the physical name.

        Order: collection with metadata, indexes, alias. Killed in between, the next call completes it.
        """
        spec = CollectionSpec(name, dimension, fingerprint, model, revision)
        physical, info = self._find_physical(spec)
        if info is None:
            self._create_collection(spec)
            physical, info = self._find_physical(spec)  # another process may have been faster, with other settings
        if info is None:
            raise StoreUnavailable(
                f"Qdrant {self.calls.place} made collection {physical!r}, but does not list it. Run again."
            )
        if self.is_embedded:
            self._speed_up_writes(physical)
        else:
            self._index_fields(physical, info)
        self._set_alias(name, physical)
        return physical

    def collection_model(self, name: str) -> dict[str, Any]:
        """The collection's metadata: fingerprint, model, dimension, schema_version. StoreMissing if there is none."""
        physical = self._aliases().get(name, name)
        if physical not in self._collections():
            raise self._missing(name)
        metadata = self._info(physical).config.metadata
        if metadata is None or not is_ours(metadata):
            raise StoreMismatch(
                f"Collection {name!r} was not made by Ballast: it does not say which model embedded it."
            )
        return dict(metadata)

    def list_collections(self) -> list[str]:
        """What a user may name: aliases, and collections that no alias points to."""
        aliases = self._aliases()
        return sorted(set(aliases) | (self._collections() - set(aliases.values())))

    # ------------------------------------------------------------------------------------------ points: reading

    def existing_ids(self, physical: str, ids: Sequence[str]) -> set[str]:
        """Which of `ids` are stored."""
        return {str(record.id) for record in self._retrieve(physical, ids, with_payload=False)}

    def existing_generations(self, physical: str, ids: Sequence[str]) -> dict[str, str]:
        """Node id -> generation, of those of `ids` that are stored."""
        records = self._retrieve(physical, ids, with_payload=["generation"])
        return {str(record.id): str((record.payload or {}).get("generation", "")) for record in records}

    def count_ids(self, physical: str, ids: Sequence[str]) -> int:
        """How many of `ids` are stored, exactly; repeated ids count once."""
        # Not a count with a has-id filter: embedded Qdrant compares every point with every id of it.
        return len(self.existing_ids(physical, ids))

    def count(self, collection: str) -> int:
        """All points, exactly (a server's `points_count` is approximate)."""
        return int(self.calls.run(f"count {collection!r}", lambda: self._client.count(collection, exact=True)).count)

    def search(self, collection: str, vector: Vectors, limit: int, *, doc_id: str | None = None) -> list[SearchHit]:
        """The `limit` passages nearest to a vector of shape (dimension,), best first; of one document if `doc_id`."""
        from qdrant_client import models

        only = None
        if doc_id is not None:
            only = models.Filter(must=[models.FieldCondition(key="doc_id", match=models.MatchValue(value=doc_id))])
        query = vector.tolist()
        try:
            answer = self.calls.run(
                f"search {collection!r}",
                lambda: self._client.query_points(
                    collection, query=query, using=DENSE_VECTOR, query_filter=only, limit=limit, with_payload=True
                ),
            )
        except StoreRejected as error:
            if collection in self._collections() | set(self._aliases()):
                raise
            raise self._missing(collection) from error
        return [to_search_hit(point) for point in answer.points]

    # ------------------------------------------------------------------------------------------ points: writing

    def upsert(self, physical: str, ids: Sequence[str], vectors: Vectors, payloads: Sequence[Payload]) -> None:
        """Store points; returns once every batch is applied. Repeatable: the same ids are overwritten.

        vectors: float32, shape (points, dimension), unit length. Raises StoreError for more than an embedded Qdrant can
        bear, before anything is written.
        """
        if not ids:
            return
        dimension = self._dimension(physical)
        sizes = check_points(ids, vectors, payloads, dimension=dimension, over_grpc=self._speaks_grpc)
        if self.is_embedded:
            self._check_embedded_room(physical, ids)
        for batch in split_batches(sizes, max_points=self._batch_points, max_bytes=self._batch_bytes):
            convert = to_grpc_points if self._speaks_grpc else to_points
            self._upsert_batch(physical, convert(ids[batch], vectors[batch], payloads[batch]))

    def refresh_payloads(self, physical: str, ids: Sequence[str], payloads: Sequence[Payload]) -> None:
        """Replace the payloads of stored points; their vectors stay. Raises StoreRejected if a point is not there."""
        from qdrant_client import models

        sizes = [measure_payload(point_id, payload) for point_id, payload in zip(ids, payloads, strict=True)]
        for batch in split_batches(sizes, max_points=self._batch_points, max_bytes=self._batch_bytes):
            operations = [
                models.OverwritePayloadOperation(
                    overwrite_payload=models.SetPayload(payload=payload, points=[point_id])
                )
                for point_id, payload in zip(ids[batch], payloads[batch], strict=True)
            ]
            self._update_batch(physical, operations)

    def _upsert_batch(self, physical: str, points: list[models.PointStruct] | list[grpc.PointStruct]) -> None:
        def send() -> None:
            self.calls.check_completed(self._client.upsert(physical, points=points, wait=True))

        try:
            self.calls.run(f"upsert {len(points)} points into {physical!r}", send, can_split=len(points) > 1)
        except BatchTooLarge as error:
            log.info("qdrant action=split points=%d reason=%s", len(points), error)
            half = len(points) // 2
            self._upsert_batch(physical, points[:half])
            self._upsert_batch(physical, points[half:])

    def _update_batch(self, physical: str, operations: Sequence[models.OverwritePayloadOperation]) -> None:
        def send() -> None:
            for result in self._client.batch_update_points(physical, update_operations=operations, wait=True):
                self.calls.check_completed(result)

        try:
            self.calls.run(f"refresh {len(operations)} payloads in {physical!r}", send, can_split=len(operations) > 1)
        except BatchTooLarge as error:
            log.info("qdrant action=split payloads=%d reason=%s", len(operations), error)
            half = len(operations) // 2
            self._update_batch(physical, operations[:half])
            self._update_batch(physical, operations[half:])

    def _check_embedded_room(self, physical: str, ids: Sequence[str]) -> None:
        after = self.count(physical) + len(ids)
        if after > EMBEDDED_WARN_POINTS:
            after -= self.count_ids(physical, ids)
        self.check_room(physical, after)

    def check_room(self, physical: str, after: int) -> None:
        """Raises StoreError where `after` points in all are more than an embedded Qdrant can bear; a server takes any.

        Ask before points are embedded: upsert() only looks when their vectors are made.
        """
        if not self.is_embedded:
            return
        if after > EMBEDDED_MAX_POINTS:
            raise StoreError(
                f"{physical!r} would hold {after:,} points; the embedded Qdrant {self.calls.place} is for "
                f"{EMBEDDED_MAX_POINTS:,} at most, since it searches by brute force and opens slowly. "
                f"Run a Qdrant server: {SERVER_HINT}, and ingest again."
            )
        if after > EMBEDDED_WARN_POINTS and physical not in self._warned:
            self._warned.add(physical)
            log.warning(
                "qdrant collection=%s points=%d embedded Qdrant: slow above %d points, refuses above %d. A server: %s",
                physical,
                after,
                EMBEDDED_WARN_POINTS,
                EMBEDDED_MAX_POINTS,
                SERVER_HINT,
            )

    # ------------------------------------------------------------------------------------------ inside

    def _find_physical(self, spec: CollectionSpec) -> tuple[str, models.CollectionInfo | None]:
        """The physical collection for `spec`, checked, and its info; None if it has yet to be made."""
        check_name(spec.name)
        collections = self._collections()
        physical = self._aliases().get(spec.name)
        if physical is None:
            # Not behind an alias: somebody else's, or ours, left between its creation and its alias.
            physical = spec.name if spec.name in collections else spec.physical
        if physical not in collections:
            return physical, None
        info = self._info(physical)
        check_collection_info(spec, physical, info)
        return physical, info

    def _create_collection(self, spec: CollectionSpec) -> None:
        from qdrant_client import models

        try:
            self.calls.run(
                f"create collection {spec.physical!r}",
                lambda: self._client.create_collection(
                    spec.physical,
                    vectors_config={
                        DENSE_VECTOR: models.VectorParams(size=spec.dimension, distance=models.Distance.COSINE)
                    },
                    metadata=spec.to_metadata(),
                ),
            )
        except StoreRejected:
            # "Already exists": a first attempt whose answer was lost, or another process. What it is gets checked next.
            if spec.physical not in self._collections():
                raise

    def _speed_up_writes(self, physical: str) -> None:
        folder = self._client.init_options.get("path")
        if folder is not None:
            with self.calls.lock:
                set_write_ahead_log(Path(folder), physical)

    def _index_fields(self, physical: str, info: models.CollectionInfo) -> None:
        for field in INDEXED_FIELDS:
            if field not in info.payload_schema:
                self._index_field(physical, field)

    def _index_field(self, physical: str, field: str) -> None:
        from qdrant_client import models

        def send() -> None:
            keyword = models.PayloadSchemaType.KEYWORD
            self.calls.check_completed(self._client.create_payload_index(physical, field, keyword, wait=True))

        self.calls.run(f"index {field!r} of {physical!r}", send)

    def _set_alias(self, name: str, physical: str) -> None:
        from qdrant_client import models

        if self._aliases().get(name) == physical:
            return
        alias = models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=physical, alias_name=name))
        self.calls.run(f"name {physical!r} {name!r}", lambda: self._client.update_collection_aliases([alias]))

    def _retrieve(
        self, physical: str, ids: Sequence[str], *, with_payload: bool | list[str]
    ) -> Iterator[models.Record]:
        unique = list(dict.fromkeys(ids))
        for start in range(0, len(unique), _IDS_PER_REQUEST):
            part = unique[start : start + _IDS_PER_REQUEST]
            read = partial(self._client.retrieve, physical, ids=part, with_payload=with_payload, with_vectors=False)
            yield from self.calls.run(f"look up {len(part)} points in {physical!r}", read)

    def _aliases(self) -> dict[str, str]:
        answer = self.calls.run("list its aliases", self._client.get_aliases)
        return {alias.alias_name: alias.collection_name for alias in answer.aliases}

    def _collections(self) -> set[str]:
        return {each.name for each in self.calls.run("list its collections", self._client.get_collections).collections}

    def _info(self, physical: str) -> models.CollectionInfo:
        return self.calls.run(f"describe {physical!r}", lambda: self._client.get_collection(physical))

    def _dimension(self, physical: str) -> int:
        if physical not in self._dimensions:
            vector = read_dense_vector(self._info(physical))
            if vector is None:
                raise StoreMismatch(
                    f"Collection {physical!r} has no vector named {DENSE_VECTOR!r}: Ballast did not make it."
                )
            self._dimensions[physical] = vector.size
        return self._dimensions[physical]

    def _missing(self, name: str) -> StoreMissing:
        there = self.list_collections()
        listed = f"it has {', '.join(there)}" if there else "it has none: run `ballast ingest` first"
        return StoreMissing(f"Qdrant {self.calls.place} has no collection {name!r}; {listed}.")
