"""Mends what verify has found, as far as that needs no embedding; the ingest that follows does the rest.

Before a point is deleted that must come back, its document is pending in the ledger: killed in between, the next run
finishes it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tasks.backends.model_files import resolve_model
from tasks.backends.qdrant import QdrantStore
from tasks.backends.qdrant_ledger import Ledger
from tasks.config import DeleteSettings, IngestSettings
from tasks.engine.collection_recipe import adopt_recipe
from tasks.engine.existing_store import open_existing_store
from tasks.engine.fingerprint import describe_recipe, find_tokenizer
from tasks.engine.verify_collection import Inspection, Key, find_bad_rows
from tasks.errors import ModelError
from tasks.policy.changes import to_pending
from tasks.policy.delete_guard import decide_deletes, exceeds_limits
from tasks.policy.identity import compute_fingerprint
from tasks.policy.reconcile import DocumentFacts, rebuild_record
from tasks.records import LedgerRecord, StoredPoints

DOCUMENTS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Mended:
    """What a repair did without embedding, and how to go on."""

    settings: IngestSettings  # for the ingest: the collection's own model and chunking
    needs_ingest: bool
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Work:
    """Sorted by what is to be done."""

    records: list[LedgerRecord] = field(default_factory=list)  # to write: rebuilt, or pending
    damaged: set[Key] = field(default_factory=set)  # their bad vectors go
    surplus: dict[Key, str] = field(default_factory=dict)  # all their points of this generation go
    others: defaultdict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))  # source, doc_id: kept
    gone: list[LedgerRecord] = field(default_factory=list)
    foreign: set[Key] = field(default_factory=set)  # their points that say no document or no generation go
    out_of_reach: int = 0
    needs_ingest: bool = False


def repair_collection(
    settings: IngestSettings, inspection: Inspection, *, environment: Mapping[str, str] | None = None
) -> Mended:
    """Write ledger records again and delete what should not be there, deletes of documents guarded as in a run.

    Raises StoreMismatch before anything is changed where the following ingest would be of other settings.
    """
    store = open_existing_store(
        settings.qdrant, settings.data_folder, os.environ if environment is None else environment
    )
    try:
        metadata = store.collection_model(inspection.collection)
        if inspection.source:
            settings = adopt_recipe(settings, metadata)
            _refuse_other_settings(store, settings)
        # A ledger that is lost as a whole is made again.
        store.prepare_collection(
            inspection.collection,
            dimension=inspection.dimension,
            fingerprint=str(metadata["fingerprint"]),
            model=str(metadata["model"]),
            revision=str(metadata.get("revision", "")),
            recipe=metadata.get("recipe"),
        )
        ledger = store.ledger(inspection.physical)
        changed = _find_changed(ledger, inspection)
        work = _sort_work(inspection, changed, datetime.now(UTC).isoformat(timespec="seconds"))
        notes = _withhold(work, inspection, settings.deletes)
        if changed:
            notes.append(f"{len(changed)} documents have been written meanwhile, by another run, and were left alone.")
        ledger.write(work.records)
        if work.damaged or work.surplus or work.foreign:
            _delete_points(store, inspection, work)
        for source, kept in work.others.items():
            _delete_others(store, inspection.physical, source, kept)
        _delete_documents(store, inspection, work.gone)
    finally:
        store.close()
    return Mended(settings, work.needs_ingest, tuple(notes))


# ---------------------------------------------------------------------------------------------- parts


def _refuse_other_settings(store: QdrantStore, settings: IngestSettings) -> None:
    try:
        files = resolve_model(settings.embedding.model, settings.embedding.revision)
    except ModelError as error:
        raise ModelError(f"A repair embeds again, with the collection's own model. {error}") from error
    recipe = describe_recipe(settings, files, find_tokenizer(files, settings.data_folder))
    store.plan_collection(
        settings.qdrant.collection,
        dimension=files.dimension,
        fingerprint=compute_fingerprint(recipe),
        model=files.name,
        revision=files.revision,
        recipe=recipe,
        on_change="refuse",
    )


def _find_changed(ledger: Ledger, inspection: Inspection) -> set[Key]:
    """Documents with findings whose records are not the ones that were seen: somebody is writing them."""
    doc_ids: defaultdict[str, list[str]] = defaultdict(list)
    for source, doc_id in dict.fromkeys((finding.source, finding.doc_id) for finding in inspection.findings):
        if source and doc_id:
            doc_ids[source].append(doc_id)
    changed = set()
    for source, found in doc_ids.items():
        records = ledger.read(source, found)
        changed |= {
            (source, doc_id) for doc_id in found if records.get(doc_id) != inspection.documents[source, doc_id].record
        }
    return changed


def _sort_work(inspection: Inspection, changed: Collection[Key], now: str) -> _Work:
    work = _Work()
    kinds: defaultdict[Key, set[str]] = defaultdict(set)
    for finding in inspection.findings:
        if (finding.source, finding.doc_id) in changed:
            continue
        kinds[finding.source, finding.doc_id].add(finding.kind)
        work.needs_ingest |= finding.repair == "ingest" and finding.source == inspection.source
    for key, found in kinds.items():
        facts = inspection.documents[key]
        if facts.unowned_points:
            work.foreign.add(key)
        if "surplus_document" in found:
            work.gone.append(facts.record or rebuild_record(facts, now))
        elif facts.has_identity:
            _sort_document(work, key, facts, found, now)
    if not inspection.source:
        work.needs_ingest = False
    return work


def _sort_document(work: _Work, key: Key, facts: DocumentFacts, found: set[str], now: str) -> None:
    source, doc_id = key
    # Only what can be embedded again is deleted to that end: a bad point of a text that is out of reach stays.
    is_in_reach = facts.state == "readable"
    needs_points = bool(found & {"missing_points", "half_written"})
    if found & {"wrong_dimension", "bad_vector"}:
        if is_in_reach:
            work.damaged.add(key)
            needs_points = True
        else:
            work.out_of_reach += 1
    if "surplus_points" in found:
        if is_in_reach and facts.record is not None:
            # Which of them are too many only the text can tell.
            work.surplus[key] = facts.record.generation
            needs_points = True
        else:
            work.out_of_reach += 1
    if "orphan_points" in found and facts.record is None and facts.points:
        rebuilt = rebuild_record(facts, now)
        work.records.append(rebuilt)
        work.needs_ingest |= rebuilt.status == "pending" and is_in_reach
    elif needs_points:
        if facts.record is not None and facts.record.status != "pending":
            work.records.append(to_pending(facts.record, source, doc_id, facts.record.content_hash, now))
        work.needs_ingest |= is_in_reach
        if not is_in_reach:
            work.out_of_reach += 1
    elif "other_generation" in found and "surplus_points" not in found:
        work.others[source][doc_id] = facts.record.generation if facts.record else ""


def _withhold(work: _Work, inspection: Inspection, limits: DeleteSettings) -> list[str]:
    """Leave in `work` only the deletes that the guard lets through; what it withholds and why, for people."""
    notes = []
    decision = decide_deletes(
        work.gone,
        known=sum(
            facts.source == inspection.source and (facts.points > 0 or _has_points(facts.record))
            for facts in inspection.documents.values()
        ),
        covered=inspection.covered,
        max_documents=limits.max_documents,
        max_fraction=limits.max_fraction,
        confirmed=limits.confirmed,
        propagate=limits.propagate,
        listed=inspection.listed,
    )
    work.gone = [*decision.delete, *decision.forget]
    if decision.reason:
        notes.append(decision.reason)
    foreign = sum(inspection.documents[key].unowned_points for key in work.foreign)
    if exceeds_limits(foreign, inspection.points, limits.max_documents, limits.max_fraction) and not limits.confirmed:
        work.foreign = set()
        notes.append(
            f"{foreign} of {inspection.points} points don't say which document they belong to, too many to delete them "
            "unasked. If nobody needs them: --confirm-deletes (deletes.confirmed)."
        )
    if work.out_of_reach:
        where = (
            "that this source does not have in a readable form" if inspection.source else "whose source is not given"
        )
        notes.append(
            f"{work.out_of_reach} documents {where} have to be embedded again: run `ballast verify SOURCE --repair` or "
            "`ballast ingest` with their source."
        )
    return notes


def _has_points(record: LedgerRecord | None) -> bool:
    return record is not None and record.has_points


def _delete_points(store: QdrantStore, inspection: Inspection, work: _Work) -> None:
    """In a second pass, page by page: the first one kept no ids."""
    for page in store.scroll_points(inspection.physical, with_vectors=True):
        wrong, bad = find_bad_rows(page, inspection.dimension)
        damaged = wrong | bad
        ids = [point_id for row, point_id in enumerate(page.ids) if _is_to_go(page, row, bool(damaged[row]), work)]
        if ids:
            store.delete_points(inspection.physical, ids)


def _is_to_go(page: StoredPoints, row: int, is_damaged: bool, work: _Work) -> bool:
    key = (page.sources[row], page.doc_ids[row])
    return (
        (is_damaged and key in work.damaged)
        or (key in work.foreign and not (all(key) and page.generations[row]))
        or (key in work.surplus and work.surplus[key] == page.generations[row])
    )


def _delete_others(store: QdrantStore, physical: str, source: str, kept: Mapping[str, str]) -> None:
    """Points of generations that are not the committed one; all points of a document that has none committed."""
    with_own = [doc_id for doc_id, generation in kept.items() if generation]
    for start in range(0, len(with_own), DOCUMENTS_AT_ONCE):
        some = with_own[start : start + DOCUMENTS_AT_ONCE]
        store.delete_other_generations(physical, source, some, [kept[doc_id] for doc_id in some])
    without = [doc_id for doc_id, generation in kept.items() if not generation]
    for start in range(0, len(without), DOCUMENTS_AT_ONCE):
        store.delete_documents(physical, source, without[start : start + DOCUMENTS_AT_ONCE])


def _delete_documents(store: QdrantStore, inspection: Inspection, gone: list[LedgerRecord]) -> None:
    """Points first, their records after: killed in between, the next run finds the record and deletes again.

    The record says "pending" meanwhile: a document that comes back as it was must not be taken for unchanged.
    """
    ledger = store.ledger(inspection.physical)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for start in range(0, len(gone), DOCUMENTS_AT_ONCE):
        some = gone[start : start + DOCUMENTS_AT_ONCE]
        doc_ids = [record.doc_id for record in some]
        ledger.write([to_pending(record, record.source, record.doc_id, record.content_hash, now) for record in some])
        store.delete_documents(inspection.physical, inspection.source, doc_ids)
        ledger.remove(inspection.source, doc_ids)
