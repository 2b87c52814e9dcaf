"""`kill -9` of `ballast ingest` itself, with its chunk workers, its CPU pool and the real model."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil
from kill_documents import write_documents
from places import EmbeddedPlace

BALLAST = Path(sys.executable).parent / "ballast"
SEED = "ballast" if os.environ.get("CI") else os.urandom(4).hex()
# A node's neighbours in its micro-batch are others after a kill: the sums are made in another order.
SAME_VECTOR = 1e-4


def make_command(documents: Path, data: Path, model: str) -> list[str]:
    told = [
        str(BALLAST),
        "ingest",
        str(documents),
        "--model",
        model,
        "--data-folder",
        str(data),
        "--collection",
        "port",
    ]
    return [
        *told,
        "--set",
        "partition.max_nodes=16",
        "--set",
        "partition.max_tokens=2000",
        "--set",
        "chunking.max_tokens=96",
    ]


def wait_for_line(lines: IO[str], beginning: str) -> list[str]:
    """The lines up to the first that begins like this."""
    seen = []
    for line in lines:
        seen.append(line)
        if line.startswith(beginning):
            break
    return seen


def kill_run(command: list[str], pause_s: float, environment: dict[str, str]) -> None:
    """Run, and kill -9 some moments after the second partition. What the run had started must be gone soon after."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = wait_for_line(process.stdout, "partition index=1")
        time.sleep(pause_s)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "".join(lines)
    assert children
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []


def kill_worker(command: list[str], out: Path, environment: dict[str, str]) -> list[str]:
    """Run, and kill -9 the process that holds the model after the first partition; the run's lines."""
    with (
        out.open("w") as stdout,
        subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment) as process,
    ):
        assert process.stderr is not None
        lines = wait_for_line(process.stderr, "partition index=0")
        children = psutil.Process(process.pid).children(recursive=True)
        max(children, key=lambda child: child.memory_info().rss).kill()
        lines += process.stderr.readlines()
    assert process.returncode == 0, "".join(lines)
    return lines


def test_a_killed_command_is_finished_by_the_next_whose_worker_is_killed(
    prefect_api: str, minilm: str, tmp_path: Path
) -> None:
    environment = {**os.environ, "PREFECT_API_URL": prefect_api}
    documents, _ = write_documents(tmp_path)
    undisturbed = make_command(documents, tmp_path / "undisturbed", minilm)
    subprocess.run(undisturbed, check=True, capture_output=True, env=environment)
    expected = EmbeddedPlace(tmp_path / "undisturbed", None).read()

    command = make_command(documents, tmp_path / "data", minilm)
    kill_run(command, random.Random(SEED).uniform(0, 0.3), environment)
    lines = kill_worker([*command, "--json"], tmp_path / "out.json", environment)
    assert any("restart" in line for line in lines), "".join(lines)
    books = json.loads((tmp_path / "out.json").read_text())["books"]
    assert books["nodes_cpu"] + books["nodes_reused"] == books["nodes_planned"]
    assert books["nodes_reused"]
    place = EmbeddedPlace(tmp_path / "data", None)
    assert place.read().list_differences(expected, atol=SAME_VECTOR) == [], f"{SEED=}"
