from collections.abc import Callable
from dataclasses import replace

import pytest

from tasks.policy.books import Ledgerbook, check_books
from tasks.records import Books, Rejection

CLOSED = Books(
    documents_seen=10,
    documents_unchanged=3,
    documents_written=4,
    documents_failed=2,
    documents_skipped=1,
    nodes_planned=20,
    nodes_gpu=10,
    nodes_cpu=4,
    nodes_reused=5,
    nodes_failed=1,
    points_counted=19,
)


APART = ("points_counted", "documents_deleted", "documents_withheld")


def commit_whole(book: Ledgerbook, nodes: dict[str, int]) -> list[str]:
    """Commit what is whole; `nodes`: how many points Qdrant counts of each document."""
    whole = book.list_whole(1000)
    good = [doc_id for doc_id in whole if book.check_count(doc_id, nodes[doc_id])]
    book.commit_documents(good)
    book.forget_whole(whole)
    return good


def test_closed_books_have_nothing_off() -> None:
    assert check_books(CLOSED) == ()


@pytest.mark.parametrize("field", [name for name in Books.__dataclass_fields__ if name not in APART])
def test_any_figure_that_is_one_off_is_noticed_with_its_line(field: str) -> None:
    off = check_books(replace(CLOSED, **{field: getattr(CLOSED, field) + 1}))
    assert len(off) == 1
    assert off[0].startswith("documents:" if field.startswith("documents") else "nodes:")


def test_a_run_is_followed_from_documents_to_points() -> None:
    book = Ledgerbook()
    book.plan_document("new.md", 3)
    book.plan_document("same.md", 2)
    book.plan_document("edited.md", 2)
    book.reject(Rejection("empty.txt", "skipped", "read", "nothing in it"))
    book.reject(Rejection("broken.pdf", "failed", "read", "not a PDF"))
    book.reuse_nodes(["same.md", "same.md"], unchanged=True)
    book.reuse_nodes(["edited.md"], unchanged=False)
    book.store_nodes(["new.md", "new.md", "new.md", "edited.md"])
    book.skip_unchanged("known.md")
    book.reject(Rejection("hopeless.pdf", "skipped", "read", "parked after 3 attempts"), is_parked=True)
    book.nodes_gpu, book.nodes_cpu = 3, 1
    assert commit_whole(book, {"same.md": 2, "new.md": 3, "edited.md": 2}) == ["same.md", "new.md", "edited.md"]
    books, off = book.close(9, 9)
    assert off == ()
    assert (books.documents_seen, books.documents_unchanged, books.documents_written) == (7, 2, 2)
    assert (books.documents_failed, books.documents_skipped, books.nodes_reused) == (1, 2, 3)


def test_a_node_that_never_arrived_is_named() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 3)
    book.store_nodes(["a.md", "a.md"])
    book.nodes_gpu = 2
    assert book.list_whole(10) == []
    _, off = book.close(2, 2)
    assert any(line.startswith("documents:") for line in off)
    assert any(line.startswith("nodes: 3 planned, but 2 GPU") for line in off)
    assert "document not whole: a.md: 3 nodes planned, 2 stored, 0 reused" in off


def test_points_that_qdrant_does_not_count_are_noticed() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 2)
    book.store_nodes(["a.md", "a.md"])
    book.nodes_gpu = 2
    assert commit_whole(book, {"a.md": 1}) == []
    _, off = book.close(1, 1)
    assert "document not whole: a.md: 2 nodes stored or reused, Qdrant counts 1" in off


def test_a_document_that_nobody_committed_is_not_written() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 1)
    book.store_nodes(["a.md"])
    book.nodes_gpu = 1
    _, off = book.close(1, 1)
    assert "document not whole: a.md: 1 nodes stored or reused, was not committed" in off


def test_points_missing_from_documents_that_were_not_looked_at_are_noticed() -> None:
    book = Ledgerbook()
    book.skip_unchanged("a.md")
    _, off = book.close(points_counted=9, points_expected=10)
    assert len(off) == 1
    assert off[0].startswith("points: Qdrant counts 9 of this source's committed documents, the ledger has 10")


def test_whole_documents_are_said_until_they_are_dealt_with() -> None:
    book = Ledgerbook()
    for name in "abc":
        book.plan_document(name, 1)
    book.store_nodes("abc")
    assert book.list_whole(2) == book.list_whole(2) == ["a", "b"]
    book.forget_whole(["a", "b"])
    assert book.list_whole(2) == ["c"]


def test_a_miscount_that_a_second_count_mends_is_forgotten() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 2)
    book.store_nodes(["a.md", "a.md"])
    book.nodes_gpu = 2
    assert not book.check_count("a.md", 1)
    assert commit_whole(book, {"a.md": 2}) == ["a.md"]
    assert book.close(2, 2)[1] == ()


def test_a_document_that_the_ledger_still_has_as_pending_is_off() -> None:
    book = Ledgerbook()
    book.skip_unchanged("a.md")
    book.reject(Rejection("b.md", "failed", "embed", "does not fit"))
    _, off = book.close(0, 0, pending=["a.md", "b.md"])
    assert off == ("document pending in the ledger: a.md",)


@pytest.mark.parametrize(
    ("enter", "is_there"),
    [
        (lambda book: book.plan_document("a", 1), True),
        (lambda book: book.skip_unchanged("a"), True),
        (lambda book: book.reject(Rejection("a", "failed", "read", "torn")), True),
        (lambda book: book.reject(Rejection("a", "skipped", "read", "parked"), is_parked=True), True),
        (lambda book: book.reject(Rejection("a", "skipped", "read", "empty file")), False),
        (lambda book: None, False),
    ],
)
def test_what_the_source_has_must_not_be_deleted(enter: Callable[[Ledgerbook], None], is_there: bool) -> None:
    book = Ledgerbook()
    enter(book)
    assert book.is_in_source("a") == is_there
    assert book.documents_in_source == is_there


def test_a_failed_node_fails_its_document_with_its_reason() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 2)
    book.store_nodes(["a.md"])
    book.fail_nodes(["a.md"], "needs 9.1 GiB alone")
    book.nodes_cpu = 1
    assert book.list_whole(10) == []
    books, off = book.close(0, 0)
    assert off == ()
    assert (books.documents_failed, books.nodes_failed, books.documents_written) == (1, 1, 0)
    assert book.rejections() == (Rejection("a.md", "failed", "embed", "needs 9.1 GiB alone"),)


def test_a_document_seen_twice_does_not_pass() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 1)
    book.plan_document("a.md", 1)
    book.store_nodes(["a.md"])
    book.nodes_gpu = 1
    _, off = book.close(1, 1)
    assert "document seen twice: a.md" in off


@pytest.mark.parametrize("is_rejected_first", [True, False])
def test_an_id_that_comes_twice_opens_the_books_and_counts_its_nodes(is_rejected_first: bool) -> None:
    """`a.jsonl#1.txt` can be a row of a table and a file: both go by, and the run has to end with its books."""
    book = Ledgerbook()
    if is_rejected_first:
        book.reject(Rejection("twice", "skipped", "read", "no text in it"))
    else:
        book.plan_document("twice", 1)
        book.store_nodes(["twice"])
    book.plan_document("twice", 2)
    book.store_nodes(["twice", "twice"])
    book.nodes_cpu = 2 if is_rejected_first else 3
    books, off = book.close(book.nodes_cpu, book.nodes_cpu)
    assert books.nodes_planned == book.nodes_cpu
    assert [line for line in off if line.startswith("document seen twice: twice")]
