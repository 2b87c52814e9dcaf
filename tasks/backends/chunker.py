"""Documents to nodes with LlamaIndex, in the model's own tokens: no node is above the limit, no character is lost."""

from __future__ import annotations

import datetime
import decimal
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.backends.pieces import WordCounter, is_inside_character
from tasks.backends.tokenizer import NodeTokenizer, replace_surrogates
from tasks.config import ChunkingSettings
from tasks.errors import TokenLimitError
from tasks.records import Document, Node, TokenIds

if TYPE_CHECKING:
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.schema import TextNode

log = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 512  # longer nodes answer questions worse, and attention costs their square
MIN_TEXT_TOKENS = 16  # less room than this for a node's own text is a mistake in the settings
NOT_EMBEDDED = "not_embedded"  # metadata key that names the metadata left out of the embedding for want of room

_RESERVED = re.compile(
    r"_node_.*|doc_id|document_id|ref_doc_id|generation|not_embedded|ballast_(?:source|nodes|content)"
)
_NON_SPACE = re.compile(r"\S")
_SEARCH_CHARS = 65_536  # how far from where it should be a node's text is looked for


@dataclass(frozen=True, slots=True)
class _Draft:
    """A node before it has an id: its text, its metadata, what of it is not embedded, what is embedded, and the ids."""

    text: str
    metadata: dict[str, Any]
    excluded_keys: list[str]
    embedded_text: str
    token_ids: TokenIds


class Chunker:
    """Cuts documents by sentences, Markdown by its headings first.

    The limit holds for prompt, embedded metadata, text and special tokens together; the ids that come with a node are
    what the model will be fed.
    """

    def __init__(
        self,
        settings: ChunkingSettings,
        tokenizer: NodeTokenizer,
        max_tokens: int,
        make_node_id: Callable[[str, str, int], str],
    ) -> None:
        """`max_tokens`: the model's limit; `make_node_id(doc_id, content_hash, occurrence)`.

        Raises TokenLimitError if the document prompt leaves no room for text.
        """
        self._settings = settings
        self._tokenizer = tokenizer
        self._make_node_id = make_node_id
        self._words = WordCounter(tokenizer)
        self.limit = min(settings.max_tokens or DEFAULT_MAX_TOKENS, max_tokens)
        bare_tokens = len(tokenizer.encode_batch([""])[0])
        self._text_limit = self.limit - bare_tokens
        if self._text_limit < MIN_TEXT_TOKENS:
            raise TokenLimitError(
                f"The prompt and special tokens take {bare_tokens} of {self.limit} tokens, which leaves "
                f"{self._text_limit} for a node's text; it needs {MIN_TEXT_TOKENS}. Raise chunking.max_tokens "
                f"(the model's limit is {max_tokens}), or choose a model with a shorter prompt."
            )
        if settings.max_tokens and settings.max_tokens > max_tokens:
            log.warning("chunking.max_tokens=%d is above the model's limit; using %d", settings.max_tokens, max_tokens)
        # One splitter for each room that metadata leaves; making one takes longer than splitting a short text.
        self._get_splitter = lru_cache(maxsize=1024)(self._make_splitter)
        self._count_prefix = lru_cache(maxsize=4096)(lambda prefix: len(tokenizer.encode_batch([prefix])[0]))

    def chunk(self, document: Document, generation: str) -> tuple[Node, ...]:
        """The document's nodes in its order; none where there is no text to embed."""
        text = replace_surrogates(document.text)
        if not text.strip():
            return ()
        metadata = _to_metadata(document.metadata)
        drafts: list[_Draft] = []
        for section, more in self._split_sections(text, document.format):
            drafts.extend(self._split_section(section, {**metadata, **more}))
        left_out = sum(NOT_EMBEDDED in draft.metadata for draft in drafts)
        if left_out:
            log.warning(
                "doc_id=%s nodes=%d nodes_without_some_metadata=%d: over a third of the limit; stored, not embedded",
                ascii(document.doc_id),
                len(drafts),
                left_out,
            )
        places = _find_places(text, [draft.text for draft in drafts], rewritten=self._is_markdown(document.format))
        return self._build_nodes(replace_surrogates(document.doc_id), text, metadata, drafts, places, generation)

    # ------------------------------------------------------------------------------------------ splitting

    def _is_markdown(self, text_format: str) -> bool:
        splitter = self._settings.splitter
        return splitter == "markdown" or (splitter == "auto" and text_format == "markdown")

    def _split_sections(self, text: str, text_format: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self._is_markdown(text_format):
            yield text, {}
            return
        from llama_index.core.node_parser import MarkdownNodeParser
        from llama_index.core.schema import TextNode

        for node in MarkdownNodeParser().get_nodes_from_node(TextNode(text=text)):
            yield node.text, dict(node.metadata)

    def _split_section(self, text: str, metadata: dict[str, Any]) -> list[_Draft]:
        excluded, prefix, dropped = self._choose_embedded_metadata(metadata)
        if dropped:
            metadata = {**metadata, NOT_EMBEDDED: dropped}
            excluded = [*excluded, NOT_EMBEDDED]
        overhead = self._count_prefix(prefix)
        room = self.limit - overhead
        drafts = []
        for chunk, ids in self._fit(self._split(text, room), prefix, room):
            # Control characters alone give no token: there is nothing to embed. As many ids as the prefix alone has can also
            # mean that its last space and the text became one token: then the text itself has some.
            if len(ids) > overhead or self._tokenizer.count(chunk):
                drafts.append(_Draft(chunk, metadata, excluded, prefix + chunk, ids))
        return drafts

    def _split(self, text: str, room: int) -> list[str]:
        splitter: SentenceSplitter = self._get_splitter(room)
        chunks: list[str] = splitter.split_text(text)
        return [stripped for chunk in chunks if (stripped := chunk.strip())]

    def _fit(self, chunks: Sequence[str], prefix: str, room: int) -> Iterator[tuple[str, TokenIds]]:
        """The chunks with their ids; one that turns out too long is split again: token counts are not additive."""
        for chunk, ids in zip(chunks, self._tokenizer.encode_batch([prefix + chunk for chunk in chunks]), strict=True):
            if len(ids) <= self.limit:
                yield chunk, ids
                continue
            if len(chunk) < 2:
                raise TokenLimitError(
                    f"The single character {chunk!a} takes {len(ids)} tokens with its metadata; the limit is "
                    f"{self.limit}. Raise chunking.max_tokens."
                )
            smaller = max(1, room // 2)
            parts = self._split(chunk, smaller) if smaller < room else []
            yield from self._fit(parts if len(parts) > 1 else _halve(chunk), prefix, smaller)

    def _make_splitter(self, room: int) -> SentenceSplitter:
        from llama_index.core.node_parser import SentenceSplitter

        sizes: dict[str, int] = {}

        def split_sentences(text: str) -> list[str]:
            sizes.clear()
            pieces = []
            for start, end, size in self._words.measure(text).find_pieces(room):
                piece = text[start:end]
                sizes[piece] = size
                pieces.append(piece)
            return pieces

        def measure(text: str) -> range:
            # The splitter takes the length of what it gets and nothing else.
            size = sizes.get(text)
            return range(self._words.measure(text).size if size is None else size)

        return SentenceSplitter(
            chunk_size=room,
            chunk_overlap=min(self._settings.overlap_tokens, room // 4),
            tokenizer=measure,
            # LlamaIndex's own is NLTK's, which looks for a download where its data is missing and knows no 。
            chunking_tokenizer_fn=split_sentences,
        )

    # ------------------------------------------------------------------------------------------ metadata

    def _choose_embedded_metadata(self, metadata: Mapping[str, Any]) -> tuple[list[str], str, list[str]]:
        """(keys not embedded, what precedes the text, keys left out as they would take over a third of the limit)."""
        wanted = set(self._settings.embedded_metadata_keys)
        chosen = [key for key, value in metadata.items() if key in wanted and value not in (None, "", [])]
        # Markdown's parser calls the path of a section without parents "/": that tells nobody anything.
        chosen = [key for key in chosen if not (key == "header_path" and metadata[key] == "/")]
        dropped: list[str] = []
        while chosen:
            prefix = _format_metadata({key: metadata[key] for key in chosen})
            if self._count_prefix(prefix) - (self.limit - self._text_limit) <= self._text_limit // 3:
                break
            longest = max(chosen, key=lambda key: len(str(metadata[key])))
            chosen.remove(longest)
            dropped.append(longest)
        prefix = _format_metadata({key: metadata[key] for key in chosen}) if chosen else ""
        return [key for key in metadata if key not in chosen], prefix, sorted(dropped)

    # ------------------------------------------------------------------------------------------ nodes

    def _build_nodes(
        self,
        doc_id: str,
        text: str,
        metadata: dict[str, Any],
        drafts: Sequence[_Draft],
        places: Sequence[tuple[int, int] | None],
        generation: str,
    ) -> tuple[Node, ...]:
        from llama_index.core.node_parser.node_utils import build_nodes_from_splits
        from llama_index.core.schema import Document as LlamaDocument
        from llama_index.core.schema import NodeRelationship
        from llama_index.core.vector_stores.utils import node_to_metadata_dict

        seen: Counter[str] = Counter()
        ids = []
        for draft in drafts:
            content_hash = hashlib.sha256(draft.embedded_text.encode()).hexdigest()
            ids.append(self._make_node_id(doc_id, content_hash, seen[content_hash]))
            seen[content_hash] += 1
        source = LlamaDocument(id_=doc_id, text=text, metadata=metadata)
        llama_nodes: list[TextNode] = build_nodes_from_splits(
            [draft.text for draft in drafts], source, id_func=lambda index, _: ids[index]
        )
        for llama_node, draft, place in zip(llama_nodes, drafts, places, strict=True):
            llama_node.metadata = dict(draft.metadata)
            llama_node.excluded_embed_metadata_keys = list(draft.excluded_keys)
            if place is not None:
                llama_node.start_char_idx, llama_node.end_char_idx = place
        # Not NodeParser's post-processing: it links sections to what follows only within one section.
        related = [llama_node.as_related_node_info() for llama_node in llama_nodes]
        nodes = []
        for index, (llama_node, draft) in enumerate(zip(llama_nodes, drafts, strict=True)):
            if index:
                llama_node.relationships[NodeRelationship.PREVIOUS] = related[index - 1]
            if index + 1 < len(related):
                llama_node.relationships[NodeRelationship.NEXT] = related[index + 1]
            payload = node_to_metadata_dict(llama_node, remove_text=False, flat_metadata=False)
            nodes.append(Node(ids[index], doc_id, generation, draft.token_ids, {**payload, "generation": generation}))
        return tuple(nodes)


def _halve(text: str) -> list[str]:
    middle = len(text) // 2
    place = next((place for place in range(middle, 0, -1) if not is_inside_character(text, place)), middle)
    return [part for half in (text[:place], text[place:]) if (part := half.strip())]


def _format_metadata(metadata: Mapping[str, Any]) -> str:
    """What LlamaIndex puts before a node's text: MetadataMode.EMBED with the default templates."""
    return "\n".join(f"{key}: {value!s}" for key, value in metadata.items()).strip() + "\n\n"


def _find_places(text: str, chunks: Sequence[str], *, rewritten: bool) -> list[tuple[int, int] | None]:
    """Where in the text each chunk stands, or None where Markdown's parser rewrote it.

    LlamaIndex takes the first match behind the previous node's start, which in repeated text leaves holes. The last
    match that starts no later than the first character not yet covered leaves none.
    """
    places: list[tuple[int, int] | None] = []
    covered = 0
    for chunk in chunks:
        uncovered = _NON_SPACE.search(text, covered)
        latest = uncovered.start() if uncovered else len(text)
        start = text.rfind(chunk, max(0, latest - len(chunk)), latest + len(chunk))
        if start < 0 and rewritten:
            start = text.find(chunk, latest, latest + len(chunk) + _SEARCH_CHARS)
        if start < 0:  # in repeated text the matches run ahead, and may have reached the end before the nodes do
            start = text.rfind(chunk, max(0, latest - len(chunk) - _SEARCH_CHARS), latest + len(chunk))
        if start < 0:
            places.append(None)
            continue
        covered = max(covered, start + len(chunk))
        places.append((start, start + len(chunk)))
    return places


def _to_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready, and without keys that LlamaIndex or Ballast would overwrite: those get `user_` before them."""
    converted: dict[str, Any] = {}
    for key, value in metadata.items():
        name = replace_surrogates(str(key))
        while _RESERVED.fullmatch(name) or name in converted:
            name = f"user_{name}"
        converted[name] = _to_json(value)
    return converted


def _to_json(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        return replace_surrogates(str(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else str(value)  # Qdrant's integers have 64 bits
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has neither NaN nor infinity
    if isinstance(value, Mapping):
        return {replace_surrogates(str(key)): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_to_json(item) for item in value]
        return sorted(items, key=str) if isinstance(value, set | frozenset) else items
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes | bytearray):
        return bytes(value).hex()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return replace_surrogates(str(value))
