"""The memory model fitted to what micro-batches really took: by probes first, then online."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from tasks.policy.memory import MemoryModel
from tasks.records import MemorySample

SAFETY = 1.01
"""On top of what covers every sample: the max of two lines between samples; costs 1 % of the batch."""

PULLS = (0.05, 0.005, 0.0005)
"""How strongly a coefficient keeps to the prior's against the samples' relative errors, tried in this order: 0.05
steadies what two noisy samples tell (a coefficient that one sample is made of still moves within 0.25 % of where that
wants it); the weaker ones are for a kernel that is not the one the prior assumed."""

TRUSTED_ERROR = 0.08
"""A fit whose worst error is below this explains its samples: no weaker pull is tried."""

SMALL_BYTES = 16 * 1024**2
"""Peaks below this count as if they were this large: what a batch of three nodes takes must not bend the model."""

UNDER_WEIGHT = 10.0
"""An under-prediction costs an out-of-memory, an over-prediction a slightly smaller batch."""

_ROUNDS = 12  # which sample shows which moment settles within 3-6


def fit_model(samples: Sequence[MemorySample], prior: MemoryModel) -> MemoryModel:
    """Scale the prior to the samples: non-negative least squares of the relative error, then lifted to cover every
    sample.

    Five unknowns: `fixed`, one factor for both `token` terms, one for both `attention` terms, and the two `square`
    terms; what no sample informs keeps the prior's value. `mask` is arithmetic and stays. The lift is no larger than
    the worst sample's relative under-prediction: a batch that once took that much may come again, so samples are never
    dropped as outliers.
    """
    if not samples:
        return prior
    table = _Samples.of(samples)
    best, best_loss = prior, np.inf
    for pull in PULLS:
        # Two starts: the moments as the prior sees them, and attention everywhere (another kernel than the prior's).
        for start in (prior, replace(prior, token=0.0, masked_token=0.0, mask=0.0)):
            model = start
            for _ in range(_ROUNDS):
                fitted = _fit_moments(table, model, prior, pull)
                if (loss := _find_loss(table, fitted)) < best_loss:
                    best, best_loss = fitted, loss
                if fitted == model:
                    break
                model = fitted
        if np.abs(_find_errors(table, best)).max() <= TRUSTED_ERROR:
            break
    return _lift(table, best, SAFETY)


@dataclass(frozen=True, slots=True)
class _Samples:
    """Samples as columns."""

    b: NDArray[np.float64]
    s: NDArray[np.float64]
    masked: NDArray[np.bool_]
    peak: NDArray[np.float64]

    @classmethod
    def of(cls, samples: Sequence[MemorySample]) -> _Samples:
        return cls(
            np.array([x.nodes for x in samples], dtype=np.float64),
            np.array([x.padded_tokens for x in samples], dtype=np.float64),
            np.array([x.masked for x in samples], dtype=np.bool_),
            np.array([max(x.peak_bytes, 1) for x in samples], dtype=np.float64),
        )


def _fit_moments(table: _Samples, current: MemoryModel, prior: MemoryModel, pull: float) -> MemoryModel:
    """One round: which of the two moments each sample's peak is, by the current model; then a linear fit."""
    n, s, masked = table.b * table.s, table.s, table.masked
    token = np.where(masked, current.masked_token + current.mask * s, current.token)
    attention = np.where(
        masked, current.masked_attention + current.masked_square * s, current.attention + current.square * s
    )
    at_attention = attention > token
    # Zero in the prior still needs a unit, so that a wrong prior can be left: one byte.
    units = np.array([max(prior.fixed, 1.0), 1.0, 1.0, max(prior.square, 1.0), max(prior.masked_square, 1.0)])
    columns = np.zeros((len(n), 5))
    columns[:, 0] = units[0]
    columns[:, 1] = np.where(at_attention, 0.0, n * np.where(masked, prior.masked_token, prior.token))
    columns[:, 2] = np.where(at_attention, n * np.where(masked, prior.masked_attention, prior.attention), 0.0)
    columns[:, 3] = np.where(at_attention & ~masked, n * s * units[3], 0.0)
    columns[:, 4] = np.where(at_attention & masked, n * s * units[4], 0.0)
    held = np.where(masked & ~at_attention, n * s * prior.mask, 0.0)
    under = table.peak > current.predict(table.b, s, masked)
    weight = np.sqrt(np.where(under, UNDER_WEIGHT, 1.0)) / np.maximum(table.peak, SMALL_BYTES)
    keep = np.array([prior.fixed, 1.0, 1.0, prior.square, prior.masked_square]) / np.where([1, 0, 0, 1, 1], units, 1.0)
    design = np.vstack([columns * weight[:, None], pull * np.eye(5)])
    target = np.concatenate([(table.peak - held) * weight, pull * keep])
    x = _solve_nonnegative(design, target)
    return _order(
        MemoryModel(
            fixed=float(x[0] * units[0]),
            token=float(x[1] * prior.token),
            attention=float(x[2] * prior.attention),
            square=float(x[3] * units[3]),
            masked_token=float(x[1] * prior.masked_token),
            masked_attention=float(x[2] * prior.masked_attention),
            masked_square=float(x[4] * units[4]),
            mask=prior.mask,
        )
    )


def _solve_nonnegative(design: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """argmin |design x - target| over x >= 0, exactly: the best feasible solution over all sets of free unknowns."""
    unknowns = design.shape[1]
    best, best_loss = np.zeros(unknowns), float(target @ target)
    for size in range(unknowns, 0, -1):
        for free in map(list, combinations(range(unknowns), size)):
            # Not by normal equations: squaring the condition made them singular for samples far from any model.
            solution = np.linalg.lstsq(design[:, free], target, rcond=None)[0]
            if (solution < 0).any():
                continue
            if size == unknowns:
                return np.asarray(solution)
            residual = design[:, free] @ solution - target
            if (loss := float(residual @ residual)) < best_loss:
                best, best_loss = np.zeros(unknowns), loss
                best[free] = solution
    return best


def _order(model: MemoryModel) -> MemoryModel:
    """Masked terms are at least the unmasked ones: a mask never saves memory."""
    return replace(
        model,
        masked_token=max(model.masked_token, model.token),
        masked_attention=max(model.masked_attention, model.attention),
        masked_square=max(model.masked_square, model.square),
    )


def _find_errors(table: _Samples, model: MemoryModel) -> NDArray[np.float64]:
    predicted = model.predict(table.b, table.s, table.masked)
    return np.asarray((predicted - table.peak) / np.maximum(table.peak, SMALL_BYTES))


def _find_loss(table: _Samples, model: MemoryModel) -> float:
    error = _find_errors(table, model)
    return float(np.sum(np.where(error < 0, UNDER_WEIGHT, 1.0) * error**2))


def _lift(table: _Samples, model: MemoryModel, safety: float) -> MemoryModel:
    """No sample under-predicted: what is missing by less than SMALL_BYTES / 2 goes to `fixed`, where it can't grow with a
    batch; for the rest the masked or unmasked terms are scaled. And `safety` on top."""
    missing = table.peak - model.predict(table.b, table.s, table.masked)
    absorbed = float(missing[missing <= SMALL_BYTES / 2].max(initial=0.0))
    model = replace(model, fixed=max(model.fixed + absorbed, 1.0))  # nothing can't be scaled
    # predict() rounds up: measured against the byte below, so that the lifted model covers the sample after rounding.
    ratio = table.peak / np.maximum(model.predict(table.b, table.s, table.masked) - 1, 1)
    ratio[missing <= SMALL_BYTES / 2] = 1.0
    plain = safety * float(ratio[~table.masked].max(initial=1.0))
    padded = safety * float(ratio[table.masked].max(initial=1.0))
    return _order(
        replace(
            model,
            fixed=model.fixed * max(plain, padded),
            token=model.token * plain,
            attention=model.attention * plain,
            square=model.square * plain,
            masked_token=model.masked_token * padded,
            masked_attention=model.masked_attention * padded,
            masked_square=model.masked_square * padded,
            mask=model.mask * padded,
        )
    )


# ---------------------------------------------------------------------------------------------- refine online

RECENT = 64
"""Samples of real micro-batches that are remembered beside the calibration's."""

SLACK = 0.05
"""An over-prediction below this is left alone: a refit costs a millisecond and would win nothing."""

SLIGHT = 0.005
"""An under-prediction below this is lifted away without a refit."""

DESCENT = 0.25
"""How far a refit may lower a coefficient in one step: peaks that vary don't make the batch swing."""


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """A model with what it was fitted to: the calibration's samples stay, the recent ones pass through a bounded
    window."""

    model: MemoryModel
    prior: MemoryModel
    calibration: tuple[MemorySample, ...] = ()
    recent: tuple[MemorySample, ...] = ()

    @property
    def is_fitted(self) -> bool:
        """False: the model is the closed-form prior."""
        return bool(self.calibration or self.recent)


def start_fit(prior: MemoryModel, calibration: Sequence[MemorySample] = ()) -> MemoryFit:
    """A fit to the calibration's samples; the prior itself without any (a CPU does not tell its peaks)."""
    return MemoryFit(fit_model(calibration, prior), prior, tuple(calibration))


def refine_fit(fit: MemoryFit, samples: Sequence[MemorySample]) -> MemoryFit:
    """Take in what real micro-batches took: under-prediction is corrected at once, over-prediction step by step.

    No sample in the window is under-predicted by the result.
    """
    if not samples:
        return fit
    window = {(x.nodes, x.padded_tokens, x.masked): x for x in fit.recent}
    for sample in samples:
        shape = (sample.nodes, sample.padded_tokens, sample.masked)
        window.pop(shape, None)  # the latest measurement of a shape replaces the earlier and moves to the end
        window[shape] = sample
    recent = tuple(window.values())[-RECENT:]
    remembered = replace(fit, recent=recent)
    new = _Samples.of(samples)
    error = _find_errors(new, fit.model)
    if error.min() >= -SLIGHT and error.max() <= SLACK:
        return remembered if error.min() >= 0 else replace(remembered, model=_lift(new, fit.model, 1.0))
    table = _Samples.of(fit.calibration + recent)
    refitted = fit_model(fit.calibration + recent, fit.prior)
    before, after = fit.model.coefficients(), refitted.coefficients()
    stepped = MemoryModel(**{k: max(after[k], before[k] + DESCENT * (after[k] - before[k])) for k in before})
    return replace(remembered, model=_lift(table, _order(stepped), 1.0))
