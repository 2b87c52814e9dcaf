"""How long planning takes, against a planner that looks at one node at a time: python tests/benchmarks/plan_nodes.py

Prints ratios: the seconds are this machine's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tasks.policy.memory import MemoryModel, derive_prior
from tasks.policy.memory_fit import fit_model, refine_fit, start_fit
from tasks.policy.micro_batches import plan_micro_batches, summarise_plan
from tasks.policy.partitions import plan_partitions
from tasks.records import MemorySample, ModelShape

GIB = 1024**3
MODEL = derive_prior(ModelShape(24, 1024, 16, 4096, 250_002, 8194), "fp16", "sdpa", "sdpa")
MAX_TOKENS = 32_768


def plan_node_by_node(lengths: NDArray[np.int64], model: MemoryModel, budget_bytes: int) -> list[list[int]]:
    """What one writes first: sort, add nodes while the padded batch fits, ask the model for each."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda x: -lengths[x]):
        if batches:
            longest = int(lengths[batches[-1][0]])
            nodes = len(batches[-1]) + 1
            masked = lengths[row] != longest
            if nodes * longest <= MAX_TOKENS and int(model.predict(nodes, longest, masked)) <= budget_bytes:
                batches[-1].append(row)
                continue
        batches.append([row])
    return batches


def measure_seconds(run: Callable[[], object], repeats: int) -> float:
    """The best of some runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    rng = np.random.default_rng(0)
    write = sys.stdout.write
    write(f"{'nodes':>9} {'plan s':>8} {'naive s':>8} {'ratio':>6} {'batches':>8} {'padding':>8} {'unmasked':>9}\n")
    for nodes in (200, 8192, 100_000, 1_000_000):
        lengths = np.clip(rng.lognormal(np.log(245), 0.9, nodes), 1, 8192).astype(np.int64)

        def plan(lengths: NDArray[np.int64] = lengths) -> object:
            return plan_micro_batches(lengths, MODEL, 8 * GIB, max_tokens=MAX_TOKENS)

        def plan_naively(lengths: NDArray[np.int64] = lengths) -> object:
            return plan_node_by_node(lengths, MODEL, 8 * GIB)

        ours, naive = measure_seconds(plan, 3), measure_seconds(plan_naively, 1)
        made = plan_micro_batches(lengths, MODEL, 8 * GIB, max_tokens=MAX_TOKENS)
        summary = summarise_plan(made, lengths)
        write(
            f"{nodes:>9,} {ours:>8.4f} {naive:>8.3f} {naive / ours:>6.1f} {summary.micro_batches:>8,} "
            f"{summary.padding_fraction:>8.3%} {summary.unmasked_token_fraction:>9.1%}\n"
        )
    million = np.clip(rng.lognormal(np.log(245), 0.9, 1_000_000), 1, 8192).astype(np.int64)
    write(f"partitions of 1,000,000 nodes: {measure_seconds(lambda: plan_partitions(million, 8192, 10**6), 3):.3f} s\n")
    samples = [MemorySample(b, s, m, int(MODEL.predict(b, s, m) * 0.8)) for b, s, m in PROBES]
    fit = start_fit(MODEL, samples)
    write(f"fit of {len(samples)} probes: {measure_seconds(lambda: fit_model(samples, MODEL), 3) * 1e3:.1f} ms, ")
    surprise = [MemorySample(30, 700, False, int(int(fit.model.predict(30, 700, False)) * 1.3))]
    write(f"a refit after a surprise: {measure_seconds(lambda: refine_fit(fit, surprise), 3) * 1e3:.1f} ms, ")
    calm = [MemorySample(30, 700, False, int(int(fit.model.predict(30, 700, False)) * 0.98))]
    write(f"and without: {measure_seconds(lambda: refine_fit(fit, calm), 3) * 1e3:.3f} ms\n")


PROBES = [
    (8, 256, False),
    (128, 256, False),
    (8, 2048, False),
    (1, 8192, False),
    (64, 255, True),
    (24, 1365, True),
    (3, 8191, True),
]

if __name__ == "__main__":
    main()
