"""What decides a run's vectors: the fingerprint, and the recipe that the chunk workers follow."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from tasks.backends.readers import read_file
from tasks.backends.tokenizer import NodeTokenizer, export_tokenizer
from tasks.config import IngestSettings
from tasks.engine.chunk import ChunkSpec
from tasks.records import ModelFiles

# Their versions decide the text of a document or where it is cut. A new version of any other package changes no vector.
PARSERS = ("llama-index-core", "tokenizers", "pypdf", "docx2txt", "beautifulsoup4", "lxml", "markdownify")


def find_tokenizer(files: ModelFiles, data_folder: str) -> str:
    """The file with the tokenizer that sentence-transformers would use; made once a model. Raises ModelError."""
    return export_tokenizer(files.path, files.revision, f"{data_folder}/tokenizers")


def describe_recipe(settings: IngestSettings, files: ModelFiles, tokenizer_file: str) -> dict[str, Any]:
    """Model, precision, pooling, chunker, tokenizer, prompts and parsers: the fingerprint is its hash. Raises ModelError.

    The precision is the knob's, not the device's: under `auto` a GPU's fp16 and a CPU's fp32 vectors agree and share a
    collection. `chunking.workers` decides nothing but the time.
    """
    tokenizer = NodeTokenizer(files.path, tokenizer_file=tokenizer_file)
    return {
        "revision": files.revision,
        "precision": settings.embedding.precision,
        "pooling": files.pooling,
        "dimension": files.dimension,
        "max_tokens": files.max_tokens,
        "document_prompt": files.document_prompt,
        "tokenizer": tokenizer.digest,
        "chunking": settings.chunking.model_dump(mode="json", exclude={"workers"}),
        "parsers": {name: version(name) for name in PARSERS},
    }


def make_chunk_spec(
    settings: IngestSettings, files: ModelFiles, tokenizer_file: str, fingerprint: str = "", source_name: str = ""
) -> ChunkSpec:
    """What a chunk worker needs; it pickles."""
    return ChunkSpec(
        read_file=read_file,
        source=settings.source,
        chunking=settings.chunking,
        model_path=files.path,
        max_tokens=files.max_tokens,
        document_prompt=files.document_prompt,
        fingerprint=fingerprint,
        source_name=source_name,
        tokenizer_file=tokenizer_file,
        max_payload_bytes=settings.qdrant.batch_bytes,
    )
