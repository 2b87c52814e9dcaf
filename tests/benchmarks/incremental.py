"""What a second run costs: nothing changed, one paragraph edited, some points deleted by hand, a ledger of many documents.

    python tests/benchmarks/incremental.py [--documents 400] [--nodes 1000] [--ledgers 1000 10000 100000]

Each run is a process of its own, through the flow, with a real model, an embedded Qdrant and an embedded Prefect API. A run's
own work is what its summary counts, from the listing of the source to the books; the flow run is that with Prefect's part;
start-up (imports, and the API's server) is paid once a command, whatever there is to do. CPU seconds are what a busy machine
changes least. The large ledgers are looked at without Prefect: see large_ledger.py. `--tiny` shows that it all still works.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ingest_against_llama_index import find_model, read_sentences, write_corpus
from large_ledger import print_ledgers

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "sentence_transformers", "llama_index")
DELETED_FRACTION = 0.03
MAX_TOKENS = 64  # of a node of the long document: its 1,000 nodes are embedded in a minute on two cores


@dataclass(frozen=True)
class Ran:
    """One command, as its process tells it."""

    state: str
    start_s: float  # imports, and the start and end of the embedded Prefect API
    flow_s: float  # the flow run, Prefect's part included
    cpu_s: float  # of the flow run, in its process
    workers_cpu_s: float  # of the flow run, in chunk workers and encoders
    heavy: list[str]  # which of HEAVY were imported
    work_s: float = 0.0  # the run's own account
    prepare_s: float = 0.0
    embed_s: float = 0.0
    devices_s: float = 0.0
    embedded: int = 0
    reused: int = 0
    unchanged: int = 0
    written: int = 0
    points: int = 0
    found_documents: int = 0  # with findings of a verify
    left: int = 0

    @property
    def all_cpu_s(self) -> float:
        return self.cpu_s + self.workers_cpu_s


# ---------------------------------------------------------------------------------------------- in the child


def run_flow(kind: str, values: dict[str, Any]) -> Ran:
    """`ballast ingest` or `verify --repair` as the command line has it."""
    started = time.monotonic()
    from flows.api_server import embedded_api
    from flows.operations import Operations
    from flows.progress import RunObserver
    from tasks.check_inputs import check_inputs
    from tasks.config import IngestSettings
    from tasks.observe import observing

    settings = IngestSettings.model_validate(values)
    operations, observer = Operations(), RunObserver()
    load: Callable[[], Any] = operations.load_flow if kind == "ingest" else operations.load_verify
    if kind == "ingest":
        check_inputs(settings)
    with embedded_api(settings.data_folder, meanwhile=load), observing(observer):
        flow = load()
        began, cpu_s, workers_cpu_s = time.monotonic(), *read_cpu()
        options = {} if kind == "ingest" else {"repair": True}
        state = flow(settings, **options, return_state=True)
        flow_s = time.monotonic() - began
        cpu_s, workers_cpu_s = (
            after - before for after, before in zip(read_cpu(), (cpu_s, workers_cpu_s), strict=True)
        )
    result: dict[str, Any] = {
        "state": str(state.name),
        "start_s": time.monotonic() - started - flow_s,
        "flow_s": flow_s,
        "cpu_s": cpu_s,
        "workers_cpu_s": workers_cpu_s,
        "heavy": [name for name in HEAVY if name in sys.modules],
    }
    if observer.finished is not None:
        summary, _ = observer.finished
        books = summary.books
        result |= {
            "work_s": summary.seconds["total"],
            "prepare_s": summary.seconds["prepare"],
            "embed_s": summary.seconds.get("embed", 0.0),
            "devices_s": summary.seconds.get("devices", 0.0),
            "embedded": books.nodes_gpu + books.nodes_cpu,
            "reused": books.nodes_reused,
            "unchanged": books.documents_unchanged,
            "written": books.documents_written,
            "points": books.points_counted,
        }
    if observer.verified is not None:
        report = observer.verified
        result |= {"points": report.points, "left": len(report.left)}
        result |= {"found_documents": len({finding.doc_id for finding in report.found}), "work_s": report.seconds}
    return Ran(**result)


def read_cpu() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that have ended."""
    own, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, ended.ru_utime + ended.ru_stime


# ---------------------------------------------------------------------------------------------- in the parent


def run(kind: str, values: dict[str, Any]) -> Ran:
    """In a process of its own: what is imported and loaded counts, every time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    environment.pop("QDRANT_URL", None)
    command = [sys.executable, __file__, "--job", json.dumps([kind, values])]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"{kind} ended with {result.returncode}: {result.stderr[-3000:]}")
    return Ran(**json.loads(result.stdout.splitlines()[-1]))


def make_settings(source: Path, data: Path, model: str, **groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "source": {"uri": str(source)},
        "qdrant": {"collection": "bench"},
        "embedding": {"model": model, "device": "cpu"},
        "data_folder": str(data),
        **groups,
    }


def print_rows(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    print(f"| {' | '.join(header)} |")
    print(f"| --- |{' ---: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(f'{cell:.2f}' if isinstance(cell, float) else str(cell) for cell in row)} |")
    print(flush=True)


RUN_HEADER = (
    "run", "own work s", "prepare s", "embed s", "flow run s", "start-up s", "CPU s", "workers' CPU s", "embedded", "imported",
)  # fmt: skip


def to_row(name: str, ran: Ran) -> list[object]:
    row: list[object] = [
        name,
        ran.work_s,
        ran.prepare_s,
        ran.embed_s,
        ran.flow_s,
        ran.start_s,
        ran.cpu_s,
        ran.workers_cpu_s,
    ]
    return [*row, ran.embedded, ", ".join(ran.heavy) or "none of them"]


def take_median(runs: Sequence[Ran]) -> Ran:
    """Of each figure by itself."""
    taken = asdict(runs[0])
    taken |= {name: statistics.median(getattr(one, name) for one in runs) for name in taken if name.endswith("_s")}
    return Ran(**{**taken, "heavy": sorted({name for one in runs for name in one.heavy})})


def compare_unchanged(source: Path, data: Path, model: str, repeats: int) -> dict[str, Any]:
    """The first run, and then the same command again; returns the settings, for what comes next."""
    settings = make_settings(source, data, model)
    first = run("ingest", settings)
    again = [run("ingest", settings) for _ in range(repeats)]
    for one in again:
        assert (one.embedded, one.written, one.unchanged) == (0, 0, first.written), one
    second = take_median(again)
    print(f"## Unchanged: {first.written} documents, {first.points} points, embedded Qdrant, {repeats} repeats\n")
    print_rows(RUN_HEADER, [to_row("first", first), to_row("unchanged, median", second)])
    print(f"Own work holds prepare and embed. Imported: which of {', '.join(HEAVY)} were, in the flow's process.")
    print(
        f"Unchanged against first, times faster: own work {first.work_s / second.work_s:.0f}, against its embedding alone "
        f"{first.embed_s / second.work_s:.0f}, flow run with Prefect {first.flow_s / second.flow_s:.0f} (its CPU "
        f"{first.all_cpu_s / second.all_cpu_s:.0f}), whole command with start-up "
        f"{(first.flow_s + first.start_s) / (second.flow_s + second.start_s):.1f}.\n",
        flush=True,
    )
    return settings


def compare_damaged(settings: dict[str, Any]) -> None:
    """Delete points behind Ballast's back, and see what a verify finds and repairs."""
    data = Path(settings["data_folder"])
    everything, deleted = delete_points(data, DELETED_FRACTION)
    repaired = run("repair", settings)
    missing = len(everything - list_points(data))
    print(f"## Deleted by hand: {len(deleted)} of {len(everything)} points, then verify --repair\n")
    header = ("ended", "documents found", "points missing", "of them after it", "nodes embedded", "findings left")
    row = [repaired.state, repaired.found_documents, len(deleted), missing, repaired.embedded, repaired.left]
    print_rows((*header, "flow run s"), [[*row, repaired.flow_s]])


def compare_edited(folder: Path, model: str, nodes: int) -> None:
    """One paragraph of one long document."""
    source, paragraphs = folder / "long", write_paragraphs(nodes)
    source.mkdir()
    document = source / "long.txt"
    document.write_text("\n\n".join(paragraphs), encoding="utf-8")
    settings = make_settings(source, folder / "data", model, chunking={"max_tokens": MAX_TOKENS})
    settings["qdrant"] = {"collection": "long"}
    first = run("ingest", settings)
    paragraphs[len(paragraphs) // 2] = (
        "The harbour master has closed berth 12 to tankers until the fenders are renewed."
    )
    document.write_text("\n\n".join(paragraphs), encoding="utf-8")
    edited = run("ingest", settings)
    assert edited.written == 1, edited
    print(f"## One paragraph edited: a document of {first.points} nodes of at most {MAX_TOKENS} tokens\n")
    header = (
        "run",
        "nodes embedded",
        "payloads refreshed",
        "points after",
        "own work s",
        "of it loading the model s",
        "CPU s",
    )
    rows = [
        [name, one.embedded, one.reused, one.points, one.work_s, one.devices_s, one.all_cpu_s]
        for name, one in (("first", first), ("edited", edited))
    ]
    print_rows(header, rows)
    print(f"Edited against first: {first.work_s / edited.work_s:.0f} times faster.\n", flush=True)


def write_paragraphs(nodes: int, seed: int = 11) -> list[str]:
    """Sentences of the samples in paragraphs of varied length, enough for about so many nodes of MAX_TOKENS."""
    rng = np.random.default_rng(seed)
    sentences = read_sentences()
    paragraphs: list[str] = []
    words = 0
    while words < nodes * MAX_TOKENS * WORDS_PER_TOKEN:
        some = [sentences[int(rng.integers(len(sentences)))] for _ in range(int(rng.integers(1, 6)))]
        paragraphs.append(" ".join(some))
        words += len(paragraphs[-1].split())
    return paragraphs


WORDS_PER_TOKEN = 0.488  # of what fills a node, overlap taken off


# ---------------------------------------------------------------------------------------------- by hand


def list_points(data: Path) -> set[str]:
    client = open_qdrant(data)
    page, _ = client.scroll("bench", limit=10**6, with_payload=False)
    client.close()
    return {str(point.id) for point in page}


def delete_points(data: Path, fraction: float) -> tuple[set[str], list[str]]:
    """(all ids as they were, those deleted), without Ballast."""
    there = list_points(data)
    ids = sorted(there)
    deleted = [
        str(ids[row]) for row in np.random.default_rng(3).choice(len(ids), max(1, round(len(ids) * fraction)), False)
    ]
    client = open_qdrant(data)
    client.delete("bench", points_selector=deleted)
    client.close()
    return there, deleted


def open_qdrant(data: Path) -> Any:
    from qdrant_client import QdrantClient

    return QdrantClient(path=str(data / "qdrant"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3, help="of the unchanged run")
    parser.add_argument("--nodes", type=int, default=1000, help="of the document that is edited")
    parser.add_argument("--ledgers", type=int, nargs="*", default=[1_000, 10_000, 100_000], help="documents of each")
    parser.add_argument("--tiny", action="store_true", help="the whole way in small: its figures mean nothing")
    parts = ("unchanged", "edited", "ledgers")
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, help="deleting by hand is in unchanged")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(asdict(run_flow(*json.loads(given.job)))))
        return
    if given.tiny:
        print("Tiny: the figures mean nothing.\n")
    else:
        os.environ.pop("PREFECT_API_URL", None)
    if given.tiny:
        given.documents, given.repeats, given.nodes, given.ledgers = 12, 1, 30, [50]
    with tempfile.TemporaryDirectory() as scratch:
        folder, model = Path(scratch), find_model()
        if "unchanged" in given.only:
            source = folder / "corpus"
            source.mkdir()
            write_corpus(source, given.documents, median_words=60)
            compare_damaged(compare_unchanged(source, folder / "data", model, given.repeats))
        if "edited" in given.only:
            compare_edited(folder, model, given.nodes)
        if "ledgers" in given.only:
            print_ledgers(folder, given.ledgers)


if __name__ == "__main__":
    main()
