"""What verify, failures and collections show, as tables: pure functions of records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tasks.records import CollectionState, LedgerRecord, VerifyReport
from tasks.tables import Column, Table

FINDING_ROWS = 50


def tabulate_verify(report: VerifyReport) -> Table:
    """One row: how much was compared, and what came of it."""
    columns = [
        Column("collection", "collection", "text"),
        Column("documents", "documents"),
        Column("points", "points"),
        Column("parked", "parked"),
        Column("found", "found"),
        Column("repaired", "repaired"),
        Column("left", "left"),
        Column("seconds", "time", "seconds"),
    ]
    row = (
        report.collection, report.documents, report.points, report.parked, len(report.found), len(report.repaired),
        len(report.left), round(report.seconds, 2),
    )  # fmt: skip
    return Table("verify", "Verify", columns, [row])


def tabulate_findings(report: VerifyReport, limit: int = FINDING_ROWS) -> Table:
    """One row a finding, those that are left first."""
    columns = [
        Column("kind", "what is off", "text"),
        Column("document", "document", "text"),
        Column("source", "source", "text"),
        Column("expected", "expected", "text"),
        Column("found", "found", "text"),
        Column("repair", "mended by", "text"),
        Column("repaired", "repaired", "text"),
    ]
    marked = [*((finding, False) for finding in report.left), *((finding, True) for finding in report.repaired)]
    rows = [
        (each.kind, each.doc_id, each.source, each.expected, each.found, each.repair, is_repaired)
        for each, is_repaired in marked[:limit]
    ]
    return Table("finding", "Findings", columns, rows, max(len(marked) - limit, 0))


def tabulate_failures(failures: Mapping[str, Sequence[LedgerRecord]]) -> Table:
    """One row a failed or parked document, by physical collection."""
    columns = [
        Column("document", "document", "text"),
        Column("status", "status", "text"),
        Column("stage", "stage", "text"),
        Column("attempts", "attempts"),
        Column("at", "last tried", "text"),
        Column("source", "source", "text"),
        Column("collection", "collection", "text"),
        Column("reason", "reason", "text"),
    ]
    rows = [
        (each.doc_id, each.status, each.stage, each.attempts, each.updated_at, each.source, physical, each.reason)
        for physical, records in failures.items()
        for each in records
    ]
    return Table("failure", "Failed documents", columns, rows)


def tabulate_collections(states: Iterable[CollectionState]) -> Table:
    """One row a physical collection."""
    columns = [
        Column("collection", "collection", "text"),
        Column("live", "live", "text"),
        Column("model", "model", "text"),
        Column("revision", "revision", "text"),
        Column("dimension", "dimension"),
        Column("points", "points"),
        Column("documents", "documents"),
    ]
    rows = [
        (
            state.physical, state.is_live, state.model, state.revision[:12], state.dimension, state.points,
            state.documents,
        )
        for state in states
    ]  # fmt: skip
    return Table("collection", "Collections", columns, rows)
