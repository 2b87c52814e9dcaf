"""Open an ingest run: everything that can be refused is refused here, before a model is loaded."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence

from tasks.backends.model_files import resolve_model
from tasks.backends.qdrant import open_store
from tasks.backends.sources import open_source
from tasks.config import IngestSettings
from tasks.engine.collection import RunCollection
from tasks.engine.devices import start_devices
from tasks.engine.fingerprint import describe_recipe, find_tokenizer, make_chunk_spec
from tasks.engine.ingest_run import IngestRun, StartDevices, open_spool
from tasks.engine.shared_partitions import check_shared, start_pools
from tasks.observe import current_observer
from tasks.policy.changed_paths import require_changed_paths
from tasks.policy.identity import compute_fingerprint
from tasks.policy.whole_run import explain_whole_run
from tasks.records import LedgerRecord


def open_run(
    settings: IngestSettings,
    environment: Mapping[str, str] | None = None,
    *,
    changed: Sequence[str] | None = None,
    stop: threading.Event | None = None,
    chunk_workers: int | None = None,
    start: StartDevices | None = None,
) -> IngestRun:
    """A run whose source, model files and collection are there and fit together; no model is loaded yet.

    `changed`: doc ids that a trigger named; only these are looked at, unless only a whole run can end green: a note says so.
    `stop`, once set by anybody, ends the run.
    Raises SourceError, ModelError, ConfigError, StoreMismatch, StoreLocked, StoreUnavailable.
    """
    started = time.monotonic()
    observer = current_observer.get()
    observer.stage("source", settings.source.uri)
    paths = None if changed is None else require_changed_paths(changed)
    source = open_source(settings.source, leave_out=settings.own_folders, changed=paths)
    observer.stage("model", settings.embedding.model)
    files = resolve_model(settings.embedding.model, settings.embedding.revision)
    tokenizer_file = find_tokenizer(files, settings.data_folder)
    recipe = describe_recipe(settings, files, tokenizer_file)
    fingerprint = compute_fingerprint(recipe)
    spec = make_chunk_spec(settings, files, tokenizer_file, fingerprint, source.key)
    observer.stage("collection", settings.qdrant.collection)
    stop = stop or threading.Event()
    store = open_store(settings.qdrant, settings.data_folder, environment=environment or os.environ)
    try:
        if settings.pools.enabled:
            check_shared(settings, is_embedded=store.is_embedded)
        collection = RunCollection(
            store, settings.qdrant, files, fingerprint, source.key, recipe=recipe, stop=stop, note=observer.note
        )
        mark = collection.read_mark() if paths else None
        why_whole = _explain_whole_run(settings, collection, mark) if paths else ""
        if why_whole:
            source = open_source(settings.source, leave_out=settings.own_folders)
        run = IngestRun(
            settings,
            files,
            source,
            collection,
            spec,
            observer,
            stop,
            chunk_workers=chunk_workers,
            start=start or (start_pools if settings.pools.enabled else start_devices),
            started=started,
        )
    except BaseException:
        store.close()
        raise
    try:
        if why_whole:
            run.tell(f"the whole source is ingested, not {_count_paths(paths)}: {why_whole}")
        elif collection.plan.is_rebuild:
            run.tell(collection.plan.reason)
        if source.changed is not None:
            run.tell(f"{_count_paths(paths)} looked at, not the whole source.")
            collection.begin_changed(mark)
        run.store_leftovers()
    except BaseException:
        run.close()
        raise
    return run


def _explain_whole_run(settings: IngestSettings, collection: RunCollection, mark: LedgerRecord | None) -> str:
    plan = collection.plan
    return explain_whole_run(
        mark,
        rebuild_reason=plan.reason if plan.is_rebuild else "",
        has_leftovers=open_spool(settings, collection).has_embedded(),
    )


def _count_paths(paths: Sequence[str] | None) -> str:
    return "1 changed path" if paths is not None and len(paths) == 1 else f"{len(paths or ())} changed paths"
