from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.memory import MemoryModel, derive_prior
from tasks.policy.memory_fit import RECENT, fit_model, refine_fit, start_fit
from tasks.policy.probes import choose_probes
from tasks.records import Attention, MemorySample, ModelShape, Precision

BGE_M3 = ModelShape(24, 1024, 16, 4096, 250_002, 8194)
BGE_BASE = ModelShape(12, 768, 12, 3072, 30_522, 512)
BGE_SMALL = ModelShape(12, 384, 12, 1536, 30_522, 512)
MINILM = ModelShape(6, 384, 12, 1536, 30_522, 512)
GIB = 1024**3
PRIOR = derive_prior(BGE_M3, "fp16", "sdpa", "sdpa")

bytes_per_token = st.floats(1, 1e5)
bytes_per_pair = st.floats(0, 500, allow_subnormal=False)


@st.composite
def models(draw: st.DrawFn) -> MemoryModel:
    token, attention, square = draw(bytes_per_token), draw(bytes_per_token), draw(bytes_per_pair)
    return MemoryModel(
        fixed=draw(st.floats(0, 1e8)),
        token=token,
        attention=attention,
        square=square,
        masked_token=token + draw(bytes_per_token),
        masked_attention=attention + draw(bytes_per_token),
        masked_square=square + draw(bytes_per_pair),
        mask=draw(st.floats(0, 4)),
    )


samples = st.builds(
    MemorySample,
    nodes=st.integers(1, 4096),
    padded_tokens=st.integers(1, 8192),
    masked=st.booleans(),
    peak_bytes=st.integers(1, 80 * GIB),
)


def measure(model: MemoryModel, b: int, s: int, masked: bool, factor: float = 1.0) -> MemorySample:
    return MemorySample(b, s, masked, int(int(model.predict(b, s, masked)) * factor))


def assert_sane(model: MemoryModel) -> None:
    assert all(np.isfinite(x) and x >= 0 for x in model.coefficients().values())
    b = np.array([1, 2, 7, 64])[:, None]
    s = np.array([1, 8, 100, 1001, 8192])[None, :]
    plain, padded = model.predict(b, s, False), model.predict(b, s, True)
    assert (plain >= 0).all()
    assert (padded >= plain).all()
    for peaks in (plain, padded):
        assert (np.diff(peaks, axis=0) >= 0).all()
        assert (np.diff(peaks, axis=1) >= 0).all()


# ------------------------------------------------------------------------------------------------- the model


@settings(deadline=None)
@given(models())
def test_predictions_are_monotone_never_negative_and_no_smaller_with_a_mask(model: MemoryModel) -> None:
    assert_sane(model)


@settings(deadline=None)
@given(models(), st.integers(1, 8192), st.booleans(), st.integers(0, 80 * GIB))
def test_largest_batch_is_exact(model: MemoryModel, s: int, masked: bool, budget: int) -> None:
    b = int(model.largest_batch(s, masked, budget))
    assert b >= 0
    assert b == 0 or int(model.predict(b, s, masked)) <= budget
    assert int(model.predict(b + 1, s, masked)) > budget


def test_largest_batch_of_many_lengths_equals_one_by_one() -> None:
    lengths = np.arange(1, 8193)
    together = PRIOR.largest_batch(lengths, True, 2 * GIB)
    assert together.tolist() == [int(PRIOR.largest_batch(s, True, 2 * GIB)) for s in lengths]


# ------------------------------------------------------------------------------------------------- the prior


@pytest.mark.parametrize(
    ("shape", "b", "s", "masked", "kernel", "precision"),
    [
        (MINILM, 4, 256, False, "sdpa", "fp32"),
        (MINILM, 2, 1001, True, "sdpa", "fp32"),
        (MINILM, 2, 2001, True, "sdpa", "fp32"),  # here the mask outgrows the feed-forward block
        (MINILM, 2, 256, False, "math", "fp32"),
        (MINILM, 2, 509, True, "math", "fp32"),
        (MINILM, 2, 256, True, "math", "fp16"),
        (BGE_SMALL, 8, 64, True, "sdpa", "fp32"),
        (BGE_BASE, 2, 256, False, "sdpa", "fp32"),
        (BGE_BASE, 2, 300, True, "math", "fp32"),
        (BGE_BASE, 4, 64, False, "math", "fp16"),  # short: the copies of q, k and v outweigh the scores
        (BGE_M3, 4, 64, False, "sdpa", "fp32"),
        (BGE_M3, 4, 64, True, "sdpa", "fp16"),
        (BGE_M3, 2, 301, True, "sdpa", "fp32"),
        (BGE_M3, 2, 257, True, "math", "fp32"),
    ],
)
def test_prior_agrees_with_what_torch_allocates(
    shape: ModelShape, b: int, s: int, masked: bool, kernel: Attention, precision: Precision
) -> None:
    prior = replace(derive_prior(shape, precision, kernel, kernel, pads_mask=False), fixed=0.0)
    measured = profile_peak(shape, b, s, masked, kernel, precision)
    assert int(prior.predict(b, s, masked)) == pytest.approx(measured, rel=0.05)


def profile_peak(shape: ModelShape, b: int, s: int, masked: bool, kernel: Attention, precision: Precision) -> int:
    """Peak bytes that a forward pass and mean pooling allocate, from PyTorch's allocation events on the CPU.

    Layers don't change the peak of inference, and the vocabulary is weights only: two layers and 100 words will do.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel

    sizes = {
        "vocab_size": 100,
        "hidden_size": shape.hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2100,
    }
    model = XLMRobertaModel(XLMRobertaConfig(**sizes)) if shape is BGE_M3 else BertModel(BertConfig(**sizes))
    model.eval().to(torch.float32 if precision == "fp32" else torch.float16)
    ids = torch.randint(5, 100, (b, s))
    backends = [SDPBackend.MATH] if kernel == "math" else [SDPBackend.FLASH_ATTENTION]
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        batch = ids.clone()
        mask = torch.ones_like(batch)
        if masked:
            mask[0, -1] = 0
        with torch.inference_mode(), sdpa_kernel(backends):
            hidden = model(input_ids=batch, attention_mask=mask)[0]
            (hidden * mask.unsqueeze(-1).to(hidden.dtype)).sum(dim=1)
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    return int(np.cumsum([x.nbytes() for x in sorted(events, key=lambda x: x.start_ns())]).max())


def test_prior_explains_the_well_known_death_at_batch_ten() -> None:
    # 10 x 16 heads x 3670^2 fp32 scores are 8.03 GiB: one tensor of the three that `math` attention holds.
    peak = int(derive_prior(BGE_M3, "fp32", "math", "math").predict(10, 3670, True))
    assert peak > 2 * 8.03 * GIB
    # The memory-efficient kernel needs a fifth, and without padding nothing grows with the square of the length.
    assert int(derive_prior(BGE_M3, "fp32", "sdpa", "sdpa").predict(10, 3670, True)) < peak / 5
    assert PRIOR.square == 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("unmasked", ["sdpa", "math", "eager", "flash_attention_2"])
@pytest.mark.parametrize("masked", ["sdpa", "math", "eager", "flash_attention_2"])
def test_every_prior_is_sane(precision: Precision, masked: Attention, unmasked: Attention) -> None:
    assert_sane(derive_prior(BGE_M3, precision, masked, unmasked))


# ------------------------------------------------------------------------------------------------- the fit

TRUTHS = {
    "as the prior": PRIOR,
    "other constants": replace(
        PRIOR,
        fixed=9e6,
        token=25_000,
        masked_token=25_000,
        attention=11_000,
        masked_attention=11_000,
        masked_square=6.5,
    ),
    "math attention where the prior expects a better kernel": derive_prior(BGE_M3, "fp16", "math", "math"),
    "a plain sum c0 + c1 bs + c2 bs^2": MemoryModel(2e7, 21_000, 21_000, 0, 21_000, 21_000, 4.2, 1.0),
}


@pytest.mark.parametrize("truth", TRUTHS.values(), ids=TRUTHS.keys())
@pytest.mark.parametrize("budget", [4 * GIB, 15 * GIB])
def test_fit_recovers_noiseless_laws_from_the_chosen_probes(truth: MemoryModel, budget: int) -> None:
    probes = choose_probes(8192, budget, PRIOR)
    fitted = fit_model([measure(truth, x.nodes, x.padded_tokens, x.masked) for x in probes.fit], PRIOR)
    predicted = [int(fitted.predict(x.nodes, x.padded_tokens, x.masked)) for x in probes.held_back]
    actual = [int(truth.predict(x.nodes, x.padded_tokens, x.masked)) for x in probes.held_back]
    error = np.array(predicted) / np.array(actual) - 1
    assert np.median(np.abs(error)) <= 0.05
    assert error.min() >= -0.03


@pytest.mark.parametrize("seed", range(20))
def test_fit_recovers_known_coefficients_from_noisy_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = TRUTHS["other constants"]
    probes = choose_probes(8192, 15 * GIB, PRIOR)
    noisy = [measure(truth, x.nodes, x.padded_tokens, x.masked, 1 + rng.uniform(-0.05, 0.05)) for x in probes.fit]
    fitted = fit_model(noisy, PRIOR)
    # Within the noise and the envelope over it; the mask's square shows in two of the probes only.
    assert fitted.token == pytest.approx(truth.token, rel=0.12)
    assert fitted.masked_square == pytest.approx(truth.masked_square, rel=0.25)
    for x in probes.held_back:
        ratio = int(fitted.predict(x.nodes, x.padded_tokens, x.masked)) / int(
            truth.predict(x.nodes, x.padded_tokens, x.masked)
        )
        assert 0.95 <= ratio <= 1.2


def test_fit_keeps_the_prior_where_no_sample_says_otherwise() -> None:
    truth = replace(PRIOR, token=30_000.0)
    fitted = fit_model([measure(truth, 64, 512, False), measure(truth, 8, 256, False)], PRIOR)
    assert fitted.masked_square == pytest.approx(PRIOR.masked_square, rel=0.03)
    assert fitted.masked_attention == pytest.approx(PRIOR.masked_attention, rel=0.03)
    # One factor for the same block with and without a mask.
    assert fitted.masked_token == pytest.approx(30_000, rel=0.03)
    assert fit_model([], PRIOR) is PRIOR


@settings(deadline=None, max_examples=60)
@given(st.lists(samples, min_size=1, max_size=8))
def test_any_fit_is_sane_and_covers_its_samples(measured: list[MemorySample]) -> None:
    fitted = fit_model(measured, PRIOR)
    assert_sane(fitted)
    assert all(int(fitted.predict(x.nodes, x.padded_tokens, x.masked)) >= x.peak_bytes for x in measured)


# ------------------------------------------------------------------------------------------------- online


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(samples, min_size=1, max_size=4), min_size=1, max_size=3))
def test_refined_models_never_under_predict_what_was_just_observed(rounds: list[list[MemorySample]]) -> None:
    fit = start_fit(PRIOR, [measure(PRIOR, 8, 512, False), measure(PRIOR, 8, 511, True)])
    for observed in rounds:
        fit = refine_fit(fit, observed)
        assert_sane(fit.model)
        latest = {(x.nodes, x.padded_tokens, x.masked): x for x in observed}
        assert all(int(fit.model.predict(x.nodes, x.padded_tokens, x.masked)) >= x.peak_bytes for x in latest.values())


def test_under_prediction_is_corrected_at_once_and_over_prediction_step_by_step() -> None:
    fit = start_fit(PRIOR)
    assert not fit.is_fitted
    before = int(PRIOR.predict(32, 512, False))

    higher = refine_fit(fit, [MemorySample(32, 512, False, int(before * 1.3))])
    assert int(higher.model.predict(32, 512, False)) >= int(before * 1.3)
    assert int(higher.model.predict(64, 512, False)) > int(PRIOR.predict(64, 512, False)) * 1.2
    assert higher.is_fitted

    predictions = []
    lower = fit
    for _ in range(20):
        lower = refine_fit(lower, [MemorySample(32, 512, False, int(before * 0.6))])
        predictions.append(int(lower.model.predict(32, 512, False)))
    assert predictions == sorted(predictions, reverse=True)
    assert predictions[0] > before * 0.85
    assert before * 0.6 <= predictions[-1] <= before * 0.6 * 1.06


def test_a_small_batch_with_a_surprise_does_not_bend_the_model() -> None:
    fit = start_fit(
        PRIOR, [measure(PRIOR, 64, 512, False), measure(PRIOR, 8, 256, False), measure(PRIOR, 16, 2001, True)]
    )
    tiny = MemorySample(1, 20, False, int(fit.model.predict(1, 20, False)) + 5 * 1024**2)
    after = refine_fit(fit, [tiny])
    assert int(after.model.predict(1, 20, False)) >= tiny.peak_bytes
    for b, s, masked in [(64, 512, False), (256, 128, False), (16, 2001, True)]:
        before = int(fit.model.predict(b, s, masked))
        assert before * 0.98 <= int(after.model.predict(b, s, masked)) <= before * 1.02


def test_well_predicted_samples_change_nothing_but_the_memory_of_them() -> None:
    fit = start_fit(PRIOR, [measure(PRIOR, 8, 512, False)])
    after = refine_fit(fit, [measure(fit.model, 16, 256, False, 0.99)])
    assert after.model == fit.model
    assert len(after.recent) == 1
    assert refine_fit(after, []) is after


def test_the_window_is_bounded_and_holds_the_latest_of_each_shape() -> None:
    fit = start_fit(PRIOR, [measure(PRIOR, 8, 512, False)])
    for b in range(1, 2 * RECENT):
        fit = refine_fit(fit, [measure(fit.model, b, 300, False, 0.97)])
    assert len(fit.recent) == RECENT
    assert len(fit.calibration) == 1
    latest = measure(fit.model, 100, 300, False, 0.98)
    fit = refine_fit(fit, [latest])
    assert [x for x in fit.recent if x.nodes == 100] == [latest]


# ------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("max_tokens", [256, 512, 8192])
@pytest.mark.parametrize("shape", [MINILM, BGE_BASE, BGE_M3])
@pytest.mark.parametrize("budget", [2 * GIB, 14 * GIB, 76 * GIB])
def test_probes_cover_the_ground_within_the_budget(max_tokens: int, shape: ModelShape, budget: int) -> None:
    prior = derive_prior(shape, "fp16", "sdpa", "sdpa")
    plan = choose_probes(max_tokens, budget, prior)
    assert 6 <= len(plan.fit) <= 8
    assert 2 <= len(plan.held_back) <= 4
    assert not set(plan.fit) & set(plan.held_back)
    for x in (*plan.fit, *plan.held_back):
        assert 2 * int(prior.predict(x.nodes, x.padded_tokens, x.masked)) <= 0.6 * budget
        assert x.padded_tokens <= max_tokens
        assert not x.masked or (x.nodes >= 2 and x.padded_tokens % 8)
    for masked in (False, True):
        kind = [x for x in plan.fit if x.masked == masked]
        assert max(x.padded_tokens for x in kind) >= 8 * min(x.padded_tokens for x in kind) or max_tokens < 8192
        assert max(x.nodes * x.padded_tokens for x in kind) >= 16_384


def test_a_tight_budget_leaves_fewer_probes_and_an_impossible_one_none() -> None:
    tight = choose_probes(8192, 192 * 1024**2, PRIOR)
    assert all(2 * int(PRIOR.predict(x.nodes, x.padded_tokens, x.masked)) <= 0.6 * 192 * 1024**2 for x in tight.fit)
    assert tight.fit
    assert choose_probes(8192, 1024**2, PRIOR).fit == ()
