"""Measure a device: what micro-batches really take of its memory, how many tokens a second it does, what a launch
costs."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from tasks.backends.encoder import Encoder
from tasks.policy.memory import MemoryModel, derive_prior
from tasks.policy.memory_fit import MemoryFit, fit_model, start_fit
from tasks.policy.probes import MAX_PROBE_TOKENS, PROBE_DOUBT, PROBE_FRACTION, Probe, ProbePlan, choose_probes
from tasks.records import BatchOutcome, CalibrationReport, EncoderInfo, MemorySample, Precision, TokenIds

logger = logging.getLogger(__name__)

LAUNCH_TOKENS_RANGE = (16, 8192)
"""Bounds of what a launch may be said to cost: a probe disturbed by another process must not spoil the plans."""

MIN_PROBE_TOKENS = 2048

FILLED_S = 0.5
"""A batch that takes this long shows the device's speed: its launch no longer matters."""

SAFE_FRACTION = 0.8
"""Of the budget: a probe expected above it, by what the smaller probes took, is left out."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The report for people, and what the planner needs: the fit, and the tokens a device does in the time of an empty
    launch."""

    report: CalibrationReport
    fit: MemoryFit
    launch_tokens: int
    note: str  # what the memory model is, and what could not be measured


def derive_encoder_prior(info: EncoderInfo) -> MemoryModel:
    """The closed form for a loaded encoder. Only CUDA's kernel copies the mask to align it."""
    precision = cast(Precision, info.key.precision)
    return derive_prior(info.shape, precision, info.kernel_masked, info.kernel_unmasked, pads_mask=info.device != "cpu")


def calibrate(
    encoder: Encoder,
    *,
    budget_bytes: int,
    seed: int = 0,
    max_seconds: float = 30.0,
    max_batch_tokens: int = MAX_PROBE_TOKENS,
    clock: Callable[[], float] = time.perf_counter,
) -> Calibration:
    """Probe the encoder with random tokens: warm-up, throughput, then memory from the smallest predicted peak to the
    largest.

    `budget_bytes`: what a micro-batch may take on top of the weights. An out-of-memory ends the probes of that size
    and above. On a device that does not tell its peaks (a CPU) the model is the closed-form prior, and the errors in
    the report are NaN. Raises ModelError or DeviceError where the encoder can't be loaded, and DeviceError where a
    lost process can't be replaced.
    """
    info = encoder.describe()  # loads the model: not part of the probing's time
    started = clock()
    prior = derive_encoder_prior(info)
    prober = _Prober(encoder, info, np.random.default_rng(seed), clock, deadline=started + max_seconds)

    warm = prober.run(Probe(1, min(16, info.max_tokens), False))
    launch_s, tokens_per_s = prober.measure_speed(prior, budget_bytes, max_batch_tokens)
    fit_samples: list[MemorySample] = []
    held_back: list[MemorySample] = []
    if warm is not None and warm.peak_bytes is None:
        note = "closed-form prior: this device does not tell its peak memory"
    else:
        # All probes together are some eight of the largest: a slow device gets smaller ones.
        affordable = int(tokens_per_s * max_seconds / 8)
        probe_tokens = max(min(max_batch_tokens, affordable), MIN_PROBE_TOKENS)
        plan = choose_probes(info.max_tokens, budget_bytes, prior, max_batch_tokens=probe_tokens)
        fit_samples, held_back = prober.measure_memory(plan, prior, budget_bytes, tokens_per_s)
        note = f"fitted on {info.key.device_name} ({len(fit_samples)} probes)" if fit_samples else "closed-form prior"
    checked = start_fit(prior, fit_samples).model
    predictions = [int(checked.predict(x.nodes, x.padded_tokens, x.masked)) for x in held_back]
    errors = [p / x.peak_bytes - 1.0 for p, x in zip(predictions, held_back, strict=True)]
    # The check is done: the probes that were held back make the model that is used better.
    fit = start_fit(prior, (*fit_samples, *held_back))
    report = CalibrationReport(
        key=info.key,
        coefficients=fit.model.coefficients(),
        samples=fit_samples,
        held_back=held_back,
        held_back_predictions=predictions,
        median_error=float(np.median(np.abs(errors))) if errors else math.nan,
        worst_under=max(0.0, -min(errors)) if errors else math.nan,
        tokens_per_s=tokens_per_s,
        seconds=clock() - started,
    )
    launch_tokens = int(np.clip(launch_s * tokens_per_s, *LAUNCH_TOKENS_RANGE))
    note = "; ".join([note, *prober.notes])
    logger.info(
        "calibrated device=%s model=%r probes=%d held_back_error=%.3f tokens_per_s=%.0f launch_tokens=%d seconds=%.1f",
        info.device, note, len(fit_samples), report.median_error, tokens_per_s, launch_tokens, report.seconds,
    )  # fmt: skip
    return Calibration(report, fit, launch_tokens, note)


@dataclass(slots=True)
class _Prober:
    encoder: Encoder
    info: EncoderInfo
    rng: np.random.Generator
    clock: Callable[[], float]
    deadline: float
    notes: list[str] = field(default_factory=list)
    is_lost: bool = False  # the process was replaced once: whatever did it, the probes are over
    seconds: float = 0.0  # of the last run

    def run(self, probe: Probe) -> BatchOutcome | None:
        """The outcome, or None where the probe did not come through: then the device has been cleaned up."""
        if self.is_lost:
            return None
        rows = self._draw_tokens(probe)
        begun = self.clock()
        outcome = self.encoder.encode(rows)
        self.seconds = self.clock() - begun
        if outcome.kind == "done":
            return outcome
        self.notes.append(f"{outcome.kind} at {probe.nodes} x {probe.padded_tokens} tokens")
        logger.warning(
            "probe failed kind=%s nodes=%d tokens=%d reason=%r",
            *(outcome.kind, probe.nodes, probe.padded_tokens, outcome.message),
        )
        if outcome.kind == "oom":
            self.encoder.release_memory()
        else:
            self.is_lost = True
            self.encoder.restart()
        return None

    def measure_speed(self, prior: MemoryModel, budget_bytes: int, max_batch_tokens: int) -> tuple[float, float]:
        """(seconds of a launch, tokens a second): wall time, so that the way to another process counts.

        Batches grow fourfold from 256 tokens until one takes half a second, so that a slow device is not kept
        for long and a fast one is filled. (0, 0) where nothing came through.
        """
        launch_s = math.inf
        for _ in range(3):
            if self.run(Probe(1, min(8, self.info.max_tokens), False)) is not None:
                launch_s = min(launch_s, self.seconds)
        length = min(256, self.info.max_tokens)
        most = int(prior.largest_batch(length, False, budget_bytes * PROBE_FRACTION / PROBE_DOUBT))
        best = 0.0
        tokens = 256
        while (nodes := max(1, tokens // length)) <= max(1, most) and tokens <= max_batch_tokens:
            probe = Probe(nodes, length, False)
            # Twice: the first run of a shape may load kernels, and a neighbour's hiccup must not pass for the speed.
            took_s, outcome = math.inf, None
            for _ in range(2):
                if (outcome := self.run(probe)) is None:
                    break
                took_s = min(took_s, self.seconds)
                if took_s > FILLED_S:
                    break
            best = max(best, nodes * length / max(took_s, 1e-9))
            if outcome is None or took_s >= FILLED_S or self.clock() >= self.deadline:
                break
            if 4 * (outcome.peak_bytes or 0) > SAFE_FRACTION * budget_bytes:
                break
            tokens *= 4
        return (launch_s if math.isfinite(launch_s) else 0.0), best

    def measure_memory(
        self, plan: ProbePlan, prior: MemoryModel, budget_bytes: int, tokens_per_s: float
    ) -> tuple[list[MemorySample], list[MemorySample]]:
        """Samples of the two kinds of probes, run together in the order of their predicted peaks.

        Each probe is judged by a fit to those before it: a prior that is far too low is found out by the small ones.
        """
        measured: dict[Probe, MemorySample] = {}
        model = prior
        for probe in sorted({*plan.fit, *plan.held_back}, key=lambda x: _predict(prior, x)):
            expected = max(_predict(prior, probe), _predict(model, probe))
            if expected > SAFE_FRACTION * budget_bytes:
                self._note("larger probes left out: the prior is too low for them")
                continue
            expected_s = probe.nodes * probe.padded_tokens / tokens_per_s if tokens_per_s else 0.0
            if self.clock() + expected_s > self.deadline:
                self._note("some probes left out: out of time")
                continue
            outcome = self.run(probe)
            if outcome is None:
                break
            if outcome.peak_bytes is not None:
                measured[probe] = MemorySample(probe.nodes, probe.padded_tokens, probe.masked, outcome.peak_bytes)
                model = fit_model(tuple(measured.values()), prior)
        return [measured[x] for x in plan.fit if x in measured], [measured[x] for x in plan.held_back if x in measured]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _draw_tokens(self, probe: Probe) -> list[TokenIds]:
        # Special and unused ids are below 1000 (BERT) or at both ends (XLM-R): padding ids inside would change
        # positions.
        vocabulary = self.info.shape.vocabulary
        low = min(1000, vocabulary // 10)
        rows = self.rng.integers(low, max(vocabulary - 1, low + 1), (probe.nodes, probe.padded_tokens), dtype=np.int32)
        last = probe.padded_tokens // 2 if probe.masked else probe.padded_tokens
        return [*rows[:-1], rows[-1, :last]]


def _predict(model: MemoryModel, probe: Probe) -> int:
    return int(model.predict(probe.nodes, probe.padded_tokens, probe.masked))
