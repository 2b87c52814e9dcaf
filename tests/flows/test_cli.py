"""The commands from the outside: arguments in, streams and exit codes out. What they call is replaced by what it returns."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.operations import Operations
from flows.progress import RunObserver
from tasks.config import BudgetSettings, EmbeddingSettings, IngestSettings, QdrantSettings
from tasks.errors import (
    ApiUnavailable,
    BooksDontClose,
    DeviceError,
    ModelError,
    SourceError,
    SpoolError,
    StoreLocked,
    StoreMismatch,
    StoreMissing,
    StoreUnavailable,
)
from tasks.records import (
    Books,
    CalibrationReport,
    CollectionState,
    Finding,
    LedgerRecord,
    MemoryKey,
    MemorySample,
    ModelFit,
    PlanReport,
    Rejection,
    RunSummary,
    SearchHit,
    VerifyReport,
)

GIB = 1024**3

SUMMARY = RunSummary(
    collection="docs", physical_collection="docs__1a", model="m", fingerprint="1a", device="cpu",
    device_note="no CUDA device: embedding on the CPU pool", books=Books(1, 0, 1, 0, 0, 2, 0, 2, 0, 0, 2),
    rejections=[], partitions=[], memory_series=[], tokens=20, seconds={"total": 4.0},
)  # fmt: skip
PLAN = PlanReport(
    model="m", documents=1, rejections=[Rejection("x.bin", "skipped", "read", "not a format")], nodes=2, tokens=20,
    longest_tokens=12, partitions=1, micro_batches=1, unmasked_token_fraction=1.0, padding_fraction=0.0,
    budget_bytes=12 * GIB, weights_bytes=GIB, predicted_peak_bytes=2 * GIB, spilled_nodes=0,
    memory_model="closed-form prior", models=[ModelFit("MiniLM", 22_700_000, GIB // 12, True, 256, 900, 0, 0.02)],
)  # fmt: skip
CALIBRATION = CalibrationReport(
    key=MemoryKey("rev", "fp16", "sdpa", "2.13", "Tesla T4", 15 * GIB), coefficients={"c0": 1e6}, samples=[],
    held_back=[MemorySample(4, 512, True, 2 * GIB)], held_back_predictions=[2 * GIB], median_error=0.0,
    worst_under=0.0, tokens_per_s=16_800.0, seconds=4.0,
)  # fmt: skip
FINDING = Finding("missing_points", "docs", "guide.md", "3 points", "1", "write_ledger")
CLEAN = VerifyReport("docs", "docs--1a", "docs", documents=2, points=6, parked=0, found=[], repaired=[], left=[])
FAILURE = LedgerRecord(
    "docs", "bad.pdf", "parked", "h", attempts=3, stage="read", reason="encrypted: it needs a password",
    updated_at="2026-11-22T12:00:00+00:00",
)  # fmt: skip
STATE = CollectionState("docs--1a2b", True, "1a2b", "m", "rev", 384, 6, 2)
HIT = SearchHit(0.73, "guide.md", "id", "Install it first.", 120, 140, {})


class Recorded(Operations):
    """Returns what it was given, or raises it; keeps what it was called with."""

    def __init__(self, outcome: Any = None, *, is_green: bool = True) -> None:
        self.outcome = outcome
        self.is_green = is_green
        self.settings: IngestSettings | None = None
        self.calls: list[dict[str, Any]] = []

    def _answer(self, **call: Any) -> Any:
        self.calls.append(call)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome

    def ingest(self, settings: IngestSettings, observer: RunObserver, *, changed: Sequence[str] | None = None) -> bool:
        self.settings = settings
        summary = self._answer(changed=changed)
        if summary is not None:
            observer.run_finished(summary, ())
        return self.is_green

    def verify(self, settings: IngestSettings, observer: RunObserver, *, with_source: bool, repair: bool) -> bool:
        self.settings = settings
        report = self._answer(with_source=with_source, repair=repair)
        if report is not None:
            observer.verify_finished(report)
        return self.is_green

    def list_failures(
        self, qdrant: QdrantSettings, data_folder: str, *, retry: bool
    ) -> Mapping[str, Sequence[LedgerRecord]]:
        failures: Mapping[str, Sequence[LedgerRecord]] = self._answer(collection=qdrant.collection, retry=retry)
        return failures

    def list_collections(
        self, qdrant: QdrantSettings, data_folder: str, *, spool: str | None, name: str | None, drop_old: bool
    ) -> Sequence[CollectionState]:
        states: Sequence[CollectionState] = self._answer(name=name, drop_old=drop_old)
        return states

    def plan(self, settings: IngestSettings, gpu_memory_bytes: int | None) -> PlanReport:
        self.settings = settings
        report: PlanReport = self._answer(gpu_memory_bytes=gpu_memory_bytes)
        return report

    def search(
        self, question: str, *, embedding: EmbeddingSettings, qdrant: QdrantSettings, data_folder: str, limit: int
    ) -> Sequence[SearchHit]:
        hits: Sequence[SearchHit] = self._answer(
            question=question, model=embedding.model, collection=qdrant.collection, limit=limit
        )
        return hits

    def calibrate(self, embedding: EmbeddingSettings, budget: BudgetSettings, data_folder: str) -> CalibrationReport:
        report: CalibrationReport = self._answer(device=embedding.device, fraction=budget.fraction)
        return report


def ballast(*arguments: str, operations: Operations) -> Result:
    return CliRunner().invoke(app, list(arguments), obj=operations)


@pytest.mark.parametrize(
    ("flags", "changed"), [([], None), (["--changed", "a.md", "--changed", "sub"], ["a.md", "sub"])]
)
def test_changed_paths_reach_the_run(flags: list[str], changed: list[str] | None) -> None:
    operations = Recorded(SUMMARY)
    assert ballast("ingest", "docs", *flags, operations=operations).exit_code == 0
    assert operations.calls == [{"changed": changed}]


def test_ingest_flags_reach_their_knobs() -> None:
    operations = Recorded(SUMMARY)
    result = ballast(
        "ingest", "docs", "--collection", "c", "--model", "m", "--revision", "r", "--device", "cuda:1",
        "--precision", "fp32", "--qdrant", "http://q:6333", "--data-folder", "d", "--chunk-tokens", "200",
        "--chunk-overlap", "20", "--memory-fraction", "0.5", "--set", "partition.max_nodes=7",
        "--source-name", "handbook", "--confirm-deletes",
        operations=operations,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert operations.settings == IngestSettings.model_validate(
        {
            "source": {"uri": "docs", "name": "handbook"},
            "deletes": {"confirmed": True},
            "qdrant": {"collection": "c", "url": "http://q:6333"},
            "embedding": {"model": "m", "revision": "r", "device": "cuda:1", "precision": "fp32"},
            "chunking": {"max_tokens": 200, "overlap_tokens": 20},
            "budget": {"fraction": 0.5},
            "partition": {"max_nodes": 7},
            "data_folder": "d",
        }
    )
    assert "documents seen=1 unchanged=0 written=1 failed=0 skipped=0" in result.stdout
    assert "closed=yes" in result.stdout


def test_a_config_file_gives_way_to_flags(tmp_path: Path) -> None:
    (tmp_path / "ballast.toml").write_text('source = "file"\n[qdrant]\ncollection = "file"\nbatch_points = 9\n')
    operations = Recorded(SUMMARY)
    result = ballast(
        "ingest", "--config", str(tmp_path / "ballast.toml"), "--collection", "flag", operations=operations
    )
    assert result.exit_code == 0, result.output
    assert operations.settings is not None
    assert operations.settings.source.uri == "file"
    assert operations.settings.qdrant.collection == "flag"
    assert operations.settings.qdrant.batch_points == 9


def test_json_is_one_document_with_closed_books() -> None:
    result = ballast("ingest", "docs", "--json", operations=Recorded(SUMMARY))
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["books_closed"] is True
    assert document["books"]["documents_written"] == 1


def test_a_red_run_shows_its_books_and_exits_1() -> None:
    books = Books(2, 0, 1, 1, 0, 2, 0, 2, 0, 0, 2)
    summary = replace(SUMMARY, books=books, rejections=[Rejection("bad.pdf", "failed", "read", "torn")])
    result = ballast("ingest", "docs", operations=Recorded(summary, is_green=False))
    assert result.exit_code == 1
    assert "rejected document=bad.pdf status=failed stage=read reason=torn" in result.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BooksDontClose("documents: 2 seen, 1 told"), 1),
        (SpoolError("torn"), 1),
        (StoreMismatch("another model"), 3),
        (StoreLocked("another process"), 3),
        (StoreMissing("no collection"), 3),
        (SourceError("no such folder"), 3),
        (ModelError("no such model"), 3),
        (StoreUnavailable("timeout"), 4),
        (DeviceError("no cuda:1"), 4),
        (ApiUnavailable("did not answer"), 4),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_are_a_message_and_a_code(error: Exception, code: int) -> None:
    result = ballast("ingest", "docs", operations=Recorded(error))
    assert result.exit_code == code
    assert result.stderr == f"Error: {error}\n"
    as_json = ballast("search", "q", "--json", operations=Recorded(error))
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {"error": {"type": type(error).__name__, "message": str(error)}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ingest"], "source: missing. Give SOURCE"),
        (
            ["ingest", "docs", "--set", "chunking.max_token=3"],
            "chunking.max_token: no such knob; did you mean max_tokens?",
        ),
        (["ingest", "docs", "--memory-fraction", "7"], "budget.fraction: input should be less than or equal to 1"),
        (["plan", "docs", "--gpu-memory", "much"], "--gpu-memory much: not a size"),
        (["ingest", "docs", "--config", "none.toml"], "--config none.toml: No such file"),
        (["search"], "Missing argument"),
        (["ingest", "docs", "--no-such-flag"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2(arguments: list[str], message: str) -> None:
    operations = Recorded()
    result = ballast(*arguments, operations=operations)
    assert result.exit_code == 2
    assert message in result.stderr
    assert operations.calls == []


@pytest.mark.parametrize("limit", ["0", "-1", "1001"])
def test_a_limit_out_of_range_is_2_with_its_document(limit: str) -> None:
    operations = Recorded([])
    result = ballast("search", "q", "--limit", limit, "--json", operations=operations)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["message"] == f"--limit {limit}: it can be 1 to 1000."
    assert operations.calls == []


def test_a_full_disk_is_no_bug() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", ".ballast/spool/x")
    result = ballast("ingest", "docs", operations=Recorded(full))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: No space left on device (.ballast/spool/x).")


def test_a_bug_is_shown_whole() -> None:
    result = ballast("ingest", "docs", operations=Recorded(ZeroDivisionError("division by zero")))
    assert result.exit_code == 70
    assert "Traceback" in result.stderr
    assert "this is a bug in Ballast: division by zero" in result.stderr


def test_ctrl_c_is_130() -> None:
    result = ballast("ingest", "docs", "--json", operations=Recorded(KeyboardInterrupt()))
    assert result.exit_code == 130
    assert "run it again to go on" in json.loads(result.stdout)["error"]["message"]


def test_a_closed_stdout_is_no_bug() -> None:
    script = f"{sys.executable} -P -c 'from flows.cli import main; main()' search '' >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", script], timeout=60).returncode == 2


STUBBORN = """
import sys, time
from flows.cli import app
from flows.operations import Operations

class Stubborn(Operations):
    def ingest(self, settings, observer, changed):
        print("running", flush=True)
        try:
            time.sleep(60)
        finally:
            time.sleep(60)

app(["ingest", "docs"], obj=Stubborn())
"""


def test_a_second_ctrl_c_does_not_wait() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        assert run.stdout.readline() == "running\n"
        run.send_signal(signal.SIGINT)
        assert "Ctrl-C again to stop at once" in run.stderr.readline()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=30) == 130


def test_a_flow_that_ends_without_books_is_a_failure() -> None:
    result = ballast("ingest", "docs", operations=Recorded(None))
    assert result.exit_code == 1
    assert "ended without its books" in result.stderr


def test_plan_shows_the_models_side_by_side() -> None:
    operations = Recorded(PLAN)
    result = ballast("plan", "docs", "--gpu-memory", "15GiB", operations=operations)
    assert result.exit_code == 0
    assert operations.calls == [{"gpu_memory_bytes": 15 * GIB}]
    lines = result.stdout.splitlines()
    assert any(line.startswith("plan model=m documents=1 nodes=2 tokens=20 ") for line in lines)
    assert any(line.startswith("model model=MiniLM parameters=23M ") and " fits=yes " in line for line in lines)
    assert "rejected document=x.bin status=skipped" in result.stdout
    assert json.loads(ballast("plan", "docs", "--json", operations=operations).stdout)["models"][0]["fits"] is True


def test_search_prints_hits_and_says_by_its_code_if_there_is_none() -> None:
    operations = Recorded([HIT])
    result = ballast("search", "how to install", "--limit", "3", "--collection", "c", operations=operations)
    assert result.exit_code == 0
    assert result.stdout == (
        'hit rank=1 score=0.73 document=guide.md position="chars 120-140" text="Install it first."\n'
    )
    assert operations.calls == [{"question": "how to install", "model": "BAAI/bge-m3", "collection": "c", "limit": 3}]
    nothing = ballast("search", "how to install", "--json", operations=Recorded([]))
    assert (nothing.exit_code, json.loads(nothing.stdout)) == (1, [])
    assert "Nothing found" in ballast("search", "how to install", operations=Recorded([])).stderr


def test_verify_says_what_is_off_and_by_its_code_whether_anything_is(tmp_path: Path) -> None:
    clean = Recorded(CLEAN)
    result = ballast("verify", "docs", "--source-name", "handbook", operations=clean)
    assert result.exit_code == 0
    assert clean.calls == [{"with_source": True, "repair": False}]
    assert clean.settings is not None
    assert (clean.settings.source.uri, clean.settings.source.name) == ("docs", "handbook")
    assert "verify collection=docs documents=2 points=6 parked=0 found=0 repaired=0 left=0" in result.stdout

    for config, with_source in (('source = "."', True), ('[source]\nuri = "."', True), ("", False)):
        (tmp_path / "ballast.toml").write_text(config)
        asked = Recorded(CLEAN)
        ballast("verify", "--config", str(tmp_path / "ballast.toml"), operations=asked)
        assert asked.calls == [{"with_source": with_source, "repair": False}]

    report = replace(CLEAN, found=[FINDING, FINDING], repaired=[FINDING], left=[FINDING], notes=["deletes withheld"])
    operations = Recorded(report, is_green=False)
    result = ballast("verify", "--repair", "--confirm-deletes", operations=operations)
    assert result.exit_code == 1
    assert operations.calls == [{"with_source": False, "repair": True}]
    assert operations.settings is not None
    assert operations.settings.deletes.confirmed
    said = 'finding kind=missing_points document=guide.md source=docs expected="3 points" found=1 repair=write_ledger'
    assert [line for line in result.stdout.splitlines() if line.startswith("finding")] == [
        f"{said} repaired=no",
        f"{said} repaired=yes",
    ]
    assert "deletes withheld" in result.stderr
    document = json.loads(ballast("verify", "docs", "--json", operations=Recorded(report)).stdout)
    assert (document["is_clean"], document["left"][0]["kind"]) == (False, "missing_points")


def test_a_verify_that_ends_without_its_report_is_a_failure() -> None:
    result = ballast("verify", "docs", operations=Recorded(None))
    assert result.exit_code == 1
    assert "ended without its report" in result.stderr


def test_failures_are_listed_with_their_reason_and_can_be_tried_again() -> None:
    operations = Recorded({"docs--1a": [FAILURE]})
    result = ballast("failures", "--collection", "docs", "--retry", operations=operations)
    assert result.exit_code == 0
    assert operations.calls == [{"collection": "docs", "retry": True}]
    assert result.stdout == (
        "failure document=bad.pdf status=parked stage=read attempts=3 at=2026-11-22T12:00:00+00:00 source=docs "
        'collection=docs--1a reason="encrypted: it needs a password"\n'
    )
    as_json = ballast("failures", "--json", operations=Recorded({"docs--1a": [FAILURE]}))
    assert json.loads(as_json.stdout)["docs--1a"][0]["attempts"] == 3
    nothing = ballast("failures", operations=Recorded({}))
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "No failed documents." in nothing.stderr


def test_collections_are_listed_and_old_ones_dropped_of_one_name_only() -> None:
    operations = Recorded([STATE])
    result = ballast("collections", operations=operations)
    assert result.exit_code == 0
    assert result.stdout == (
        "collection collection=docs--1a2b live=yes model=m revision=rev dimension=384 points=6 documents=2\n"
    )
    ballast("collections", "--drop-old", operations=operations)
    ballast("collections", "--drop-old", "--collection", "docs", operations=operations)
    assert operations.calls == [
        {"name": None, "drop_old": False},
        {"name": "documents", "drop_old": True},
        {"name": "docs", "drop_old": True},
    ]


def test_calibrate_prints_the_fit_and_its_error() -> None:
    operations = Recorded(CALIBRATION)
    result = ballast("calibrate", "--device", "cuda:0", "--memory-fraction", "0.5", operations=operations)
    assert result.exit_code == 0
    assert operations.calls == [{"device": "cuda:0", "fraction": 0.5}]
    assert 'calibration device="Tesla T4" ' in result.stdout
    assert "coefficient name=c0 value=1e+06" in result.stdout
    assert "held_back nodes=4 padded_tokens=512 masked=yes " in result.stdout


def test_help_is_quick_to_load_and_tells_the_exit_codes() -> None:
    script = (
        "import sys; from flows.cli import main; sys.argv[1:] = ['ingest', '--help']\n"
        "try: main()\n"
        "finally: print(sorted({'prefect', 'torch', 'llama_index', 'numpy', 'rich.progress'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("[]\n")
    assert "130 interrupted" in run.stdout
