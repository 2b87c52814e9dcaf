"""A model on disk: found or downloaded, and described from its configuration files alone; no weights are loaded."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tasks.errors import ModelError
from tasks.records import ModelFiles, ModelShape

# What sentence-transformers reads; a hub repository often carries the same weights four times over, in other formats.
_WANTED = ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin", "*.jinja")
_UNWANTED = (
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "tf_model*",
    "flax_model*",
    "rust_model*",
    "*.onnx",
    "*.msgpack",
    "*.gguf",
)
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_SENTENCE_CONFIGS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_HASHED_SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors", ".bin", ".jinja", ".py"})

# These models number positions from pad_token_id + 1: of XLM-R's 8194 rows 8192 can be used, and a longer text crashes.
_OFFSET_POSITIONS = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "mpnet",
        "data2vec-text",
        "longformer",
        "roberta-prelayernorm",
    }
)
_POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_SHAPELESS_MODULES = frozenset({"Normalize", "Dropout", "LayerNorm"})


def resolve_model(model: str, revision: str | None = None) -> ModelFiles:
    """Find `model`, a folder or a hub id (downloaded once, then from the hub's cache), and describe it.

    A hub model's revision is its commit; a folder's is a hash of its files' contents. Raises ModelError.
    """
    if not model.strip():  # Path("") is the working folder
        raise ModelError("The model's name is empty. Give an id on the hub, owner/name, or a model's folder.")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(
                f"{model} is a folder, and revision={revision!r} names a commit of a hub model. Leave revision unset."
            )
        # Absolute: the name is kept with the collection, and a search may come from another working folder.
        folder = folder.resolve()
        return describe_folder(folder, name=str(folder), revision=_hash_folder(folder))
    if model.startswith((".", "~", os.sep)) or model.count("/") > 1 or folder.exists():
        raise ModelError(
            f"No folder {folder}. Give a folder with a SentenceTransformer, or an id on the hub, owner/name."
        )
    snapshot = _download(model, revision)
    return describe_folder(snapshot, name=model, revision=snapshot.name)


def describe_folder(folder: Path, *, name: str, revision: str) -> ModelFiles:
    """Read a SentenceTransformer's (or a plain transformer's) configuration files. Raises ModelError."""
    modules = _read_modules(folder)
    transformer = folder / modules[0][1]
    config = _read_json(transformer / "config.json")
    if config is None:
        raise ModelError(f"{transformer} has no config.json, so it is no transformer model. Give a model's own folder.")
    if not any((transformer / weights).is_file() for weights in _WEIGHTS):
        raise ModelError(f"{transformer} has no weights; looked for {', '.join(_WEIGHTS)}. Download the model again.")
    model_type = str(config.get("model_type", ""))
    config = config.get("text_config", config) if "hidden_size" not in config else config
    sentence_config = _read_sentence_config(transformer)
    max_tokens = _find_max_tokens(transformer, model_type, config, sentence_config)
    shape = _read_shape(transformer, config, max_tokens)
    pooling, dimension, pools_prompt = _follow_modules(folder, modules, shape.hidden)
    document_prompt, query_prompt = _read_prompts(folder)
    if not pools_prompt and (document_prompt or query_prompt):
        raise ModelError(
            f"{name} leaves its prompt out of the pooling (include_prompt=false), which is not supported: "
            "the encoder sees token ids only. Choose a model that pools the prompt too."
        )
    return ModelFiles(
        name=name,
        path=str(folder),
        revision=revision,
        shape=shape,
        dimension=dimension,
        max_tokens=max_tokens,
        pooling=pooling,
        document_prompt=document_prompt,
        query_prompt=query_prompt,
    )


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        ignored = [*_UNWANTED, *_list_duplicate_weights(model, revision)]
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*_WANTED], ignore_patterns=ignored))
    except GatedRepoError as error:
        raise ModelError(f"{model} is gated. Accept its terms on the hub and set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model} has no revision {revision!r} on the hub. Leave it unset for the default.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"{model} is neither a folder here nor a model on the hub. Check the name; a private one needs HF_TOKEN."
        ) from error
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub can't be reached"
        raise ModelError(
            f"{model} is not in the hub's cache ({constants.HF_HUB_CACHE}) and {reason}. "
            "Download it once with a connection and HF_HUB_OFFLINE=0, or give a folder that holds the model."
        ) from error
    except HTTPError as error:  # the base of the hub's own and of its transport's, httpx or what has taken its place
        raise ModelError(
            f"The hub broke off while {model} was downloaded: {error}. Try again, what is complete is kept; "
            "or give a folder that holds the model."
        ) from error


def _list_duplicate_weights(model: str, revision: str | None) -> list[str]:
    """Patterns of weights that are there a second time: bge-m3 has only pytorch_model.bin, most have safetensors too."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HTTPError

    if constants.HF_HUB_OFFLINE:
        return []
    try:
        siblings = HfApi().model_info(model, revision=revision).siblings or ()
    except HTTPError:
        return []  # the download itself meets the same trouble and tells, or finds the model in the cache
    names = {sibling.rfilename for sibling in siblings}
    return ["pytorch_model*.bin"] if {"model.safetensors", "model.safetensors.index.json"} & names else []


def _hash_folder(folder: Path) -> str:
    """sha256 over names and contents, in the order of the names: the same files anywhere have the same revision."""
    digest = hashlib.sha256()
    for path in _list_model_files(folder):
        there = path.stat()
        content = _hash_file(path, there.st_ino, there.st_size, there.st_mtime_ns)
        digest.update(f"{path.relative_to(folder).as_posix()}\n{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


# A command looks at its inputs before it starts anything, and then the run does: bge-m3's 2.3 GB are read once.
@lru_cache(maxsize=256)
def _hash_file(path: Path, _inode: int, _size: int, _mtime_ns: int) -> str:
    content = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            content.update(block)
    return content.hexdigest()


def _list_model_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
            continue
        unwanted = any(fnmatch.fnmatch(relative.as_posix(), pattern) for pattern in _UNWANTED)
        if path.suffix in _HASHED_SUFFIXES and not unwanted:
            yield path


def _read_json(path: Path) -> Any:
    """The file's content, None where there is no file. Raises ModelError for a torn one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}. Download the model again.") from error


def _read_modules(folder: Path) -> list[tuple[str, str]]:
    """(type, path) of each module; a plain transformer has no modules.json: sentence-transformers pools its mean."""
    modules = _read_json(folder / "modules.json")
    if modules is None:
        return [("Transformer", "")]
    found = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    if not found or found[0][0] != "Transformer":
        raise ModelError(
            f"{folder}'s first module is {found[0][0] if found else 'missing'}; only Transformer is supported. "
            "Choose a model that is a transformer encoder."
        )
    return found


def _follow_modules(folder: Path, modules: list[tuple[str, str]], hidden: int) -> tuple[str, int, bool]:
    """(pooling, dimension of the output, whether the prompt is pooled too)."""
    if len(modules) == 1 and not (folder / "modules.json").is_file():
        return "mean", hidden, True
    pooling, dimension, pools_prompt = "", hidden, True
    for kind, path in modules[1:]:
        config = _read_json(folder / path / "config.json") or {}
        if kind == "Pooling":
            modes = config.get("pooling_mode") or [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag)]
            modes = [modes] if isinstance(modes, str) else (list(modes) or ["mean"])
            pooling = "+".join(modes)
            dimension = int(
                config.get("embedding_dimension") or config.get("word_embedding_dimension") or hidden
            ) * len(modes)
            pools_prompt = bool(config.get("include_prompt", True))
        elif kind == "Dense":
            if "out_features" not in config:
                raise ModelError(f"{folder / path}/config.json does not say out_features. Download the model again.")
            dimension = int(config["out_features"])
        elif kind not in _SHAPELESS_MODULES:
            raise ModelError(
                f"{folder} has a module of type {kind}; supported are Transformer, Pooling, Dense, Normalize, Dropout, "
                "LayerNorm. Choose a model made of these."
            )
    if not pooling:
        raise ModelError(
            f"{folder}'s modules.json has no Pooling module, so it gives no vector for a text. Choose another model."
        )
    return pooling, dimension, pools_prompt


def _read_sentence_config(transformer: Path) -> dict[str, Any]:
    for kind in _SENTENCE_CONFIGS:
        config = _read_json(transformer / f"sentence_{kind}_config.json")
        if config:
            return dict(config)
    return {}


def _find_max_tokens(
    transformer: Path, model_type: str, config: dict[str, Any], sentence_config: dict[str, Any]
) -> int:
    """The limit of one sequence as sentence-transformers finds it, and never more than the positions the model has."""
    processor = sentence_config.get("processor_kwargs") or sentence_config.get("tokenizer_args") or {}
    stated = processor.get("model_max_length") or sentence_config.get("max_seq_length")
    positions = config.get("max_position_embeddings") or 0
    if positions > 0 and model_type in _OFFSET_POSITIONS:
        pad_id = config.get("pad_token_id")
        positions -= (1 if pad_id is None else int(pad_id)) + 1
    if not stated:
        tokenizer_config = _read_json(transformer / "tokenizer_config.json") or {}
        stated = tokenizer_config.get("model_max_length")
    # transformers writes 1e30 where a tokenizer has no limit.
    limits = [
        int(limit) for limit in (stated, positions, sentence_config.get("document_length")) if limit and 0 < limit < 1e9
    ]
    if not limits:
        raise ModelError(
            f'{transformer} does not say how long a text may be: put {{"max_seq_length": 512}}, or what the model was '
            "trained with, into its sentence_bert_config.json."
        )
    return min(limits)


def _read_shape(transformer: Path, config: dict[str, Any], max_tokens: int) -> ModelShape:
    def read(*names: str) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
        raise ModelError(
            f"{transformer}/config.json has none of {', '.join(names)}. Only transformer encoders are supported."
        )

    # The second and third names are DistilBERT's and T5's.
    return ModelShape(
        layers=read("num_hidden_layers", "n_layers", "num_layers"),
        hidden=read("hidden_size", "dim", "d_model"),
        heads=read("num_attention_heads", "n_heads", "num_heads"),
        intermediate=read("intermediate_size", "hidden_dim", "d_ff"),
        vocabulary=read("vocab_size"),
        max_tokens=max_tokens,
    )


def _read_prompts(folder: Path) -> tuple[str, str]:
    """(document prompt, query prompt): the model's own, else its default prompt, else none."""
    config = _read_json(folder / "config_sentence_transformers.json") or {}
    prompts = {name: prompt for name, prompt in (config.get("prompts") or {}).items() if prompt is not None}
    default_name = config.get("default_prompt_name")
    if default_name is not None and default_name not in prompts:
        raise ModelError(f"{folder} names {default_name!r} as its default prompt, but has only {sorted(prompts)}.")
    default = prompts.get(default_name, "")
    # Newer versions save an empty "document" beside a model's own "passage": the first with a text counts.
    documents = [prompts[name] for name in ("document", "passage", "corpus") if name in prompts]
    document = next(filter(None, documents), "") if documents else default
    return document, prompts.get("query", default)
