"""What is stored beside the points: failed documents, and the physical collections behind a name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from tasks.backends.qdrant import QdrantStore
from tasks.backends.spool import clear_spools
from tasks.config import QdrantSettings
from tasks.engine.existing_store import open_existing_store
from tasks.records import CollectionState, LedgerRecord


def list_failures(
    settings: QdrantSettings, data_folder: str, *, retry: bool = False, environment: Mapping[str, str] | None = None
) -> dict[str, list[LedgerRecord]]:
    """Failed and parked documents by physical collection, the live one first: a collection that is being built has its own.

    `retry`: parked ones are failed ones again, with no attempts behind them; they come back as they are then.
    Raises StoreMissing, StoreMismatch, StoreLocked, StoreUnavailable.
    """
    with _opened(settings, data_folder, environment) as store:
        store.collection_model(settings.collection)  # a name that is not there, or not ours, is an error of its own
        failures = {}
        for state in store.list_physical(settings.collection):
            ledger = store.ledger(state.physical)
            found = [record for page in ledger.scroll() for record in page if record.status in ("failed", "parked")]
            found.sort(key=lambda record: (record.source, record.doc_id))
            if retry:
                found = [_release(record) for record in found]
                ledger.write([record for record in found if record.status == "failed" and record.attempts == 0])
            if found:
                failures[state.physical] = found
        return failures


def _release(record: LedgerRecord) -> LedgerRecord:
    return replace(record, status="failed", attempts=0) if record.status == "parked" else record


def list_collections(
    settings: QdrantSettings, data_folder: str, name: str | None = None, *, environment: Mapping[str, str] | None = None
) -> list[CollectionState]:
    """The physical collections of `name`, or of every name; each name's live one first.

    A physical name stands for that collection alone. Raises StoreMissing, StoreMismatch, StoreLocked, StoreUnavailable.
    """
    with _opened(settings, data_folder, environment) as store:
        if name is not None:
            return _find(store, name)[1]
        return [state for each in store.list_our_names() for state in store.list_physical(each)]


def drop_old_collections(
    settings: QdrantSettings,
    data_folder: str,
    name: str,
    *,
    spool: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[CollectionState]:
    """Drop every physical collection of `name` but the live one, also one that is still being built; returns what is left.

    What their runs left in the spool (unset: the data folder's) goes, too. A physical name stands for that collection
    alone. Raises StoreMissing, StoreMismatch, StoreLocked, StoreUnavailable, SpoolError.
    """
    with _opened(settings, data_folder, environment) as store:
        owner, found = _find(store, name)
        old = [state for state in found if not state.is_live]
        for state in old:
            # The spool first: killed in between, the collection is still listed, and dropping it again completes it.
            clear_spools(f"{spool or f'{data_folder}/spool'}/{state.physical}", repr(owner))
            store.drop_physical(owner, state.physical)
        return [state for state in found if state.is_live]


def _find(store: QdrantStore, name: str) -> tuple[str, list[CollectionState]]:
    """The name meant and its physical collections; of a physical name that has no alias, its own name and it alone."""
    found = store.list_physical(name)
    if found:
        return name, found
    owner = str(store.collection_model(name).get("collection"))  # or what is wrong with the name
    return owner, [state for state in store.list_physical(owner) if state.physical == name]


@contextmanager
def _opened(settings: QdrantSettings, data_folder: str, environment: Mapping[str, str] | None) -> Iterator[QdrantStore]:
    store = open_existing_store(settings, data_folder, os.environ if environment is None else environment)
    try:
        yield store
    finally:
        store.close()
