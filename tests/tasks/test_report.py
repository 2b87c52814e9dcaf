"""Tables, Markdown and JSON of records, as a reader gets them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.json_ready import summary_to_json, to_json_ready
from tasks.records import (
    Books,
    BudgetMark,
    CalibrationReport,
    LadderStep,
    MemoryKey,
    MemoryReading,
    MemorySample,
    ModelFit,
    PartitionReport,
    PlanReport,
    Rejection,
    RunSummary,
)
from tasks.report import (
    describe_outcome,
    describe_steps,
    hide_credentials,
    render_report,
    tabulate_documents,
    tabulate_ladder,
    tabulate_memory,
    tabulate_nodes,
    tabulate_partition_page,
    tabulate_partitions,
    tabulate_rejections,
    tabulate_run,
    thin_series,
)
from tasks.tables import Column, Table, format_value, to_artifact_rows, to_lines, to_markdown
from tasks.tabulate_plan import (
    tabulate_calibration,
    tabulate_coefficients,
    tabulate_models,
    tabulate_plan,
    tabulate_probes,
)

GIB = 1024**3

OOM = LadderStep("oom", "CUDA out of memory", 64, 32, 512, 8 * GIB, 4 * GIB, GIB, at_s=1.5)
SPILL = LadderStep("spill", "one node needs 9 GiB", 1, 0, 8192, 4 * GIB, 4 * GIB, GIB, at_s=2.0)

SMOOTH = PartitionReport(
    index=0, nodes=100, tokens=20_000, gpu_nodes=100, cpu_nodes=0, failed_nodes={}, micro_batches=4, batch_min=8,
    batch_max=64, peak_bytes=3 * GIB, budget_bytes=8 * GIB, seconds=2.0, padding_tokens=10, redone_fp32=0, steps=(),
    device="cuda:0",
)  # fmt: skip
DEGRADED = replace(SMOOTH, index=1, gpu_nodes=98, cpu_nodes=2, peak_bytes=4 * GIB, seconds=3.0, steps=(OOM, SPILL))

BOOKS = Books(
    documents_seen=5, documents_unchanged=1, documents_written=2, documents_failed=1, documents_skipped=1,
    nodes_planned=203, nodes_gpu=198, nodes_cpu=2, nodes_reused=3, nodes_failed=0, points_counted=203,
)  # fmt: skip

SUMMARY = RunSummary(
    collection="docs", physical_collection="docs__1a2b", model="BAAI/bge-m3", fingerprint="1a2b", device="cuda:0",
    device_note="the first CUDA device", books=BOOKS,
    rejections=[
        Rejection("empty.md", "skipped", "read", "no text"),
        Rejection("bad|name\n.pdf", "failed", "read", "not a PDF: <script>"),
    ],
    partitions=[SMOOTH, DEGRADED],
    memory_series=[MemoryReading(t / 2, "GPU-1", (2 + t % 3) * GIB, GIB, 15 * GIB, None) for t in range(6)],
    tokens=40_000, seconds={"total": 7.5, "chunk": 1.0, "embed": 5.0},
    budget_series=[BudgetMark(0.0, 8 * GIB, 64), BudgetMark(1.5, 4 * GIB, 32)],
)  # fmt: skip

PLAN = PlanReport(
    model="BAAI/bge-m3", documents=5, rejections=[], nodes=203, tokens=40_000, longest_tokens=8000, partitions=2,
    micro_batches=9, unmasked_token_fraction=0.93, padding_fraction=0.01, budget_bytes=12 * GIB, weights_bytes=GIB,
    predicted_peak_bytes=11 * GIB, spilled_nodes=3, memory_model="closed-form prior",
    models=[ModelFit("MiniLM", 22_700_000, GIB // 12, True, 256, 900, 0, 0.02)],
)  # fmt: skip

CALIBRATION = CalibrationReport(
    key=MemoryKey("rev", "fp16", "sdpa", "2.13", "Tesla T4", 15 * GIB), coefficients={"c0": 1e6, "c1": 2.5e4, "c2": 30.0},
    samples=[MemorySample(1, 512, False, GIB)], held_back=[MemorySample(4, 512, True, 2 * GIB)],
    held_back_predictions=[int(2.1 * GIB)], median_error=0.05, worst_under=0.0, tokens_per_s=16_800.0, seconds=4.0,
)  # fmt: skip

TABLES = [
    tabulate_documents(BOOKS),
    tabulate_nodes(BOOKS),
    tabulate_run(SUMMARY),
    tabulate_partitions(SUMMARY.partitions),
    tabulate_partition_page(SUMMARY.partitions),
    tabulate_ladder(DEGRADED),
    tabulate_rejections(SUMMARY.rejections),
    tabulate_memory(SUMMARY.memory_series, SUMMARY.budget_series),
    tabulate_plan(PLAN),
    tabulate_models(PLAN),
    tabulate_calibration(CALIBRATION),
    tabulate_coefficients(CALIBRATION),
    tabulate_probes(CALIBRATION),
]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_every_column_reaches_every_form(table: Table) -> None:
    width = len(table.columns)
    assert all(len(row) == width for row in to_artifact_rows(table)), "two columns of one label would lose a value"
    header, rule, *rows = to_markdown(table).splitlines()
    assert len(re.findall(r"(?<!\\)\|", header)) == len(re.findall(r"\|", rule)) == width + 1
    assert len(rows) == len(table.rows)
    assert all(line.startswith(f"{table.name} {table.columns[0].key}=") for line in to_lines(table))


def test_report_shows_what_happened() -> None:
    report = render_report(SUMMARY)
    assert report.startswith("# docs: books closed\n")
    assert "8,000 tokens/s while embedding; 1.0 % of the nodes spilled" in report
    assert "peak of a micro-batch 4.00 GiB against a budget of 8.00 GiB (partition 1)" in report
    assert "7.5 s in all (chunk 1.0 s, embed 5.0 s)" in report
    assert "## Ladder of partition 1" in report
    assert "## Ladder of partition 0" not in report
    # 2.0 s into the run the second budget is in force.
    assert re.search(r"\| 2\.0 s \| GPU-1 \| .* \| 4\.00 GiB \| 32 \|", report)
    # A document's name can't break the table or become a tag.
    assert r"| bad\|name .pdf | failed | read | not a PDF: \<script\> |" in report


def test_report_tells_the_books_first_then_what_failed_then_how_it_went() -> None:
    report = render_report(SUMMARY, (), "![memory](data:image/png;base64,xyz)")
    assert re.findall(r"^## (.*)$", report, re.MULTILINE) == [
        "Documents", "Nodes", "Not ingested", "Memory over time", "Partitions", "Ladder of partition 1", "Device memory",
    ]  # fmt: skip
    assert "\n![memory](data:image/png;base64,xyz)\n" in report


def test_a_report_of_very_many_partitions_stays_a_page() -> None:
    many = [replace(DEGRADED, index=index) for index in range(3000)]
    report = render_report(replace(SUMMARY, partitions=many))
    assert len(report) < 100_000
    assert "... and 2,800 more" in report
    assert "... and 2,990 more partitions with steps" in report


@settings(deadline=None)
@given(
    fates=st.lists(st.sampled_from(["smooth", "degraded", "failed"]), min_size=1, max_size=60), limit=st.integers(1, 20)
)
def test_a_page_of_partitions_has_the_worst_and_the_sum_of_all(fates: list[str], limit: int) -> None:
    made = {
        "smooth": SMOOTH,
        "degraded": DEGRADED,
        "failed": replace(SMOOTH, gpu_nodes=99, failed_nodes={"a": "no place"}),
    }
    reports = [replace(made[fate], index=index) for index, fate in enumerate(fates)]
    table = tabulate_partition_page(reports, limit)
    rows = [dict(zip((column.key for column in table.columns), row, strict=True)) for row in table.rows]
    single, total = rows[: min(limit, len(reports))], rows[min(limit, len(reports)) :]
    shown = [int(str(row["index"])) for row in single]
    assert shown == sorted(shown)
    assert table.left_out == len(reports) - len(shown)
    order = ["failed", "degraded", "smooth"]
    left = [order.index(fate) for index, fate in enumerate(fates) if index not in shown]
    assert max(order.index(fates[index]) for index in shown) <= min(left, default=2)
    for row in total:
        assert row["index"] == f"all {len(reports)}"
        assert row["nodes"] == 100 * len(reports)
        assert row["failed"] == fates.count("failed")
        assert row["spilled"] == 2 * fates.count("degraded")
    assert len(total) == (len(reports) > 1)


def test_report_names_the_line_that_is_off() -> None:
    report = render_report(replace(SUMMARY, books=replace(BOOKS, documents_written=1)))
    assert report.startswith("# docs: books do not close\n")
    assert "- **off:** documents: 5 seen, but 1 unchanged + 1 written + 1 failed + 1 skipped = 4" in report
    assert "- **off:** points: 1 missing" in render_report(SUMMARY, ["points: 1 missing"])


def test_failed_documents_come_first_and_the_rest_is_counted() -> None:
    skipped = [Rejection(f"{n}.md", "skipped", "read", "no text") for n in range(30)]
    table = tabulate_rejections([*skipped, Rejection("bad.pdf", "failed", "read", "torn")], limit=20)
    assert table.rows[0][0] == "bad.pdf"
    assert (len(table.rows), table.left_out) == (20, 11)
    assert "... and 11 more" in to_markdown(table)


@settings(deadline=None)
@given(
    used=st.lists(st.tuples(st.sampled_from(["GPU-1", "GPU-2", "GPU-3"]), st.integers(0, 15 * GIB)), max_size=300),
    limit=st.integers(1, 60),
)
def test_thinned_series_keeps_order_and_the_peak_of_every_device(used: list[tuple[str, int]], limit: int) -> None:
    series = [MemoryReading(float(t), uuid, b, 0, 15 * GIB, None) for t, (uuid, b) in enumerate(used)]
    thinned = thin_series(series, limit)
    devices = {reading.device_uuid for reading in series}
    assert len(thinned) <= max(limit, len(devices))
    assert [r.seconds for r in thinned] == sorted(r.seconds for r in thinned)
    for uuid in devices:
        peaks = [max(r.used_bytes for r in rows if r.device_uuid == uuid) for rows in (series, thinned)]
        assert peaks[0] == peaks[1]
    if len(series) * max(len(devices), 1) <= limit:
        assert thinned == series


def test_ladder_in_one_line() -> None:
    told = "1 oom, 1 spill; batch 64 -> 32; 2 nodes on the CPU (oom: CUDA out of memory)"
    assert describe_steps(DEGRADED) == told
    grown = replace(OOM, kind="grow", reason="a run of micro-batches went through", nodes_before=32, nodes_after=64)
    assert describe_steps(replace(SMOOTH, steps=(grown,))) == "1 grow; batch 32 -> 64"
    long = describe_steps(replace(SMOOTH, steps=(replace(OOM, reason="no memory\n" * 100),)))
    assert len(long) < 300
    assert "\n" not in long
    assert describe_steps(SMOOTH) == "no ladder steps"


def test_a_runs_last_state_tells_how_it_went() -> None:
    told = "203 points counted in docs; 1 of 2 partitions stepped down, 1.0 % of the nodes spilled to the CPU"
    assert describe_outcome(SUMMARY) == told
    assert describe_outcome(replace(SUMMARY, partitions=[SMOOTH])) == "203 points counted in docs"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("docs/*.md", "docs/*.md"),
        ("what?.md", "what?.md"),
        ("s3://bucket/docs", "s3://bucket/docs"),
        ("https://user:secret@host/a?X-Amz-Signature=abc", "https://...@host/a?..."),
        ("ftp://user:p@ss w@host/a", "ftp://...@host/a"),
        ("simplecache::ftp://me:pw@host/x", "simplecache::ftp://...@host/x"),
    ],
)
def test_no_credential_is_shown(uri: str, shown: str) -> None:
    assert hide_credentials(uri) == shown


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "bytes", "-"),
        (3 * GIB, "bytes", "3.00 GiB"),
        (10 * 1024**2, "bytes", "10.0 MiB"),
        (0.041, "fraction", "4.1 %"),
        (16_800.4, "rate", "16,800"),
        (12.34, "seconds", "12.3 s"),
        (900.0, "seconds", "15.0 min"),
        (True, "text", "yes"),
        (1_000_000, "count", "1,000,000"),
    ],
)
def test_values_as_people_read_them(value: float | None, unit: str, shown: str) -> None:
    assert format_value(value, unit) == shown  # type: ignore[arg-type]


def test_lines_survive_hostile_names() -> None:
    table = Table("rejected", "", [Column("document", "d", "text"), Column("n", "n")], [('a "b"\n\x1b[31m=c', None)])
    assert to_lines(table) == ['rejected document="a \\"b\\" �[31m=c" n=']


@settings(deadline=None)
@given(st.text())
def test_a_markdown_cell_stays_one_cell(name: str) -> None:
    table = Table("t", "", [Column("a", "a", "text"), Column("b", "b", "text")], [(name, "end")])
    lines = to_markdown(table).split("\n")
    assert len(lines) == 4
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 3


def test_json_has_derived_values_and_knows_no_nan() -> None:
    document = summary_to_json(SUMMARY)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["books_closed"] is True
    assert document["spilled_fraction"] == pytest.approx(0.01)
    assert document["partitions"][1]["is_degraded"] is True
    assert document["partitions"][0]["tokens_per_s"] == 10_000
    odd = {"score": np.float32(0.5), "ids": np.arange(2), "nan": float("nan"), "when": np.datetime64("2026-01-02")}
    assert to_json_ready(odd) == {"score": 0.5, "ids": [0, 1], "nan": None, "when": "2026-01-02"}
