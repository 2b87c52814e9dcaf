"""A run's stages without Prefect: real model files, real chunk workers, real embedded Qdrant."""

import collections
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.backends.model_files import resolve_model
from tasks.backends.qdrant import open_store
from tasks.backends.sources import Source
from tasks.config import IngestSettings
from tasks.engine.collection import RunCollection
from tasks.engine.fingerprint import find_tokenizer, make_chunk_spec
from tasks.engine.ingest_run import IngestRun
from tasks.errors import RunStopped, SourceError, StoreError, StoreMismatch
from tasks.observe import SilentObserver
from tasks.records import Document, Rejection

Item = Document | Rejection


class Items(Source):
    """Whatever it is given, instead of files."""

    def __init__(self, items: Callable[[], Iterator[Item]]) -> None:
        self.name = self.key = "items"
        self.changed = None
        self._items = items

    def total_bytes(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Item]:
        return self._items()


def open_run(folder: Path, model: str, items: Callable[[], Iterator[Item]], **groups: dict[str, Any]) -> IngestRun:
    defaults = {
        "source": {"uri": "nowhere"},
        "chunking": {"workers": 1},
        "partition": {"max_tokens": 1000},
        "data_folder": str(folder),
        "qdrant": {"collection": "port"},
    }
    settings = IngestSettings.model_validate({**defaults, **groups})
    files = resolve_model(model)
    spec = make_chunk_spec(settings, files, find_tokenizer(files, settings.data_folder), "f" * 64, "items")
    store = open_store(settings.qdrant, settings.data_folder, environment={})
    collection = RunCollection(store, settings.qdrant, files, spec.fingerprint, "items")
    return IngestRun(settings, files, Items(items), collection, spec, SilentObserver())


def count_processes() -> int:
    return len(multiprocessing.active_children())


def test_a_stop_is_noticed_where_nothing_in_the_source_is_new(tmp_path: Path, minilm: str) -> None:
    """Ctrl-C in a large collection where hardly anything changed: no node to embed comes by for a long time."""

    def nothing_new() -> Iterator[Item]:
        for number in range(500_000):
            if number == 1_000:
                closing.start()
            yield Rejection(f"empty-{number}.txt", "skipped", "read", "no text in it")
        raise AssertionError("nobody stopped it")

    before = count_processes()
    run = open_run(tmp_path, minilm, nothing_new)
    closing = threading.Thread(target=run.close)
    with pytest.raises(RunStopped) as stopped:
        run.spool_next_partition()
    closing.join()
    # Still held, as a task's state holds it: the traceback's frames must not keep the workers.
    assert stopped.value is not None
    assert count_processes() == before


def test_a_source_that_fails_midway_ends_the_run_with_its_reason_and_no_process(tmp_path: Path, minilm: str) -> None:
    def breaks() -> Iterator[Item]:
        yield from (Document(f"{number}.txt", "The pilot boards before the breakwater. " * 5) for number in range(200))
        raise SourceError("the bucket went away")

    before = count_processes()
    run = open_run(tmp_path, minilm, breaks)
    with pytest.raises(SourceError, match="bucket"):
        collections.deque(iter(run.spool_next_partition, None), maxlen=0)
    run.close()
    assert count_processes() == before


def test_more_points_than_an_embedded_qdrant_bears_are_refused_before_they_are_embedded(
    tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.backends.qdrant.EMBEDDED_MAX_POINTS", 100)

    def many() -> Iterator[Item]:
        return (Document(f"{number}.txt", "The pilot boards before the breakwater.") for number in range(150))

    run = open_run(tmp_path, minilm, many, partition={"max_tokens": 600, "max_nodes": 60})
    with pytest.raises(StoreError, match=r"would hold .* points; .*100 at most.*docker run"):
        collections.deque(iter(run.spool_next_partition, None), maxlen=0)
    run.close()


def test_a_run_that_stored_nothing_does_not_bind_the_next_to_its_settings(tmp_path: Path, minilm: str) -> None:
    """The first try had a model too large for the card, say; the second a smaller one, under the same name."""

    def document() -> Iterator[Item]:
        yield Document("pilot.txt", "The pilot boards before the breakwater.")

    first = open_run(tmp_path, minilm, document)
    partition = first.spool_next_partition()
    assert partition is not None
    first.close()
    store = open_store(first.settings.qdrant, str(tmp_path), environment={})
    settings = first.settings.qdrant.model_copy(update={"on_change": "refuse"})
    second = RunCollection(store, settings, first.files, "e" * 64, "items")
    assert second.existing_generations(["7d444840-9dc0-11d1-b245-5ffdce74fad2"]) == {}
    second.make()
    assert second.count() == 0
    with pytest.raises(StoreMismatch):
        RunCollection(store, settings, first.files, "d" * 64, "items")
    store.close()


def test_what_an_earlier_run_embedded_and_could_not_store_is_stored_and_not_embedded_again(
    tmp_path: Path, minilm: str
) -> None:
    def documents() -> Iterator[Item]:
        yield from (Document(f"{number}.txt", f"Ship {number} waits for the tide. " * 40) for number in range(20))

    first = open_run(tmp_path, minilm, documents)
    partition = first.spool_next_partition()
    assert partition is not None
    vectors = np.zeros((partition.nodes, 384), np.float32)
    vectors[:, 7] = 1.0
    first.spool.write_vectors(partition, np.arange(partition.nodes), vectors)
    first.close()  # before anything was stored: Qdrant was away

    second = open_run(tmp_path, minilm, documents)
    assert second.store_leftovers() == partition.nodes
    assert second.spool.list_embedded() == []
    planned = 0
    while (following := second.spool_next_partition()) is not None:
        planned += following.nodes
    (books, _) = second.books.close(0, 0)
    second.close()
    assert books.nodes_reused == partition.nodes
    assert books.nodes_planned == partition.nodes + planned
