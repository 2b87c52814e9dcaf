"""`ballast calibrate`: probe a device and keep its memory model."""

from __future__ import annotations

from dataclasses import replace

from tasks.backends.model_files import resolve_model
from tasks.backends.process_encoder import ProcessEncoder
from tasks.check_inputs import check_data_folder
from tasks.config import BudgetSettings, EmbeddingSettings
from tasks.engine.devices import choose_device, make_spec
from tasks.engine.measure_device import calibrate_now
from tasks.records import CalibrationReport


def calibrate_device(embedding: EmbeddingSettings, budget: BudgetSettings, data_folder: str) -> CalibrationReport:
    """Probe anew, whatever an earlier run measured. Raises ConfigError, ModelError or DeviceError."""
    check_data_folder(data_folder)
    files = resolve_model(embedding.model, embedding.revision)
    device, _reason = choose_device(embedding.device)
    spec = replace(make_spec(embedding, budget, files, device), profiles_memory=True)
    encoder = ProcessEncoder(spec, batch_timeout_s=embedding.batch_timeout_s)
    try:
        return calibrate_now(encoder, budget, data_folder).report
    finally:
        encoder.close()
