"""`ballast search`: embed a question with the collection's own model and look it up."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import numpy as np

from tasks.backends.model_files import resolve_model
from tasks.backends.process_encoder import ProcessEncoder
from tasks.backends.tokenizer import NodeTokenizer
from tasks.config import BudgetSettings, EmbeddingSettings, QdrantSettings
from tasks.engine.devices import choose_device, make_spec
from tasks.engine.existing_store import open_existing_store
from tasks.engine.fingerprint import find_tokenizer
from tasks.errors import ConfigError, DeviceError, ModelError, StoreMismatch
from tasks.records import SearchHit

logger = logging.getLogger(__name__)


def search_collection(
    question: str,
    *,
    embedding: EmbeddingSettings,
    qdrant: QdrantSettings,
    data_folder: str,
    limit: int = 5,
    environment: Mapping[str, str] | None = None,
) -> list[SearchHit]:
    """The passages nearest to the question, best first. The model is the collection's unless embedding.model names one.

    Raises ConfigError for an empty question, StoreMissing where the collection is not there, StoreMismatch for a model that
    did not make the collection, ModelError where the model can't be found.
    """
    if not question.strip():
        raise ConfigError("The question is empty. Give some words to search for.")
    environment = os.environ if environment is None else environment
    store = open_existing_store(qdrant, data_folder, environment)
    try:
        made_with = store.collection_model(qdrant.collection)
        named = "model" in embedding.model_fields_set
        try:
            files = resolve_model(embedding.model if named else str(made_with["model"]), embedding.revision)
        except ModelError as error:
            if named:
                raise
            raise ModelError(
                f"Collection {qdrant.collection!r} was made with {made_with['model']}, which is not found any more. "
                f"If it has moved, say where it is with --model. {error}"
            ) from error
        if files.revision != made_with["revision"]:
            raise StoreMismatch(
                f"Collection {qdrant.collection!r} was made with {made_with['model']} at revision "
                f"{made_with['revision'][:12]}, {files.name} is at {files.revision[:12]}: their vectors don't compare. "
                f"Search with --model {made_with['model']}, or ingest again into another collection."
            )
        tokens = NodeTokenizer(
            files.path, query_prompt=files.query_prompt, tokenizer_file=find_tokenizer(files, data_folder)
        ).encode_query(question)
        if len(tokens) > files.max_tokens:
            logger.warning(
                "The question has %d tokens, %s takes %d: what is beyond does not count.",
                len(tokens), files.name, files.max_tokens,
            )  # fmt: skip
            tokens = np.append(tokens[: files.max_tokens - 1], tokens[-1:])  # the last one is a special token
        device, _reason = choose_device(embedding.device)
        encoder = ProcessEncoder(make_spec(embedding, BudgetSettings(), files, device))
        try:
            outcome = encoder.encode([tokens])
        finally:
            encoder.close()
        if outcome.vectors is None:
            raise DeviceError(f"The question could not be embedded: {outcome.message}. Try --device cpu.")
        return store.search(qdrant.collection, outcome.vectors[0], limit)
    finally:
        store.close()
