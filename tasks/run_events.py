"""Which events the end of a run gives: what an automation can react to. Pure functions of records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks.records import PartitionReport, RunSummary
from tasks.report import embedding_tokens_per_s, find_discrepancies

# An event is one message to the server: a list in it stays short, and the report has it all.
NAMED_AT_MOST = 20


@dataclass(frozen=True, slots=True)
class RunEvent:
    """`name` as automations match it; `payload` is JSON-ready and has no document text in it."""

    name: str
    payload: Mapping[str, Any] = field(default_factory=dict)


def choose_run_events(
    summary: RunSummary, off: Sequence[str] = (), *, alert_spilled_fraction: float
) -> tuple[RunEvent, ...]:
    """`ballast.run.finished` always; `ballast.books.failed` for books that don't close, or documents or nodes that failed;
    `ballast.run.spilled` where a larger share of the nodes left the GPU than `alert_spilled_fraction`.
    """
    discrepancies = find_discrepancies(summary, off)
    books = summary.books
    is_red = bool(discrepancies or books.documents_failed or books.nodes_failed)
    events = [RunEvent("ballast.run.finished", describe_run(summary, discrepancies))]
    if is_red:
        failed = [rejection for rejection in summary.rejections if rejection.status == "failed"]
        payload = {
            "closed": not discrepancies,
            "off": list(discrepancies[:NAMED_AT_MOST]),
            "documents_failed": books.documents_failed,
            "nodes_failed": books.nodes_failed,
            "first": [
                {"document": rejection.doc_id, "stage": rejection.stage, "reason": rejection.reason[:500]}
                for rejection in failed[:NAMED_AT_MOST]
            ],
        }
        events.append(RunEvent("ballast.books.failed", payload))
    if summary.spilled_fraction > alert_spilled_fraction:
        spilled = [report for report in summary.partitions if count_spilled(report)]
        payload = {
            "spilled_fraction": round(summary.spilled_fraction, 4),
            "alert_spilled_fraction": alert_spilled_fraction,
            "spilled_nodes": sum(count_spilled(report) for report in spilled),
            "partitions": [report.index for report in spilled[:NAMED_AT_MOST]],
            "reason": next((s.reason[:500] for report in spilled for s in report.steps if s.kind == "spill"), ""),
        }
        events.append(RunEvent("ballast.run.spilled", payload))
    return tuple(events)


def describe_run(summary: RunSummary, discrepancies: Sequence[str]) -> dict[str, Any]:
    """The books and the speeds, flat: an automation's template can name each."""
    return {
        "collection": summary.collection,
        "physical_collection": summary.physical_collection,
        "model": summary.model,
        "device": summary.device,
        "closed": not discrepancies,
        **asdict(summary.books),
        "partitions": len(summary.partitions),
        "partitions_degraded": sum(report.is_degraded for report in summary.partitions),
        "tokens": summary.tokens,
        "tokens_per_s": round(embedding_tokens_per_s(summary), 1),
        "spilled_fraction": round(summary.spilled_fraction, 4),
        "seconds": round(summary.seconds.get("total", 0.0), 3),
    }


def count_spilled(report: PartitionReport) -> int:
    """Nodes that left a GPU for the CPU pool; on the CPU pool from the start none did."""
    return 0 if report.device == "cpu" else report.cpu_nodes
