"""A run that is told to stop, by Ctrl-C or as a cancelled flow run is: in order, and the next one goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

BALLAST = Path(sys.executable).parent / "ballast"
DOCUMENTS = 16


def write_documents(folder: Path) -> None:
    folder.mkdir()
    for number in range(DOCUMENTS):
        text = " ".join(f"Ship {number} waits for tide {line}, and its pilot waits, too." for line in range(250))
        (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")


def test_what_is_embedded_when_a_run_is_stopped_is_not_embedded_again(tmp_path: Path, minilm: str) -> None:
    """Ctrl-C, then run again and cancelled (SIGTERM, as Prefect's workers send it), then run again to its end."""
    write_documents(tmp_path / "docs")
    command = [
        str(BALLAST),
        "ingest",
        str(tmp_path / "docs"),
        "--model",
        minilm,
        "--data-folder",
        str(tmp_path / "data"),
    ]
    command += ["--set", "partition.max_tokens=12000"]
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    waiting = []
    for told in (signal.SIGINT, signal.SIGTERM):
        lines: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as run:
            assert run.stdout is not None
            for line in run.stdout:
                lines.append(line)
                if line.startswith("partition index=0"):
                    run.send_signal(told)
        assert run.returncode in (130, -told), "".join(lines)
        waiting.append(count_spooled(tmp_path / "data" / "spool"))
        assert waiting[-1] > 0, "a partition was under way: its micro-batches are in the spool"
    assert any("embedded and could not store" in line for line in lines)

    last = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=False)
    assert last.returncode == 0, last.stderr
    books = json.loads(last.stdout)["books"]
    assert books["documents_seen"] == DOCUMENTS == books["documents_unchanged"] + books["documents_written"]
    # What the others had embedded came from Qdrant or from the spool.
    assert books["nodes_cpu"] + books["nodes_reused"] == books["nodes_planned"]
    assert books["points_counted"] - books["nodes_cpu"] >= sum(waiting)
    assert count_spooled(tmp_path / "data" / "spool") == 0


def count_spooled(folder: Path) -> int:
    """Vectors that wait for Qdrant."""
    vectors = 0
    for path in folder.rglob("*.npz"):
        with np.load(path) as arrays:
            vectors += len(arrays["rows"])
    return vectors
