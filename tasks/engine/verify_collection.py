"""Looks at a collection as it is: points, ledger and source, joined a document. Changes nothing.

Memory grows with the documents, not with their points: vectors are looked at page by page.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tasks.backends.points import NORM_TOLERANCE
from tasks.backends.qdrant import QdrantStore
from tasks.backends.qdrant_collections import SCHEMA_VERSION
from tasks.backends.readers import hash_content, read_file
from tasks.backends.sources import Source, open_source
from tasks.config import IngestSettings, SourceSettings
from tasks.engine.collection_recipe import NodeCheck
from tasks.engine.existing_store import open_existing_store
from tasks.engine.select_changed import HASH_THREADS
from tasks.errors import StoreMismatch
from tasks.observe import current_observer
from tasks.policy.delete_guard import is_covered
from tasks.policy.reconcile import DocumentFacts, GenerationFacts, SourceState, reconcile_document
from tasks.records import CollectionState, Document, FileRef, Finding, Rejection, StoredPoints, VerifyReport

ITEMS_AT_ONCE = 256  # of a source, on their way through the threads that hash

Key = tuple[str, str]
"""(source, doc_id)"""

Item = FileRef | Document | Rejection


@dataclass(slots=True)
class Inspection:
    """What was found; all that a repair needs to know."""

    collection: str
    physical: str
    dimension: int
    source: str = ""  # its key; empty where no source was looked at
    documents: dict[Key, DocumentFacts] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    points: int = 0
    listed: int = 0  # documents that the source has, readable or not
    covered: tuple[str, ...] = ()  # see records.Rejection
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def __repr__(self) -> str:  # a task's result may be logged: not every document
        return f"Inspection({self.physical}, {len(self.documents)} documents, {len(self.findings)} findings)"


def inspect_collection(
    settings: IngestSettings, *, with_source: bool, environment: Mapping[str, str] | None = None
) -> Inspection:
    """Compare the live collection's points with its ledger, and both with the source where `with_source`.

    Raises SourceError, StoreMissing, StoreMismatch, StoreLocked, StoreUnavailable.
    """
    started = time.monotonic()
    observer = current_observer.get()
    observer.stage("collection", settings.qdrant.collection)
    store = open_existing_store(
        settings.qdrant, settings.data_folder, os.environ if environment is None else environment
    )
    try:
        live = find_live(store, settings.qdrant.collection)
        check = NodeCheck(settings, store.collection_model(settings.qdrant.collection))
        inspection = Inspection(settings.qdrant.collection, live.physical, live.dimension)
        observer.stage("ledger", live.physical)
        _read_ledger(store, inspection)
        observer.stage("points", live.physical)
        _read_points(store, inspection)
    finally:
        store.close()
    if with_source:
        observer.stage("source", settings.source.uri)
        # Listed last: a document that the ledger had before and the listing has not has left; never one that just came.
        source = open_source(settings.source, leave_out=settings.own_folders)
        inspection.source = source.key
        _note_unknown_source(inspection)
        _read_source(source, settings.source, inspection, check)
    inspection.findings = tuple(
        itertools.chain.from_iterable(reconcile_document(facts) for _, facts in sorted(inspection.documents.items()))
    )
    inspection.seconds = time.monotonic() - started
    return inspection


def find_live(store: QdrantStore, name: str) -> CollectionState:
    """The collection that `name` stands for. Raises StoreMissing, or StoreMismatch for one that is not ours."""
    metadata = store.collection_model(name)
    if metadata.get("schema_version") != SCHEMA_VERSION:
        raise StoreMismatch(
            f"Collection {name!r} has schema version {metadata.get('schema_version')}; this Ballast reads "
            f"{SCHEMA_VERSION}. Ingest into another --collection, or use the Ballast that made it."
        )
    live = next((state for state in store.list_physical(name) if state.is_live), None)
    if live is None:
        raise StoreMismatch(f"{name!r} is no name that Ballast ingests into: give the name of its alias.")
    return live


def find_bad_rows(page: StoredPoints, dimension: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows have no vector of our name and dimension, and which of the others are not finite or not of unit length."""
    rows = page.vectors or ()
    wrong = np.array([row is None or row.shape != (dimension,) for row in rows], dtype=np.bool_)
    bad = np.zeros(len(rows), dtype=np.bool_)
    kept = [row for row, is_wrong in zip(rows, wrong, strict=True) if row is not None and not is_wrong]
    if kept:
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(np.stack(kept), axis=1)  # not finite where a component is not
        bad[~wrong] = ~(np.abs(norms - 1.0) <= NORM_TOLERANCE)
    return wrong, bad


def make_report(before: Inspection, after: Inspection | None, notes: Sequence[str], seconds: float) -> VerifyReport:
    """`after`: what a second look found once all was done; None where nothing was to be repaired."""
    last = after or before
    left = {(finding.source, finding.doc_id) for finding in last.findings}
    repaired = [each for each in before.findings if after is not None and (each.source, each.doc_id) not in left]
    return VerifyReport(
        collection=last.collection,
        physical_collection=last.physical,
        source=last.source,
        documents=len(last.documents),
        points=last.points,
        parked=sum(facts.record is not None and facts.record.status == "parked" for facts in last.documents.values()),
        found=before.findings,
        repaired=repaired,
        left=last.findings,
        notes=tuple(dict.fromkeys((*before.notes, *notes, *last.notes))),
        seconds=seconds,
    )


# ---------------------------------------------------------------------------------------------- parts


def _facts(inspection: Inspection, source: str, doc_id: str) -> DocumentFacts:
    facts = inspection.documents.get((source, doc_id))
    if facts is None:
        facts = inspection.documents[source, doc_id] = DocumentFacts(source, doc_id)
    return facts


def _read_ledger(store: QdrantStore, inspection: Inspection) -> None:
    for page in store.ledger(inspection.physical).scroll():
        for record in page:
            _facts(inspection, record.source, record.doc_id).record = record


def _read_points(store: QdrantStore, inspection: Inspection) -> None:
    for page in store.scroll_points(inspection.physical, with_vectors=True):
        wrong, bad = find_bad_rows(page, inspection.dimension)
        inspection.points += len(page.ids)
        for row, point_id in enumerate(page.ids):
            generations = _facts(inspection, page.sources[row], page.doc_ids[row]).generations
            generation = generations.get(page.generations[row])
            if generation is None:
                generation = generations[page.generations[row]] = GenerationFacts()
            generation.add_point(point_id, page.document_nodes[row], page.content_hashes[row])
            generation.wrong_dimension += bool(wrong[row])
            generation.bad_vectors += bool(bad[row])


def _note_unknown_source(inspection: Inspection) -> None:
    known = sorted({source for source, _ in inspection.documents if source})
    if known and inspection.source not in known:
        inspection.notes = (
            f"Collection {inspection.collection!r} knows no source {inspection.source!r}; it has {', '.join(known[:10])}. "
            "If it is one of these, say so with --source-name.",
        )


def _read_source(source: Source, settings: SourceSettings, inspection: Inspection, check: NodeCheck) -> None:
    """Say of every document of this source what the source has of it now."""
    documents = inspection.documents
    covered: list[str] = []

    def look(item: Item) -> tuple[SourceState, str, str]:
        is_known = (source.key, item.doc_id) in documents
        content: str | Document | Rejection
        if isinstance(item, FileRef):
            # What nobody knows is read: an empty file is not missing.
            content = hash_content(item, settings) if is_known else read_file(item, settings)
        else:
            content = item
        if isinstance(content, Rejection):
            return ("unreadable" if content.status == "failed" else "skipped"), "", content.reason
        if isinstance(content, Document):
            if not is_known and not check.has_nodes(content):
                return "skipped", "", "There is no text in it."
            content = content.content_hash
        return "readable", content, ""

    with ThreadPoolExecutor(HASH_THREADS, "hash") as pool:
        for items in _take(source, ITEMS_AT_ONCE):
            for item, (state, content_hash, reason) in zip(items, pool.map(look, items), strict=True):
                if isinstance(item, Rejection) and item.covers is not None:
                    covered.append(item.covers)
                inspection.listed += state != "skipped"
                if state == "skipped" and (source.key, item.doc_id) not in documents:
                    continue
                facts = _facts(inspection, source.key, item.doc_id)
                facts.state, facts.content_hash, facts.reason = state, content_hash, reason
    inspection.covered = tuple(covered)
    for (key, doc_id), facts in documents.items():
        if key == source.key and facts.state == "unknown":
            facts.state = "covered" if is_covered(doc_id, covered) else "absent"


def _take(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while some := list(itertools.islice(iterator, count)):
        yield some
