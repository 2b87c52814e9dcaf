"""What a run looks like as tables and Markdown: pure functions of records.

No document text and no secret gets in here: names, counts and the reasons of our own errors only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from tasks.policy.books import check_books
from tasks.records import (
    Books,
    BudgetMark,
    MemoryReading,
    PartitionReport,
    Rejection,
    RunSummary,
)
from tasks.tables import Column, Table, Value, clean_text, escape_markdown, format_bytes, format_value, to_markdown

MEMORY_ROWS = 40  # a page of the UI; the peak of each span is kept, so that no spike is averaged away
LADDER_ROWS = 50
LADDERS = 10  # partitions of a report whose ladder is shown step by step
PAGE_ORDER = (
    "index", "nodes", "device", "batch", "oom_steps", "spilled", "failed", "steps", "seconds", "tokens_per_s", "tokens",
    "peak_bytes", "budget_bytes",
)  # fmt: skip
PARTITION_ROWS = 200  # some 50 KB of the artifact, and more than anybody reads
REJECTION_ROWS = 100
REASON_CHARS = 240
STEPS_DOWN = ("oom", "spill", "restart", "exhausted", "shrink")

# ---------------------------------------------------------------------------------------------- tables


def tabulate_documents(books: Books) -> Table:
    """Documents: seen = unchanged + written + failed + skipped; apart from these, what has left the source."""
    row = (
        books.documents_seen,
        books.documents_unchanged,
        books.documents_written,
        books.documents_failed,
        books.documents_skipped,
        books.documents_deleted,
        books.documents_withheld,
    )
    names = ("seen", "unchanged", "written", "failed", "skipped", "deleted", "withheld")
    return Table("documents", "Documents", [Column(name, name) for name in names], [row])


def tabulate_nodes(books: Books) -> Table:
    """Nodes: planned = GPU + CPU + reused + failed; and what Qdrant counts."""
    columns = [
        Column("planned", "planned"),
        Column("gpu", "GPU"),
        Column("cpu", "CPU"),
        Column("reused", "reused"),
        Column("failed", "failed"),
        Column("points_counted", "points in Qdrant"),
    ]
    row = (
        books.nodes_planned,
        books.nodes_gpu,
        books.nodes_cpu,
        books.nodes_reused,
        books.nodes_failed,
        books.points_counted,
    )
    return Table("nodes", "Nodes", columns, [row])


def tabulate_run(summary: RunSummary, off: Sequence[str] | None = None) -> Table:
    """One row: what ran where, how fast, and whether the books close."""
    columns = [
        Column("collection", "collection", "text"),
        Column("model", "model", "text"),
        Column("device", "device", "text"),
        Column("tokens", "tokens"),
        Column("tokens_per_s", "tokens/s", "rate"),
        Column("spilled_fraction", "spilled", "fraction"),
        Column("seconds", "time", "seconds"),
        Column("closed", "books closed", "text"),
    ]
    row: tuple[Value, ...] = (
        summary.collection,
        summary.model,
        summary.device,
        summary.tokens,
        embedding_tokens_per_s(summary),
        summary.spilled_fraction,
        summary.seconds.get("total"),
        not find_discrepancies(summary, off),
    )
    return Table("run", "Run", columns, [row])


def tabulate_partitions(reports: Iterable[PartitionReport]) -> Table:
    """One row a partition."""
    columns = [
        Column("index", "partition"),
        Column("nodes", "nodes"),
        Column("tokens", "tokens"),
        Column("device", "device", "text"),
        Column("batch", "batch", "text"),
        Column("oom_steps", "OOM steps"),
        Column("spilled", "spilled"),
        Column("failed", "failed"),
        Column("peak_bytes", "peak memory", "bytes"),
        Column("budget_bytes", "budget", "bytes"),
        Column("seconds", "time", "seconds"),
        Column("tokens_per_s", "tokens/s", "rate"),
    ]
    rows = [
        (
            report.index,
            report.nodes,
            report.tokens,
            report.device,
            describe_range(report.batch_min, report.batch_max),
            sum(step.kind == "oom" for step in report.steps),
            0 if report.device == "cpu" else report.cpu_nodes,
            len(report.failed_nodes),
            report.peak_bytes,
            report.budget_bytes,
            round(report.seconds, 3),
            round(report.tokens_per_s, 1),
        )
        for report in reports
    ]
    return Table("partition", "Partitions", columns, rows)


def tabulate_partition_page(reports: Sequence[PartitionReport], limit: int = PARTITION_ROWS) -> Table:
    """As tabulate_partitions, with what happened to each, for a page of the UI: at most `limit` partitions and their sum.

    Where there are more, those with failed nodes come before those that stepped down, and these before the rest. What an
    operator looks for comes first: the UI's column is narrow.
    """
    worst_first = sorted(reports, key=lambda report: (not report.failed_nodes, not report.is_degraded, report.index))
    shown = sorted(worst_first[:limit], key=lambda report: report.index)
    plain = tabulate_partitions(shown)
    rows = [
        (*row, describe_steps(report) if report.steps else "") for row, report in zip(plain.rows, shown, strict=True)
    ]
    if len(reports) > 1:
        rows.append(_sum_partitions(reports))
    columns = [*plain.columns, Column("steps", "what happened", "text")]
    order = [[column.key for column in columns].index(key) for key in PAGE_ORDER]
    return Table(
        plain.name,
        plain.title,
        [columns[place] for place in order],
        [[row[place] for place in order] for row in rows],
        max(len(reports) - limit, 0),
    )


def _sum_partitions(reports: Sequence[PartitionReport]) -> tuple[Value, ...]:
    tokens, seconds = sum(report.tokens for report in reports), sum(report.seconds for report in reports)
    peaks = [report.peak_bytes for report in reports if report.peak_bytes is not None]
    low, high = min(report.batch_min for report in reports), max(report.batch_max for report in reports)
    degraded = sum(report.is_degraded for report in reports)
    return (
        f"all {len(reports):,}",
        sum(report.nodes for report in reports),
        tokens,
        ", ".join(sorted({report.device for report in reports})),
        describe_range(low, high),
        sum(step.kind == "oom" for report in reports for step in report.steps),
        sum(report.cpu_nodes for report in reports if report.device != "cpu"),
        sum(len(report.failed_nodes) for report in reports),
        max(peaks, default=None),
        max(report.budget_bytes for report in reports),
        round(seconds, 3),
        round(tokens / seconds, 1) if seconds else 0.0,
        f"{degraded:,} stepped down" if degraded else "",
    )


def tabulate_ladder(report: PartitionReport, limit: int = LADDER_ROWS) -> Table:
    """One row a step of the ladder, in order; the reason comes early, since the UI's column is narrow."""
    columns = [
        Column("at_s", "at", "seconds"),
        Column("step", "step", "text"),
        Column("nodes_before", "batch before"),
        Column("nodes_after", "batch after"),
        Column("reason", "reason", "text"),
        Column("padded_tokens", "padded tokens"),
        Column("budget_before_bytes", "budget before", "bytes"),
        Column("budget_after_bytes", "budget after", "bytes"),
        Column("free_bytes", "free", "bytes"),
    ]
    rows = [
        (
            round(step.at_s, 3),
            step.kind,
            step.nodes_before,
            step.nodes_after,
            step.reason,
            step.padded_tokens,
            step.budget_before_bytes or None,  # 0: the step was not about the budget
            step.budget_after_bytes or None,
            step.free_bytes or None,
        )
        for step in report.steps[:limit]
    ]
    return Table("ladder", f"Ladder of partition {report.index}", columns, rows, max(len(report.steps) - limit, 0))


def tabulate_rejections(rejections: Sequence[Rejection], limit: int = REJECTION_ROWS) -> Table:
    """One row a document that did not make it; the failed ones first, since they are what makes the run red."""
    columns = [
        Column("document", "document", "text"),
        Column("status", "status", "text"),
        Column("stage", "stage", "text"),
        Column("reason", "reason", "text"),
    ]
    ordered = sorted(rejections, key=lambda rejection: rejection.status != "failed")
    rows = [(r.doc_id, r.status, r.stage, r.reason) for r in ordered[:limit]]
    return Table("rejected", "Not ingested", columns, rows, max(len(rejections) - limit, 0))


def tabulate_memory(
    series: Sequence[MemoryReading], marks: Sequence[BudgetMark] = (), limit: int = MEMORY_ROWS
) -> Table:
    """The sampler's series, thinned to `limit` rows in all, with the budget and batch in force at each reading."""
    columns = [
        Column("seconds", "at", "seconds"),
        Column("device_uuid", "device", "text"),
        Column("used_bytes", "used", "bytes"),
        Column("free_bytes", "free", "bytes"),
        Column("process_bytes", "this run", "bytes"),
        Column("budget_bytes", "budget", "bytes"),
        Column("batch_nodes", "batch"),
    ]
    rows: list[tuple[Value, ...]] = []
    for reading in thin_series(series, limit):
        own = (mark for mark in marks if mark.worker == reading.worker)
        in_force = (mark for mark in own if mark.step is None and mark.seconds <= reading.seconds)
        mark = max(in_force, key=lambda m: m.seconds, default=None)
        rows.append(
            (
                round(reading.seconds, 2),
                reading.device_uuid,
                reading.used_bytes,
                reading.free_bytes,
                reading.process_bytes,
                mark.budget_bytes if mark else None,
                mark.batch_nodes if mark else None,
            )
        )
    return Table("memory", "Device memory", columns, rows)


def thin_series(series: Sequence[MemoryReading], limit: int) -> list[MemoryReading]:
    """At most `limit` readings, shared by the devices, in order of time: of each span the fullest."""
    by_device: dict[str, list[MemoryReading]] = {}
    for reading in series:
        by_device.setdefault(reading.device_uuid, []).append(reading)
    kept: list[MemoryReading] = []
    share = max(limit // max(len(by_device), 1), 1)
    for readings in by_device.values():
        spans = groupby(enumerate(readings), key=lambda pair: pair[0] * share // max(len(readings), share))
        kept += [max((reading for _, reading in span), key=lambda r: r.used_bytes) for _, span in spans]
    return sorted(kept, key=lambda reading: reading.seconds)


# ---------------------------------------------------------------------------------------------- the run's report


def render_report(summary: RunSummary, off: Sequence[str] | None = None, picture: str = "") -> str:
    """The run as Markdown, for its artifact: the closed books first, then what failed, then how it went.

    `off`: what keeps the books from closing, where the caller knows more. `picture`: Markdown for the course of the memory.
    """
    discrepancies = find_discrepancies(summary, off)
    lines = [f"# {escape_markdown(summary.collection)}: books {'do not close' if discrepancies else 'closed'}", ""]
    lines += [f"- **off:** {escape_markdown(line)}" for line in discrepancies]
    lines += [
        *(f"- **note:** {escape_markdown(note)}" for note in summary.notes),
        f"- {summary.tokens:,} tokens, {format_value(embedding_tokens_per_s(summary), 'rate')} tokens/s while embedding; "
        f"{format_value(summary.spilled_fraction, 'fraction')} of the nodes spilled to the CPU",
        f"- time: {describe_times(summary.seconds)}",
        f"- {describe_memory(summary)}",
        f"- model: {escape_markdown(summary.model)}",
        f"- device: {escape_markdown(summary.device)}. {escape_markdown(summary.device_note)}",
        f"- stored in: {escape_markdown(summary.physical_collection)}, "
        f"fingerprint {escape_markdown(summary.fingerprint)}",
        "",
    ]
    for table in (tabulate_documents(summary.books), tabulate_nodes(summary.books)):
        lines += _render_section(table)
    lines += _render_section(tabulate_rejections(summary.rejections))
    if picture:
        lines += ["## Memory over time", "", picture, ""]
    lines += _render_section(tabulate_partition_page(summary.partitions))
    stepped = sorted(
        (report for report in summary.partitions if report.steps), key=lambda report: not report.is_degraded
    )
    for report in stepped[:LADDERS]:
        lines += _render_section(tabulate_ladder(report))
    if len(stepped) > LADDERS:
        lines += [f"... and {len(stepped) - LADDERS:,} more partitions with steps: see their ladder artifacts", ""]
    lines += _render_section(tabulate_memory(summary.memory_series, summary.budget_series))
    return "\n".join(lines)


def _render_section(table: Table) -> list[str]:
    return [f"## {table.title}", "", to_markdown(table)] if table.rows else []


def find_discrepancies(summary: RunSummary, off: Sequence[str] | None = None) -> tuple[str, ...]:
    """What keeps the books from closing: as the run found it, or, where it did not say, by the two equations."""
    return tuple(off) if off else check_books(summary.books)


def embedding_tokens_per_s(summary: RunSummary) -> float:
    """Tokens a second while partitions were embedded; 0 where none was."""
    seconds = sum(report.seconds for report in summary.partitions)
    return sum(report.tokens for report in summary.partitions) / seconds if seconds else 0.0


def describe_times(seconds: Mapping[str, float]) -> str:
    """Total first: "12.0 s in all (chunk 3.0 s, embed 8.0 s)"."""
    stages = ", ".join(f"{name} {format_value(value, 'seconds')}" for name, value in seconds.items() if name != "total")
    total = format_value(seconds.get("total"), "seconds")
    return f"{total} in all ({stages})" if stages else f"{total} in all"


def describe_memory(summary: RunSummary) -> str:
    """The highest peak of all partitions against the budget it was planned under."""
    measured = [report for report in summary.partitions if report.peak_bytes is not None]
    if not measured:
        return "memory: the device does not tell a micro-batch's peak"
    top = max(measured, key=lambda report: report.peak_bytes or 0)
    return (
        f"memory: peak of a micro-batch {format_bytes(top.peak_bytes or 0)} against a budget of "
        f"{format_bytes(top.budget_bytes)} (partition {top.index})"
    )


def describe_steps(report: PartitionReport) -> str:
    """The ladder in one line, for a state's message: "2 oom, 1 spill; batch 64 -> 16; 3 nodes on the CPU (oom: ...)".

    The reason is that of the first step down.
    """
    if not report.steps:
        return "no ladder steps"
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(step.kind for step in report.steps).items())
    told = kinds
    # A spilled node leaves nothing on the device: 0 is not a batch.
    if batches := [step.nodes_after for step in report.steps if step.nodes_after]:
        told += f"; batch {report.steps[0].nodes_before} -> {min(batches)}"
    if report.cpu_nodes and report.device != "cpu":
        told += f"; {report.cpu_nodes} nodes on the CPU"
    if down := next((step for step in report.steps if step.kind in STEPS_DOWN), None):
        told += f" ({down.kind}: {shorten(down.reason)})"
    return told


def shorten(text: str, limit: int = REASON_CHARS) -> str:
    """On one line, and no longer than a state's message should be."""
    one_line = " ".join(clean_text(text).split())
    return one_line if len(one_line) <= limit else one_line[: limit - 3].rstrip() + "..."


def describe_outcome(summary: RunSummary) -> str:
    """For the run's last state: what is stored, and what an operator should know of how it got there."""
    told = f"{summary.books.points_counted} points counted in {summary.collection}"
    if degraded := sum(report.is_degraded for report in summary.partitions):
        told += f"; {degraded} of {len(summary.partitions)} partitions stepped down"
    if summary.spilled_fraction:
        told += f", {format_value(summary.spilled_fraction, 'fraction')} of the nodes spilled to the CPU"
    return told


def describe_range(low: int, high: int) -> str:
    """ "8-64", or "8" where they are the same."""
    return str(low) if low == high else f"{low}-{high}"


def hide_credentials(uri: str) -> str:
    """A source or server as it may be shown: without user, password and query (a signed URL's signature)."""
    if "://" not in uri:
        return uri
    return re.sub(r"\?.*$", "?...", re.sub(r"://[^/]*@", "://...@", uri))
