"""What a run does with a document that the ledger knows or doesn't know, and how its record moves on."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from tasks.policy.identity import compute_nodes_digest
from tasks.records import ChunkedDocument, LedgerRecord, Rejection

Decision = Literal["new", "changed", "unchanged", "resume", "retry", "parked"]
"""unchanged and parked end here; all others are chunked, and embedded where their nodes are not stored yet.

resume: a run began to write this document and did not commit it. retry: the last run failed on this content.
"""


def decide_document(
    record: LedgerRecord | None, content_hash: str, *, max_attempts: int, reason: str | None = None
) -> Decision:
    """What becomes of a document whose content hashes to `content_hash`; empty: it could not be read, or was not hashed.

    `reason`: why it can't be used this time; of two contents without a hash, only those are the same that fail for the same.
    "unchanged" only where it is committed and nothing was written since. A `failed` record is retried whatever its attempts
    are: to_failed() parks it when they are used up, and what may hide other documents is never parked.
    """
    if record is None:
        return "new"
    if record.status == "pending":
        return "resume"
    if record.status == "done":
        if record.is_partial:
            return "resume"
        # Two documents that could not be hashed are not the same one.
        return "unchanged" if content_hash and content_hash == record.content_hash else "changed"
    if not _is_same_failure(record, content_hash, reason):
        return "changed"
    return "parked" if record.status == "parked" and record.attempts >= max_attempts else "retry"


def _is_same_failure(record: LedgerRecord, content_hash: str, reason: str | None) -> bool:
    # Contents without a hash may differ: they count as one only while they fail for one reason.
    return content_hash == record.content_hash and (content_hash != "" or reason == record.reason)


def needs_hash(record: LedgerRecord | None) -> bool:
    """Whether the content hash can spare the document the rest of the way.

    Without a record, or with one that says pending or failed, it goes on in any case: reading it twice would be in vain.
    """
    if record is None:
        return False
    return record.status == "parked" or (
        record.status == "done" and not record.is_partial and record.content_hash != ""
    )


def to_pending(record: LedgerRecord | None, source: str, doc_id: str, content_hash: str, now: str) -> LedgerRecord:
    """The intent, written before the first point is touched: what was committed last is kept, for it is still there."""
    is_same = record is not None and record.content_hash == content_hash
    return LedgerRecord(
        source,
        doc_id,
        "pending",
        content_hash,
        generation=record.generation if record else "",
        nodes=record.nodes if record else 0,
        nodes_digest=record.nodes_digest if record else "",
        is_partial=True,
        attempts=record.attempts if record and is_same else 0,
        updated_at=now,
    )


def to_done(source: str, chunked: ChunkedDocument, now: str) -> LedgerRecord:
    """The commit, written last: all nodes are stored and counted, and no other generation is there."""
    return LedgerRecord(
        source,
        chunked.doc_id,
        "done",
        chunked.content_hash,
        generation=chunked.generation,
        nodes=len(chunked.nodes),
        nodes_digest=compute_nodes_digest(node.node_id for node in chunked.nodes),
        updated_at=now,
    )


def to_failed(
    record: LedgerRecord | None, source: str, rejection: Rejection, *, max_attempts: int, now: str, is_partial: bool
) -> LedgerRecord:
    """One more run that could not use this content; what was committed before stays committed and findable.

    `is_partial`: this run has touched the document's points. Parked once the attempts reach `max_attempts`, unless that
    would make a run look fine that is not: where the rejection covers more than itself (a folder that can't be listed),
    and where points of an uncommitted generation may be stored, now or since an earlier run.
    """
    attempts = 1
    if record and record.status != "done" and _is_same_failure(record, rejection.content_hash, rejection.reason):
        attempts = record.attempts + 1
    before = record or LedgerRecord(source, rejection.doc_id, "failed", "")
    # What an earlier run left half written stays so until a commit.
    is_partial = before.is_partial or is_partial
    is_parked = attempts >= max_attempts and rejection.covers is None and not is_partial
    return replace(
        before,
        status="parked" if is_parked else "failed",
        content_hash=rejection.content_hash,
        is_partial=is_partial,
        attempts=attempts,
        stage=rejection.stage,
        reason=rejection.reason,
        updated_at=now,
    )


def describe_parked(record: LedgerRecord) -> str:
    """The reason that the run's list of skipped documents gives for a parked one."""
    times = "1 attempt" if record.attempts == 1 else f"{record.attempts} attempts"
    return f"parked after {times}: {record.reason}"
