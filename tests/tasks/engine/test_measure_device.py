"""What is kept of a measurement, and when a device is measured again."""

from pathlib import Path

from tasks.backends.fake_encoder import FakeEncoder
from tasks.config import BudgetSettings, EmbeddingSettings
from tasks.engine.measure_device import MeasuredDevice, measure_device


def measure(encoder: FakeEncoder, folder: Path, **budget: int) -> MeasuredDevice:
    return measure_device(encoder, EmbeddingSettings(), BudgetSettings.model_validate(budget), str(folder))


def test_a_device_is_measured_once(tmp_path: Path) -> None:
    first = measure(FakeEncoder(), tmp_path)
    encoder = FakeEncoder()
    again = measure(encoder, tmp_path)
    assert first.fit.is_fitted
    assert again.fit.model == first.fit.model
    assert "from an earlier run" in again.note
    assert encoder.calls == []


def test_a_device_that_left_no_room_for_probes_is_measured_again(tmp_path: Path) -> None:
    """A neighbour had it all, or budget.max_bytes was tiny: that must not decide the plans of every run to come."""
    cramped = measure(FakeEncoder(), tmp_path, max_bytes=1024**2)
    assert not cramped.fit.is_fitted
    later = measure(FakeEncoder(), tmp_path)
    assert later.fit.is_fitted


def test_a_cpu_keeps_its_speed(tmp_path: Path) -> None:
    first = measure(FakeEncoder(device="cpu"), tmp_path)
    assert measure(FakeEncoder(device="cpu"), tmp_path).tokens_per_s == first.tokens_per_s
