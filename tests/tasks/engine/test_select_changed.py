"""What goes on to the chunkers: everything but what the ledger has as it is, and what failed too often."""

import threading
from collections.abc import Mapping, Sequence

import pytest

from tasks.engine.fill_partitions import Progress
from tasks.engine.select_changed import LOOKUP_BYTES, LOOKUP_ITEMS, ChangeSelector, Item
from tasks.policy.books import Ledgerbook
from tasks.records import Document, FileRef, LedgerRecord, Rejection


def file(name: str) -> FileRef:
    return FileRef(name, f"/docs/{name}", "md", source_bytes=10)


def record(name: str, status: str = "done", content_hash: str = "same", **fields: int) -> LedgerRecord:
    return LedgerRecord("docs", name, status, content_hash, **fields)  # type: ignore[arg-type]


class Ledger:
    def __init__(self, *records: LedgerRecord) -> None:
        self.records = {each.doc_id: each for each in records}
        self.asked: list[int] = []

    def read_records(self, doc_ids: Sequence[str]) -> Mapping[str, LedgerRecord]:
        self.asked.append(len(doc_ids))
        return {doc_id: self.records[doc_id] for doc_id in doc_ids if doc_id in self.records}


class Run:
    """A selector over a ledger, and files whose content hashes to "same" unless `contents` says otherwise."""

    def __init__(self, ledger: Ledger, contents: Mapping[str, str | Rejection] | None = None) -> None:
        self.books = Ledgerbook()
        self.progress = Progress(100)
        self.hashed: list[str] = []
        self._contents = contents or {}
        self.selector = ChangeSelector(ledger, self._hash, self.books, threading.Lock(), self.progress, max_attempts=3)

    def _hash(self, ref: FileRef) -> str | Rejection:
        self.hashed.append(ref.doc_id)
        return self._contents.get(ref.doc_id, "same")

    def select(self, *items: Item) -> list[Item]:
        return list(self.selector.select(items))


def test_an_unchanged_file_ends_here_and_counts_as_read() -> None:
    run = Run(Ledger(record("a.md")))
    assert run.select(file("a.md"), file("b.md")) == [file("b.md")]
    assert run.hashed == ["a.md"]  # b.md has no record: it is read once, by its chunk worker
    assert run.progress.seen_bytes == 10
    books, off = run.books.close(0, 0)
    assert off == ()
    assert (books.documents_seen, books.documents_unchanged) == (1, 1)


def test_a_changed_file_goes_on_with_its_record() -> None:
    before = record("a.md", nodes=4)
    run = Run(Ledger(before), {"a.md": "other"})
    assert run.select(file("a.md")) == [file("a.md")]
    assert run.selector.take("a.md") == before
    assert run.selector.take("a.md") is None


@pytest.mark.parametrize("status", ["pending", "failed"])
def test_what_was_not_committed_goes_on_and_is_not_read_twice(status: str) -> None:
    run = Run(Ledger(record("a.md", status, attempts=1)))
    assert run.select(file("a.md")) == [file("a.md")]
    assert run.hashed == []


def test_a_parked_file_is_skipped_with_its_reason_until_its_content_changes() -> None:
    parked = LedgerRecord("docs", "a.pdf", "parked", "same", attempts=3, reason="encrypted")
    run = Run(Ledger(parked))
    assert run.select(file("a.pdf")) == []
    (rejection,) = run.books.rejections()
    assert (rejection.status, rejection.reason) == ("skipped", "parked after 3 attempts: encrypted")
    assert run.books.is_in_source("a.pdf")
    assert Run(Ledger(parked), {"a.pdf": "other"}).select(file("a.pdf")) == [file("a.pdf")]


def test_a_file_that_can_not_be_hashed_goes_on_as_its_rejection() -> None:
    torn = Rejection("a.md", "failed", "read", "permission denied", 10)
    run = Run(Ledger(record("a.md")), {"a.md": torn})
    assert run.select(file("a.md")) == [torn]
    assert run.selector.take("a.md") == record("a.md")
    assert run.progress.seen_bytes == 0  # counted where it is entered in the books


def test_a_row_is_compared_by_the_hash_it_carries() -> None:
    rows = [Document("t.csv#1", "text", content_hash="same"), Document("t.csv#2", "text", content_hash="other")]
    run = Run(Ledger(record("t.csv#1"), record("t.csv#2")))
    assert run.select(*rows) == rows[1:]
    assert run.hashed == []


def test_look_ups_are_by_the_hundred_and_bounded_by_the_rows_text() -> None:
    ledger = Ledger()
    items = [file(f"{number}.md") for number in range(LOOKUP_ITEMS + 3)]
    assert Run(ledger).select(*items) == items
    assert ledger.asked == [LOOKUP_ITEMS, 3]
    ledger = Ledger()
    row = Document("t.csv#1", "x" * LOOKUP_BYTES)
    Run(ledger).select(row, row, file("a.md"))
    assert ledger.asked == [1, 1, 1]
