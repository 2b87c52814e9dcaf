"""Runs that are killed: the test's side of zygote.py."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Ended:
    """How a run ended: 0, or the negative number of the signal that killed it; what it was doing, and what it said."""

    status: int
    seconds: float
    marks: list[str]
    result: dict[str, Any]
    log: str

    @property
    def was_killed(self) -> bool:
        return self.status == -9

    def under_way(self) -> list[str]:
        """The innermost stages that had begun and not ended."""
        open_stages: list[str] = []
        for mark in self.marks:
            edge, _, stage = mark.partition(" ")
            if edge == ">":
                open_stages.append(stage)
            elif stage in open_stages:
                open_stages.reverse()
                open_stages.remove(stage)
                open_stages.reverse()
        return open_stages


class Zygote:
    """The process that forks the runs. They may be asked for from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._ends: dict[int, Future[dict[str, Any]]] = {}
        environment = {
            **os.environ,
            "OPENBLAS_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of pyarrow's allocator: a thread that a fork would lose
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def run(self, settings: Mapping[str, Any], kill: Mapping[str, Any] | None = None) -> Ended:
        """Run an ingest to its end, whatever that is."""
        number = next(self._ids)
        marks, result = self._folder / f"{number}.marks", self._folder / f"{number}.json"
        job = {"id": number, "settings": settings, "kill": kill, "marks": str(marks), "result": str(result)}
        ended: Future[dict[str, Any]] = Future()
        assert self._process.stdin is not None
        with self._lock:
            self._ends[number] = ended
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        told = ended.result(timeout=120)
        return Ended(
            told["status"],
            told["seconds"],
            marks.read_text().splitlines() if marks.exists() else [],
            json.loads(result.read_text()) if told["status"] == 0 else {},
            Path(f"{result}.log").read_text(),
        )

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            self._ends.pop(told["id"]).set_result(told)
        for ended in self._ends.values():
            ended.set_exception(RuntimeError("the zygote is gone"))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._thread.join()
        self._process.stdout.close()
