"""The real commands, as a user's shell runs them: exit codes, streams and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = "from flows.cli import main; main()"


class Shell:
    """Runs `ballast` with one working folder and without any server configured."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.model = model
        servers = ("QDRANT_URL", "QDRANT_API_KEY", "PREFECT_API_URL")
        self._environment = {name: value for name, value in os.environ.items() if name not in servers}

    def run(self, *arguments: str, where: str = ".", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, *arguments],
            cwd=self.folder / where, env={**self._environment, **environment}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip

    def read(self, code: int, *arguments: str, where: str = ".", **environment: str) -> Any:
        """What `--json` printed, if the exit code is this one: exactly one document and no traceback."""
        done = self.run(*arguments, "--json", where=where, **environment)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Shell:
    folder = tmp_path_factory.mktemp("user")
    docs = folder / "docs [1] ü"
    docs.mkdir()
    (docs / "ships.md").write_text("# Ships\n\nThe harbour opens at six in the morning.\n")
    (docs / "new\nline 🚀.txt").write_text("Cake needs flour, sugar and butter.\n")
    (docs / "twin.txt").write_text("Cake needs flour, sugar and butter.\n")
    (docs / "rows.csv").write_text("id,text\n1,Ropes are coiled clockwise.\n2,\n")
    (docs / "empty.md").touch()
    (docs / "picture.bmp").write_bytes(b"BM")
    (folder / "elsewhere").mkdir()
    (folder / "model").symlink_to(minilm)
    return Shell(folder, minilm)


@pytest.fixture(scope="module")
def summary(shell: Shell) -> Any:
    """One ingest, with the model named by a relative path."""
    return shell.read(0, "ingest", "docs [1] ü", "--model", "model", "--device", "cpu")


def test_ingest_closes_its_books(summary: Any) -> None:
    assert summary["books_closed"] is True
    assert summary["books_off"] == []
    books = summary["books"]
    assert {name: books[f"documents_{name}"] for name in ("seen", "written", "failed", "skipped")} == {
        "seen": 7, "written": 4, "failed": 0, "skipped": 3,
    }  # fmt: skip
    assert books["nodes_cpu"] == books["nodes_planned"] == books["points_counted"] == 4
    assert sorted(each["doc_id"] for each in summary["rejections"]) == ["empty.md", "picture.bmp", "rows.csv#2"]
    assert {"collection", "model", "fingerprint", "device", "device_note", "partitions", "seconds"} <= summary.keys()


def test_a_second_run_embeds_nothing_and_says_so_in_lines(shell: Shell, summary: Any) -> None:
    done = shell.run("ingest", "docs [1] ü", "--model", shell.model)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "documents seen=7 unchanged=4 written=0 failed=0 skipped=3 deleted=0 withheld=0" in lines
    assert "nodes planned=0 gpu=0 cpu=0 reused=0 failed=0 points_counted=4" in lines
    assert all("\x1b" not in line for line in lines)


def test_search_finds_the_passage_from_another_working_folder(shell: Shell, summary: Any) -> None:
    hits = shell.read(
        0, "search", "When does the port open?", "--limit", "2", "--data-folder", "../.ballast", where="elsewhere"
    )
    assert [len(hits), hits[0]["doc_id"]] == [2, "ships.md"]
    assert {"score", "doc_id", "node_id", "text", "start_char", "end_char", "metadata"} == hits[0].keys()


def test_a_reader_that_leaves_early_is_no_error(shell: Shell, summary: Any) -> None:
    quoted = f"{sys.executable} -P -c '{PROGRAM}' search flour --limit 4 | head -n 1"
    done = subprocess.run(
        ["/bin/sh", "-c", quoted], cwd=shell.folder, capture_output=True, text=True, timeout=240, env=os.environ
    )
    assert done.returncode == 0
    assert done.stdout.startswith("hit rank=1 ")
    assert "Traceback" not in done.stderr


def test_plan_writes_nothing(shell: Shell) -> None:
    report = shell.read(0, "plan", "../docs [1] ü", "--model", "../model", "--gpu-memory", "1GiB", where="elsewhere")
    assert (report["documents"], report["nodes"], report["spilled_nodes"]) == (7, 4, 0)
    assert 0 < report["predicted_peak_bytes"] <= report["budget_bytes"] < 1024**3
    fits = {each["model"].rpartition("/")[2]: each["fits"] for each in report["models"]}
    assert fits["bge-m3"] is False
    assert fits["all-MiniLM-L6-v2"] is True
    assert list((shell.folder / "elsewhere").iterdir()) == []


def test_calibrate_fits_the_cpu(shell: Shell) -> None:
    report = shell.read(0, "calibrate", "--model", "model", "--device", "cpu")
    assert report["key"]["precision"] == "fp32"
    assert report["median_error"] < 0.25
    assert len(report["held_back"]) == len(report["held_back_predictions"]) > 0
    assert {"coefficients", "samples", "worst_under", "tokens_per_s", "seconds"} <= report.keys()


@pytest.mark.parametrize(
    ("code", "arguments", "environment", "message"),
    [
        (3, ["ingest", "nowhere"], {}, "nowhere does not exist"),
        (3, ["ingest", "../docs [1] ü", "--model", "no/model"], {}, "no/model is not in the hub's cache"),
        (2, ["ingest", "../docs [1] ü", "--model", "../model", "--device", "gpu"], {}, "auto, cpu, cuda"),
        (2, ["ingest", "../docs [1] ü", "--model", "../model", "--data-folder", "/dev/null/x"], {}, "is a file"),
        (3, ["search", "q"], {}, "Run `ballast ingest` first"),
        (3, ["verify"], {}, "Run `ballast ingest` first"),
        (3, ["failures"], {}, "Run `ballast ingest` first"),
        (3, ["collections"], {}, "Run `ballast ingest` first"),
        (4, ["search", "q"], {"QDRANT_URL": "http://127.0.0.1:1"}, "does not answer"),
        (2, ["search", "q"], {"QDRANT_URL": "http://host.invalid", "QDRANT_API_KEY": "hunter2"}, "plain http"),
        (4, ["ingest", "../docs [1] ü", "--model", "../model"], {"PREFECT_API_URL": "http://127.0.0.1:1"}, "Prefect"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_what_is_refused_leaves_nothing_behind(
    shell: Shell, code: int, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    error = shell.read(code, *arguments, where="elsewhere", **environment)["error"]
    assert message in error["message"]
    assert "hunter2" not in error["message"]
    assert list((shell.folder / "elsewhere").iterdir()) == []
