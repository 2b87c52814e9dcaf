"""The points of whole documents: counted by generation, deleted, and counted again. A document is (source, doc_id)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tasks.backends.points import check_text, split_batches
from tasks.backends.qdrant_calls import CheckedCalls
from tasks.backends.qdrant_pages import Pages
from tasks.errors import StoreRejected, StoreUnavailable

if TYPE_CHECKING:
    from qdrant_client import QdrantClient, models

DOCUMENTS_PER_REQUEST = 512
_BYTES_PER_REQUEST = 4 * 1024**2  # of document ids; a server refuses 32 MiB, and compares each id with its index
_IDS_PER_DELETE = 1_000
_LISTED_POINTS = 8_192


class Documents(Protocol):
    """Two ways to the same answers: a server filters by its indexes; embedded Qdrant has none.

    doc_ids are those of one source, as many as you like, in any spelling that UTF-8 can hold. Every method raises
    StoreUnavailable or StoreRejected.
    """

    def count_generations(self, physical: str, source: str, doc_ids: Sequence[str]) -> dict[str, int]:
        """Generation -> points of it, exactly, of all points of these documents."""
        ...

    def delete_other_generations(
        self, physical: str, source: str, doc_ids: Sequence[str], keep: Collection[str]
    ) -> None:
        """Delete the points of these documents that are of none of the generations to keep, and see that none is left."""
        ...

    def delete_documents(self, physical: str, source: str, doc_ids: Sequence[str]) -> None:
        """Delete all points of these documents, and see that none is left."""
        ...

    def count_source(self, physical: str, source: str, *, except_doc_ids: Sequence[str] = ()) -> int:
        """All points of this source, exactly, but those of some documents."""
        ...


class ServerDocuments:
    """By filters, in requests of at most 512 documents."""

    def __init__(self, client: QdrantClient, calls: CheckedCalls) -> None:
        self._client = client
        self._calls = calls

    def count_generations(self, physical: str, source: str, doc_ids: Sequence[str]) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for part in split_documents(source, doc_ids):
            counts.update(self._facet(physical, _select(source, part), limit=4 * len(part) + 16))
        return dict(counts)

    def delete_other_generations(
        self, physical: str, source: str, doc_ids: Sequence[str], keep: Collection[str]
    ) -> None:
        check_keep(physical, keep)
        for part in split_documents(source, doc_ids):
            self._delete(physical, _select(source, part, but=sorted(keep)), len(part))

    def delete_documents(self, physical: str, source: str, doc_ids: Sequence[str]) -> None:
        for part in split_documents(source, doc_ids):
            self._delete(physical, _select(source, part), len(part))

    def count_source(self, physical: str, source: str, *, except_doc_ids: Sequence[str] = ()) -> int:
        check_text(source)
        # Not one count with all of them in its filter: they may be more than a request holds.
        excepted = sum(self._count(physical, _select(source, part)) for part in split_documents(source, except_doc_ids))
        return self._count(physical, _select(source, None)) - excepted

    def _facet(self, physical: str, selected: models.Filter, *, limit: int) -> dict[str, int]:
        read = partial(self._client.facet, physical, "generation", facet_filter=selected, limit=limit, exact=True)
        hits = self._calls.run(f"count the generations of documents in {physical!r}", read).hits
        if len(hits) >= limit:  # as many as were asked for: there may be more
            return self._facet(physical, selected, limit=4 * limit)
        return {str(hit.value): hit.count for hit in hits}

    def _count(self, physical: str, selected: models.Filter) -> int:
        read = partial(self._client.count, physical, count_filter=selected, exact=True)
        return int(self._calls.run(f"count points of documents in {physical!r}", read).count)

    def _delete(self, physical: str, selected: models.Filter, documents: int) -> None:
        from qdrant_client import models

        def send() -> None:
            selector = models.FilterSelector(filter=selected)
            self._calls.check_completed(self._client.delete(physical, points_selector=selector, wait=True))

        action = f"delete points of {documents} documents from {physical!r}"
        self._calls.run(action, send)
        check_gone(self._calls, action, self._count(physical, selected))


class EmbeddedDocuments:
    """By one pass over all points: a filter is tried on each in Python, 512 document ids one after the other.

    At 50,000 points of 6,250 documents a facet by 512 documents took 5.3 s, a pass takes 0.7 s whatever their number.
    """

    def __init__(self, client: QdrantClient, calls: CheckedCalls, pages: Pages) -> None:
        self._client = client
        self._calls = calls
        self._pages = pages

    def count_generations(self, physical: str, source: str, doc_ids: Sequence[str]) -> dict[str, int]:
        check_documents(source, doc_ids)
        found = self._list(physical, source, set(doc_ids)) if doc_ids else iter(())
        return dict(Counter(generation for _, generation in found if generation is not None))

    def delete_other_generations(
        self, physical: str, source: str, doc_ids: Sequence[str], keep: Collection[str]
    ) -> None:
        check_keep(physical, keep)
        kept = frozenset(keep)
        self._delete(physical, source, doc_ids, lambda generation: generation not in kept)

    def delete_documents(self, physical: str, source: str, doc_ids: Sequence[str]) -> None:
        self._delete(physical, source, doc_ids, lambda _: True)

    def count_source(self, physical: str, source: str, *, except_doc_ids: Sequence[str] = ()) -> int:
        check_documents(source, except_doc_ids)
        return sum(1 for _ in self._list(physical, source, None, but=frozenset(except_doc_ids)))

    def _list(
        self, physical: str, source: str, doc_ids: Collection[str] | None, *, but: Collection[str] = ()
    ) -> Iterator[tuple[str, str | None]]:
        """(point id, generation) of these documents of the source; None: of all but some."""
        for page in self._pages.iterate(
            physical,
            fields=["ballast_source", "doc_id", "generation"],
            page_points=_LISTED_POINTS,
            equal={"ballast_source": source},
        ):
            for record in page:
                payload = record.payload or {}
                doc_id = payload.get("doc_id")
                if doc_id not in but and (doc_ids is None or doc_id in doc_ids):
                    yield str(record.id), payload.get("generation")

    def _delete(
        self, physical: str, source: str, doc_ids: Sequence[str], is_wrong: Callable[[str | None], bool]
    ) -> None:
        check_documents(source, doc_ids)
        if not doc_ids:
            return
        wanted = set(doc_ids)

        def find() -> list[str]:
            return [point for point, generation in self._list(physical, source, wanted) if is_wrong(generation)]

        found = find()
        if found:
            delete_ids(self._client, self._calls, physical, found)
            action = f"delete points of {len(doc_ids)} documents from {physical!r}"
            check_gone(self._calls, action, len(find()))


def delete_ids(client: QdrantClient, calls: CheckedCalls, physical: str, ids: Sequence[str]) -> None:
    """Delete points by their ids; those that are not there are no error."""
    from qdrant_client import models

    def send(part: list[str]) -> None:
        # Ours are UUIDs; a point of somebody else's may have a number, which is another id than its digits.
        points: list[models.ExtendedPointId] = [int(each) if each.isdecimal() else each for each in part]
        selector = models.PointIdsList(points=points)
        calls.check_completed(client.delete(physical, points_selector=selector, wait=True))

    for start in range(0, len(ids), _IDS_PER_DELETE):
        part = list(ids[start : start + _IDS_PER_DELETE])
        calls.run(f"delete {len(part)} points from {physical!r}", partial(send, part))


def check_gone(calls: CheckedCalls, action: str, left: int) -> None:
    """Raises StoreUnavailable where points that were deleted are still counted."""
    if left:
        raise StoreUnavailable(
            f"Qdrant {calls.place} could not {action}: {left} are still there, or came back meanwhile. Does another "
            "process write to this collection? Run again."
        )


def split_documents(source: str, doc_ids: Sequence[str]) -> Iterator[list[str]]:
    """Documents in the lots that one request takes; each once."""
    check_documents(source, doc_ids)
    unique = list(dict.fromkeys(doc_ids))
    sizes = [len(doc_id.encode()) for doc_id in unique]
    for part in split_batches(sizes, max_points=DOCUMENTS_PER_REQUEST, max_bytes=_BYTES_PER_REQUEST):
        yield unique[part]


def check_documents(source: str, doc_ids: Sequence[str]) -> None:
    check_text(source)
    for doc_id in doc_ids:
        check_text(doc_id)


def check_keep(physical: str, keep: Collection[str]) -> None:
    if not keep:
        raise StoreRejected(
            f"No generation to keep in {physical!r}: that would delete whole documents. If that is meant, delete_documents()."
        )


def _select(source: str, doc_ids: Sequence[str] | None, *, but: Sequence[str] = ()) -> models.Filter:
    """Never without a condition: a filter without any selects all points of a collection."""
    from qdrant_client import models

    must: list[models.Condition] = [models.FieldCondition(key="ballast_source", match=models.MatchValue(value=source))]
    if doc_ids is not None:
        if not doc_ids:
            raise StoreRejected("A request about no documents at all: it would be about all of them.")
        must.append(models.FieldCondition(key="doc_id", match=models.MatchAny(any=list(doc_ids))))
    must_not: list[models.Condition] = []
    if but:
        must_not.append(models.FieldCondition(key="generation", match=models.MatchAny(any=list(but))))
    return models.Filter(must=must, must_not=must_not or None)
