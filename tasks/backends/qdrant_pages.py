"""Reading all points of a collection page by page, at the same cost for the last page as for the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from tasks.backends.qdrant_calls import CheckedCalls

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

# Embedded Qdrant sorts all ids and skips to the offset for every page of a scroll: 56 ms a page at 50,000 points, so a
# ledger of 100,000 documents would take over 20 s in pages of 512. All ids first, then their points by id: 4 s.
_LISTED_IDS = 65_536


class Pages:
    """Of the collections behind one client. A page that fails for a passing reason is asked for again, by itself."""

    def __init__(self, client: QdrantClient, calls: CheckedCalls, *, is_embedded: bool) -> None:
        self._client = client
        self._calls = calls
        self._is_embedded = is_embedded

    def iterate(
        self,
        collection: str,
        *,
        fields: Sequence[str],
        page_points: int,
        equal: Mapping[str, str] | None = None,
        vectors: Sequence[str] = (),
    ) -> Iterator[list[models.Record]]:
        """Pages of points with these payload fields and vectors; of those whose fields equal `equal` (among `fields`).

        Points written meanwhile may be missed, deleted ones may be in it; all others come exactly once.
        """
        equal = equal or {}
        pages = self._iterate_embedded if self._is_embedded else self._iterate_server
        for page in pages(collection, fields, page_points, equal, list(vectors) or False):
            if page:
                yield page

    def _iterate_server(
        self,
        collection: str,
        fields: Sequence[str],
        page_points: int,
        equal: Mapping[str, str],
        vectors: list[str] | bool,
    ) -> Iterator[list[models.Record]]:
        from qdrant_client import models

        conditions = [
            models.FieldCondition(key=field, match=models.MatchValue(value=value)) for field, value in equal.items()
        ]
        offset: models.ExtendedPointId | None = None
        while True:
            read = partial(
                self._client.scroll,
                collection,
                scroll_filter=models.Filter(must=list(conditions)) if conditions else None,
                limit=page_points,
                offset=offset,
                with_payload=list(fields),
                with_vectors=vectors,
            )
            page, offset = self._calls.run(f"read a page of {collection!r}", read)
            yield page
            if offset is None:
                return

    def _iterate_embedded(
        self,
        collection: str,
        fields: Sequence[str],
        page_points: int,
        equal: Mapping[str, str],
        vectors: list[str] | bool,
    ) -> Iterator[list[models.Record]]:
        for ids in self._list_ids(collection):
            for start in range(0, len(ids), page_points):
                read = partial(
                    self._client.retrieve,
                    collection,
                    ids=ids[start : start + page_points],
                    with_payload=list(fields),
                    with_vectors=vectors,
                )
                page = self._calls.run(f"read a page of {collection!r}", read)
                yield [record for record in page if _is_equal(record.payload or {}, equal)]

    def _list_ids(self, collection: str) -> Iterator[list[models.ExtendedPointId]]:
        offset: models.ExtendedPointId | None = None
        while True:
            read = partial(
                self._client.scroll,
                collection,
                limit=_LISTED_IDS,
                offset=offset,
                with_payload=False,
                with_vectors=False,
            )
            page, offset = self._calls.run(f"list the ids of {collection!r}", read)
            yield [record.id for record in page]
            if offset is None:
                return


def _is_equal(payload: Mapping[str, object], equal: Mapping[str, str]) -> bool:
    return all(payload.get(field) == value for field, value in equal.items())
