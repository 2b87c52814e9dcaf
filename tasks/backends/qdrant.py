"""The store: points and collections in Qdrant. Every write waits, is checked, and can be repeated."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.backends.grpc_points import to_grpc_points, upsert_grpc_points
from tasks.backends.points import (
    DENSE_VECTOR,
    STORED_FIELDS,
    check_points,
    measure_payload,
    split_batches,
    to_points,
    to_search_hit,
    to_stored_points,
)
from tasks.backends.qdrant_batches import send_halved
from tasks.backends.qdrant_calls import CheckedCalls, RetryPolicy
from tasks.backends.qdrant_catalog import Catalog
from tasks.backends.qdrant_collections import CollectionPlan, CollectionSpec
from tasks.backends.qdrant_connection import (
    SERVER_HINT,
    choose_url,
    connect_server,
    open_embedded,
    speaks_grpc,
)
from tasks.backends.qdrant_documents import Documents, EmbeddedDocuments, ServerDocuments, delete_ids
from tasks.backends.qdrant_ledger import Ledger
from tasks.backends.qdrant_pages import Pages
from tasks.config import QdrantSettings
from tasks.errors import StoreError, StoreRejected
from tasks.records import CollectionState, Payload, SearchHit, StoredPoints, Vectors

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
        self._warned: set[str] = set()
        self._catalog = Catalog(client, self.calls, is_embedded=is_embedded)
        self._pages = Pages(client, self.calls, is_embedded=is_embedded)
        self._documents: Documents = (
            EmbeddedDocuments(client, self.calls, self._pages) if is_embedded else ServerDocuments(client, self.calls)
        )

    def close(self) -> None:
        with self.calls.lock:
            self._client.close()

    # ------------------------------------------------------------------------------------------ collections

    def plan_collection(
        self,
        name: str,
        *,
        dimension: int,
        fingerprint: str,
        model: str = "",
        revision: str = "",
        recipe: Mapping[str, Any] | None = None,
        on_change: Literal["rebuild", "refuse"] = "rebuild",
    ) -> CollectionPlan:
        """Which physical collection a run of `name` writes to; changes nothing. Ask before loading a model.

        recipe: the parts of the fingerprint, JSON-ready, so that the reason for a rebuild can name those that differ.
        Raises StoreMismatch for a collection that is not ours, is no name, or can't be gone on with; under
        on_change="refuse" also for one of another fingerprint or dimension.
        """
        spec = CollectionSpec(name, dimension, fingerprint, model, revision, recipe or {})
        return self._catalog.plan(spec, on_change)

    def prepare_collection(
        self,
        name: str,
        *,
        dimension: int,
        fingerprint: str,
        model: str,
        revision: str = "",
        recipe: Mapping[str, Any] | None = None,
    ) -> str:
        """Make what the plan says unless it is there: collection, ledger, indexes; returns the physical name.

        A name that has no alias gets it; one that has keeps it until switch_alias(). Killed in between, the next call
        completes it.
        """
        return self._catalog.prepare(CollectionSpec(name, dimension, fingerprint, model, revision, recipe or {}))

    def switch_alias(self, name: str, physical: str) -> None:
        """Let `name` stand for `physical` from now on, in one step for its readers. Repeatable."""
        self._catalog.switch(name, physical)

    def list_our_names(self) -> list[str]:
        """The names of all collections that Ballast made, also of those that no alias points to."""
        return self._catalog.list_our_names()

    def list_physical(self, name: str) -> list[CollectionState]:
        """The physical collections of a name, the live one first; empty where there are none."""
        return self._catalog.list_physical(name)

    def drop_physical(self, name: str, physical: str) -> None:
        """Drop one of the name's collections and its ledger.

        Raises StoreRejected for the one that an alias points to and for one that is not of this name, StoreMissing.
        """
        self._catalog.drop(name, physical)

    def ledger(self, physical: str) -> Ledger:
        """The ledger of a physical collection; asks nothing, and need not be there yet."""
        return Ledger(self._client, self.calls, self._catalog, self._pages, physical, is_embedded=self.is_embedded)

    def collection_model(self, name: str) -> dict[str, Any]:
        """The collection's metadata: fingerprint, model, dimension, schema_version. StoreMissing if there is none."""
        return self._catalog.read_model(name)

    def list_collections(self) -> list[str]:
        """What a user may name: aliases, and collections that no alias points to. No ledgers."""
        return self._catalog.list_names()

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
            if self._catalog.has(collection):
                raise
            raise self._catalog.missing(collection) from error
        return [to_search_hit(point) for point in answer.points]

    def count_source(self, physical: str, source: str, *, except_doc_ids: Sequence[str] = ()) -> int:
        """All points of a source, exactly, but those of some documents."""
        return self._documents.count_source(physical, source, except_doc_ids=except_doc_ids)

    def count_generations(self, physical: str, source: str, doc_ids: Sequence[str]) -> dict[str, int]:
        """Generation -> number of its points, exactly, of all points of these documents of a source."""
        return self._documents.count_generations(physical, source, doc_ids)

    def scroll_points(self, physical: str, *, with_vectors: bool, page_points: int = 512) -> Iterator[StoredPoints]:
        """All points, a page at a time, in no order. Points written meanwhile may be missed; the others come once."""
        vectors = [DENSE_VECTOR] if with_vectors else []
        pages = self._pages.iterate(physical, fields=STORED_FIELDS, page_points=page_points, vectors=vectors)
        for page in pages:
            yield to_stored_points(page, with_vectors=with_vectors)

    # ------------------------------------------------------------------------------------------ points: deleting

    def delete_other_generations(
        self, physical: str, source: str, doc_ids: Sequence[str], keep: Collection[str]
    ) -> None:
        """Delete the points of these documents that are of no generation in `keep`; counted: none is left.

        Raises StoreRejected where nothing is to be kept, StoreUnavailable where some are still there.
        """
        self._documents.delete_other_generations(physical, source, doc_ids, keep)

    def delete_documents(self, physical: str, source: str, doc_ids: Sequence[str]) -> None:
        """Delete all points of these documents; counted: none is left. Raises StoreUnavailable otherwise."""
        self._documents.delete_documents(physical, source, doc_ids)

    def delete_points(self, physical: str, ids: Sequence[str]) -> None:
        """Delete points by id; those that are not there are no error."""
        delete_ids(self._client, self.calls, physical, ids)

    # ------------------------------------------------------------------------------------------ points: writing

    def upsert(self, physical: str, ids: Sequence[str], vectors: Vectors, payloads: Sequence[Payload]) -> None:
        """Store points; returns once every batch is applied. Repeatable: the same ids are overwritten.

        vectors: float32, shape (points, dimension), unit length. Raises StoreError for more than an embedded Qdrant can
        bear, before anything is written.
        """
        if not ids:
            return
        dimension = self._catalog.read_dimension(physical)
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

    def _upsert_batch(self, physical: str, points: Sequence[models.PointStruct] | Sequence[grpc.PointStruct]) -> None:
        def send(part: Sequence[Any]) -> None:
            if self._speaks_grpc:
                result = upsert_grpc_points(self._client, physical, part)
            else:
                result = self._client.upsert(physical, points=list(part), wait=True)
            self.calls.check_completed(result)

        send_halved(self.calls, lambda count: f"upsert {count} points into {physical!r}", points, send)

    def _update_batch(self, physical: str, operations: Sequence[models.OverwritePayloadOperation]) -> None:
        def send(part: Sequence[models.OverwritePayloadOperation]) -> None:
            for result in self._client.batch_update_points(physical, update_operations=part, wait=True):
                self.calls.check_completed(result)

        send_halved(self.calls, lambda count: f"refresh {count} payloads in {physical!r}", operations, send)

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

    def _retrieve(
        self, physical: str, ids: Sequence[str], *, with_payload: bool | list[str]
    ) -> Iterator[models.Record]:
        unique = list(dict.fromkeys(ids))
        for start in range(0, len(unique), _IDS_PER_REQUEST):
            part = unique[start : start + _IDS_PER_REQUEST]
            read = partial(self._client.retrieve, physical, ids=part, with_payload=with_payload, with_vectors=False)
            yield from self.calls.run(f"look up {len(part)} points in {physical!r}", read)
