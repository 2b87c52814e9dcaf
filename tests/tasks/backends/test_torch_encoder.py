"""The torch encoder by itself: masks, padding, precision, overflow, and what becomes of exceptions. CUDA is in tests/gpu."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.allocator import allocator_environment, set_allocator_environment
from tasks.backends.torch_encoder import TorchEncoder, is_unit, to_failure_chain
from tasks.errors import ConfigError, DeviceError, ModelError
from tasks.policy.failures import classify_failure
from tasks.records import TokenIds


def build_xlm_roberta(**changes: Any) -> transformers.XLMRobertaModel:
    """bge-m3 in small: XLM-R with random weights, positions counted from the pad id on."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 500,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 130,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    }
    return transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**(shape | changes))).eval()


def build_encoder(precision: str = "auto", **changes: Any) -> TorchEncoder:
    model = build_xlm_roberta(**changes)
    return TorchEncoder.from_model(model, device="cpu", classify=classify_failure, precision=precision)


def rows_of(*tokens: int) -> list[TokenIds]:
    return [np.arange(5, 5 + count, dtype=np.int32) for count in tokens]


@pytest.fixture(scope="module")
def encoder() -> Iterator[TorchEncoder]:
    built = build_encoder()
    yield built
    built.close()


def test_the_description_is_read_off_the_model(encoder: TorchEncoder) -> None:
    info = encoder.describe()
    assert (info.shape.layers, info.shape.hidden, info.shape.heads, info.shape.intermediate) == (2, 64, 4, 128)
    assert info.max_tokens == 128  # 130 positions, counted from 2 on
    assert (info.device, info.key.precision, info.key.attention) == ("cpu", "fp32", "sdpa")
    assert info.key.torch_version == torch.__version__
    assert info.kernel_masked == info.kernel_unmasked == "sdpa"
    # The shape's closed form leaves out the pooler (h^2 + h) and the embedding's norm and type table.
    assert info.weights_bytes == pytest.approx(4 * info.shape.parameters, rel=0.1)


def test_eager_attention_is_said_to_hold_the_scores() -> None:
    info = build_encoder(attn_implementation="eager").describe()
    assert info.kernel_masked == info.kernel_unmasked == "eager"


@given(tokens=st.lists(st.integers(1, 128), min_size=1, max_size=6))
@settings(deadline=None, max_examples=10)
def test_padding_changes_no_vector(encoder: TorchEncoder, tokens: list[int]) -> None:
    together = encoder.encode(rows_of(*tokens)).vectors
    assert together is not None
    for row, count in enumerate(tokens):
        alone = encoder.encode(rows_of(count)).vectors
        assert alone is not None
        assert together[row] @ alone[0] > 0.9999


def test_equal_lengths_reach_the_model_without_a_mask_and_others_with_one() -> None:
    model = build_xlm_roberta()
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda _m, _a, kw: seen.append(kw["attention_mask"] is not None), with_kwargs=True)
    encoder = TorchEncoder.from_model(model, device="cpu", classify=classify_failure)
    encoder.encode(rows_of(9, 9))
    encoder.encode(rows_of(9, 8))
    assert seen == [False, True]


def test_ids_of_another_vocabulary_are_refused_before_they_reach_the_device(encoder: TorchEncoder) -> None:
    with pytest.raises(ModelError, match="vocabulary ends at 499"):
        encoder.encode([np.array([5, 500], np.int32)])
    with pytest.raises(ModelError, match="0 tokens"):
        encoder.encode([np.array([], np.int32)])


def test_half_precision_agrees_with_single_precision(encoder: TorchEncoder) -> None:
    half = build_encoder("fp16")
    single_vectors = encoder.encode(rows_of(60, 20, 20)).vectors
    outcome = half.encode(rows_of(60, 20, 20))
    assert half.describe().key.precision == "fp16"
    assert half.describe().weights_bytes < 0.6 * encoder.describe().weights_bytes
    assert outcome.vectors is not None
    assert single_vectors is not None
    assert outcome.vectors.dtype == np.float32
    assert outcome.redone_fp32 == 0
    assert np.einsum("nd,nd->n", outcome.vectors, single_vectors).min() > 0.999


def build_overflowing(precision: str) -> TorchEncoder:
    """Activations of some 1e6 in the feed-forward: fine in fp32, beyond fp16's 65,504."""
    model = build_xlm_roberta()
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.weight.mul_(3e4)
        model.encoder.layer[0].output.dense.weight.mul_(3e2)
    return TorchEncoder.from_model(model, device="cpu", classify=classify_failure, precision=precision)


def test_rows_that_overflow_in_half_precision_are_redone_in_single() -> None:
    rows = rows_of(12, 12, 7)
    expected = build_overflowing("fp32").encode(rows)
    outcome = build_overflowing("fp16").encode(rows)
    assert (expected.redone_fp32, expected.bad_rows) == (0, ())
    assert (outcome.redone_fp32, outcome.bad_rows) == (3, ())
    assert outcome.vectors is not None
    assert expected.vectors is not None
    assert np.einsum("nd,nd->n", outcome.vectors, expected.vectors).min() > 0.999


def test_only_the_rows_that_overflow_are_redone() -> None:
    model = build_xlm_roberta()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7] = float("nan")
    encoder = TorchEncoder.from_model(model, device="cpu", classify=classify_failure, precision="fp16")
    outcome = encoder.encode([np.array([5, 6], np.int32), np.array([5, 7], np.int32), np.array([8, 9], np.int32)])
    # A weight that is NaN stays so in fp32: this row can't be had, its neighbours can.
    assert outcome.kind == "done"
    assert outcome.bad_rows == (1,)
    assert outcome.redone_fp32 == 0
    assert outcome.vectors is not None
    assert is_unit(outcome.vectors).tolist() == [True, False, True]


class FailingModel(torch.nn.Module):  # type: ignore[misc]
    """Fails like a device does, with a tensor in the failing frame."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner = build_xlm_roberta()
        self.config = self.inner.config
        self.error: Exception | None = error
        self.held: weakref.ref[torch.Tensor] | None = None

    def get_embedding_dimension(self) -> int:
        return 64

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        activations = torch.ones(1000)
        self.held = weakref.ref(activations)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        return {"sentence_embedding": self.inner(features["input_ids"]).pooler_output + activations[0]}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.03 GiB."), "oom"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "sticky"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "ambiguous"),
        (MemoryError(), "oom"),
    ],
)
def test_failures_of_the_device_come_back_as_outcomes_that_hold_no_tensor(error: Exception, kind: str) -> None:
    model = FailingModel(error)
    encoder = TorchEncoder.from_model(model, device="cpu", classify=classify_failure)
    gc.disable()
    try:
        outcome = encoder.encode(rows_of(9))
        assert (outcome.kind, outcome.vectors) == (kind, None)
        assert type(error).__name__ in outcome.message
        assert model.held is not None
        assert model.held() is None  # without the garbage collector's help
    finally:
        gc.enable()
    assert encoder.encode(rows_of(9)).kind == "done"


def test_a_bug_in_the_model_is_raised_as_it_is() -> None:
    encoder = TorchEncoder.from_model(
        FailingModel(RuntimeError("mat1 and mat2 shapes cannot be multiplied")), device="cpu", classify=classify_failure
    )
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        encoder.encode(rows_of(9))


def test_a_device_or_precision_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="cuda:99"):
        TorchEncoder.from_model(build_xlm_roberta(), device="cuda:99", classify=classify_failure).describe()
    with pytest.raises(ConfigError, match="tpu"):
        TorchEncoder.from_model(build_xlm_roberta(), device="tpu", classify=classify_failure).describe()
    with pytest.raises(ConfigError, match="fp8"):
        build_encoder("fp8").describe()
    with pytest.raises(ModelError, match="nowhere"):
        TorchEncoder("/nowhere", device="cpu", classify=classify_failure).describe()
    with pytest.raises(DeviceError, match="ProcessEncoder"):
        build_encoder().restart()


def test_the_whole_chain_of_causes_is_told() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise ValueError("could not run") from error
    except ValueError as error:
        chain = to_failure_chain(error)
    assert [names[0] for names, _ in chain] == ["ValueError", "MemoryError"]
    assert classify_failure(chain) == "oom"


def test_the_users_allocator_settings_are_kept() -> None:
    merged = allocator_environment(
        {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128", "PYTORCH_ALLOC_CONF": "roundup_power2_divisions:4"}
    )
    assert len(set(merged.values())) == 1
    assert set(merged["PYTORCH_ALLOC_CONF"].split(",")) == {
        "max_split_size_mb:128",
        "roundup_power2_divisions:4",
        "expandable_segments:True",
    }
    chosen = allocator_environment({"PYTORCH_ALLOC_CONF": "expandable_segments:False"})
    assert chosen["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:False"


def test_it_is_said_when_torch_was_imported_too_early(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="tasks.backends.allocator"):
        set_allocator_environment()
    assert "before its allocator environment" in caplog.text


def test_a_cpu_tells_its_peaks_to_a_prober_that_asks_for_them(minilm: str) -> None:
    encoder = TorchEncoder(minilm, device="cpu", classify=classify_failure, profiles_memory=True)
    rng = np.random.default_rng(3)
    peaks = []
    for nodes in (2, 4, 8):
        outcome = encoder.encode([rng.integers(1000, 30_000, 64, dtype=np.int32) for _ in range(nodes)])
        assert outcome.peak_bytes is not None
        peaks.append(outcome.peak_bytes)
    # Two hidden states, the attention's output, the feed-forward block's two: (3 x 384 + 2 x 1536) x 4 bytes a token.
    assert peaks[2] == pytest.approx(8 * 64 * (3 * 384 + 2 * 1536) * 4, rel=0.1)
    assert peaks[0] < peaks[1] < peaks[2]
    encoder.close()


@pytest.mark.parametrize("tokens", [(9,), (9, 4), (30, 30, 7, 5, 1), (64,) * 9])
def test_rows_shared_out_among_threads_have_the_vectors_of_one_thread(minilm: str, tokens: tuple[int, ...]) -> None:
    alone, shared = (
        TorchEncoder(minilm, device="cpu", classify=classify_failure, threads=threads) for threads in (1, 3)
    )
    try:
        expected, got = alone.encode(rows_of(*tokens)).vectors, shared.encode(rows_of(*tokens)).vectors
        assert expected is not None
        assert got is not None
        np.testing.assert_allclose(got, expected, atol=1e-5)
    finally:
        alone.close()
        shared.close()
        torch.set_num_threads(os.cpu_count() or 1)
