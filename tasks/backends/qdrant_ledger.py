"""The ledger of one physical collection: a companion collection without vectors, one point a document.

Beside them it has a mark for each source whose books were closed here: a point like a document's, but of MARKS_SOURCE.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any

from tasks.backends.points import check_text, measure_payload, split_batches
from tasks.backends.qdrant_batches import send_halved
from tasks.backends.qdrant_calls import CheckedCalls
from tasks.backends.qdrant_catalog import Catalog
from tasks.backends.qdrant_collections import MARKS_SOURCE, name_ledger
from tasks.backends.qdrant_documents import delete_ids
from tasks.backends.qdrant_pages import Pages
from tasks.errors import StoreRejected
from tasks.records import LedgerRecord, LedgerStatus

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

# Never change it: a record is found by its id, so a new value would lose every ledger.
_NAMESPACE = uuid.UUID("0b7c9a3e-4f4e-5c0b-9d5c-6a1f0e7d2b58")
_RECORDS_PER_REQUEST = 512
_RECORDS_PER_PAGE = 4_096  # some 600 bytes each
_BYTES_PER_REQUEST = 8 * 1024**2
_FIELDS = [field.name for field in fields(LedgerRecord)]


class Ledger:
    """What is known of each document of `physical`. One that was not made yet reads as empty.

    Writes return once they are applied, and can be repeated. Every method raises StoreUnavailable or StoreRejected.
    """

    def __init__(
        self,
        client: QdrantClient,
        calls: CheckedCalls,
        catalog: Catalog,
        pages: Pages,
        physical: str,
        *,
        is_embedded: bool,
    ) -> None:
        self.name = name_ledger(physical)
        self._client = client
        self._calls = calls
        self._catalog = catalog
        self._pages = pages
        self._is_embedded = is_embedded

    # ------------------------------------------------------------------------------------------ reading

    def read(self, source: str, doc_ids: Sequence[str]) -> dict[str, LedgerRecord]:
        """doc_id -> record, of those of `doc_ids` that have one. By id: as fast in a large ledger as in a small one."""
        points = list(dict.fromkeys(to_point_id(source, doc_id) for doc_id in doc_ids))
        found: list[LedgerRecord] = []
        for start in range(0, len(points), _RECORDS_PER_REQUEST):
            part = points[start : start + _RECORDS_PER_REQUEST]
            read = partial(self._client.retrieve, self.name, ids=part, with_payload=True, with_vectors=False)
            try:
                answer = self._calls.run(f"look up {len(part)} documents in {self.name!r}", read)
            except StoreRejected:
                if self._is_made():
                    raise
                return {}
            found += map(to_record, answer)
        return {record.doc_id: record for record in found}

    def scroll(self, source: str | None = None) -> Iterator[list[LedgerRecord]]:
        """All records, or those of one source, some thousand at a time, in no order; each once, if nothing writes."""
        if not self._is_made():
            return
        equal = {} if source is None else {"source": source}
        for page in self._pages.iterate(self.name, fields=_FIELDS, page_points=_RECORDS_PER_PAGE, equal=equal):
            records = map(to_record, page)
            yield [record for record in records if record.source != MARKS_SOURCE or source == MARKS_SOURCE]

    def count(self, source: str | None = None) -> int:
        """Records in all, or of one source, exactly."""
        try:
            if source is None:
                return self._catalog.count_documents(self.name)
            read = partial(self._client.count, self.name, count_filter=_select(source), exact=True)
            return int(self._calls.run(f"count the documents in {self.name!r}", read).count)
        except StoreRejected:
            if self._is_made():
                raise
            return 0

    def list_sources(self) -> set[str]:
        """The sources that have a record of a document."""
        if not self._is_made():
            return set()
        if self._is_embedded:  # its facet respells what looks like a UUID
            pages = self._pages.iterate(self.name, fields=["source"], page_points=_RECORDS_PER_PAGE)
            found = {str((point.payload or {}).get("source")) for page in pages for point in page}
        else:
            found = self._facet_sources(limit=256)
        return found - {MARKS_SOURCE}

    def read_marks(self) -> dict[str, str]:
        """Source -> when a run of it last closed its books here, as write_mark() was told; also of one without documents."""
        return {mark.doc_id: mark.updated_at for page in self.scroll(MARKS_SOURCE) for mark in page}

    def read_mark(self, source: str) -> LedgerRecord | None:
        """What write_mark() was told last of one source: its `doc_id`; None: nothing."""
        return self.read(MARKS_SOURCE, [source]).get(source)

    # ------------------------------------------------------------------------------------------ writing

    def write(self, records: Sequence[LedgerRecord]) -> None:
        """Add the records, or put them in the place of those of the same documents; the last one of a document counts."""
        payloads = {to_point_id(record.source, record.doc_id): to_payload(record) for record in records}
        ids = list(payloads)
        sizes = [measure_payload(point_id, payload) for point_id, payload in payloads.items()]
        for batch in split_batches(sizes, max_points=_RECORDS_PER_REQUEST, max_bytes=_BYTES_PER_REQUEST):
            self._upsert(ids[batch], payloads)

    def write_mark(self, source: str, closed_at: str, status: LedgerStatus = "done") -> None:
        """Say that a run of `source` closed its books here, all documents written, at that time (ISO; empty: not so).

        status: "pending" while a run writes, "failed" where its books closed and some documents failed.
        """
        self.write([LedgerRecord(MARKS_SOURCE, source, status, "", updated_at=closed_at)])

    def remove(self, source: str, doc_ids: Sequence[str]) -> None:
        """Forget these documents; those without a record are no error."""
        if doc_ids and self._is_made():
            points = dict.fromkeys(to_point_id(source, doc_id) for doc_id in doc_ids)
            delete_ids(self._client, self._calls, self.name, list(points))

    # ------------------------------------------------------------------------------------------ inside

    def _upsert(self, ids: Sequence[str], payloads: Mapping[str, dict[str, Any]]) -> None:
        from qdrant_client import models

        def send(part: Sequence[str]) -> None:
            points = [models.PointStruct(id=point_id, vector={}, payload=payloads[point_id]) for point_id in part]
            self._calls.check_completed(self._client.upsert(self.name, points=points, wait=True))

        send_halved(self._calls, lambda count: f"write {count} records to {self.name!r}", ids, send)

    def _facet_sources(self, *, limit: int) -> set[str]:
        read = partial(self._client.facet, self.name, "source", limit=limit, exact=True)
        hits = self._calls.run(f"list the sources in {self.name!r}", read).hits
        if len(hits) >= limit:  # as many as were asked for: there may be more
            return self._facet_sources(limit=4 * limit)
        return {str(hit.value) for hit in hits}

    def _is_made(self) -> bool:
        return self.name in self._catalog.collections()


def to_point_id(source: str, doc_id: str) -> str:
    """UUIDv5 of one document of one source. Raises StoreRejected for what a request can't hold."""
    check_text(source)
    check_text(doc_id)
    return str(uuid.uuid5(_NAMESPACE, json.dumps([source, doc_id])))


def to_payload(record: LedgerRecord) -> dict[str, Any]:
    # A reason may quote anything: a file's name, a library's words.
    return {**asdict(record), "reason": record.reason.encode(errors="replace").decode()}


def to_record(point: models.Record) -> LedgerRecord:
    payload = point.payload or {}
    return LedgerRecord(**{field: payload[field] for field in _FIELDS if field in payload})


def _select(source: str) -> models.Filter:
    from qdrant_client import models

    check_text(source)
    return models.Filter(must=[models.FieldCondition(key="source", match=models.MatchValue(value=source))])
