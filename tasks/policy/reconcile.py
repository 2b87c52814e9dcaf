"""What is off with one document: its source, its ledger record and its points, held against each other."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal

from tasks.policy.changes import to_pending
from tasks.records import Finding, FindingKind, LedgerRecord, Repair

SourceState = Literal["readable", "unreadable", "skipped", "covered", "absent", "unknown"]
"""skipped: there, with nothing to embed in it (empty, another format). covered: not listed, and under what could not be
read, so it may be there. unknown: its source was not looked at."""


@dataclass(slots=True)
class GenerationFacts:
    """The points of one generation of one document, added up as they stream by."""

    points: int = 0
    document_nodes: int = 0  # how many there should be, as all of them say; 0: they don't say, or don't agree
    content_hash: str = ""  # as all of them say
    wrong_dimension: int = 0
    bad_vectors: int = 0  # not finite, or not of unit length
    _digest: int = 0

    def add_point(self, point_id: str, document_nodes: int, content_hash: str) -> None:
        is_first = self.points == 0
        self.points += 1
        self._digest ^= int(point_id) if point_id.isdecimal() else uuid.UUID(point_id).int  # Qdrant also takes numbers
        self.document_nodes = document_nodes if is_first or document_nodes == self.document_nodes else 0
        self.content_hash = content_hash if is_first or content_hash == self.content_hash else ""

    @property
    def nodes_digest(self) -> str:
        """As policy.identity.compute_nodes_digest makes it."""
        return f"{self._digest:032x}"

    @property
    def damaged(self) -> int:
        return self.wrong_dimension + self.bad_vectors

    @property
    def is_whole(self) -> bool:
        return self.points > 0 and self.points == self.document_nodes and not self.damaged


@dataclass(slots=True)
class DocumentFacts:
    """All that was found of one document, whatever its size: nothing in here grows with its points."""

    source: str
    doc_id: str
    state: SourceState = "unknown"
    content_hash: str = ""  # of what the source has; empty where it could not be read
    reason: str = ""  # why it could not
    record: LedgerRecord | None = None
    generations: dict[str, GenerationFacts] = field(default_factory=dict)

    @property
    def has_identity(self) -> bool:
        """Whether its points say which document they belong to; if not, somebody else wrote them."""
        return self.source != "" and self.doc_id != ""

    @property
    def owned(self) -> dict[str, GenerationFacts]:
        """The generations that can be this document's."""
        return {name: found for name, found in self.generations.items() if name} if self.has_identity else {}

    @property
    def points(self) -> int:
        return sum(found.points for found in self.owned.values())

    @property
    def unowned_points(self) -> int:
        return sum(found.points for found in self.generations.values()) - self.points


def reconcile_document(facts: DocumentFacts) -> tuple[Finding, ...]:
    """What is off, each with the repair that mends it; nothing where source, ledger and points agree.

    A parked document is no finding while its content stays: the runs say so, and `ballast failures` lists it.
    """
    unowned: list[Finding] = []
    if facts.unowned_points:
        found = f"{facts.unowned_points} points without"
        expected = "ballast_source, doc_id and generation in each payload"
        unowned = [_find(facts, "orphan_points", expected, found, "delete_points")]
    return (*unowned, *_reconcile_owned(facts))


def _reconcile_owned(facts: DocumentFacts) -> tuple[Finding, ...]:
    record = facts.record
    if facts.state in ("absent", "skipped"):
        if not facts.points and (record is None or not record.has_points):
            return ()
        why = "not in the source" if facts.state == "absent" else facts.reason or "nothing to embed in it"
        return (_find(facts, "surplus_document", f"no points: {why}", _describe_points(facts), "delete_document"),)
    findings = _check_vectors(facts)
    if record is None:
        findings += _check_without_record(facts)
    elif record.status == "pending" or record.is_partial:
        findings.append(_describe_half_written(facts, record))
    else:
        findings += [*_check_points(facts, record), *_check_content(facts, record)]
    return tuple(findings)


def rebuild_record(facts: DocumentFacts, now: str) -> LedgerRecord:
    """A ledger record out of the points alone: done where they are one whole generation, else pending, to be written again."""
    if len(facts.owned) == 1:
        ((generation, found),) = facts.owned.items()
        if found.is_whole:
            return LedgerRecord(
                facts.source,
                facts.doc_id,
                "done",
                found.content_hash,
                generation=generation,
                nodes=found.points,
                nodes_digest=found.nodes_digest,
                updated_at=now,
            )
    return to_pending(None, facts.source, facts.doc_id, "", now)


# ---------------------------------------------------------------------------------------------- parts


def _find(facts: DocumentFacts, kind: FindingKind, expected: str, found: str, repair: Repair) -> Finding:
    return Finding(kind, facts.source, facts.doc_id, expected, found, repair)


def _check_vectors(facts: DocumentFacts) -> list[Finding]:
    findings = []
    wrong = sum(found.wrong_dimension for found in facts.owned.values())
    if wrong:
        found = f"{wrong} of {_describe_points(facts)} without"
        findings.append(_find(facts, "wrong_dimension", "a vector of our name and dimension", found, "delete_points"))
    bad = sum(found.bad_vectors for found in facts.owned.values())
    if bad:
        found = f"{bad} of {_describe_points(facts)} without"
        findings.append(_find(facts, "bad_vector", "a finite vector of unit length", found, "delete_points"))
    return findings


def _check_without_record(facts: DocumentFacts) -> list[Finding]:
    if facts.points:
        whole = ", whole" if len(facts.owned) == 1 and all(found.is_whole for found in facts.owned.values()) else ""
        found = f"none, and {_describe_points(facts)}{whole}"
        return [_find(facts, "orphan_points", "a ledger record", found, "write_ledger")]
    if facts.state == "readable":
        return [_find(facts, "missing_document", "a ledger record and points", "neither", "ingest")]
    if facts.state == "unreadable":
        return [_find(facts, "unreadable", "a readable document", facts.reason, "nothing")]
    return []


def _describe_half_written(facts: DocumentFacts, record: LedgerRecord) -> Finding:
    found = f"{record.status} since {record.updated_at or 'an unknown time'}, {_describe_points(facts)}"
    # A parked one is not tried again by itself.
    repair: Repair = "write_ledger" if record.status in ("parked", "done") else "ingest"
    return _find(facts, "half_written", "committed", found, repair)


def _check_points(facts: DocumentFacts, record: LedgerRecord) -> list[Finding]:
    """Against what was committed last; a failed document may still have its last good version stored."""
    findings = []
    own = facts.owned.get(record.generation, GenerationFacts())
    expected = f"{record.nodes} points"
    if own.points < record.nodes:
        findings.append(_find(facts, "missing_points", expected, str(own.points), "write_ledger"))
    elif own.points > record.nodes:
        findings.append(_find(facts, "surplus_points", expected, str(own.points), "delete_points"))
    elif record.nodes_digest and own.points and own.nodes_digest != record.nodes_digest:
        findings.append(_find(facts, "surplus_points", expected, f"{own.points} with other ids", "delete_points"))
    others = facts.points - own.points
    if others:
        found = f"{others} points of {len(facts.owned) - (own.points > 0)} other generations"
        # Where its own points are not whole, the others may be all that readers have: the next commit deletes them.
        repair: Repair = "write_ledger" if findings else "delete_points"
        generation = f"generation {record.generation[:12]} only" if record.generation else "no points"
        findings.append(_find(facts, "other_generation", generation, found, repair))
    return findings


def _check_content(facts: DocumentFacts, record: LedgerRecord) -> list[Finding]:
    has_changed = facts.state == "readable" and facts.content_hash != record.content_hash
    if record.status == "failed" and not has_changed:
        found = f"failed ({record.stage}): {record.reason}"
        return [_find(facts, "unreadable", "a readable document", found, "ingest")]
    if has_changed:
        expected = f"content {facts.content_hash[:12]}"
        found = f"{record.content_hash[:12] or 'unread'} of {record.updated_at or 'an unknown time'}"
        return [_find(facts, "stale_document", expected, found, "ingest")]
    if facts.state == "unreadable" and record.status == "done":
        return [_find(facts, "unreadable", "a readable document", f"{facts.reason}; stored as before", "nothing")]
    return []


def _describe_points(facts: DocumentFacts) -> str:
    points = facts.points
    count = "1 point" if points == 1 else f"{points} points"
    return f"{count} of {len(facts.owned)} generations" if len(facts.owned) > 1 else count
