"""The embedding model's own tokenizer, without torch: the ids made here are what the model is fed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.backends.processes import spawn_pool
from tasks.errors import ModelError
from tasks.records import TokenIds

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_TEXTS_AT_ONCE = 512  # the Rust side takes some hundred bytes a token, for as long as its results live

_SURROGATES = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    """The text, as long as it was, with U+FFFD for lone surrogates: neither the tokenizer nor UTF-8 can hold them."""
    return _SURROGATES.sub("\ufffd", text)


class NodeTokenizer:
    """Never truncates, never pads. Prompts go before the text as they are, as SentenceTransformer.encode has it."""

    def __init__(
        self, model_path: str, *, document_prompt: str = "", query_prompt: str = "", tokenizer_file: str | None = None
    ) -> None:
        """Read the tokenizer of the model in folder `model_path`, or what export_tokenizer made of it. Raises ModelError."""
        if tokenizer_file is None:
            self._tokenizer = _load_tokenizer(Path(model_path))
        else:
            self._tokenizer = _read_tokenizer(Path(tokenizer_file))
        # tokenizer.json may carry both: MiniLM's truncates at 128 and pads to 128.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.document_prompt = document_prompt
        self.query_prompt = query_prompt

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides the ids but the prompts: part of the fingerprint."""
        return hashlib.sha256(self._tokenizer.to_str().encode("utf-8", "surrogatepass")).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[TokenIds]:
        """Each document text's ids, document prompt and special tokens included."""
        ids: list[TokenIds] = []
        for first in range(0, len(texts), _TEXTS_AT_ONCE):
            some = texts[first : first + _TEXTS_AT_ONCE]
            prompted = [self.document_prompt + text for text in some] if self.document_prompt else list(some)
            ids.extend(np.array(encoding.ids, np.int32) for encoding in self._tokenizer.encode_batch_fast(prompted))
        return ids

    def encode_query(self, text: str) -> TokenIds:
        """A query's ids, query prompt and special tokens included."""
        return np.array(self._tokenizer.encode(self.query_prompt + replace_surrogates(text)).ids, np.int32)

    def count(self, text: str) -> int:
        """Tokens of the text alone, without prompt and special tokens."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text alone, without prompt and special tokens."""
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def find_starts(self, text: str) -> NDArray[np.int64]:
        """Where in the text, in characters, each of its tokens starts; ascending. Shape (tokens,)."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return np.fromiter((start for start, _ in offsets), np.int64, len(offsets))


def export_tokenizer(model_path: str, revision: str, folder: str) -> str:
    """Path of a file in `folder` with the tokenizer as transformers builds it; made once a model revision. Raises ModelError.

    transformers 5 makes the tokenizers of known models anew from their vocabulary: what sentence-transformers feeds may
    differ from what the model's tokenizer.json says (XLM-R: line breaks and spaces at the ends). It takes torch to know:
    a process of its own pays for that, the first time.
    """
    path = name_export(revision, folder)
    if not path.is_file():
        with spawn_pool(1) as pool:
            content = pool.submit(_build_tokenizer, model_path).result()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    return str(path)


def name_export(revision: str, folder: str) -> Path:
    """Where export_tokenizer() puts, or has put, the file."""
    made_by = f"{revision} {version('transformers')} {version('tokenizers')}"
    return Path(folder) / f"{hashlib.sha256(made_by.encode()).hexdigest()[:32]}.json"


def _build_tokenizer(model_path: str) -> str:
    folder = Path(model_path)
    transformer = folder / _find_transformer(folder)
    return _add_lowercase(_convert_tokenizer(transformer), transformer).to_str()


def _load_tokenizer(folder: Path) -> Tokenizer:
    transformer = folder / _find_transformer(folder)
    path = transformer / "tokenizer.json"
    tokenizer = _read_tokenizer(path) if path.is_file() else _convert_tokenizer(transformer)
    return _add_lowercase(tokenizer, transformer)


def _read_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    content = path.read_text(encoding="utf-8")
    try:
        json.loads(content)
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Remove it, or download the model again.") from error
    return Tokenizer.from_str(content)


def _add_lowercase(tokenizer: Tokenizer, transformer: Path) -> Tokenizer:
    from tokenizers import normalizers

    sentence_config = transformer / "sentence_bert_config.json"
    if sentence_config.is_file() and json.loads(sentence_config.read_text(encoding="utf-8")).get("do_lower_case"):
        parts = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *parts])
    return tokenizer


def _find_transformer(folder: Path) -> str:
    modules = folder / "modules.json"
    if not modules.is_file():
        return ""
    return str(json.loads(modules.read_text(encoding="utf-8"))[0]["path"])


def _convert_tokenizer(transformer: Path) -> Tokenizer:
    # Some models have a vocabulary or a sentencepiece model only: transformers converts it, importing torch to do so.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(transformer)).backend_tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{transformer} has no tokenizer.json, and none can be made of its other files: {error}. "
            "Save the model's fast tokenizer into the folder."
        ) from error
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.to_str())
