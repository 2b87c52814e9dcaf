"""Peak memory of `ballast ingest` when the corpus grows tenfold: each process by itself, and all of them together.

    python tests/benchmarks/memory_growth.py [--documents 600] [--times 10]

A tiny model of 1024 dimensions, so that thousands of documents take minutes; the corpus of ingest_against_llama_index.py. The
partitions are cut small, so that the small corpus has several of them, too: one partition is what a run holds by design.
Qdrant is the loopback double over gRPC, in another process whose memory is not counted: a server's is its own. Then once more
with the embedded Qdrant, which lives in the flow's process and holds every point by its nature: `--no-embedded` leaves it out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from ingest_against_llama_index import find_model, make_tiny_model, write_corpus

ROOT = Path(__file__).resolve().parents[2]
MIB = 1024**2
PARTITION_NODES = 128
EVERY_S = 0.1

# What a process of the tree is, by a word of its command line; the first that fits.
KINDS = {"api_process": "Prefect API", "resource_tracker": "others", "multiprocessing": "workers"}
FLOW = "flow"


@dataclass
class Peaks:
    """MiB. `tree` is the highest sum at one moment, not the sum of the others."""

    qdrant: str
    documents: int
    nodes: int = 0
    partitions: int = 0
    seconds: float = 0.0
    tree: float = 0.0
    kinds: dict[str, float] = field(default_factory=dict)  # all processes of a kind together, at its own highest moment


@contextmanager
def watch_tree(pid: int, peaks: Peaks) -> Iterator[None]:
    """Sample the resident memory of a process and all below it."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            sums = dict(sample_tree(pid))
            peaks.tree = max(peaks.tree, sum(sums.values()))
            for kind, size in sums.items():
                peaks.kinds[kind] = max(peaks.kinds.get(kind, 0.0), size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sample_tree(pid: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return {}
    for member in family:
        try:
            command = " ".join(member.cmdline())
            size = member.memory_info().rss / MIB
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        kind = FLOW if member.pid == pid else next((KINDS[word] for word in KINDS if word in command), "others")
        sums[kind] = sums.get(kind, 0.0) + size
    return sums


# ---------------------------------------------------------------------------------------------- Qdrant in another process


def serve() -> None:
    """Both doubles, until stdin closes; what they were asked is not kept."""
    from tasks.backends.fake_qdrant_grpc import LoopbackQdrantGrpc
    from tasks.backends.fake_qdrant_server import LoopbackQdrant

    with LoopbackQdrant() as rest, LoopbackQdrantGrpc(rest) as grpc:
        rest.requests = grpc.requests = deque(maxlen=0)  # type: ignore[assignment]
        print(json.dumps({"qdrant.url": rest.url, "qdrant.grpc_port": grpc.port}), flush=True)
        sys.stdin.read()


@contextmanager
def start_double() -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", __file__, "--serve"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield {**json.loads(process.stdout.readline()), "qdrant.transport": "grpc"}
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


# ---------------------------------------------------------------------------------------------- runs


def run_ingest(source: Path, data: Path, model: str, documents: int, qdrant: dict[str, Any], nodes: int) -> Peaks:
    command = [str(Path(sys.executable).parent / "ballast"), "ingest", str(source), "--collection", "bench", "--json"]
    command += [
        "--model",
        model,
        "--data-folder",
        str(data),
        "--device",
        "cpu",
        "--set",
        f"partition.max_nodes={nodes}",
    ]
    for name, value in qdrant.items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    environment.pop("QDRANT_URL", None)
    peaks = Peaks("another process" if qdrant else "embedded", documents)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    with watch_tree(process.pid, peaks):
        output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"ballast ingest ended with {process.returncode}: {errors[-3000:]}")
    summary = json.loads(output)
    assert summary["books_closed"], summary["books_off"]
    peaks.nodes, peaks.partitions = summary["books"]["nodes_planned"], len(summary["partitions"])
    peaks.seconds = summary["seconds"]["total"]
    return peaks


def print_tables(runs: Sequence[Peaks]) -> None:
    kinds = [FLOW, *sorted({kind for one in runs for kind in one.kinds} - {FLOW})]
    print("Peak resident memory, MiB; the whole tree's is the highest sum at one moment.\n")
    print(f"| Qdrant | documents | nodes | partitions | own work s | whole tree | {' | '.join(kinds)} |")
    print(f"| --- |{' ---: |' * (5 + len(kinds))}")
    for one in runs:
        sizes = " | ".join(f"{one.kinds.get(kind, 0.0):.0f}" for kind in kinds)
        figures = f"{one.documents:,} | {one.nodes:,} | {one.partitions} | {one.seconds:.0f} | {one.tree:.0f}"
        print(f"| {one.qdrant} | {figures} | {sizes} |")
    print()
    for small, large in zip(runs[::2], runs[1::2], strict=False):
        grown = f"{large.documents / small.documents:.0f} times the documents, Qdrant {small.qdrant}: the tree grows by"
        print(f"{grown} {large.tree / small.tree - 1:+.1%}, the flow's process by {compare(small, large, FLOW):+.1%}.")
    if len(runs) == 4:
        shares = [
            embedded.kinds[FLOW] - server.kinds[FLOW] for server, embedded in zip(runs[:2], runs[2:], strict=True)
        ]
        print(f"The embedded Qdrant's share of the flow's process: {shares[0]:.0f} and {shares[1]:.0f} MiB.")


def compare(small: Peaks, large: Peaks, kind: str) -> float:
    return large.kinds[kind] / small.kinds[kind] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--partition-nodes", type=int, default=PARTITION_NODES)
    parser.add_argument("--no-embedded", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="the whole way in small: its figures mean nothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    if given.tiny:
        given.documents, given.times, given.partition_nodes, given.no_embedded = 30, 1, 8, True
    else:
        os.environ.pop("PREFECT_API_URL", None)
    runs: list[Peaks] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = find_model() if given.tiny else make_tiny_model(folder)
        sizes = sorted({given.documents, given.documents * given.times})
        for documents in sizes:
            (folder / f"corpus-{documents}").mkdir()
            write_corpus(folder / f"corpus-{documents}", documents, median_words=60)
        for place in ("server",) if given.no_embedded else ("server", "embedded"):
            for documents in sizes:
                source, data = folder / f"corpus-{documents}", folder / f"{place}-{documents}"
                if place == "embedded":
                    runs.append(run_ingest(source, data, model, documents, {}, given.partition_nodes))
                    continue
                with start_double() as qdrant:
                    runs.append(run_ingest(source, data, model, documents, qdrant, given.partition_nodes))
    if given.json:
        print(json.dumps([asdict(one) for one in runs], indent=1))
        return
    if given.tiny:
        print("Tiny: the figures mean nothing.\n")
    print_tables(runs)


if __name__ == "__main__":
    main()
