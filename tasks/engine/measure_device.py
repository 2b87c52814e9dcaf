"""What is known of a device before the first partition: from an earlier run, else measured now, else by the closed form."""

from __future__ import annotations

from dataclasses import dataclass

from tasks.backends.encoder import Encoder
from tasks.backends.memory_store import StoredFit, load_fit, save_fit
from tasks.config import BudgetSettings, EmbeddingSettings
from tasks.engine.calibrate import Calibration, calibrate, derive_encoder_prior
from tasks.engine.embedded import EmbedSettings
from tasks.policy.budget import compute_budget
from tasks.policy.ladder import LadderSettings
from tasks.policy.memory_fit import MemoryFit, start_fit
from tasks.policy.micro_batches import LAUNCH_TOKENS
from tasks.records import EncoderInfo

GPU_BATCH_TOKENS = 32_768
CPU_BATCH_TOKENS = 2_048  # above, a CPU gets no faster, and its activations take more memory


@dataclass(frozen=True, slots=True)
class MeasuredDevice:
    """The memory model to plan with, the speed, and in words where they are from."""

    fit: MemoryFit
    tokens_per_s: float  # 0 where it was not measured
    launch_tokens: int
    note: str


def measure_device(
    encoder: Encoder, embedding: EmbeddingSettings, budget: BudgetSettings, data_folder: str
) -> MeasuredDevice:
    """Load the model and find its memory model; a measurement is kept under its whole key in `data_folder`."""
    info = encoder.describe()
    stored = load_fit(fits_folder(data_folder), info.key)
    prior = derive_encoder_prior(info)
    if stored is not None:
        fit = start_fit(prior, stored.samples)
        note = f"fitted on {info.key.device_name}" if fit.is_fitted else "closed-form prior"
        return MeasuredDevice(fit, stored.tokens_per_s, stored.launch_tokens, f"{note}, from an earlier run")
    if not embedding.calibrate:
        return MeasuredDevice(start_fit(prior), 0.0, LAUNCH_TOKENS, "closed-form prior, embedding.calibrate is off")
    measured = calibrate_now(encoder, budget, data_folder)
    return MeasuredDevice(measured.fit, measured.report.tokens_per_s, measured.launch_tokens, measured.note)


def calibrate_now(encoder: Encoder, budget: BudgetSettings, data_folder: str) -> Calibration:
    """Probe the device, and keep what came of it; a device without room for a probe is measured again next time."""
    info = encoder.describe()
    budget_bytes = compute_budget(
        encoder.read_memory(), margin_fraction=budget.margin_fraction, max_bytes=_to_int(budget.max_bytes)
    )
    measured = calibrate(encoder, budget_bytes=budget_bytes, max_batch_tokens=find_batch_tokens(budget, info))
    report = measured.report
    stored = StoredFit(measured.fit.calibration, report.tokens_per_s, measured.launch_tokens)
    # No probe where it counts: a neighbour had the device, or the budget was tiny. Kept, it would be the last word.
    if measured.fit.is_fitted or info.device == "cpu":
        save_fit(fits_folder(data_folder), info.key, stored)
    return measured


def find_batch_tokens(budget: BudgetSettings, info: EncoderInfo) -> int:
    """Tokens of a micro-batch at most: the knob, else what the kind of device can make use of."""
    return budget.max_micro_batch_tokens or (CPU_BATCH_TOKENS if info.device == "cpu" else GPU_BATCH_TOKENS)


def to_embed_settings(budget: BudgetSettings, info: EncoderInfo, launch_tokens: int) -> EmbedSettings:
    """The loop's settings from the knobs and the device."""
    return EmbedSettings(
        max_micro_batch_tokens=find_batch_tokens(budget, info),
        launch_tokens=launch_tokens,
        margin_fraction=budget.margin_fraction,
        max_budget_bytes=_to_int(budget.max_bytes),
        ladder=LadderSettings(grow_after=budget.grow_after),
    )


def fits_folder(data_folder: str) -> str:
    return f"{data_folder}/memory-models"


def _to_int(size: int | None) -> int | None:
    return None if size is None else int(size)
