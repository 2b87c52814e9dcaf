"""BallastEmbedding in LlamaIndex's place: the same vectors, no truncation in silence, no death of memory."""

import asyncio
import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from tasks.backends.encoder import Encoder
from tasks.engine.calibrate import derive_encoder_prior
from tasks.engine.llama_index_embedding import BallastEmbedding
from tasks.errors import ConfigError, DeviceError
from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, TokenIds

# Importing LlamaIndex's node parsers and its pickling go through deprecated corners of other libraries.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WORDS = ["harbour", "ballast", "crane", "tide", "pilot", "cargo", "anchor", "hull", "ledger", "manifest", "quay"]


def make_texts(lengths: Sequence[int], seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


TEXTS = make_texts([3, 40, 12, 150, 5, 12, 90, 1, 12, 30, 200, 7])


@pytest.fixture(scope="module")
def plain(minilm: str) -> HuggingFaceEmbedding:
    return HuggingFaceEmbedding(minilm, device="cpu")


@pytest.fixture(scope="module")
def ballast(minilm: str) -> BallastEmbedding:
    return BallastEmbedding(minilm, device="cpu")


def assert_equal(ours: Any, theirs: Any) -> None:
    cosine = np.einsum("nd,nd->n", np.asarray(ours), np.asarray(theirs))
    assert cosine.min() > 0.9999
    assert cosine.max() < 1.0001


def test_the_vectors_are_the_base_classes(plain: HuggingFaceEmbedding, ballast: BallastEmbedding) -> None:
    assert_equal(ballast.get_text_embedding_batch(TEXTS), plain.get_text_embedding_batch(TEXTS))
    assert_equal([ballast.get_query_embedding("Which tide?")], [plain.get_query_embedding("Which tide?")])
    assert_equal([ballast.get_text_embedding("Which tide?")], [plain.get_text_embedding("Which tide?")])
    assert ballast.get_text_embedding_batch([]) == []
    assert_equal([ballast.get_text_embedding("")], [plain.get_text_embedding("")])


def test_async_calls_take_turns_and_agree(plain: HuggingFaceEmbedding, ballast: BallastEmbedding) -> None:
    async def ask() -> list[Any]:
        return await asyncio.gather(
            ballast.aget_text_embedding_batch(TEXTS),
            ballast.aget_query_embedding("Which tide?"),
            ballast.aget_text_embedding("Which tide?"),
        )

    batch, query, text = asyncio.run(ask())
    assert_equal(batch, plain.get_text_embedding_batch(TEXTS))
    assert_equal([query, text], [plain.get_query_embedding("Which tide?"), plain.get_text_embedding("Which tide?")])


def test_instructions_and_max_length_mean_what_they_mean_in_the_base_class(minilm: str) -> None:
    options: dict[str, Any] = {"max_length": 64, "device": "cpu", "show_progress_bar": True}
    options |= {"query_instruction": "find: ", "text_instruction": "passage: "}
    ours, theirs = BallastEmbedding(minilm, **options), HuggingFaceEmbedding(minilm, **options)
    assert_equal(ours.get_text_embedding_batch(TEXTS), theirs.get_text_embedding_batch(TEXTS))
    assert_equal([ours.get_query_embedding("tide")], [theirs.get_query_embedding("tide")])
    assert ours.truncated_texts == 3  # 90, 150 and 200 words


def test_a_truncated_model_dimension_is_kept(minilm: str) -> None:
    ours, theirs = (cls(minilm, device="cpu", truncate_dim=64) for cls in (BallastEmbedding, HuggingFaceEmbedding))
    assert_equal(ours.get_text_embedding_batch(TEXTS), theirs.get_text_embedding_batch(TEXTS))


def test_truncation_is_told_with_its_count_and_not_every_time(minilm: str, caplog: pytest.LogCaptureFixture) -> None:
    embedding = BallastEmbedding(minilm, device="cpu", max_length=32)
    # 30 words of one token each and two special tokens are exactly the limit, 31 are one too many.
    texts = ["tide " * 30, "tide " * 31, "tide " * 40, "tide"]
    for _ in range(3):
        embedding.get_text_embedding_batch(texts)
    told = [record.getMessage() for record in caplog.records if "truncated_texts" in record.getMessage()]
    assert len(told) == 2
    assert "truncated_texts=2 of=4 max_tokens=32" in told[0]
    assert embedding.truncated_texts == 6


def test_it_drops_into_a_pipeline_and_an_index(ballast: BallastEmbedding) -> None:
    documents = [Document(text=text, metadata={"n": n}) for n, text in enumerate(TEXTS)]
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=8)
    nodes = IngestionPipeline(transformations=[splitter, ballast], vector_store=SimpleVectorStore()).run(
        documents=documents
    )
    assert len(nodes) > len(documents)
    assert all(node.embedding is not None for node in nodes)
    index = VectorStoreIndex.from_documents(
        [Document(text="The crane lifts forty tonnes."), Document(text="Supper is at eight.")], embed_model=ballast
    )
    (best, *_) = index.as_retriever(similarity_top_k=2).retrieve("How heavy can the crane lift?")
    assert "crane" in best.node.get_content()


def test_a_given_batch_size_bounds_what_goes_together(minilm: str) -> None:
    embedding = Recorded(minilm, device="cpu", embed_batch_size=4)
    embedding.get_text_embedding_batch(make_texts([9] * 10))
    assert embedding.batches == [4, 4, 2]
    whole = Recorded(minilm, device="cpu")
    whole.get_text_embedding_batch(make_texts([9] * 10))
    assert whole.batches == [10]


def test_a_copy_works_without_what_the_original_started(ballast: BallastEmbedding) -> None:
    expected = ballast.get_text_embedding_batch(TEXTS)
    for other in (copy.deepcopy(ballast), pickle.loads(pickle.dumps(ballast))):
        assert_equal(other.get_text_embedding_batch(TEXTS), expected)


@pytest.mark.parametrize("options", [{"normalize": False}, {"parallel_process": True}, {"device": "tpu"}])
def test_what_it_does_not_do_is_refused_at_once(minilm: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        BallastEmbedding(minilm, **({"device": "cpu"} | options))


# ------------------------------------------------------------------------------------------ trouble


class Card:
    """A CPU encoder that passes for a small GPU: `room_bytes` above the weights, and faults by call."""

    def __init__(self, inner: Encoder, room_bytes: int, fault: Callable[[int], str | None]) -> None:
        self.inner = inner
        self.room_bytes = room_bytes
        self.fault = fault
        self.calls: list[int] = []
        self.release_memory, self.restart, self.close = inner.release_memory, inner.restart, inner.close

    def describe(self) -> EncoderInfo:
        return replace(self.inner.describe(), device="cuda:0")

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        self.calls.append(len(token_ids))
        kind = self.fault(len(self.calls) - 1)
        return BatchOutcome(kind, message=f"injected {kind}") if kind else self.inner.encode(token_ids)  # type: ignore[arg-type]

    def read_memory(self) -> DeviceMemory:
        return DeviceMemory(self.room_bytes, self.room_bytes, self.room_bytes)


class Recorded(BallastEmbedding):  # type: ignore[misc]
    """With its encoder on a Card."""

    room_bytes: int = 8 * 1024**3
    oom_calls: frozenset[int] = frozenset()

    def _make_encoder(self) -> Encoder:
        self._card = Card(
            super()._make_encoder(), self.room_bytes, lambda call: "oom" if call in self.oom_calls else None
        )
        return self._card

    _card: Any = None

    @property
    def batches(self) -> list[int]:
        return self._card.calls  # type: ignore[no-any-return]


@pytest.fixture
def expected(plain: HuggingFaceEmbedding) -> list[list[float]]:
    return plain.get_text_embedding_batch(make_texts([9] * 16))


def test_out_of_memory_halves_the_batch_and_loses_nothing(minilm: str, plain: HuggingFaceEmbedding) -> None:
    embedding = Recorded(minilm, device="cpu")
    embedding.oom_calls = frozenset({0})
    texts = [f"{word} " + "tide " * 200 for word in WORDS]
    assert_equal(embedding.get_text_embedding_batch(texts), plain.get_text_embedding_batch(texts))
    first, second, *_ = embedding.batches
    assert 1 <= second <= first // 2
    assert sum(embedding.batches) == first + len(texts)  # what failed was tried again, in smaller batches, and no more


def test_a_device_without_room_hands_everything_to_the_cpu(minilm: str, expected: list[list[float]]) -> None:
    embedding = Recorded(minilm, device="cpu")
    embedding.room_bytes = 1024
    assert_equal(embedding.get_text_embedding_batch(make_texts([9] * 16)), expected)
    assert embedding.batches == []


def test_only_the_long_texts_go_to_the_cpu(minilm: str, plain: HuggingFaceEmbedding) -> None:
    embedding = Recorded(minilm, device="cpu", max_length=256)
    texts = make_texts([240, 9, 9, 9, 230])
    prior = derive_encoder_prior(embedding._make_encoder().describe())
    embedding.room_bytes = int(1.1 * int(prior.predict(3, 14, True)))
    assert_equal(embedding.get_text_embedding_batch(texts), plain.get_text_embedding_batch(texts))
    assert sum(embedding.batches) == 3


def test_without_the_spill_it_is_an_error_with_the_way_out(minilm: str) -> None:
    embedding = Recorded(minilm, device="cpu", spill_to_cpu=False)
    embedding.oom_calls = frozenset(range(99))
    with pytest.raises(DeviceError, match=r"16 of 16 texts.*injected oom.*spill_to_cpu=True"):
        embedding.get_text_embedding_batch(make_texts([9] * 16))
