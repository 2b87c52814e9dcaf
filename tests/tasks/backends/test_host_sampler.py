"""The host's memory over time: real readings of this machine and this process."""

from __future__ import annotations

import subprocess
import sys
from subprocess import PIPE

import numpy as np
import pytest

from tasks.backends.host_sampler import HOST, HostSampler, read_tree_bytes
from tasks.records import DeviceMemory

MIB = 1024**2


def test_readings_of_this_machine_add_up() -> None:
    sampler = HostSampler(60)
    sampler.start()
    sampler.stop()
    first, last = sampler.series()[0], sampler.series()[-1]
    assert first.device_uuid == HOST
    assert 0 <= first.seconds <= last.seconds
    assert first.used_bytes + first.free_bytes == first.total_bytes
    assert first.process_bytes is not None
    assert first.process_bytes > 10 * MIB


def test_what_this_process_takes_shows() -> None:
    before = read_tree_bytes()
    taken = np.ones(64 * MIB, np.uint8)
    assert read_tree_bytes() - before > 48 * MIB, f"{taken.nbytes} bytes are resident"


def test_a_childs_memory_counts() -> None:
    before = read_tree_bytes()
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=PIPE, stdout=PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        during = read_tree_bytes()
        child.communicate(b"\n")
    assert during - before > 2 * MIB


@pytest.mark.parametrize(
    ("total", "limit", "free", "used"),
    [(64, 64, 40, 24), (64, 8, 3, 5), (64, 8, 20, 0)],
    ids=["whole machine", "container's limit", "more free than the limit"],
)
def test_the_limit_is_what_counts_as_the_whole(total: int, limit: int, free: int, used: int) -> None:
    sampler = HostSampler(60, memory=lambda: DeviceMemory(total, free, limit), process_bytes=lambda: 1)
    sampler.sample()
    (reading,) = sampler.series()
    assert (reading.total_bytes, reading.used_bytes) == (min(total, limit), used)
