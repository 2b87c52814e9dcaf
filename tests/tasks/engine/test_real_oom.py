"""A real allocator says no: RLIMIT_AS in the device process, a real model, and a driver that promises far too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tasks.backends.process_encoder import EncoderSpec, ProcessEncoder
from tasks.engine.calibrate import derive_encoder_prior
from tasks.engine.cpu_pool import CpuPool
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import ON_CPU, ON_DEVICE, EmbedSettings
from tasks.engine.measure_device import MeasuredDevice
from tasks.policy.failures import classify_failure
from tasks.policy.memory_fit import start_fit
from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, TokenIds, Vectors

MIB = 1024**2


class Promising(ProcessEncoder):
    """Says that the whole machine is free: a driver that misjudges, or a neighbour that is faster than the next reading."""

    def read_memory(self) -> DeviceMemory:
        return replace(super().read_memory(), total_bytes=2**40, free_bytes=2**40, limit_bytes=2**40)

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        outcome = super().encode(token_ids)
        self.kinds.append(outcome.kind)
        self.embedded += len(token_ids) if outcome.kind == "done" else 0
        return outcome

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__(spec)
        self.kinds: list[str] = []
        self.embedded = 0


def start(model_path: str, headroom_bytes: int | None) -> Promising:
    """A device process with `headroom_bytes` of address space on top of the loaded model."""
    # One thread: a limit that hits while OpenMP starts its own threads ends the process instead.
    return Promising(EncoderSpec(model_path, "cpu", classify_failure, threads=1, address_space_bytes=headroom_bytes))


def make_embedder(encoder: Promising, spill: CpuPool | None = None) -> NodeEmbedder:
    info: EncoderInfo = encoder.describe()
    settings = EmbedSettings(max_micro_batch_tokens=262_144)
    return NodeEmbedder(encoder, start_fit(derive_encoder_prior(info)), settings, spill=spill)


def make_worker(model_path: str) -> tuple[NodeEmbedder, MeasuredDevice]:
    embedder = make_embedder(start(model_path, None))
    return embedder, MeasuredDevice(embedder.fit, 0.0, 256, "not measured")


@pytest.fixture(scope="module")
def plain_model(minilm: str) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(minilm, device="cpu")


def embed_plainly(model: Any, nodes: Sequence[TokenIds]) -> Vectors:
    """What SentenceTransformer itself makes of the same tokens, one node at a time: no padding, no packing."""
    import torch

    with torch.inference_mode():
        rows = [
            model({"input_ids": torch.tensor(ids[None], dtype=torch.int64)})["sentence_embedding"][0].numpy()
            for ids in nodes
        ]
    return np.stack(rows)


def make_nodes(lengths: Sequence[int]) -> list[TokenIds]:
    rng = np.random.default_rng(0)
    return [np.r_[101, rng.integers(1000, 20_000, length - 2), 102].astype(np.int32) for length in lengths]


@pytest.fixture
def encoders() -> Iterator[list[Any]]:
    started: list[Any] = []
    yield started
    for one in started:
        one.close()


def test_the_run_survives_a_first_batch_that_can_not_fit(minilm: str, plain_model: Any, encoders: list[Any]) -> None:
    encoder = start(minilm, 60 * MIB)
    encoders.append(encoder)
    nodes = make_nodes([256] * 24 + [20] * 20)
    embedded = make_embedder(encoder).embed(nodes)
    assert encoder.kinds[0] == "oom"
    assert next(step.nodes_before for step in embedded.steps if step.kind == "oom") == 24
    assert embedded.failed == {}
    assert (embedded.placed == ON_DEVICE).all()
    assert encoder.embedded == len(nodes)  # nobody twice
    assert np.einsum("nd,nd->n", embedded.vectors, embed_plainly(plain_model, nodes)).min() > 0.9999


def test_nodes_that_fit_nowhere_on_the_device_end_in_the_pool(
    minilm: str, plain_model: Any, encoders: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # glibc sets 64 MiB of address space aside for each thread that allocates: room inside the limit, were there several.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    pool = CpuPool(lambda: make_worker(minilm), 1)
    encoders.append(pool)
    encoder = start(minilm, 5 * MIB)
    encoders.append(encoder)
    nodes = make_nodes([256] * 6 + [8] * 10)
    embedded = make_embedder(encoder, pool).embed(nodes).collect_spilled()
    assert {"oom", "spill"} <= {step.kind for step in embedded.steps}
    assert embedded.failed == {}
    assert (embedded.placed[:6] == ON_CPU).all()
    assert (embedded.placed[6:] == ON_DEVICE).any()
    assert encoder.embedded == int((embedded.placed == ON_DEVICE).sum())
    assert np.einsum("nd,nd->n", embedded.vectors, embed_plainly(plain_model, nodes)).min() > 0.9999
