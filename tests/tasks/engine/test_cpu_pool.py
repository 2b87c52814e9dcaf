"""The CPU pool's own work: workers started when needed, used again, replaced by their embedders, ended with the pool."""

import threading
import time

import numpy as np
import pytest

from tasks.backends.fake_encoder import FakeEncoder, to_unit_vector
from tasks.engine.cpu_pool import CpuPool
from tasks.engine.devices import Devices
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.engine.measure_device import MeasuredDevice
from tasks.errors import DeviceError, ModelError
from tasks.observe import SilentObserver
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import TokenIds

FIT = start_fit(MemoryModel(0.0, 64 * 1024, 0.0, 0.0, 64 * 1024, 64 * 1024, 64.0, 0.0))


class Workers:
    """Makes workers over the double and remembers their encoders."""

    def __init__(self, **traits: object) -> None:
        self.traits = traits
        self.encoders: list[FakeEncoder] = []
        self.stop = threading.Event()

    def __call__(self) -> tuple[NodeEmbedder, MeasuredDevice]:
        encoder = FakeEncoder(device="cpu", **self.traits)  # type: ignore[arg-type]
        self.encoders.append(encoder)
        embedder = NodeEmbedder(encoder, FIT, EmbedSettings(max_micro_batch_tokens=512), stop=self.stop)
        return embedder, MeasuredDevice(FIT, 1000.0, 64, "a double")


def make_nodes(count: int, seed: int = 0) -> list[TokenIds]:
    return [np.random.default_rng([seed, row]).integers(1000, 30_000, 20 + row, dtype=np.int32) for row in range(count)]


def test_no_worker_is_started_before_it_is_needed_and_one_is_used_again() -> None:
    workers = Workers()
    pool = CpuPool(workers, workers=3)
    assert workers.encoders == []
    for seed in range(4):
        nodes = make_nodes(5, seed)
        embedded = pool.submit(nodes).result()
        np.testing.assert_allclose(embedded.vectors, [to_unit_vector(ids, 32) for ids in nodes], atol=1e-6)
    assert len(workers.encoders) == 1
    pool.close()
    with pytest.raises(DeviceError, match="closed"):
        workers.encoders[0].describe()


def test_a_worker_that_cannot_start_says_why_to_whoever_waits() -> None:
    def fail() -> tuple[NodeEmbedder, MeasuredDevice]:
        raise ModelError("no such model")

    pool = CpuPool(fail, workers=1)
    with pytest.raises(ModelError, match="no such model"):
        pool.submit(make_nodes(1)).result()
    with pytest.raises(ModelError, match="no such model"):
        pool.start()
    pool.close()


def test_a_lost_process_is_replaced_and_its_nodes_are_done_again() -> None:
    workers = Workers(sticky_calls={0})
    pool = CpuPool(workers, workers=1)
    embedded = pool.submit(make_nodes(30)).result()
    pool.close()
    assert workers.encoders[0].restarts == 1
    assert np.isfinite(embedded.vectors).all()
    assert [step.kind for step in embedded.steps] == ["restart"]


def test_a_run_that_is_told_to_stop_stops_before_the_next_micro_batch() -> None:
    workers = Workers()
    pool = CpuPool(workers, workers=1)
    pool.submit(make_nodes(3)).result()
    before = len(workers.encoders[0].calls)
    workers.stop.set()
    embedded = pool.submit(make_nodes(30, seed=1)).result()
    pool.close()
    assert len(workers.encoders[0].calls) == before
    assert len(embedded.missing_rows()) == 30


def test_a_second_worker_that_finds_no_room_leaves_the_work_to_the_first() -> None:
    workers = Workers()
    refused: list[int] = []

    def make_one() -> tuple[NodeEmbedder, MeasuredDevice]:
        if workers.encoders:
            refused.append(1)
            raise DeviceError("The device process (pid 7) died by SIGKILL, while it loaded the model.")
        return workers()

    pool = CpuPool(make_one, workers=2)
    pool.start()
    shares = [make_nodes(40, seed) for seed in range(6)]
    embedded = [future.result() for future in [pool.submit(share) for share in shares]]
    pool.close()
    for share, result in zip(shares, embedded, strict=True):
        np.testing.assert_allclose(result.vectors, [to_unit_vector(ids, 32) for ids in share], atol=1e-6)
    assert len(refused) <= 1


def test_a_partition_counts_the_seconds_of_its_work_not_those_in_the_queue() -> None:
    """Three partitions wait in front of one worker: together they take no longer than it is at work."""
    workers = Workers()
    pool = CpuPool(workers, workers=1)
    started = time.monotonic()
    devices = Devices(None, pool, device="cpu", note="", tokens_per_s=0.0, observer=SilentObserver())
    waiting = [devices.spread_over_pool(make_nodes(400, index), index, 32) for index in range(3)]
    seconds = [embedded.collect_spilled().seconds for embedded in waiting]
    took_s = time.monotonic() - started
    devices.close()
    assert all(seconds)
    assert sum(seconds) <= took_s
