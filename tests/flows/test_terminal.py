"""What is written where: on a terminal, in a pipe, with --json and with --quiet."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from dataclasses import replace

import pytest

from flows.terminal import Terminal
from tasks.observe import current_observer, observing
from tasks.records import (
    Books,
    LadderStep,
    ModelFit,
    Partition,
    PartitionReport,
    PlanReport,
    Rejection,
    RunSummary,
    SearchHit,
)
from tasks.tabulate_plan import tabulate_models

ANSI = "\x1b["

STEP = LadderStep("oom", "CUDA out of memory", 64, 32, 512, 8 * 1024**3, 4 * 1024**3, 1024**3)
REPORT = PartitionReport(
    index=0, nodes=100, tokens=20_000, gpu_nodes=98, cpu_nodes=2, failed_nodes={}, micro_batches=4, batch_min=8,
    batch_max=64, peak_bytes=3 * 1024**3, budget_bytes=8 * 1024**3, seconds=2.0, padding_tokens=10, redone_fp32=0,
    steps=(STEP,), device="cuda:0",
)  # fmt: skip
SUMMARY = RunSummary(
    collection="docs", physical_collection="docs__1a", model="m", fingerprint="1a", device="cuda:0",
    device_note="the first CUDA device", books=Books(3, 0, 1, 1, 1, 100, 98, 2, 0, 0, 100),
    rejections=[Rejection("a [b].md", "failed", "read", "torn"), Rejection("empty.md", "skipped", "read", "no text")],
    partitions=[REPORT], memory_series=[], tokens=20_000, seconds={"total": 4.0, "embed": 2.0},
)  # fmt: skip
PLAN = PlanReport(
    model="m", documents=1, rejections=[], nodes=2, tokens=20, longest_tokens=12, partitions=1, micro_batches=1,
    unmasked_token_fraction=1.0, padding_fraction=0.0, budget_bytes=2**33, weights_bytes=2**28,
    predicted_peak_bytes=2**30, spilled_nodes=0, memory_model="closed-form prior", models=[],
)  # fmt: skip
HITS = [SearchHit(0.73, "guide.md", "id", "Install\x1b[31m it\nfirst.", 120, 140, {"page_label": "3"})]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_story() -> None:
    """What the engine tells during a small run."""
    observer = current_observer.get()
    observer.stage("model", "BAAI/bge-m3")
    observer.note("the first CUDA device")
    observer.partition_spooled(Partition(0, "p", 100, 20_000, 900, 0.5))
    observer.micro_batch_done(0, 50, 100, 10_000, "cuda:0")
    observer.ladder_step(0, STEP)
    observer.micro_batch_done(0, 100, 100, 10_000, "cuda:0")
    observer.partition_done(REPORT)
    observer.run_finished(SUMMARY, ())


def show_run(terminal: Terminal) -> None:
    with terminal.watch() as observer, observing(observer):
        run_story()
        assert observer.finished == (SUMMARY, ())
        terminal.print_summary(SUMMARY, ())


def test_models_keep_their_names_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    models = [ModelFit("BAAI/bge-base-en-v1.5", 109_000_000, 2**28, True, 512, 12_345, 2_841, 7.66)] * 2
    out = Tty()
    terminal = Terminal(stdout=out, stderr=io.StringIO())
    terminal.print_tables(tabulate_models(replace(PLAN, models=models)))
    assert out.getvalue().count("BAAI/bge-base-en-v1.5") == 2


def test_a_pipe_gets_plain_lines() -> None:
    out, err = io.StringIO(), io.StringIO()
    show_run(Terminal(stdout=out, stderr=err))
    lines = out.getvalue().splitlines()
    assert ANSI not in out.getvalue()
    assert err.getvalue() == ""
    assert "stage name=model detail=BAAI/bge-m3" in lines
    assert 'note "the first CUDA device"' in lines
    (partition,) = [line for line in lines if line.startswith("partition ")]
    assert partition == (
        "partition index=0 nodes=100 tokens=20000 device=cuda:0 batch=8-64 oom_steps=1 spilled=2 failed=0 "
        "peak_bytes=3221225472 budget_bytes=8589934592 seconds=2 tokens_per_s=10000"
    )
    assert any(line.startswith("ladder partition=0 step=oom nodes_before=64 nodes_after=32 ") for line in lines)
    assert 'rejected document="a [b].md" status=failed stage=read reason=torn' in lines
    assert "documents seen=3 unchanged=0 written=1 failed=1 skipped=1 deleted=0 withheld=0" in lines
    assert "nodes planned=100 gpu=98 cpu=2 reused=0 failed=0 points_counted=100" in lines
    assert lines[-1].startswith("run collection=docs ")
    assert lines[-1].endswith(" closed=yes")


def test_a_terminal_gets_boxes_on_stdout_and_bars_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out, err = Tty(), Tty()
    show_run(Terminal(stdout=out, stderr=err))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "points in Qdrant" in shown
    assert "10,000" in shown
    assert "a [b].md" in shown, "brackets are no markup"
    assert "Books closed." in shown
    assert "tokens_per_s=" not in shown
    told = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err.getvalue())
    assert "embed" in told
    assert "oom, batch 64 -> 32, budget 4.00 GiB, 1.00 GiB free: CUDA out of memory" in told


def test_json_keeps_stdout_for_the_document() -> None:
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(json=True, stdout=out, stderr=err)
    with terminal.watch() as observer, observing(observer), terminal.logging_from("warning"):
        run_story()
        logging.getLogger("tasks.x").warning("a warning")
        logging.getLogger("prefect.flow_runs").error("Finished in state Failed()")
    terminal.print_json({"answer": "ünïcode"})
    assert json.loads(out.getvalue()) == {"answer": "ünïcode"}
    assert "partition index=0" in err.getvalue()
    assert "WARNING tasks.x: a warning" in err.getvalue()
    assert "Finished in state" not in err.getvalue()


def test_quiet_says_nothing_on_the_way_and_everything_at_the_end() -> None:
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(quiet=True, stdout=out, stderr=err)
    with terminal.watch() as observer, observing(observer):
        run_story()
    assert (out.getvalue(), err.getvalue()) == ("", "")
    terminal.print_summary(SUMMARY, ())
    assert "partition index=0" in out.getvalue()


def test_open_books_are_named() -> None:
    out = io.StringIO()
    Terminal(stdout=out, stderr=io.StringIO()).print_summary(SUMMARY, ["points: Qdrant counts 99"])
    assert "off points: Qdrant counts 99" in out.getvalue().splitlines()
    assert "closed=no" in out.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Tty])
def test_hits_show_score_document_and_position(stream: type[io.StringIO]) -> None:
    out = stream()
    Terminal(stdout=out, stderr=io.StringIO()).print_hits(HITS)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) if stream is Tty else out.getvalue()
    for part in ("0.73", "guide.md", "page 3, chars 120-140", "it first."):
        assert part in shown
    assert "\x1b[31m" not in out.getvalue(), "a document's escape sequence reached the terminal"


def test_errors_are_readable_and_with_json_on_stdout_too() -> None:
    out, err = io.StringIO(), io.StringIO()
    Terminal(json=True, stdout=out, stderr=err).print_error("StoreLocked", "another process [holds] it")
    assert json.loads(out.getvalue()) == {"error": {"type": "StoreLocked", "message": "another process [holds] it"}}
    assert err.getvalue() == "Error: another process [holds] it\n"


def test_a_storm_of_steps_is_cut_and_threads_do_not_mix_lines() -> None:
    out = io.StringIO()
    with Terminal(stdout=out, stderr=io.StringIO()).watch() as observer:
        threads = [
            threading.Thread(target=lambda: [observer.ladder_step(7, STEP) for _ in range(50)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert len(set(lines)) == 1


def test_nobody_watches_by_default_and_after_the_run() -> None:
    default = current_observer.get()
    with Terminal(quiet=True).watch() as observer, observing(observer):
        assert current_observer.get() is observer
    assert current_observer.get() is default
    default.note("goes nowhere")
