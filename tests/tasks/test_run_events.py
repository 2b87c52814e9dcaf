"""Which events a run's end gives, by what its books say."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tasks.records import Books, LadderStep, PartitionReport, Rejection, RunSummary
from tasks.run_events import choose_run_events

GIB = 1024**3

SPILL = LadderStep("spill", "one node needs 9 GiB", 1, 0, 8192, 4 * GIB, 4 * GIB, GIB)
PARTITION = PartitionReport(
    index=7, nodes=100, tokens=20_000, gpu_nodes=80, cpu_nodes=20, failed_nodes={}, micro_batches=4, batch_min=8,
    batch_max=64, peak_bytes=3 * GIB, budget_bytes=8 * GIB, seconds=2.0, padding_tokens=0, redone_fp32=0, steps=(SPILL,),
    device="cuda:0",
)  # fmt: skip
BOOKS = Books(
    documents_seen=5, documents_unchanged=1, documents_written=4, documents_failed=0, documents_skipped=0,
    nodes_planned=100, nodes_gpu=80, nodes_cpu=20, nodes_reused=0, nodes_failed=0, points_counted=100,
)  # fmt: skip
GREEN = RunSummary(
    collection="docs", physical_collection="docs__1a", model="m", fingerprint="1a", device="cuda:0", device_note="",
    books=BOOKS, rejections=[], partitions=[PARTITION], memory_series=[], tokens=20_000, seconds={"total": 7.5},
)  # fmt: skip
FAILED = replace(BOOKS, documents_written=3, documents_failed=1)


def names(summary: RunSummary, off: tuple[str, ...] = (), alert: float = 0.5) -> list[str]:
    events = choose_run_events(summary, off, alert_spilled_fraction=alert)
    for event in events:
        json.dumps(event.payload)
    return [event.name.removeprefix("ballast.") for event in events]


@pytest.mark.parametrize(
    ("changes", "off", "alert", "expected"),
    [
        ({}, (), 0.5, ["run.finished"]),
        ({}, (), 0.2, ["run.finished"]),  # the very share is not above it
        ({}, (), 0.1, ["run.finished", "run.spilled"]),
        ({"books": FAILED}, (), 0.5, ["run.finished", "books.failed"]),
        ({"books": FAILED}, (), 0.1, ["run.finished", "books.failed", "run.spilled"]),
        ({"books": replace(BOOKS, nodes_gpu=79, nodes_failed=1)}, (), 0.5, ["run.finished", "books.failed"]),
        ({"books": replace(BOOKS, documents_seen=6)}, (), 0.5, ["run.finished", "books.failed"]),
        ({}, ("points: 1 missing",), 0.5, ["run.finished", "books.failed"]),
        # The CPU pool from the start: nothing left a GPU.
        ({"partitions": [replace(PARTITION, device="cpu", gpu_nodes=0, cpu_nodes=100)]}, (), 0.01, ["run.finished"]),
        ({"partitions": []}, (), 0.01, ["run.finished"]),
    ],
)
def test_what_happened_decides_the_events(
    changes: dict[str, Any], off: tuple[str, ...], alert: float, expected: list[str]
) -> None:
    assert names(replace(GREEN, **changes), off, alert) == expected


def test_the_payloads_say_what_an_automation_needs() -> None:
    red = replace(
        GREEN,
        books=FAILED,
        rejections=[
            Rejection("empty.md", "skipped", "read", "empty file"),
            Rejection("bad.pdf", "failed", "read", "damaged PDF"),
        ],
    )
    finished, failed, spilled = choose_run_events(red, alert_spilled_fraction=0.1)
    assert (finished.payload["documents_failed"], finished.payload["tokens_per_s"]) == (1, 10_000)
    assert (finished.payload["closed"], finished.payload["points_counted"]) == (True, 100)
    assert failed.payload["first"] == [{"document": "bad.pdf", "stage": "read", "reason": "damaged PDF"}]
    assert spilled.payload == {
        "spilled_fraction": 0.2,
        "alert_spilled_fraction": 0.1,
        "spilled_nodes": 20,
        "partitions": [7],
        "reason": "one node needs 9 GiB",
    }


def test_a_run_with_very_many_failures_stays_one_message() -> None:
    rejections = [Rejection(f"{n}.md", "failed", "read", "x" * 10_000) for n in range(10_000)]
    books = replace(BOOKS, documents_seen=10_001, documents_failed=10_000, documents_written=0)
    red = replace(GREEN, books=books, rejections=rejections, partitions=[PARTITION] * 1000)
    for event in choose_run_events(red, ("off " * 100,) * 1000, alert_spilled_fraction=0.1):
        assert len(json.dumps(event.payload)) < 50_000
