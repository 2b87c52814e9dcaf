"""bge-m3's shape with random weights, drawn nodes, and what runs on them in a process of its own.

For tests/gpu and the gpu_*.py scripts: needs torch, transformers, sentence-transformers and numpy, no model hub and no
tokenizer. `tiny` is the same path in small, for a machine without a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # a script's own folder is on the path, the checkout is not
    sys.path.insert(0, str(ROOT))

from tasks.backends.allocator import allocator_environment  # noqa: E402
from tasks.backends.encoder import Encoder  # noqa: E402
from tasks.backends.process_encoder import ProcessEncoder  # noqa: E402
from tasks.backends.processes import spawn_pool  # noqa: E402
from tasks.backends.torch_encoder import TorchEncoder  # noqa: E402
from tasks.engine.calibrate import derive_encoder_prior  # noqa: E402
from tasks.policy.failures import classify_failure  # noqa: E402
from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, TokenIds  # noqa: E402

GIB = 1024**3
BGE_M3 = {
    "vocab_size": 250_002,
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
    "pad_token_id": 1,
}
TINY = BGE_M3 | {
    "vocab_size": 2000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 514,
}
STORY = (3670, 310, 245, 198, 260, 120, 402, 88, 231, 175)
"""The batch that kills a 15 GiB card: one long text pads nine short ones."""


@dataclass(frozen=True)
class RandomEncoder:
    """How to build it; picklable, so that a ProcessEncoder can."""

    device: str
    precision: str = "auto"
    fraction: float = 1.0
    layers: int = 24
    tiny: bool = False
    attention: str = "sdpa"
    fused: bool = True  # False: torch's math attention, as for bf16 on a T4
    card_bytes: int | None = None  # a CPU that passes for a card of this size
    marker: str = ""  # a file: while it is there, the encoder provokes a device-side assert, and removes it first

    def __call__(self) -> Encoder:
        """Build it here and now, on its device."""
        import torch

        if not self.fused:
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
        encoder = TorchEncoder.from_model(
            self.build_model(),
            device=self.device,
            classify=classify_failure,
            precision=self.precision,
            fraction=self.fraction,
            revision="random",
        )
        if self.device != "cpu":
            encoder.describe()
            torch.cuda.empty_cache()  # the weights were drawn there in fp32
        if self.card_bytes is not None:
            return PretendCard(encoder, self.card_bytes)
        return Saboteur(encoder, Path(self.marker)) if self.marker else encoder

    def build_model(self) -> Any:
        """The bare transformer, the same weights in every process for the same layers and device."""
        import torch
        import transformers

        shape = TINY if self.tiny else BGE_M3 | {"num_hidden_layers": self.layers}
        config = transformers.XLMRobertaConfig(**shape, attn_implementation=self.attention)
        torch.manual_seed(0)
        # 568 M random numbers take a CPU half a minute and a GPU none; small models are drawn alike for both.
        with torch.device("cpu" if self.tiny or self.layers <= 2 else self.device):
            return transformers.XLMRobertaModel(config, add_pooling_layer=False).eval()

    @property
    def max_tokens(self) -> int:
        return (TINY if self.tiny else BGE_M3)["max_position_embeddings"] - 2

    @property
    def vocabulary(self) -> int:
        return (TINY if self.tiny else BGE_M3)["vocab_size"]

    def start(self) -> Encoder:
        """As a run has it: in a process of its own on a GPU; here for a tiny one, to save the imports."""
        return self() if self.tiny else ProcessEncoder(self, environment=allocator_environment())

    def draw_lengths(self, nodes: int, seed: int = 0) -> list[int]:
        """Log-normal: median 245, sigma 0.9, clipped to the model's limit; a tiny model's are an eighth of it."""
        rng = np.random.default_rng(seed)
        median = 245 / 8 if self.tiny else 245
        return [int(n) for n in rng.lognormal(np.log(median), 0.9, nodes).clip(4, self.max_tokens)]

    def draw_nodes(self, lengths: Sequence[int], seed: int = 0) -> list[TokenIds]:
        rng = np.random.default_rng(seed)
        return [rng.integers(5, self.vocabulary - 1, min(n, self.max_tokens), dtype=np.int32) for n in lengths]


def run_apart(function: Callable[..., Any], *arguments: Any, tiny: bool) -> Any:
    """The function's answer from a fresh process with the allocator's environment; here for a tiny model."""
    if tiny:
        return function(*arguments)
    pool = spawn_pool(1, environment=allocator_environment())
    try:
        return pool.submit(function, *arguments).result()
    finally:
        pool.shutdown(wait=True)


class PretendCard:
    """A CPU encoder that passes for a card, to run these scripts without one: it tells peaks, a tenth above the closed
    form, and is out of memory above `total_bytes`."""

    def __init__(self, inner: Encoder, total_bytes: int) -> None:
        self.inner = inner
        self.total_bytes = total_bytes
        self.taken_bytes = 0
        self.prior = derive_encoder_prior(inner.describe())
        self.release_memory, self.close = inner.release_memory, inner.close

    def describe(self) -> EncoderInfo:
        info = self.inner.describe()
        key = replace(info.key, device_name="no GPU: a CPU that passes for one", device_total_bytes=self.total_bytes)
        return replace(info, key=key, device="cuda:0")

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        lengths = [len(ids) for ids in token_ids]
        peak = int(1.1 * int(self.prior.predict(len(lengths), max(lengths), min(lengths) != max(lengths))))
        if peak > self.read_memory().free_bytes:
            return BatchOutcome("oom", message=f"{peak:,} bytes do not fit the pretended card")
        return replace(self.inner.encode(token_ids), peak_bytes=peak, reserved_peak_bytes=peak)

    def read_memory(self) -> DeviceMemory:
        free = self.total_bytes - self.describe().weights_bytes - self.taken_bytes
        return DeviceMemory(self.total_bytes, max(0, free), self.total_bytes)

    def restart(self) -> None:
        raise AssertionError("a pretended card is never lost")


class Saboteur:
    """Breaks the CUDA context for good, once: an index out of range on the device, as a wrong token id would."""

    def __init__(self, inner: Encoder, marker: Path) -> None:
        self.inner = inner
        self.marker = marker
        self.describe, self.read_memory = inner.describe, inner.read_memory
        self.release_memory, self.restart, self.close = inner.release_memory, inner.restart, inner.close

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        import torch

        if self.marker.exists():
            self.marker.unlink()
            table = torch.zeros(4, 4, device=self.describe().device)
            table[torch.full((8,), 1000, device=table.device)]
        return self.inner.encode(token_ids)  # reports the assert, as asynchronous faults are: in the next call


# ------------------------------------------------------------------------------------------ what others do


def build_plain_model(spec: RandomEncoder, nodes: Sequence[TokenIds]) -> Any:
    """A SentenceTransformer that encodes names of nodes; padding, mask, sorting and loop are its own.

    A name is as long as its node has tokens, since encode() sorts by the length of the text. Looking a name up is
    cheaper than tokenizing would be: in favour of the plain model.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    transformer = spec.build_model()

    class Names(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformer

        def preprocess(self, inputs: list[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
            rows = [nodes[int(text.split(".", 1)[0])] for text in inputs]
            width = max(len(ids) for ids in rows)
            padded, mask = np.full((len(rows), width), 1, np.int64), np.zeros((len(rows), width), np.int64)
            for row, ids in enumerate(rows):
                padded[row, : len(ids)], mask[row, : len(ids)] = ids, 1
            return {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            output = self.model(features["input_ids"], attention_mask=features["attention_mask"])
            return {**features, "token_embeddings": output.last_hidden_state}

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[spec.precision]
    modules = [Names(), Pooling(transformer.config.hidden_size, "cls"), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu").eval().to(dtype)
    if spec.device != "cpu":
        torch.cuda.empty_cache()
        if spec.fraction < 1:
            torch.cuda.set_per_process_memory_fraction(spec.fraction, spec.device)
    return model.to(spec.device)


def to_names(lengths: Sequence[int]) -> list[str]:
    return [f"{row}." + "x" * (length - len(f"{row}.")) for row, length in enumerate(lengths)]


@dataclass(frozen=True)
class Plain:
    """One way to run the plain model: `slice_size` texts a call of encode() (None: all), `batch_size` in it."""

    name: str
    batch_size: int
    slice_size: int | None = None


@dataclass(frozen=True)
class Timed:
    name: str
    seconds: float | None  # None: it ran out of memory
    peak_bytes: int | None = None


def time_plain(spec: RandomEncoder, lengths: Sequence[int], ways: Sequence[Plain], repeats: int) -> list[Timed]:
    """The best of some runs of each way; meant for run_apart()."""
    import time

    import torch

    nodes, names = spec.draw_nodes(lengths), to_names(lengths)
    model = build_plain_model(spec, nodes)
    on_gpu = spec.device != "cpu"
    model.encode(names[:64], batch_size=8, show_progress_bar=False)
    timed = []
    for way in ways:
        best, failed = None, False
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(spec.device)
        for _ in range(repeats):
            started = time.perf_counter()
            try:
                step = way.slice_size or len(names)
                for first in range(0, len(names), step):
                    vectors = model.encode(
                        names[first : first + step], batch_size=way.batch_size, show_progress_bar=False
                    )
                    if way.slice_size:
                        vectors.tolist()  # LlamaIndex's embeddings are lists of Python floats
            except RuntimeError as error:
                if classify_failure([((type(error).__name__,), str(error))]) != "oom":
                    raise
                failed = True
            if failed:
                break
            took = time.perf_counter() - started
            best = took if best is None else min(best, took)
        peak = torch.cuda.max_memory_allocated(spec.device) if on_gpu else None
        timed.append(Timed(way.name, None if failed else best, peak))
        if failed and on_gpu:
            torch.cuda.empty_cache()
    return timed


# ------------------------------------------------------------------------------------------ reports


def describe_machine(device: str) -> str:
    """Device, versions and date: a figure without them means nothing."""
    import sentence_transformers
    import torch
    import transformers

    name = (
        torch.cuda.get_device_properties(device).name
        if device != "cpu"
        else "no GPU: a tiny model on a CPU, the figures mean nothing"
    )
    return (
        f"{name}; torch {torch.__version__}, transformers {transformers.__version__}, sentence-transformers "
        f"{sentence_transformers.__version__}, numpy {np.__version__}, python {sys.version.split()[0]}; "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    )


def to_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def to_gib(size: float) -> str:
    return f"{size / GIB:.2f}"


class Report:
    """Prints as it goes and writes the whole to a file at the end, also after a failure."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.parts: list[str] = []

    def add(self, text: str) -> None:
        self.parts.append(text)
        sys.stdout.write(text + "\n\n")
        sys.stdout.flush()
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")
