"""Runs ingests in forked children, so that each costs a second and not the ten that the imports take; kills them as told.

A job is a line of JSON on stdin, its end a line of JSON on stdout. This process has one thread: a fork of it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from run_stages import run_stages

import tasks.engine.chunk
from tasks.backends.fake_encoder import FakeEncoder
from tasks.backends.qdrant import QdrantStore
from tasks.backends.qdrant_calls import CheckedCalls
from tasks.backends.spool import SpoolFolder
from tasks.config import IngestSettings
from tasks.engine.collection import RunCollection
from tasks.engine.cpu_pool import CpuPool
from tasks.engine.devices import Devices
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.engine.ingest_run import IngestRun
from tasks.engine.measure_device import MeasuredDevice
from tasks.engine.open_run import open_run
from tasks.observe import Observer
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import BatchOutcome, ModelFiles, TokenIds

# What a run imports as it goes: once, for all children.
LAZY = (
    "anyio",
    "ctypes.util",
    "encodings.cp437",
    "fsspec.implementations.chained",
    "h2.connection",
    "httpcore",
    "llama_index.core.node_parser",
    "llama_index.core.schema",
    "llama_index.core.vector_stores.utils",
    "pandas",  # pyarrow looks for it
    "portalocker",
    "pyarrow.dataset",
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
    "pynvml",
    "qdrant_client.local.qdrant_local",
    "tasks.backends.chunker",
    "tasks.backends.points",
    "tasks.backends.texts",
    "tenacity",
    "tokenizers",
)


@dataclass
class Job:
    """One ingest. `kill`: {"after_s": s} from its start, or {"mark": m, "nth": n, "after_s": s} from a mark on."""

    id: int
    settings: dict[str, Any]
    marks: str  # a file: what the run was doing, line by line, up to its last moment
    result: str  # a file: what the run has to say, when it ends by itself
    kill: dict[str, Any] | None = None


# ------------------------------------------------------------------------------------------ in a child


class Recorder:
    """Writes a line as each stage begins and ends, and ends the process at the one that the job names."""

    def __init__(self, path: str, kill: dict[str, Any] | None) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._kill = kill if kill and "mark" in kill else None
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, mark: str) -> None:
        with self._lock:
            # A write to a file is the kernel's once it returns: it outlives the process.
            os.write(self._file, f"{mark}\n".encode())
            self._counts[mark] += 1
            due = self._kill is not None and mark == self._kill["mark"] and self._counts[mark] == self._kill["nth"]
            if due and self._kill is not None:
                if not self._kill["after_s"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Thread(target=_die_in, args=(self._kill["after_s"],), daemon=True).start()

    def watch(self, owner: Any, name: str, stage: str | Callable[..., str]) -> None:
        """Mark every call of owner.name: "> stage" before it, "< stage" after it."""
        called = getattr(owner, name)

        @functools.wraps(called)
        def marked(*args: Any, **kwargs: Any) -> Any:
            mark = stage if isinstance(stage, str) else stage(*args, **kwargs)
            if not mark:
                return called(*args, **kwargs)
            self(f"> {mark}")
            try:
                return called(*args, **kwargs)
            finally:
                self(f"< {mark}")

        setattr(owner, name, marked)


def _die_in(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_stages(mark: Recorder) -> None:
    """Every step of a run that changes something outside the process, or takes its time."""
    from qdrant_client.local.persistence import CollectionPersistence
    from qdrant_client.local.qdrant_local import QdrantLocal

    mark.watch(tasks.engine.chunk, "chunk_batch", "chunk")
    mark.watch(SpoolFolder, "write_partition", "spool nodes")
    mark.watch(SpoolFolder, "write_vectors", "spool vectors")
    mark.watch(SpoolFolder, "remove_partition", "clear spool")
    mark.watch(IngestRun, "store_leftovers", "leftovers")
    mark.watch(RunCollection, "refresh_payloads", "refresh payloads")
    mark.watch(RunCollection, "upsert", "upsert")
    mark.watch(RunCollection, "count_generations", "count")
    mark.watch(RunCollection, "delete_other_generations", "delete old generations")
    mark.watch(RunCollection, "delete_documents", "delete gone documents")
    # Their calls that do nothing are no steps.
    mark.watch(RunCollection, "make", lambda self: "" if self._is_made else "make collection")
    mark.watch(RunCollection, "write_records", lambda _, records: f"ledger {records[0].status}" if records else "")
    mark.watch(RunCollection, "remove_records", lambda _, doc_ids: "ledger forget" if doc_ids else "")
    mark.watch(QdrantStore, "switch_alias", "switch")
    mark.watch(CheckedCalls, "run", name_request)
    # Within one request to an embedded Qdrant.
    mark.watch(CollectionPersistence, "persist", "write a point")
    mark.watch(CollectionPersistence, "delete", "remove a point")
    mark.watch(QdrantLocal, "_save", "write the catalog")


def name_request(calls: CheckedCalls, action: str, *_: Any, **__: Any) -> str:
    """What a request to a server does, without names and numbers; an embedded Qdrant's changes have marks of their own."""
    if isinstance(calls.lock, contextlib.nullcontext):
        return f"request: {re.sub(r' .?[0-9]+| .[^ ]*--[^ ]*', '', action)}"
    return ""


@dataclass
class MarkedEncoder(FakeEncoder):
    """The double, which says when it is at work."""

    mark: Callable[[str], None] = field(kw_only=True)

    def encode(self, token_ids: list[TokenIds]) -> BatchOutcome:  # type: ignore[override]
        self.mark("> embed")
        outcome = super().encode(token_ids)
        self.mark("< embed")
        return outcome


def ingest(job: Job) -> dict[str, Any]:
    """One run, its stages side by side as in the flow; returns what a test wants to know of it."""
    mark = Recorder(job.marks, job.kill)
    watch_stages(mark)
    encoders: list[MarkedEncoder] = []

    def start(settings: IngestSettings, files: ModelFiles, observer: Observer, stop: threading.Event) -> Devices:
        encoder = MarkedEncoder(dimension=files.dimension, mark=mark)
        encoders.append(encoder)
        fit = start_fit(MemoryModel(0.0, 64 * 1024, 0.0, 0.0, 64 * 1024, 64 * 1024, 64.0, 0.0))
        embedder = NodeEmbedder(encoder, fit, EmbedSettings(max_micro_batch_tokens=256), stop=stop)
        return Devices(
            embedder, CpuPool(_no_worker, 1), device="cuda:0", note="", tokens_per_s=1e5, observer=observer, stop=stop
        )

    mark("> open")
    run = open_run(IngestSettings.model_validate(job.settings), {}, chunk_workers=0, start=start)
    mark("< open")
    try:
        mark("> stages")
        embedded = run_stages(run)
        mark("< stages")
        mark("> settle")
        run.settle()
        mark("< settle")
        summary, off = run.close_books()
    finally:
        run.close()
    mark("< close")
    return {
        "embedded": embedded,
        "rows": int(np.sum([sum(encoder.finished.values()) for encoder in encoders])),
        "off": off,
        "failed": summary.books.documents_failed,
        "notes": summary.notes,
    }


def _no_worker() -> tuple[NodeEmbedder, MeasuredDevice]:
    raise AssertionError("nothing spills here")


def run_child(job: Job) -> None:
    """Never returns."""
    status = 1
    try:
        # stdout is the zygote's line to the test.
        log = os.open(f"{job.result}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        result = ingest(job)
        Path(job.result).write_text(json.dumps(result), encoding="utf-8")
        status = 0
    except BaseException:  # noqa: BLE001  whatever it is: the test reads it, and this process must not go on as a zygote
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


# ------------------------------------------------------------------------------------------ the zygote


@dataclass
class Child:
    job: Job
    pid: int
    started: float

    @property
    def deadline(self) -> float | None:
        kill = self.job.kill
        return self.started + kill["after_s"] if kill and "mark" not in kill else None


def serve() -> None:
    """Until stdin is closed; then every child is killed, and waited for."""
    for name in LAZY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page of what it shares with this process
    threads = [path.joinpath("comm").read_text().strip() for path in Path("/proc/self/task").iterdir()]
    assert len(threads) == 1, f"a fork would lose threads of {threads}"
    children: dict[int, Child] = {}
    waiting = b""
    print(json.dumps({"ready": True}), flush=True)
    while True:
        now = time.monotonic()
        deadlines = [child.deadline for child in children.values() if child.deadline is not None]
        timeout_s = max(0.0, min(deadlines) - now) if deadlines else None
        readable, _, _ = select.select([0, *children], [], [], timeout_s)
        for pidfd, child in list(children.items()):
            # Never a process id that may be another's by now: the pidfd is this child's, and it has not been waited for.
            if pidfd in readable:
                _, status = os.waitpid(child.pid, 0)
                os.close(pidfd)
                del children[pidfd]
                seconds = time.monotonic() - child.started
                ended = {"id": child.job.id, "status": os.waitstatus_to_exitcode(status), "seconds": seconds}
                print(json.dumps(ended), flush=True)
            elif child.deadline is not None and child.deadline <= time.monotonic():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                child.job.kill = None
        if 0 in readable:
            content = os.read(0, 1 << 20)
            if not content:
                break
            *lines, waiting = (waiting + content).split(b"\n")
            for line in lines:
                job = Job(**json.loads(line))
                pid = os.fork()
                if pid == 0:
                    os.close(0)
                    run_child(job)
                children[os.pidfd_open(pid)] = Child(job, pid, time.monotonic())
    for pidfd, child in children.items():
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(child.pid, 0)


if __name__ == "__main__":
    serve()
