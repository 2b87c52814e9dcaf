"""Throughput under a memory cap, against the best fixed batch size: python tests/benchmarks/gpu_throughput.py --out FILE

bge-m3's shape with random weights, 6,000 nodes of log-normal length and the story's ten. Some minutes on an H100; --quick
for less; `--device cpu --tiny` runs the same code on a small model without a GPU, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from random_encoder import (
    GIB,
    STORY,
    Plain,
    RandomEncoder,
    Report,
    Timed,
    describe_machine,
    run_apart,
    time_plain,
    to_gib,
    to_table,
)

from tasks.engine.calibrate import calibrate
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.policy.budget import compute_budget

MAX_BATCH_TOKENS = 32_768  # EmbeddingSettings' default on CUDA
SWEEP = (4, 8, 16, 32, 64, 128, 256)


def time_ballast(spec: RandomEncoder, lengths: list[int], repeats: int) -> tuple[Timed, str]:
    """As the flow has it: the encoder in its own process, calibrated; the calibration's time is told apart."""
    nodes = spec.draw_nodes(lengths)
    encoder = spec.start()
    try:
        info = encoder.describe()
        budget = compute_budget(encoder.read_memory(), margin_fraction=0.06)
        measured = calibrate(encoder, budget_bytes=budget, max_batch_tokens=MAX_BATCH_TOKENS)
        settings = EmbedSettings(MAX_BATCH_TOKENS, launch_tokens=measured.launch_tokens)
        embedder = NodeEmbedder(encoder, measured.fit, settings)
        best, embedded = None, None
        for _ in range(repeats):
            started = time.perf_counter()
            embedded = embedder.embed(nodes)
            took = time.perf_counter() - started
            best = took if best is None else min(best, took)
            if embedded.failed:
                return Timed(
                    "Ballast", None
                ), f"{len(embedded.failed)} nodes failed: {next(iter(embedded.failed.values()))}"
        assert embedded is not None
        ooms = sum(step.kind == "oom" for step in embedded.steps)
        note = (
            f"Ballast: calibrated in {measured.report.seconds:.1f} s ({measured.note}; a launch costs "
            f"{measured.launch_tokens} tokens); {len(embedded.batch_sizes)} micro-batches of {min(embedded.batch_sizes)} to "
            f"{max(embedded.batch_sizes)} nodes, {embedded.padding_tokens / sum(lengths):.2%} padding, {ooms} out of memory."
        )
        return Timed(f"Ballast, {info.key.precision}", best, embedded.peak_bytes), note
    finally:
        encoder.close()


def compare(spec: RandomEncoder, lengths: list[int], sweep: tuple[int, ...], repeats: int, report: Report) -> None:
    """One cap: everyone in a process of its own, the best of `repeats` runs."""
    ours, note = time_ballast(spec, lengths, repeats)
    half = replace(spec, precision="fp32" if spec.device == "cpu" else "fp16")
    single = replace(spec, precision="fp32")
    ways = [Plain(f"SentenceTransformer.encode, {half.precision}, batch_size={size}", size) for size in sweep]
    swept = run_apart(time_plain, half, lengths, ways, repeats, tiny=spec.tiny)
    defaults = run_apart(
        time_plain, single, lengths, [Plain("SentenceTransformer.encode, its defaults: fp32, batch_size=32", 32)], 1,
        tiny=spec.tiny,
    )  # fmt: skip
    like_llama_index = run_apart(
        time_plain, single, lengths,
        [Plain("LlamaIndex's defaults, emulated without LlamaIndex: slices of 10 in document order, fp32", 10, 10)], 1,
        tiny=spec.tiny,
    )  # fmt: skip
    best = min((one.seconds for one in swept if one.seconds), default=None)
    rows = []
    for one in (ours, *swept, *defaults, *like_llama_index):
        if one.seconds is None:
            rows.append([one.name, "out of memory", "", "", ""])
            continue
        against_best = f"{best / one.seconds:.3f}" if best else ""
        against_ours = f"{ours.seconds / one.seconds:.3f}" if ours.seconds else ""
        peak = to_gib(one.peak_bytes) if one.peak_bytes else ""
        rows.append([one.name, f"{sum(lengths) / one.seconds:,.0f}", against_best, against_ours, peak])
    report.add(
        to_table(("", "tokens/s", "speed against the best fixed batch", "speed against Ballast", "peak GiB*"), rows)
    )
    report.add("*Ballast's peak is on top of the weights, the others' with them.\n\n" + note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a small model: the same code, no figures")
    parser.add_argument("--quick", action="store_true", help="fewer nodes, one cap, one run each")
    parser.add_argument(
        "--caps", type=float, nargs="+", help="GiB that the process may take (default: 15, and 4 unless --quick)"
    )
    parser.add_argument("--out", type=Path, help="write the report here, too")
    args = parser.parse_args()
    report = Report(args.out)
    spec = RandomEncoder(args.device, tiny=args.tiny, card_bytes=GIB if args.device == "cpu" else None)
    nodes = 60 if args.tiny else 1500 if args.quick else 6000
    lengths = [min(n, spec.max_tokens) for n in (*spec.draw_lengths(nodes), *STORY)]
    report.add(f"# Throughput: {len(lengths):,} nodes, {sum(lengths):,} tokens, longest {max(lengths):,}")
    report.add(describe_machine(args.device))
    repeats = 1 if args.quick or args.tiny else 3
    sweep = (8, 32) if args.tiny else SWEEP
    if args.device == "cpu":
        compare(spec, lengths, sweep, repeats, report)
        return
    total_bytes = run_apart(read_total_bytes, args.device, tiny=False)
    for cap in args.caps or ([15] if args.quick else [15, 4]):
        report.add(f"## Cap {cap:g} GiB of {to_gib(total_bytes)}")
        compare(replace(spec, fraction=min(1.0, cap * GIB / total_bytes)), lengths, sweep, repeats, report)


def read_total_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)


if __name__ == "__main__":
    main()
