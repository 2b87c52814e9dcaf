"""Cuts a text into pieces of known token counts, at the best places: sentences, lines, phrases, words, tokens.

LlamaIndex's SentenceSplitter asks a tokenizer for the size of every piece at every level, and so tokenises a text three
to five times; where nothing else is left it cuts into single characters. Here each distinct word is tokenised once in a
worker's life, and a slice's size is a difference of two sums. Sizes are estimates, exact for tokenizers that never join
words: whoever relies on a limit must check the finished chunk.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tasks.backends.tokenizer import NodeTokenizer

# A run of letters without a space is one [UNK] to a WordPiece model: 5 MB of base64 would be one node of one token.
# English has 4 to 5 characters a token, a table with wide gaps about 10.
CHARS_PER_TOKEN = 24

_WORD = re.compile(r"\S+")
_LEVELS = (
    # Ends of sentences, with closing quotes and brackets; where words are not spaced no space need follow. Blank lines.
    re.compile(r"""(?:[.!?…]+["'”’»)\]]*(?=\s)|[。！？｡]+["'”’」』）】»]*|\n[^\S\n]*\n)\s*"""),
    re.compile(r"\n\s*"),
    re.compile(r"(?:[,;:،؛|)\]}](?=\s)|[，；、：）」])\s*"),
)
# Scripts without spaces: such runs are not words that come again, so their tokens are looked at one by one.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_LONG_WORD_CHARS = 32
_LONG_WORD_TOKENS = 12
_WINDOW_CHARS = 16_384  # tokenised at once: the Rust side takes some hundred bytes a character
_WORDS_AT_ONCE = 65_536
_CACHED_WORDS = 200_000  # about 30 MB


class WordCounter:
    """Token counts of words, tokenised once each. One a worker."""

    def __init__(self, tokenizer: NodeTokenizer) -> None:
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}
        self._last = MeasuredText("", np.zeros(0, np.int64), np.zeros(1, np.int64))

    def measure(self, text: str) -> MeasuredText:
        """Take the size of every word of `text`; the text holds no lone surrogates."""
        if self._last.text != text:  # the splitter asks for a text's size first, then for its pieces
            self._last = self._measure(text)
        return self._last

    def _measure(self, text: str) -> MeasuredText:
        # Arrays, and some words at a time: lists of a whole text's took 40 bytes a character.
        positions = array("q")
        counts = array("q", [0])
        before = 0
        matches = _WORD.finditer(text)
        while spans := [match.span() for match in itertools.islice(matches, _WORDS_AT_ONCE)]:
            # A word comes with the space before it: byte-level tokenizers count "\n    return" and " return" differently.
            starts = [before, *(end for _, end in spans[:-1])]
            words = [text[at : min(end, at + _LONG_WORD_CHARS + 1)] for at, (_, end) in zip(starts, spans, strict=True)]
            before = spans[-1][1]
            self._learn(words)
            for word, (start, end) in zip(words, spans, strict=True):
                count = self._counts.get(word)
                if count is not None:
                    positions.append(start)
                    counts.append(count)
                    continue
                for window in range(start, end, _WINDOW_CHARS):
                    found = self._tokenizer.find_starts(text[window : min(end, window + _WINDOW_CHARS)]) + window
                    positions.frombytes(found.tobytes())
                    counts.extend(itertools.repeat(1, len(found)))
        return MeasuredText(text, np.frombuffer(positions, np.int64), np.cumsum(np.frombuffer(counts, np.int64)))

    def _learn(self, words: Sequence[str]) -> None:
        if len(self._counts) > _CACHED_WORDS:
            self._counts.clear()
        new = [
            word
            for word in set(words).difference(self._counts)
            if len(word) <= _LONG_WORD_CHARS and not _UNSPACED.search(word)
        ]
        if not new:
            return
        # After a letter, as in a text: at the very start byte-level and sentencepiece tokenizers may add a space.
        counts = self._tokenizer.count_batch(["a", *("a" + word if word[0].isspace() else word for word in new)])
        for word, count in zip(new, counts[1:], strict=True):
            count -= counts[0] if word[0].isspace() else 0
            if count <= _LONG_WORD_TOKENS:
                self._counts[word] = max(0, count)


class MeasuredText:
    """A text with the places where its tokens start (or its words, several tokens each) and the tokens before each."""

    def __init__(self, text: str, positions: NDArray[np.int64], tokens_before: NDArray[np.int64]) -> None:
        """`positions`: ascending, in characters, shape (n,); `tokens_before`: shape (n + 1,), the last is the sum."""
        self.text = text
        self._positions = positions
        self._tokens_before = tokens_before

    @property
    def size(self) -> int:
        return max(int(self._tokens_before[-1]), len(self.text) // CHARS_PER_TOKEN)

    def find_pieces(self, room: int) -> list[tuple[int, int, int]]:
        """(start, end, size) of consecutive pieces that make up the text; no size is above `room`."""
        return list(self._divide(0, len(self.text), room, 0))

    def _sizes(self, cuts: Sequence[int]) -> NDArray[np.int64]:
        places = np.asarray(cuts, np.int64)
        tokens = self._tokens_before[np.searchsorted(self._positions, places)]
        sizes: NDArray[np.int64] = np.maximum(np.diff(tokens), np.diff(places) // CHARS_PER_TOKEN)
        return sizes

    def _divide(self, start: int, end: int, room: int, level: int) -> Iterator[tuple[int, int, int]]:
        if level < len(_LEVELS):
            ends = [match.end() for match in _LEVELS[level].finditer(self.text, start, end)]
            cuts = [start, *(cut for cut in ends if start < cut < end), end]
        else:
            cuts = self._cut_between_tokens(start, end, room)
        for (left, right), size in zip(pairwise(cuts), self._sizes(cuts).tolist(), strict=True):
            if size <= room or level == len(_LEVELS):
                yield left, right, min(size, room)
            else:
                yield from self._divide(left, right, room, level + 1)

    def _cut_between_tokens(self, start: int, end: int, room: int) -> list[int]:
        # Pieces of a sixteenth, so that the splitter can still fill a chunk and repeat an overlap.
        grain = max(1, room // 16)
        first, last = np.searchsorted(self._positions, (start, end)).tolist()
        cuts = [start]
        while first < last:
            target = self._tokens_before[first] + grain
            first = max(first + 1, int(np.searchsorted(self._tokens_before, target, side="right")) - 1)
            stop = int(self._positions[first]) if first < last else end
            # One token may be a run of thousands of characters.
            while stop - cuts[-1] > grain * CHARS_PER_TOKEN:
                cuts.append(self._avoid_split_character(cuts[-1], cuts[-1] + grain * CHARS_PER_TOKEN))
            stop = self._avoid_split_character(cuts[-1], stop)
            if cuts[-1] < stop < end:
                cuts.append(stop)
        while end - cuts[-1] > grain * CHARS_PER_TOKEN:
            cuts.append(self._avoid_split_character(cuts[-1], cuts[-1] + grain * CHARS_PER_TOKEN))
        return [*cuts, end]

    def _avoid_split_character(self, start: int, cut: int) -> int:
        """The cut, or a place up to 16 before it, if it would part a letter from its accent or an emoji's halves."""
        for place in range(cut, max(start, cut - 16), -1):
            if not is_inside_character(self.text, place):
                return place
        return cut


def is_inside_character(text: str, place: int) -> bool:
    """Whether a cut at `place` would part what is read as one character."""
    if not 0 < place < len(text):
        return False
    after = text[place]
    return (
        unicodedata.category(after) in ("Mn", "Me", "Mc")
        or after in "\u200d\ufe0e\ufe0f"
        or text[place - 1] == "\u200d"
        or "\U0001f3fb" <= after <= "\U0001f3ff"
    )
