"""Which documents that left the source may be deleted: a listing that came back short must not empty a collection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tasks.records import LedgerRecord


@dataclass(frozen=True, slots=True)
class DeleteDecision:
    """What becomes of the records that were not seen in the source."""

    delete: tuple[LedgerRecord, ...]  # points first, then the record
    withheld: tuple[LedgerRecord, ...]  # stay as they are
    reason: str  # why some are withheld, the figures and the way out; empty where none is
    forget: tuple[LedgerRecord, ...] = ()  # no points ever: only the record goes; neither deleted nor withheld


def decide_deletes(
    gone: Sequence[LedgerRecord],
    *,
    known: int,
    covered: Sequence[str],
    max_documents: int,
    max_fraction: float,
    confirmed: bool,
    propagate: bool,
    listed: int | None = None,
) -> DeleteDecision:
    """Delete `gone`, the records of documents that the source did not list, or withhold them.

    known: documents of this source in the ledger, `gone` included. covered: what failed Rejections cover; whatever begins
    like that may still be there, and is kept, confirmed or not. The rest is withheld as a whole where it is above both
    limits, or where the source listed nothing at all (`listed` == 0; None: not known), unless confirmed.
    """
    hidden = [record for record in gone if is_covered(record.doc_id, covered)]
    seen_gone = [record for record in gone if not is_covered(record.doc_id, covered)]
    # A covered one without points is neither: it keeps its attempts, and there is nothing to delete.
    kept = [record for record in hidden if record.has_points]
    rest = [record for record in seen_gone if record.has_points]
    forget = tuple(record for record in seen_gone if not record.has_points)
    reasons = []
    if kept:
        reasons.append(
            f"{_count_documents(len(kept))} kept: under {_list_some(covered)}, which could not be read in full, "
            "they may still be there. Mend that and run again"
        )
    withheld = list(kept)
    if rest and (why := _why_withheld(len(rest), known, max_documents, max_fraction, confirmed, propagate, listed)):
        reasons.append(why)
        withheld += rest
        rest = []
    return DeleteDecision(tuple(rest), tuple(withheld), ". ".join(reasons) + "." if reasons else "", forget)


def is_covered(doc_id: str, covered: Sequence[str]) -> bool:
    """Whether `doc_id` begins like one of the prefixes, or is the folder or table itself that one stands for."""
    return doc_id.startswith(tuple(covered)) or any(
        prefix[-1:] in ("/", "#") and doc_id == prefix[:-1] for prefix in covered
    )


def exceeds_limits(count: int, known: int, max_documents: int, max_fraction: float) -> bool:
    """Above both: few of many is everyday work, many of a handful too."""
    return count > max_documents and count > max_fraction * known


def _why_withheld(
    count: int,
    known: int,
    max_documents: int,
    max_fraction: float,
    confirmed: bool,
    propagate: bool,
    listed: int | None,
) -> str:
    """Empty where they may go."""
    if not propagate:
        return f"{_count_documents(count)} left the source and stay: deletes.propagate is off"
    if confirmed:
        return ""
    way_out = "If they are really gone: --confirm-deletes (deletes.confirmed)"
    share = f"{_count_documents(count)} of {known}"
    if listed == 0:
        return f"{share} would be deleted, for the source lists no document at all; none was. {way_out}"
    if exceeds_limits(count, known, max_documents, max_fraction):
        return (
            f"{share} would be deleted, {count / max(known, 1):.1%}; above both {max_documents} documents "
            f"(deletes.max_documents) and {max_fraction:.1%} (deletes.max_fraction) none is. {way_out}"
        )
    return ""


def _count_documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count} documents"


def _list_some(prefixes: Iterable[str], limit: int = 3) -> str:
    names = [prefix or "the whole source" for prefix in prefixes]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
