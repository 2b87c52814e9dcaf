"""Embedding on work pools, without the pools: workers are real processes that run the real flow, only who starts them is ours.

tests/e2e/deployed/test_deployed.py has the real pools. Here workers die in ways that a pool would take minutes to show.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest

from flows.progress import RunObserver
from tasks.backends.fake_qdrant_server import LoopbackQdrant
from tasks.backends.spool import SpoolFolder
from tasks.backends.spool_reports import read_sign_of_life
from tasks.config import EmbedGroup, IngestSettings
from tasks.errors import DeviceError
from tasks.pool_runs import RunLook
from tasks.records import RunSummary

pytestmark = pytest.mark.usefixtures("prefect_api")

# As a worker's process would: its own interpreter, the flow by its module, parameters as JSON.
WORKER = """
import json, sys
from flows.embed import embed_partitions
from tasks import open_group
given = json.load(open(sys.argv[1]))
state = embed_partitions(given["settings"], given["group"], return_state=True)
print(state.name, state.message, flush=True)
sys.exit(0 if state.is_completed() else 3)
"""


class ProcessRuns:
    """PoolRuns whose workers are processes of this test."""

    def __init__(self, settings: IngestSettings, folder: Path, meddle: "Meddle") -> None:
        self.settings = settings
        self.folder = folder
        self.meddle = meddle
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.groups: list[EmbedGroup] = []

    def start(self, group: EmbedGroup, *, key: str) -> str:
        run_id = str(uuid4())
        order = self.folder / f"order-{run_id}.json"
        order.write_text(
            json.dumps({"settings": self.settings.model_dump(mode="json"), "group": group.model_dump(mode="json")})
        )
        # A flow run's id is the server's to give; the ingest run knows this worker by ours.
        named = f"import tasks.open_group as o\no.flow_run.get_id = lambda: {run_id!r}"
        script = WORKER.replace("from tasks import open_group", named)
        can_start = self.meddle.can_start(len(self.groups))
        command = [sys.executable, "-c", script if can_start else "raise SystemExit(9)", order]
        with (self.folder / f"worker-{run_id}.log").open("wb") as log:
            self.processes[run_id] = subprocess.Popen([str(each) for each in command], stdout=log, stderr=log)
        self.groups.append(group)
        return run_id

    def look(self, run_ids: Collection[str]) -> Mapping[str, RunLook]:
        self.meddle.look(self)
        looks = {}
        for run_id in run_ids:
            code = self.processes[run_id].poll()
            # A server calls it running once the flow has begun, which is after the imports.
            phase: Literal["pending", "running"] = "running" if self.has_begun(run_id) else "pending"
            looks[run_id] = RunLook(phase, "") if code is None else RunLook("ended", f"exit code {code}")
        return looks

    def end(self, run_id: str, reason: str, *, crashed: bool) -> None: ...

    def is_served(self, pool: str) -> bool:
        return True

    def has_begun(self, run_id: str) -> bool:
        group = self.groups[list(self.processes).index(run_id)]
        return read_sign_of_life(SpoolFolder(group.spool), run_id) is not None

    def is_at_work(self, number: int) -> str | None:
        """The run of group `number`, once it has begun with a partition."""
        if len(self.groups) <= number:
            return None
        run_id = list(self.processes)[number]
        sign = read_sign_of_life(SpoolFolder(self.groups[number].spool), run_id)
        return run_id if sign is not None and sign.partition is not None else None


class Meddle:
    """What a test does to workers; nothing unless told."""

    def can_start(self, number: int) -> bool:
        return True

    def look(self, runs: ProcessRuns) -> None: ...


@pytest.fixture
def shared(tmp_path: Path, minilm: str) -> Iterator[Callable[..., IngestSettings]]:
    """Settings for workers and ingest: a Qdrant over HTTP, a spool for all, a GPU pool whose device takes 60 tokens."""
    with LoopbackQdrant() as double:

        def make(documents: int = 6, **pools: Any) -> IngestSettings:
            docs = tmp_path / "docs"
            docs.mkdir(exist_ok=True)
            for number in range(documents):
                words = f"Ship {number} waits for the tide and its pilot. " * (3 if number % 2 else 60)
                (docs / f"{number}.txt").write_text(words)
            return IngestSettings.model_validate(
                {
                    "source": {"uri": str(docs)},
                    "embedding": {"model": minilm, "device": "cpu", "calibrate": False},
                    "chunking": {"workers": 1},
                    "partition": {"max_tokens": 900},
                    "qdrant": {"collection": "port", "url": double.url, "transport": "rest"},
                    "pools": {"enabled": True, "poll_s": 0.2, "silent_s": 8, **pools},
                    "data_folder": str(tmp_path / "data"),
                    "spool": str(tmp_path / "spool"),
                }
            )

        yield make


def run_flow(
    settings: IngestSettings,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    meddle: Meddle | None = None,
    runs: "type[ProcessRuns] | None" = None,
) -> tuple[Any, RunSummary | None, ProcessRuns]:
    from flows.ingest import ingest
    from tasks.observe import observing

    started = (runs or ProcessRuns)(settings, folder, meddle or Meddle())
    monkeypatch.setattr("flows.ingest.PoolRuns", lambda *_: started)
    observer = RunObserver()
    try:
        with observing(observer):
            state = ingest(settings, return_state=True)
        if observer.finished is None:
            state.result()
    finally:
        for process in started.processes.values():
            process.kill()
            process.wait()
    return state, observer.finished[0] if observer.finished else None, started


def test_what_the_device_can_t_place_goes_on_to_the_cpu_pool(
    shared: Callable[..., IngestSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = shared()
    settings = settings.model_copy(update={"budget": settings.budget.model_copy(update={"max_bytes": 35_000_000})})
    state, summary, runs = run_flow(settings, tmp_path, monkeypatch)
    assert state.is_completed(), state.message
    assert summary is not None
    # One group for the device; the CPU pool begins with what is left of the first partition, and goes on with the others.
    assert [group.pool for group in runs.groups] == ["gpu", *["cpu"] * (len(runs.groups) - 1)]
    left = [each.index for group in runs.groups[1:] for each in group.partitions]
    assert sorted(left) == sorted(set(left))
    assert summary.books.nodes_gpu > 0
    assert summary.books.nodes_cpu > 0
    assert summary.books.nodes_gpu + summary.books.nodes_cpu == summary.books.points_counted
    assert 0 < summary.spilled_fraction < 1
    assert any(step.kind == "spill" for report in summary.partitions for step in report.steps)
    assert list_partition_files(runs) == []


class KillInTurn(Meddle):
    """Sends each worker its signal, as long as there are some left, once it has begun with a partition."""

    def __init__(self, *signals: signal.Signals) -> None:
        self.signals = list(signals)
        self.victims: list[str] = []

    def look(self, runs: ProcessRuns) -> None:
        if self.signals and (run_id := runs.is_at_work(len(self.victims))) is not None:
            self.victims.append(run_id)
            runs.processes[run_id].send_signal(self.signals.pop(0))


def test_what_dead_workers_had_is_embedded_by_another(
    shared: Callable[..., IngestSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meddle = KillInTurn(signal.SIGTERM, signal.SIGKILL)
    state, summary, runs = run_flow(shared(30), tmp_path, monkeypatch, meddle)
    assert state.is_completed(), state.message
    assert len(meddle.victims) == 2
    assert summary is not None
    assert summary.books.nodes_gpu == summary.books.points_counted == summary.books.nodes_planned
    assert sum("run again" in note for note in summary.notes) == 2
    assert list_partition_files(runs) == []


def test_a_worker_that_was_taken_for_dead_writes_nothing_more(
    shared: Callable[..., IngestSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is cut off and comes back when its partitions are others': it must find out before it stores a point."""
    meddle = KillInTurn(signal.SIGSTOP)
    codes: list[int] = []

    class ComeBack(ProcessRuns):
        def end(self, run_id: str, reason: str, *, crashed: bool) -> None:
            assert crashed
            self.processes[run_id].send_signal(signal.SIGCONT)
            codes.append(self.processes[run_id].wait(60))

    state, summary, runs = run_flow(shared(30), tmp_path, monkeypatch, meddle, runs=ComeBack)
    assert state.is_completed(), state.message
    assert codes == [3]
    assert summary is not None
    assert summary.books.nodes_gpu == summary.books.points_counted
    log = (tmp_path / f"worker-{meddle.victims[0]}.log").read_text()
    assert "not this run's any more" in log
    assert list_partition_files(runs) == []


class NeverStart(Meddle):
    def can_start(self, number: int) -> bool:
        return False


def test_a_pool_whose_workers_cant_start_ends_the_run_and_loses_nothing(
    shared: Callable[..., IngestSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = shared(gpu_runs=2)
    with pytest.raises(
        DeviceError, match=r"5 runs in a row on gpu-pool ended before their first partition.*exit code 9"
    ):
        run_flow(settings, tmp_path, monkeypatch, NeverStart())
    monkeypatch.undo()

    # Mended, the next run does what this one could not.
    state, summary, _ = run_flow(settings, tmp_path, monkeypatch)
    assert state.is_completed(), state.message
    assert summary is not None
    assert summary.books.documents_written == 6


class KillEach(Meddle):
    """Kills every worker once it has begun with a partition: one that kills whoever touches it."""

    def look(self, runs: ProcessRuns) -> None:
        for number, process in enumerate(list(runs.processes.values())):
            if process.poll() is None and runs.is_at_work(number) is not None:
                process.kill()


def test_nodes_fail_by_name_where_no_worker_survives_them(
    shared: Callable[..., IngestSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, summary, runs = run_flow(shared(2, max_attempts=1), tmp_path, monkeypatch, KillEach())
    assert state.name == "DocumentsFailed"
    assert summary is not None
    assert [group.pool for group in runs.groups] == ["gpu", "cpu"]
    assert summary.books.documents_failed == 2
    assert {each.reason for each in summary.rejections} == {"cpu-pool could not embed it: exit code -9"}


def test_a_spool_without_room_for_two_partitions_takes_one_at_a_time(
    shared: Callable[..., IngestSettings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full as soon as there is one: were that one not taken, nothing would ever make room."""
    state, summary, runs = run_flow(shared(4).model_copy(update={"spool_max_bytes": 1}), tmp_path, monkeypatch)
    assert state.is_completed(), state.message
    assert summary is not None
    assert summary.books.nodes_gpu == summary.books.points_counted
    assert [len(group.partitions) for group in runs.groups] == [1] * len(summary.partitions)
    assert len(runs.groups) > 1


def list_partition_files(runs: ProcessRuns) -> list[str]:
    return [path.name for path in Path(runs.groups[0].spool).iterdir() if path.name.startswith("partition-")]
