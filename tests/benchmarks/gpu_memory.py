"""Memory on a GPU: the model's error, out of memory under caps, a wrong model, a neighbour that takes and gives back.

python tests/benchmarks/gpu_memory.py --out FILE    (--quick for less, --only for a part)

bge-m3's shape with random weights. `--device cpu --tiny` runs the same code on a small model without a GPU, on a CPU
that passes for a card: its figures mean nothing. Beside FILE goes FILE.json with every measured shape.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gpu_throughput import read_total_bytes
from random_encoder import (
    GIB,
    STORY,
    Plain,
    PretendCard,
    RandomEncoder,
    Report,
    describe_machine,
    run_apart,
    time_plain,
    to_gib,
    to_table,
)

from tasks.backends.allocator import allocator_environment
from tasks.backends.encoder import Encoder
from tasks.backends.processes import spawn_pool
from tasks.engine.calibrate import calibrate, derive_encoder_prior
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import Embedded, EmbedSettings, Watch
from tasks.errors import DeviceError
from tasks.policy.budget import compute_budget
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import MemorySample

MARGIN = 0.06
MAX_BATCH_TOKENS = 32_768
UNBOUND_TOKENS = 2**20  # so that the budget alone is what bounds a micro-batch


# ------------------------------------------------------------------------------------------ the model's error


@dataclass(frozen=True)
class Measured:
    """Shapes that calibrate() has not seen, what they took, and what was predicted."""

    kernels: str
    samples: tuple[MemorySample, ...]
    fitted: tuple[int, ...]
    prior: tuple[int, ...]
    reserved_ratio: float  # the largest peak of reserved bytes over that of allocated ones: fragmentation
    seconds: float


def measure_errors(spec: RandomEncoder, shapes: int, seconds: float) -> Measured:
    """In a process of its own: calibrate, then run shapes drawn at random, with and without a mask."""
    encoder = spec()
    info = encoder.describe()
    budget = compute_budget(encoder.read_memory(), margin_fraction=MARGIN)
    measured = calibrate(encoder, budget_bytes=budget, max_batch_tokens=MAX_BATCH_TOKENS, max_seconds=seconds)
    seen = {(x.nodes, x.padded_tokens, x.masked) for x in measured.fit.calibration}
    prior = derive_encoder_prior(info)
    rng = np.random.default_rng(1)
    samples: list[MemorySample] = []
    reserved = 0
    for _ in range(20 * shapes):
        longest = int(np.exp(rng.uniform(np.log(24), np.log(info.max_tokens))))
        masked = bool(rng.integers(2))
        nodes = max(1 + masked, int(rng.uniform(0.05, 1.0) * MAX_BATCH_TOKENS) // longest)
        # A shape is skipped where the fit says that it does not fit: that an out of memory follows is told elsewhere.
        if (nodes, longest, masked) in seen or int(measured.fit.model.predict(nodes, longest, masked)) > budget:
            continue
        lengths = [longest] * (nodes - 1) + [longest - 1 - longest // 3 if masked else longest]
        outcome = encoder.encode(spec.draw_nodes(lengths))
        if outcome.kind == "done" and outcome.peak_bytes and outcome.reserved_peak_bytes and not outcome.redone_fp32:
            samples.append(MemorySample(nodes, longest, masked, outcome.peak_bytes))
            reserved = max(reserved, outcome.reserved_peak_bytes)
        if len(samples) >= shapes:
            break
    return Measured(
        kernels=f"{info.kernel_unmasked} / {info.kernel_masked}",
        samples=tuple(samples),
        fitted=predict_all(measured.fit.model, samples),
        prior=predict_all(prior, samples),
        reserved_ratio=reserved / max(x.peak_bytes for x in samples),
        seconds=measured.report.seconds,
    )


def predict_all(model: MemoryModel, samples: list[MemorySample]) -> tuple[int, ...]:
    return tuple(int(model.predict(x.nodes, x.padded_tokens, x.masked)) for x in samples)


def report_errors(spec: RandomEncoder, quick: bool, report: Report) -> list[dict[str, Any]]:
    kinds = [("fp16", {}), ("fp32", {}), ("bf16", {}), ("fp16, math attention", {"fused": False})]
    kinds += [("fp16, eager attention", {"attention": "eager"})]
    if spec.device == "cpu":
        kinds = [("fp32", {})]
    elif quick:
        kinds = kinds[:1]
    rows, recorded = [], []
    for name, options in kinds:
        kind = replace(spec, precision=name[:4], **options)
        shapes, seconds = (6, 10.0) if spec.tiny else (12, 10.0) if quick else (32, 30.0)
        try:
            one: Measured = run_apart(measure_errors, kind, shapes, seconds, tiny=spec.tiny)
        except DeviceError as error:  # bf16 on a card that only emulates it
            report.add(f"{name}: {error}")
            continue
        peaks = np.array([x.peak_bytes for x in one.samples])
        for label, predicted in (("fitted", one.fitted), ("closed form", one.prior)):
            error = np.array(predicted) / peaks - 1
            rows.append(
                [
                    name, one.kernels, label, len(peaks), f"{np.median(np.abs(error)):.1%}", f"{max(0.0, -error.min()):.1%}",
                    f"{max(0.0, error.max()):.1%}", f"{one.reserved_ratio:.2f}", f"{one.seconds:.1f}",
                ]
            )  # fmt: skip
        recorded += [
            {"precision": name, "kernels": one.kernels, **asdict(x), "fitted": f, "prior": p}
            for x, f, p in zip(one.samples, one.fitted, one.prior, strict=True)
        ]
    report.add("## Error on shapes that the calibration has not seen (aim: median 5 %, never under by more than 3 %)")
    header = ("precision", "kernels unmasked / masked", "model", "shapes", "median", "worst under", "worst over",
              "largest reserved / allocated peak", "calibration s")  # fmt: skip
    report.add(to_table(header, rows))
    return recorded


# ------------------------------------------------------------------------------------------ caps


@dataclass(frozen=True)
class Capped:
    embedded: Embedded
    budget_bytes: int
    probe_note: str
    alloc_retries: int


def embed_capped(spec: RandomEncoder, lengths: list[int], max_batch_tokens: int, scale: float) -> Capped:
    """In a process of its own: calibrate (or trust a closed form `scale` times as large), then embed everything."""
    encoder = spec()
    info = encoder.describe()
    budget = compute_budget(encoder.read_memory(), margin_fraction=MARGIN)
    if scale == 1.0:
        measured = calibrate(encoder, budget_bytes=budget, max_batch_tokens=MAX_BATCH_TOKENS)
        fit, launch_tokens, note = measured.fit, measured.launch_tokens, measured.note
    else:
        wrong = MemoryModel(**{k: scale * v for k, v in derive_encoder_prior(info).coefficients().items()})
        fit, launch_tokens, note = start_fit(wrong), 256, f"a model that says {scale:g} of the truth"
    settings = EmbedSettings(max_batch_tokens, launch_tokens=launch_tokens, margin_fraction=MARGIN)
    embedded = NodeEmbedder(encoder, fit, settings).embed(spec.draw_nodes(lengths))
    retries = 0
    if spec.device != "cpu":
        import torch

        retries = int(torch.cuda.memory_stats(spec.device)["num_alloc_retries"])
    return Capped(embedded, budget, note, retries)


def report_caps(spec: RandomEncoder, lengths: list[int], caps: dict[str, RandomEncoder], report: Report) -> None:
    """Ballast under each cap, with its usual micro-batches and with such as large as the budget allows."""
    rows = []
    equal = [min(512, spec.max_tokens)] * (100 if spec.tiny else len(lengths) // 2)
    tight = list(caps)[-1]
    runs = [(cap, "log-normal and the story", lengths, MAX_BATCH_TOKENS, 1.0) for cap in caps]
    runs += [(cap, "equal lengths, bound by the budget alone", equal, UNBOUND_TOKENS, 1.0) for cap in caps]
    runs += [(tight, "the same, by a model that says 0.3 of the truth", equal, UNBOUND_TOKENS, 0.3)]
    for cap, what, nodes, max_batch_tokens, scale in runs:
        capped: Capped = run_apart(embed_capped, caps[cap], nodes, max_batch_tokens, scale, tiny=spec.tiny)
        one = capped.embedded
        kinds = [step.kind for step in one.steps]
        sizes = one.batch_sizes or [0]
        rows.append(
            [
                cap, what, len(nodes), kinds.count("oom"), len(one.failed), capped.alloc_retries, to_gib(capped.budget_bytes),
                to_gib(one.peak_bytes or 0), f"{min(sizes)}-{max(sizes)}", f"{sum(nodes) / one.seconds:,.0f}",
            ]
        )  # fmt: skip
    report.add("## Ballast under caps (aim: nothing out of memory after a calibration)")
    header = ("cap", "nodes' lengths", "nodes", "out of memory", "nodes failed", "allocator retries", "budget GiB",
              "largest peak GiB", "batch sizes", "tokens/s")  # fmt: skip
    report.add(to_table(header, rows))


def report_plain(spec: RandomEncoder, lengths: list[int], caps: dict[str, RandomEncoder], report: Report) -> None:
    """The story's ten texts and the longest of the others, as plain code embeds them."""
    nodes = [min(n, spec.max_tokens) for n in (*STORY, *sorted(lengths, reverse=True)[:100])]
    ways = {
        "fp32": [Plain("LlamaIndex's defaults, emulated: slices of 10 in document order, fp32", 10, 10),
                 Plain("SentenceTransformer.encode, its defaults: fp32, batch_size=32", 32)],
        "fp16": [Plain("SentenceTransformer.encode, fp16, batch_size=32", 32),
                 Plain("SentenceTransformer.encode, fp16, batch_size=128", 128)],
    }  # fmt: skip
    if spec.device == "cpu":
        ways = {"fp32": ways["fp32"]}
    rows = []
    for cap, capped in caps.items():
        for precision, some in ways.items():
            timed = run_apart(time_plain, replace(capped, precision=precision), nodes, some, 1, tiny=spec.tiny)
            rows += [[cap, x.name, "out of memory" if x.seconds is None else "went through"] for x in timed]
    report.add(f"## Plain code under the same caps: the story's 10 and the {len(nodes) - 10} longest nodes")
    report.add(to_table(("cap", "", ""), rows))


# ------------------------------------------------------------------------------------------ a neighbour


class Neighbour(Protocol):
    """Another program on the same card."""

    def take(self, size: int) -> bool: ...

    def give_back(self) -> None: ...


class ProcessNeighbour:
    """A process that holds plain allocations on the card."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.pool: ProcessPoolExecutor = spawn_pool(1, environment=allocator_environment())
        self.take(1)  # its CUDA context takes some hundred MB: now, and not when it counts

    def take(self, size: int) -> bool:
        """False where the card has not that much."""
        return bool(self.pool.submit(hold, self.device, size).result())

    def give_back(self) -> None:
        self.pool.submit(let_go).result()

    def close(self) -> None:
        self.pool.shutdown(wait=True)


class PretendedNeighbour:
    def __init__(self, card: PretendCard) -> None:
        self.card = card

    def take(self, size: int) -> bool:
        self.card.taken_bytes += size
        return True

    def give_back(self) -> None:
        self.card.taken_bytes = 0


_held: list[Any] = []  # in the neighbour's process


def hold(device: str, size: int) -> bool:
    import torch

    try:
        _held.append(torch.empty(size, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        return False
    return True


def let_go() -> None:
    import torch

    _held.clear()
    torch.cuda.empty_cache()


@dataclass
class Visit:
    """What happened around a neighbour's stay."""

    batches: list[int]
    taken_at: int
    given_back_at: int
    got: bool
    embedded: Embedded


def embed_beside(
    encoder: Encoder, neighbour: Neighbour, spec: RandomEncoder, lengths: list[int], size: int, *, release: bool
) -> Visit:
    """Embed; after batch 4 the neighbour takes `size` bytes, four later it gives them back.

    `release`: our cached blocks are given back right before. What the allocator caches is not free for others: without
    it, it would be the neighbour who is refused, while our batches go on in what we hold.
    """
    info = encoder.describe()
    budget = compute_budget(encoder.read_memory(), margin_fraction=MARGIN)
    measured = calibrate(encoder, budget_bytes=budget, max_batch_tokens=MAX_BATCH_TOKENS)
    settings = EmbedSettings(UNBOUND_TOKENS, launch_tokens=measured.launch_tokens, margin_fraction=MARGIN)
    embedder = NodeEmbedder(encoder, measured.fit, settings)
    visit = Visit(
        [], 0, 0, False, Embedded(np.empty((0, info.dimension), np.float32), np.empty(0, np.int8), info.device)
    )

    def watch(nodes: int, *_tokens_and_budget: int) -> None:
        visit.batches.append(nodes)
        if len(visit.batches) == 4:
            if release:
                encoder.release_memory()
            visit.got = neighbour.take(size)
            visit.taken_at = 4
        elif visit.taken_at and not visit.given_back_at and len(visit.batches) == visit.taken_at + 4:
            neighbour.give_back()
            visit.given_back_at = len(visit.batches)

    visit.embedded = embedder.embed(spec.draw_nodes(lengths), Watch(on_batch=watch))
    return visit


def visit_card(spec: RandomEncoder, lengths: list[int], *, release: bool) -> Visit:
    """A card of 15 GiB, made of a larger one by a second neighbour who holds the rest all the time."""
    encoder = spec.start()
    try:
        free = encoder.read_memory().free_bytes
        if isinstance(encoder, PretendCard):
            return embed_beside(encoder, PretendedNeighbour(encoder), spec, lengths, 2 * free // 5, release=release)
        rest, neighbour = ProcessNeighbour(spec.device), ProcessNeighbour(spec.device)
        try:
            free = encoder.read_memory().free_bytes
            room = 15 * GIB - encoder.describe().weights_bytes
            if free > room and not rest.take(free - room):
                raise RuntimeError(f"{free - room:,} bytes could not be taken off the card, of {free:,} free ones")
            return embed_beside(encoder, neighbour, spec, lengths, 6 * GIB, release=release)
        finally:
            rest.close()
            neighbour.close()
    finally:
        encoder.close()


def report_neighbour(spec: RandomEncoder, report: Report, quick: bool) -> None:
    nodes = 4000 if spec.tiny else 3000 if quick else 6000
    lengths = [64 if spec.tiny else 2000] * nodes
    rows = []
    for release in (True, False):
        visit = visit_card(spec, lengths, release=release)
        kinds = [step.kind for step in visit.embedded.steps]
        stay = visit.batches[visit.taken_at : visit.given_back_at]
        after = visit.batches[visit.given_back_at :]
        rows.append(
            [
                "given back before" if release else "kept", "yes" if visit.got else "refused",
                spread(visit.batches[: visit.taken_at]), spread(stay), spread(after), kinds.count("shrink"),
                kinds.count("oom"), len(visit.embedded.failed),
            ]
        )  # fmt: skip
    report.add("## A neighbour takes 6 GiB of a 15 GiB card after batch 4 and gives them back four batches later")
    header = ("our cached blocks", "the neighbour got its memory", "batch sizes before", "while it is there", "after",
              "shrink steps", "out of memory", "nodes failed")  # fmt: skip
    report.add(to_table(header, rows))


def spread(sizes: list[int]) -> str:
    return f"{min(sizes)}-{max(sizes)}" if sizes else "none"


# ------------------------------------------------------------------------------------------ the script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a small model: the same code, no figures")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, nodes and precisions")
    parser.add_argument("--caps", type=float, nargs="+", default=[15, 8, 4], help="GiB that the process may take")
    parser.add_argument("--only", choices=("errors", "caps", "plain", "neighbour"), nargs="+")
    parser.add_argument("--out", type=Path, help="write the report here, too, and the shapes to FILE.json")
    args = parser.parse_args()
    wanted = set(args.only or ("errors", "caps", "plain", "neighbour"))
    report = Report(args.out)
    report.add("# Memory: bge-m3's shape, random weights" if not args.tiny else "# Memory: a tiny model")
    report.add(describe_machine(args.device))
    spec = RandomEncoder(args.device, tiny=args.tiny, card_bytes=GIB // 8 if args.device == "cpu" else None)
    lengths = spec.draw_lengths(40 if args.tiny else 1500 if args.quick else 6000)
    lengths += [min(n, spec.max_tokens) for n in STORY]
    if args.device == "cpu":
        caps = {"a pretended card": spec}
    else:
        total_bytes = run_apart(read_total_bytes, args.device, tiny=False)
        caps = {f"{cap:g} GiB": replace(spec, fraction=min(1.0, cap * GIB / total_bytes)) for cap in args.caps}
    if "errors" in wanted:
        recorded = report_errors(spec, args.quick, report)
        if args.out is not None:
            args.out.with_suffix(args.out.suffix + ".json").write_text(json.dumps(recorded, indent=1), encoding="utf-8")
    if "caps" in wanted:
        report_caps(spec, lengths, caps, report)
    if "plain" in wanted:
        report_plain(spec, lengths, caps, report)
    if "neighbour" in wanted:
        report_neighbour(spec, report, args.quick)


if __name__ == "__main__":
    main()
