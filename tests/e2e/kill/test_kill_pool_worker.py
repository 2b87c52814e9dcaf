"""`kill -9` of a CPU pool's worker while runs go on: the pool replaces it, and the end is as if nothing had happened."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from kill_documents import prepare_model, write_documents
from places import EmbeddedPlace, Stored
from run_stages import run_stages
from slow_encoder import SlowEncoder

from tasks.backends.process_encoder import ProcessEncoder
from tasks.config import IngestSettings
from tasks.engine.cpu_pool import CpuPool
from tasks.engine.devices import Devices
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.engine.ingest_run import StartDevices
from tasks.engine.measure_device import MeasuredDevice
from tasks.engine.open_run import open_run
from tasks.errors import BallastError
from tasks.observe import Observer
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import Books, ModelFiles

NAME = "port"
KILLS = 40
PAUSE_S = 0.3  # between two kills, on average: about as long as a worker takes to come back
SEED = "ballast" if os.environ.get("CI") else os.urandom(4).hex()
FIT = start_fit(MemoryModel(0.0, 64 * 1024, 0.0, 0.0, 64 * 1024, 64 * 1024, 64.0, 0.0))


@dataclass
class Workers:
    """A pool of one worker process; remembers what it needs to kill it."""

    encoder: ProcessEncoder | None = None
    pids: list[int] = field(default_factory=list)  # of the workers that were killed

    def start(self, _settings: IngestSettings, files: ModelFiles, observer: Observer, stop: threading.Event) -> Devices:
        def make_worker() -> tuple[NodeEmbedder, MeasuredDevice]:
            self.encoder = ProcessEncoder(functools.partial(SlowEncoder, dimension=files.dimension, device="cpu"))
            embedder = NodeEmbedder(self.encoder, FIT, EmbedSettings(max_micro_batch_tokens=256), stop=stop)
            return embedder, MeasuredDevice(FIT, 1e4, 64, "a double")

        pool = CpuPool(make_worker, workers=1)
        pool.start()
        return Devices(None, pool, device="cpu", note="", tokens_per_s=1e4, observer=observer, stop=stop)

    def kill(self) -> None:
        """The worker that is there now, whatever it does; nothing where there is none."""
        pid = self.encoder.pid if self.encoder is not None else None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.pids.append(pid)


@dataclass(frozen=True)
class Ended:
    """How a run ended: with books, or with the error that stopped it."""

    books: Books | None
    off: tuple[str, ...]
    embedded: list[str]
    error: str = ""

    @property
    def is_green(self) -> bool:
        return self.books is not None and not self.off and not self.books.documents_failed


@dataclass
class Bench:
    """Two folders of documents, and runs over them."""

    folder: Path
    model: Path
    before: Path
    after: Path

    def open_place(self, start: EmbeddedPlace | None) -> EmbeddedPlace:
        folder = Path(tempfile.mkdtemp(dir=self.folder)) / "data"
        shutil.copytree(start.data_folder if start else self.folder / "empty", folder)
        return EmbeddedPlace(folder, start)

    def run(
        self, place: EmbeddedPlace, documents: Path, start: StartDevices, meanwhile: Callable[[threading.Event], None]
    ) -> Ended:
        """`meanwhile` runs beside it until its event is set."""
        settings = IngestSettings.model_validate(
            {
                "source": {"uri": str(documents), "name": "harbour"},
                "chunking": {"max_tokens": 64, "overlap_tokens": 8},
                "embedding": {"model": str(self.model), "device": "cpu"},
                "partition": {"max_nodes": 8, "max_tokens": 400},
                "qdrant": {"collection": NAME},
                "data_folder": str(place.data_folder),
            }
        )
        has_ended = threading.Event()
        beside = threading.Thread(target=meanwhile, args=(has_ended,))
        run = open_run(settings, {}, chunk_workers=0, start=start)
        beside.start()
        try:
            embedded = run_stages(run)
            run.settle()
            summary, off = run.close_books()
        except BallastError as error:
            return Ended(None, (), [], str(error))
        finally:
            has_ended.set()
            beside.join()
            run.close()
        return Ended(summary.books, off, embedded)


@pytest.fixture(scope="module")
def bench(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("pool")
    model = prepare_model(Path(minilm), folder / "model", folder / "empty")
    return Bench(folder, model, *write_documents(folder))


def leave_alone(_has_ended: threading.Event) -> None:
    pass


def check_end(bench: Bench, place: EmbeddedPlace, documents: Path, killed: Ended, expected: Stored) -> None:
    """What the killed run left is right where it says so; a clean run then embeds what is missing, and only that."""
    left = place.read()
    if killed.is_green:
        assert left.list_differences(expected) == []
    stored = set(left.collections.get(expected.aliases[NAME], ()))
    clean = bench.run(place, documents, Workers().start, leave_alone)
    assert clean.is_green, clean
    assert stored.isdisjoint(clean.embedded)
    assert len(clean.embedded) == len(set(clean.embedded))
    assert place.read().list_differences(expected) == []


def test_killed_at_random_moments(bench: Bench) -> None:
    rng = random.Random(SEED)
    first = bench.open_place(None)
    assert bench.run(first, bench.before, Workers().start, leave_alone).is_green
    changed = bench.open_place(first)
    assert bench.run(changed, bench.after, Workers().start, leave_alone).is_green
    ends: list[Ended] = []
    pids: list[int] = []
    while len(pids) < KILLS:
        start, documents, expected = rng.choice(
            [(None, bench.before, first.read()), (first, bench.after, changed.read())]
        )
        workers = Workers()

        def kill_now_and_then(has_ended: threading.Event, workers: Workers = workers) -> None:
            pauses = random.Random(rng.random())
            while not has_ended.wait(pauses.expovariate(1 / PAUSE_S)):
                workers.kill()

        place = bench.open_place(start)
        ends.append(bench.run(place, documents, workers.start, kill_now_and_then))
        pids += workers.pids
        check_end(bench, place, documents, ends[-1], expected)
        place.close()
    red = [
        ended.error or f"{ended.books and ended.books.documents_failed} failed" for ended in ends if not ended.is_green
    ]
    print(f"\n{len(pids)} workers killed in {len(ends)} runs, {len(red)} of them ended red: {red}, {SEED=}")
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_partition_whose_workers_all_die_is_finished_by_the_next_run(bench: Bench) -> None:
    reference = bench.open_place(None)
    assert bench.run(reference, bench.before, Workers().start, leave_alone).is_green
    workers = Workers()

    def kill_all(has_ended: threading.Event) -> None:
        while not has_ended.wait(0.01):
            if len(workers.pids) < 12:
                workers.kill()

    place = bench.open_place(None)
    killed = bench.run(place, bench.before, workers.start, kill_all)
    assert not killed.is_green
    check_end(bench, place, bench.before, killed, reference.read())
