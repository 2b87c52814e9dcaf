"""The ingest flow through its front door: real Prefect API, real model, embedded Qdrant."""

import json
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.progress import RunObserver
from tasks.backends.fake_encoder import GIB, FakeEncoder
from tasks.backends.fake_qdrant_server import LoopbackQdrant
from tasks.config import IngestSettings, QdrantSettings
from tasks.errors import SourceError, StoreMismatch
from tasks.records import PartitionReport, RunSummary

pytestmark = pytest.mark.usefixtures("prefect_api")

POEM = "The lighthouse keeper counts the ships at dusk. "
TEXTS = {
    "harbour.md": "# Harbour\n\nThe pilot boards two miles before the breakwater.\n\n"
    "## Tugs\n\nTwo tugs are required above 60,000 tonnes.",
    "poem.txt": POEM * 40,
    "rules.txt": "Ballast water is exchanged at least 200 nautical miles from land. The log is kept for two years.",
}


def write_texts(folder: Path, texts: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in (texts or TEXTS).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def make_settings(source: Path | str, data: Path, model: str, **groups: dict[str, Any]) -> IngestSettings:
    values: dict[str, Any] = {
        "source": {"uri": str(source)},
        "embedding": {"model": model, "device": "cpu"},
        "chunking": {"workers": 1},
        "qdrant": {"collection": "port"},
        "data_folder": str(data),
    }
    for name, group in groups.items():
        values[name] = {**values.get(name, {}), **group}
    return IngestSettings.model_validate(values)


def run_flow(settings: IngestSettings, changed: list[str] | None = None) -> tuple[Any, RunSummary | None]:
    """The flow run's final state, and the summary the observer was given."""
    from flows.ingest import ingest
    from flows.progress import RunObserver
    from tasks.observe import observing

    observer = RunObserver()
    with observing(observer):
        state = ingest(settings, changed, return_state=True)
    return state, observer.finished[0] if observer.finished else None


def read_artifacts(state: Any) -> dict[str, Any]:
    """The newest artifact of each key, of this flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        run_filter = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        found = client.read_artifacts(artifact_filter=run_filter)
    return {str(artifact.key): artifact.data for artifact in sorted(found, key=lambda artifact: str(artifact.updated))}


def read_task_states(state: Any) -> list[tuple[str, str, str]]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
        )
    return [(run.name, run.state.name, run.state.message or "") for run in runs if run.state is not None]


@pytest.fixture(scope="module")
def first_run(
    prefect_api: str, minilm: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[IngestSettings, Any, RunSummary]:
    """The texts, ingested once; the tests below leave the collection as it is."""
    folder = tmp_path_factory.mktemp("first")
    settings = make_settings(write_texts(folder / "docs"), folder / "data", minilm)
    state, summary = run_flow(settings)
    assert state.is_completed(), state.message
    assert summary is not None
    return settings, state, summary


def test_documents_end_up_in_qdrant_and_the_run_shows_how(first_run: tuple[IngestSettings, Any, RunSummary]) -> None:
    _, state, summary = first_run
    assert (summary.books.documents_seen, summary.books.documents_written) == (3, 3)
    assert summary.books.nodes_cpu == summary.books.nodes_planned == summary.books.points_counted > 3
    assert "asked for by embedding.device" in summary.device_note

    names = Counter(name.rstrip("0123456789 ").split("-")[0] for name, _, _ in read_task_states(state))
    assert names == {
        "prepare": 1,
        "start devices": 1,
        "chunk partition": 2,
        "embed partition": 1,
        "upsert partition": 1,
        "settle": 1,
    }
    artifacts = read_artifacts(state)
    assert set(artifacts) == {"progress-port", "partitions-port", "books-port", "memory-port", "report-port"}
    assert artifacts["progress-port"] == 100
    assert json.loads(artifacts["partitions-port"])[0]["nodes"] == str(summary.books.nodes_planned)
    assert "books closed" in artifacts["report-port"]


def test_a_second_run_finds_everything_there_and_loads_no_model(
    first_run: tuple[IngestSettings, Any, RunSummary],
) -> None:
    state, summary = run_flow(first_run[0])
    assert state.is_completed()
    assert summary is not None
    assert summary.books.documents_unchanged == summary.books.documents_seen == 3
    assert summary.books.nodes_reused == summary.books.nodes_planned
    assert summary.device == "none"
    assert summary.partitions == []


def test_a_run_over_changed_paths_says_so_in_its_name_and_looks_at_nothing_else(
    first_run: tuple[IngestSettings, Any, RunSummary],
) -> None:
    from prefect.client.orchestration import get_client

    state, summary = run_flow(first_run[0], ["rules.txt"])
    assert state.is_completed(), state.message
    assert summary is not None
    assert (summary.books.documents_seen, summary.books.documents_unchanged) == (1, 1)
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(state.state_details.flow_run_id).name.endswith("docs (1 changed)")


def test_what_was_ingested_is_found_by_its_meaning(first_run: tuple[IngestSettings, Any, RunSummary]) -> None:
    from tasks.search import search_collection

    settings = first_run[0]
    hits = search_collection(
        "How many tugboats does a large vessel need?",
        embedding=settings.embedding,
        qdrant=settings.qdrant,
        data_folder=settings.data_folder,
        limit=3,
    )
    assert hits[0].doc_id == "harbour.md"
    assert "Two tugs" in hits[0].text
    document = TEXTS["harbour.md"]
    assert hits[0].start_char is not None
    assert document[hits[0].start_char : hits[0].end_char].strip() == hits[0].text.strip()


def test_llama_index_reads_the_collection_as_it_is(
    first_run: tuple[IngestSettings, Any, RunSummary], minilm: str
) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

    client = QdrantClient(path=f"{first_run[0].data_folder}/qdrant")
    try:
        index = VectorStoreIndex.from_vector_store(
            QdrantVectorStore(client=client, collection_name="port"),
            embed_model=HuggingFaceEmbedding(model_name=minilm, device="cpu"),
        )
        (best, *_) = index.as_retriever(similarity_top_k=2).retrieve("How far from land is ballast water exchanged?")
    finally:
        client.close()
    assert "200 nautical miles" in best.node.get_content()
    assert best.node.ref_doc_id == "rules.txt"
    assert best.node.metadata["file_name"] == "rules.txt"


def test_a_document_that_cannot_be_read_ends_the_run_red_and_the_others_are_stored(tmp_path: Path, minilm: str) -> None:
    folder = write_texts(tmp_path / "docs")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 and then nothing of the kind")
    (folder / "empty.txt").touch()
    state, summary = run_flow(make_settings(folder, tmp_path / "data", minilm))
    assert state.is_failed()
    assert state.name == "DocumentsFailed"
    assert "1 of 5 documents failed: broken.pdf" in state.message
    assert summary is not None
    books = summary.books
    assert (books.documents_written, books.documents_failed, books.documents_skipped) == (3, 1, 1)
    assert "broken.pdf" in read_artifacts(state)["report-port"]


def test_another_chunking_is_refused_before_a_model_is_loaded(
    first_run: tuple[IngestSettings, Any, RunSummary], minilm: str, tmp_path: Path
) -> None:
    settings = first_run[0]
    data = Path(settings.data_folder)
    fits = shutil.move(data / "memory-models", tmp_path / "fits")
    try:
        refusing = {"collection": "port", "on_change": "refuse"}
        changed = make_settings(settings.source.uri, data, minilm, chunking={"max_tokens": 64}, qdrant=refusing)
        state, summary = run_flow(changed)
        assert state.is_failed()
        assert summary is None
        with pytest.raises(StoreMismatch, match=r"chunking\.max_tokens"):
            state.result()
        assert not (data / "memory-models").exists()  # a device that starts measures itself
    finally:
        shutil.move(fits, data / "memory-models")


def test_a_source_that_is_not_there_is_refused(tmp_path: Path, minilm: str) -> None:
    state, _ = run_flow(make_settings(tmp_path / "nowhere", tmp_path / "data", minilm))
    with pytest.raises(SourceError, match="nowhere"):
        state.result()


def test_the_settings_hold_no_secret(tmp_path: Path, minilm: str) -> None:
    """The API key is taken from the environment where it is used; a flow parameter would show it to everybody."""
    assert not [name for name in QdrantSettings.model_fields if "key" in name]


def test_a_step_down_shows_on_the_runs_page(tmp_path: Path, minilm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU double for the faults; the pool that takes what it spills is the real one."""
    from tasks.engine.devices import Devices, make_pool
    from tasks.engine.embed_nodes import NodeEmbedder
    from tasks.engine.embedded import EmbedSettings
    from tasks.engine.open_run import open_run
    from tasks.policy.memory import MemoryModel
    from tasks.policy.memory_fit import start_fit

    gpu = FakeEncoder(total_bytes=2 * GIB, dimension=384, max_tokens=256, c0=0.0, c1=5.0 * 1024**2, oom_calls={1})

    def start(settings: IngestSettings, files: Any, observer: Any, stop: Any) -> Devices:
        pool = make_pool(settings, files, stop)
        law = MemoryModel(gpu.c0, gpu.c1, 0.0, 0.0, gpu.c1, gpu.c1, gpu.c2, 0.0)
        options = EmbedSettings(max_micro_batch_tokens=4096, margin_fraction=0.0)
        embedder = NodeEmbedder(gpu, start_fit(law), options, spill=pool)
        return Devices(embedder, pool, device="cuda:0", note="a double", tokens_per_s=1e6, observer=observer)

    monkeypatch.setattr("tasks.prepare.open_run", partial(open_run, start=start))
    state, summary = run_flow(make_settings(write_texts(tmp_path / "docs"), tmp_path / "data", minilm))
    assert state.is_completed(), state.message
    assert summary is not None
    assert summary.books.nodes_cpu > 0
    assert summary.books.nodes_gpu > 0
    assert summary.books.nodes_gpu + summary.books.nodes_cpu == summary.books.nodes_planned
    (embed,) = [entry for entry in read_task_states(state) if entry[0].startswith("embed")]
    assert embed[1] == "CompletedDegraded"
    assert "1 oom" in embed[2]
    artifacts = read_artifacts(state)
    rows = json.loads(artifacts["ladder-port"])
    assert {"oom", "spill"} <= {row["step"] for row in rows}
    assert all(row["reason"] for row in rows)
    assert_vectors_are_whole(tmp_path / "data", summary)


def assert_vectors_are_whole(data: Path, summary: RunSummary) -> None:
    from tasks.backends.qdrant import open_store

    store = open_store(QdrantSettings(), str(data), environment={})
    try:
        points, _ = store._client.scroll(summary.physical_collection, limit=1000, with_vectors=True)
    finally:
        store.close()
    vectors: Sequence[Any] = [point.vector["text-dense"] for point in points]  # type: ignore[index, call-overload]
    assert len(vectors) == summary.books.points_counted
    np.testing.assert_allclose(np.linalg.norm(np.asarray(vectors), axis=1), 1.0, atol=1e-3)


class Outage(RunObserver):
    """Takes Qdrant away once the first partition is embedded, and brings it back when `is_over` says so."""

    def __init__(self, double: LoopbackQdrant, ends_after_partitions: int | None, ends_after_s: float) -> None:
        super().__init__()
        self.embedded_meanwhile: list[int] = []
        self._double = double
        self._ends_after_partitions = ends_after_partitions
        self._timer = threading.Timer(ends_after_s, self._end)
        self._began = False

    def _end(self) -> None:
        self._double.is_down = False

    def partition_done(self, report: PartitionReport) -> None:
        if not self._began:
            self._began = self._double.is_down = True
            self._timer.start()
        elif self._double.is_down:
            self.embedded_meanwhile.append(report.index)
            if len(self.embedded_meanwhile) == self._ends_after_partitions:
                self._timer.cancel()
                self._end()


@pytest.mark.parametrize(("room", "most"), [(4 * 1024**3, 5), (1, 3)])
def test_with_qdrant_away_embedding_goes_on_into_the_spool_up_to_its_bound_and_nothing_is_embedded_twice(
    tmp_path: Path, minilm: str, room: int, most: int
) -> None:
    """Room for all: five partitions more are embedded before Qdrant comes back. Room for none: the device waits."""
    from flows.ingest import ingest
    from tasks.observe import observing

    texts = {f"{number:02}.txt": f"Ship {number} waits for the tide. " * 150 for number in range(12)}
    with LoopbackQdrant() as double:
        settings = make_settings(
            write_texts(tmp_path / "docs", texts),
            tmp_path / "data",
            minilm,
            qdrant={"url": double.url, "collection": "port", "transport": "rest"},
            partition={"max_tokens": 1000},
        ).model_copy(update={"spool_max_bytes": room})
        outage = Outage(double, most if room > 1 else None, ends_after_s=60 if room > 1 else 8)
        with observing(outage):
            state = ingest(settings, return_state=True)
        assert state.is_completed(), state.message
        assert outage.finished is not None
        summary, off = outage.finished
        assert off == ()
        if room > 1:
            assert len(outage.embedded_meanwhile) == most
        else:
            assert len(outage.embedded_meanwhile) <= most < len(summary.partitions)
        books = summary.books
        assert books.nodes_cpu == books.nodes_planned == books.points_counted == double.memory.count("port").count
