"""Runs one after the other over a source that changes: real files, chunker, model, embedded Qdrant and ledger.

Chunked and embedded in this process, since starting workers is not what these tests are about.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.torch_encoder import TorchEncoder
from tasks.config import IngestSettings, QdrantSettings
from tasks.engine.calibrate import derive_encoder_prior
from tasks.engine.devices import Devices
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.engine.ingest_run import IngestRun
from tasks.engine.open_run import open_run
from tasks.errors import StoreUnavailable
from tasks.observe import Observer
from tasks.policy.memory_fit import start_fit
from tasks.records import LedgerRecord, ModelFiles, RunSummary

PARAGRAPH = (
    "Paragraph {number} of {name}: the pilot boards {number} miles before the breakwater, when the tide allows it."
)


def write_document(folder: Path, name: str, paragraphs: int = 3, **changed: str) -> None:
    texts = [PARAGRAPH.format(number=number, name=name) for number in range(paragraphs)]
    for number, text in changed.items():
        texts[int(number.removeprefix("p"))] = text
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n\n".join(texts), encoding="utf-8")


class SharedEncoder(TorchEncoder):
    """Outlives the runs: loading the model is not what is tested here, nor is exporting its tokenizer in a process."""

    tokenizers: Path | None = None

    def close(self) -> None:
        pass


class NoCpuPool:
    """In the place of the CPU pool: nothing spills in these tests."""

    workers = 1

    def close(self) -> None:
        pass


class Ballast:
    """Ingest, again and again, into one data folder; each run with everything opened anew."""

    def __init__(self, folder: Path, model: str, encoder: SharedEncoder) -> None:
        self.docs = folder / "docs"
        self.data = folder / "data"
        self.embedded = 0  # nodes, by the last run
        self._model = model
        self._encoder = encoder

    def settings(self, folder: Path | None = None, **groups: dict[str, Any]) -> IngestSettings:
        values: dict[str, Any] = {
            "source": {"uri": str(folder or self.docs)},
            "embedding": {"model": self._model},
            "chunking": {"max_tokens": 48, "overlap_tokens": 0},
            "partition": {"max_tokens": 2_000},
            "qdrant": {"collection": "port"},
            "data_folder": str(self.data),
        }
        for name, group in groups.items():
            values[name] = {**values.get(name, {}), **group}
        return IngestSettings.model_validate(values)

    def _start(
        self, settings: IngestSettings, _files: ModelFiles, observer: Observer, stop: threading.Event
    ) -> Devices:
        prior = derive_encoder_prior(self._encoder.describe())
        embedder = NodeEmbedder(self._encoder, start_fit(prior), EmbedSettings(max_micro_batch_tokens=2_048), stop=stop)
        pool: Any = NoCpuPool()
        return Devices(
            embedder, pool, device="cpu", note="in this process", tokens_per_s=0, observer=observer, stop=stop
        )

    def open(self, settings: IngestSettings, changed: Sequence[str] | None = None) -> IngestRun:
        tokenizers = self.data / "tokenizers"
        if self._encoder.tokenizers is not None and not tokenizers.exists():
            shutil.copytree(self._encoder.tokenizers, tokenizers)
        run = open_run(settings, {}, changed=changed, chunk_workers=0, start=self._start)
        self._encoder.tokenizers = tokenizers
        return run

    def run(
        self,
        folder: Path | None = None,
        before_commit: Callable[[IngestRun], None] | None = None,
        *,
        changed: Sequence[str] | None = None,
        **groups: dict[str, Any],
    ) -> tuple[RunSummary, tuple[str, ...]]:
        """A run to its end; `before_commit` is called once the first partition is embedded, and may raise."""
        run = self.open(self.settings(folder, **groups), changed)
        devices = threading.Thread(target=run.start_devices)
        devices.start()
        self.embedded = 0
        try:
            while (partition := run.spool_next_partition()) is not None:
                devices.join()
                self.embedded += run.embed_partition(partition).nodes
                if before_commit is not None:
                    before_commit(run)
                try:
                    run.upsert_partition(partition)
                except StoreUnavailable:
                    run.upsert_partition(partition)  # as Prefect repeats the task
            run.settle()
            return run.close_books()
        finally:
            run.close()
            devices.join()

    def open_store(self) -> QdrantStore:
        return open_store(QdrantSettings(), str(self.data), environment={})

    def find_live(self, store: QdrantStore) -> str:
        return next(each.physical for each in store.list_physical("port") if each.is_live)

    def look(self) -> tuple[dict[str, tuple[str, str, str]], dict[tuple[str, str], LedgerRecord]]:
        """Points as id -> (source, document, generation), and the ledger by source and document."""
        store = self.open_store()
        try:
            physical = self.find_live(store)
            points = {
                point_id: (source, doc_id, generation)
                for page in store.scroll_points(physical, with_vectors=False)
                for point_id, source, doc_id, generation in zip(
                    page.ids, page.sources, page.doc_ids, page.generations, strict=True
                )
            }
            records = {(each.source, each.doc_id): each for page in store.ledger(physical).scroll() for each in page}
            return points, records
        finally:
            store.close()

    def documents(self) -> set[str]:
        return {doc_id for _, doc_id, _ in self.look()[0].values()}


def closed(result: tuple[RunSummary, tuple[str, ...]]) -> RunSummary:
    summary, off = result
    assert off == ()
    return summary
