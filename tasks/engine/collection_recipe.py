"""A collection's own model, precision and chunking, as its metadata keeps them: what a repair embeds with."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tasks.backends.model_files import resolve_model
from tasks.config import ChunkingSettings, IngestSettings
from tasks.engine.chunk import ChunkSpec, chunk_batch
from tasks.engine.fingerprint import find_tokenizer, make_chunk_spec
from tasks.errors import ModelError
from tasks.records import Document, Rejection

HEAD_CHARS = 4096  # of a document: where it holds a word, there is something to embed


def adopt_recipe(settings: IngestSettings, metadata: Mapping[str, Any]) -> IngestSettings:
    """The settings with the collection's own model, precision and chunking wherever they don't say otherwise."""
    recipe: Mapping[str, Any] = metadata.get("recipe") or {}
    made_with: dict[str, Any] = {"model": metadata.get("model"), "precision": recipe.get("precision")}
    said = settings.embedding.model_fields_set
    embedding = settings.embedding.model_copy(
        update={knob: value for knob, value in made_with.items() if value and knob not in said}
    )
    chunking = ChunkingSettings.model_validate(
        {
            **{
                knob: value
                for knob, value in (recipe.get("chunking") or {}).items()
                if knob in ChunkingSettings.model_fields
            },
            **settings.chunking.model_dump(include=settings.chunking.model_fields_set),
        }
    )
    # Not a new collection beside the one to be repaired.
    qdrant = settings.qdrant.model_copy(update={"on_change": "refuse"})
    return settings.model_copy(update={"embedding": embedding, "chunking": chunking, "qdrant": qdrant})


class NodeCheck:
    """Tells a document that is missing from one that never had a node: nothing but characters that the model drops.

    The tokenizer is loaded with the first question. Safe to call from several threads.
    """

    def __init__(self, settings: IngestSettings, metadata: Mapping[str, Any]) -> None:
        self._settings = adopt_recipe(settings, metadata)
        self._lock = threading.Lock()
        self._spec: ChunkSpec | None = None
        self._is_without_model = False

    def has_nodes(self, document: Document) -> bool:
        """True also where the collection's model can't be found: what is not known to be empty is missing."""
        with self._lock:
            spec = self._load()
            if spec is None:
                return True
            head = replace(document, text=document.text[:HEAD_CHARS])
            parts = [head] if len(document.text) <= HEAD_CHARS else [head, document]
            return any(not _is_empty(chunk_batch([part], spec)[0]) for part in parts)

    def _load(self) -> ChunkSpec | None:
        if self._spec is None and not self._is_without_model:
            try:
                files = resolve_model(self._settings.embedding.model, self._settings.embedding.revision)
                tokenizer_file = find_tokenizer(files, self._settings.data_folder)
            except ModelError:
                self._is_without_model = True
            else:
                self._spec = make_chunk_spec(self._settings, files, tokenizer_file)
        return self._spec


def _is_empty(chunked: object) -> bool:
    return isinstance(chunked, Rejection) and chunked.status == "skipped"
