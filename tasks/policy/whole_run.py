"""When a run that was asked for some changed paths has to look at the whole source instead."""

from __future__ import annotations

from tasks.records import LedgerRecord


def explain_whole_run(mark: LedgerRecord | None, *, rebuild_reason: str, has_leftovers: bool) -> str:
    """Why only a whole run can end green; empty where the changed paths are enough.

    mark: what the ledger says of the source as a whole; None: nothing. rebuild_reason: why the run builds a new collection;
    empty where it doesn't. has_leftovers: vectors of an earlier run are in the spool.
    """
    if rebuild_reason:
        return f"it builds a new collection. {rebuild_reason}"
    if mark is None:
        return "the collection has nothing of this source yet."
    if not is_looked_through(mark):
        return "an earlier run of it was cut off, or its books did not close, and what it left undone is not known."
    if has_leftovers:
        return "an earlier run of it embedded what it could not store."
    return ""


def is_looked_through(mark: LedgerRecord) -> bool:
    """Whether a run has gone through the whole source and closed its books, and no run was cut off since.

    Some documents may have failed in it: they have records, and are tried again by whole runs.
    """
    return mark.status == "failed" or (mark.status == "done" and mark.updated_at != "")
