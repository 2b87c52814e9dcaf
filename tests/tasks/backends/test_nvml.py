"""The memory sampler: against the real library where it has no driver, and against a made-up machine with two cards."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml
import pytest

from tasks.backends.nvml import MemorySampler, read_process_tree

GIB = 1024**3


class FakeNVMLError(Exception):
    pass


@dataclass
class FakeCard:
    uuid: str
    bus_id: str
    used_bytes: int = GIB
    processes: Sequence[tuple[int, int | None]] = ()
    slices: Sequence[FakeCard] = ()
    fails: bool = False


@dataclass
class FakeNvml:
    """The few calls of pynvml that the sampler makes, over cards that a test can change while it runs."""

    cards: Sequence[FakeCard]
    is_open: bool = False
    NVMLError: type[Exception] = field(default=FakeNVMLError)

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def nvmlDeviceGetPciInfo(self, card: FakeCard) -> SimpleNamespace:
        return SimpleNamespace(busId=card.bus_id.encode())

    def nvmlDeviceGetMigMode(self, card: FakeCard) -> list[int]:
        if not card.slices:
            raise FakeNVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: FakeCard) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: FakeCard, index: int) -> FakeCard:
        if index >= len(card.slices):
            raise FakeNVMLError("Not Found")
        return card.slices[index]

    def nvmlDeviceGetMemoryInfo(self, card: FakeCard) -> SimpleNamespace:
        if card.fails:
            raise FakeNVMLError("GPU is lost")
        return SimpleNamespace(total=16 * GIB, used=card.used_bytes, free=16 * GIB - card.used_bytes)

    def nvmlDeviceGetComputeRunningProcesses(self, card: FakeCard) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes]


def build_cards() -> list[FakeCard]:
    return [
        FakeCard("GPU-aaaa-1", "00000000:17:00.0", processes=[(10, GIB), (11, 2 * GIB), (99, 5 * GIB)]),
        FakeCard("GPU-bbbb-2", "00000000:65:00.0", used_bytes=3 * GIB),
    ]


def test_without_a_driver_the_series_is_empty_and_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        reason = str(error)
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")
    sampler = MemorySampler(0.01)
    with caplog.at_level("INFO", logger="tasks.backends"):
        sampler.start()
        sampler.stop()
    assert sampler.series() == []
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_a_thread_samples_until_it_is_stopped() -> None:
    nvml = FakeNvml(build_cards())
    sampler = MemorySampler(0.001, nvml=nvml)
    sampler.start()
    while len(sampler.series()) < 6:
        time.sleep(0.001)
    sampler.stop()
    series = sampler.series()
    assert {reading.device_uuid for reading in series} == {"GPU-aaaa-1", "GPU-bbbb-2"}
    assert [reading.seconds for reading in series] == sorted(reading.seconds for reading in series)
    assert not nvml.is_open


@pytest.mark.parametrize("name", ["bbbb-2", "GPU-bbbb-2", "0000:65:00.0", "00000000:65:00.0"])
def test_a_device_is_found_by_what_cuda_calls_it(name: str) -> None:
    sampler = MemorySampler(60, device_uuids=[name], nvml=FakeNvml(build_cards()))
    sampler.start()
    sampler.stop()
    assert {(reading.device_uuid, reading.used_bytes) for reading in sampler.series()} == {("GPU-bbbb-2", 3 * GIB)}


def test_a_device_that_nvml_does_not_know_is_said(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(build_cards())
    sampler = MemorySampler(60, device_uuids=["cccc-3"], nvml=nvml)
    with caplog.at_level("INFO", logger="tasks.backends"):
        sampler.start()
    assert "cccc-3" in caplog.text
    assert not nvml.is_open


def test_the_process_trees_bytes_are_counted_and_the_neighbours_are_not() -> None:
    sampler = MemorySampler(60, pids=lambda: {10, 11}, nvml=FakeNvml(build_cards()))
    sampler.start()
    sampler.stop()
    by_device = {reading.device_uuid: reading.process_bytes for reading in sampler.series()}
    assert by_device == {"GPU-aaaa-1": 3 * GIB, "GPU-bbbb-2": 0}


@pytest.mark.parametrize("processes", [[(10, None)], [(77, GIB)]])
def test_process_bytes_are_unknown_where_the_driver_does_not_say(processes: list[tuple[int, int | None]]) -> None:
    card = FakeCard("GPU-aaaa-1", "00000000:17:00.0", processes=processes)
    sampler = MemorySampler(60, pids=lambda: {10}, nvml=FakeNvml([card]))
    sampler.start()
    sampler.stop()
    assert {reading.process_bytes for reading in sampler.series()} == {None}


def test_mig_slices_are_devices_of_their_own() -> None:
    slices = [
        FakeCard("MIG-s1", "00000000:17:00.0", used_bytes=5),
        FakeCard("MIG-s2", "00000000:17:00.0", used_bytes=6),
    ]
    nvml = FakeNvml([FakeCard("GPU-aaaa-1", "00000000:17:00.0", slices=slices)])
    sampler = MemorySampler(60, device_uuids=["s2"], nvml=nvml)
    sampler.start()
    sampler.stop()
    assert {(reading.device_uuid, reading.used_bytes) for reading in sampler.series()} == {("MIG-s2", 6)}


def test_a_lost_card_leaves_a_gap_and_the_others_go_on() -> None:
    cards = build_cards()
    sampler = MemorySampler(60, nvml=FakeNvml(cards))
    sampler.start()
    before = len(sampler.series())
    cards[0].fails = True
    sampler.sample()
    later = sampler.series()[before:]
    sampler.stop()
    assert "GPU-bbbb-2" in {reading.device_uuid for reading in later}
    assert sampler.series()[-1].device_uuid == "GPU-bbbb-2"


def test_a_long_series_is_thinned_out_over_its_whole_length() -> None:
    seconds = iter(range(10_000))
    nvml = FakeNvml(build_cards()[:1])
    sampler = MemorySampler(3600, max_readings=100, nvml=nvml, clock=lambda: float(next(seconds)), pids=frozenset)
    sampler.start()
    for _ in range(1000):
        sampler.sample()
    sampler.stop()
    times = [reading.seconds for reading in sampler.series()]
    assert 50 <= len(times) <= 100
    assert times[0] <= 2
    assert times[-1] > 990
    assert times == sorted(times)


def test_the_process_tree_holds_this_process() -> None:
    assert os.getpid() in read_process_tree()
