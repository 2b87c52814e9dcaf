"""Opens the store for what reads it: an embedded Qdrant that is not there is not made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.qdrant_connection import choose_url
from tasks.config import QdrantSettings
from tasks.errors import StoreMissing


def open_existing_store(settings: QdrantSettings, data_folder: str, environment: Mapping[str, str]) -> QdrantStore:
    """As open_store(). Raises StoreMissing where there is neither a server nor an embedded Qdrant in the data folder."""
    if choose_url(settings, environment) is None and not (Path(data_folder) / "qdrant").is_dir():
        # Opening it would make it.
        raise StoreMissing(
            f"There is no embedded Qdrant in {Path(data_folder).absolute()}. Run `ballast ingest` first, name its folder "
            "with --data-folder, or a server with --qdrant."
        )
    return open_store(settings, data_folder, environment=environment)
