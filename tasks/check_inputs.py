"""What is refused before anything is started or written: a mistyped path must not cost the start of the Prefect API."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tasks.backends.model_files import resolve_model
from tasks.backends.qdrant_collections import check_name
from tasks.backends.sources import open_source
from tasks.config import IngestSettings
from tasks.engine.existing_store import open_existing_store
from tasks.errors import ConfigError
from tasks.policy.changed_paths import require_changed_paths


def check_inputs(settings: IngestSettings, changed: Sequence[str] | None = None) -> None:
    """Look at the data folder, the collection's name, the source and the model's files. The run itself looks again.

    `changed`: of the source only these paths.

    Raises ConfigError, SourceError, ModelError.
    """
    check_data_folder(settings.data_folder)
    check_name(settings.qdrant.collection)
    paths = None if changed is None else require_changed_paths(changed)
    open_source(settings.source, leave_out=settings.own_folders, changed=paths)
    resolve_model(settings.embedding.model, settings.embedding.revision)


def check_stored(settings: IngestSettings, *, with_source: bool) -> None:
    """Whether there is such a collection, and the source where one is compared with it.

    Raises ConfigError, SourceError, StoreMissing, StoreMismatch, StoreLocked, StoreUnavailable.
    """
    check_data_folder(settings.data_folder)
    if with_source:
        open_source(settings.source, leave_out=settings.own_folders)
    store = open_existing_store(settings.qdrant, settings.data_folder, os.environ)
    try:
        store.collection_model(settings.qdrant.collection)
    finally:
        store.close()


def check_data_folder(folder: str) -> None:
    """Whether the folder can be written to, or made; makes nothing. Raises ConfigError."""
    if not folder.strip():
        raise ConfigError("data_folder is empty. Name a folder with --data-folder, or leave it out for .ballast.")
    path = Path(folder).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise ConfigError(
            f"The data folder {folder} can't be made: {there} is a file. Name another with --data-folder."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"The data folder {folder} can't be written: no permission in {there}. Name another with --data-folder."
        )
