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


def test_closed_books_have_nothing_off() -> None:
    assert check_books(CLOSED) == ()


@pytest.mark.parametrize("field", [name for name in Books.__dataclass_fields__ if name != "points_counted"])
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
    book.nodes_gpu, book.nodes_cpu = 3, 1
    books, off = book.close(points_counted=7)
    assert off == ()
    assert (books.documents_seen, books.documents_unchanged, books.documents_written) == (5, 1, 2)
    assert (books.documents_failed, books.documents_skipped, books.nodes_reused) == (1, 1, 3)


def test_a_node_that_never_arrived_is_named() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 3)
    book.store_nodes(["a.md", "a.md"])
    book.nodes_gpu = 2
    _, off = book.close(points_counted=2)
    assert any(line.startswith("documents:") for line in off)
    assert any(line.startswith("nodes: 3 planned, but 2 GPU") for line in off)
    assert "document not whole: a.md: 3 nodes planned, 2 stored, 0 reused" in off


def test_points_that_qdrant_does_not_count_are_noticed() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 2)
    book.store_nodes(["a.md", "a.md"])
    book.nodes_gpu = 2
    _, off = book.close(points_counted=1)
    assert off == ("points: Qdrant counts 1 of this run's points, 2 were stored or reused",)


def test_a_failed_node_fails_its_document_with_its_reason() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 2)
    book.store_nodes(["a.md"])
    book.fail_nodes(["a.md"], "needs 9.1 GiB alone")
    book.nodes_cpu = 1
    books, off = book.close(points_counted=1)
    assert off == ()
    assert (books.documents_failed, books.nodes_failed, books.documents_written) == (1, 1, 0)
    assert book.rejections() == (Rejection("a.md", "failed", "embed", "needs 9.1 GiB alone"),)


def test_a_document_seen_twice_does_not_pass() -> None:
    book = Ledgerbook()
    book.plan_document("a.md", 1)
    book.plan_document("a.md", 1)
    book.store_nodes(["a.md"])
    book.nodes_gpu = 1
    _, off = book.close(points_counted=1)
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
    books, off = book.close(points_counted=book.nodes_cpu)
    assert books.nodes_planned == book.nodes_cpu
    assert [line for line in off if line.startswith("document seen twice: twice")]
