"""On a real device: allocator settings, attention kernels, precision, and a CUDA context that is lost."""

from pathlib import Path

import numpy as np
import pytest
from device_checks import check_allocator, encode_some, run_unmasked_and_masked
from random_encoder import RandomEncoder, run_apart

from tasks.backends.allocator import allocator_environment
from tasks.backends.process_encoder import ProcessEncoder
from tasks.engine.calibrate import derive_encoder_prior
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.policy.memory_fit import start_fit

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


def test_expandable_segments_are_on_in_a_device_process(device: str) -> None:
    assert run_apart(check_allocator, RandomEncoder(device, layers=2), tiny=False)


def test_half_precision_never_holds_the_scores(device: str) -> None:
    found = run_apart(run_unmasked_and_masked, RandomEncoder(device, layers=2), tiny=False)
    assert found["kernels"] == ("sdpa", "sdpa")
    assert found["fused"] == found["story"] == "done"
    assert found["peak"] < found["scores"] / 2
    assert found["story_peak"] < found["story_scores"] / 2


def test_half_precision_agrees_with_single_precision_on_the_host(device: str) -> None:
    half = run_apart(encode_some, RandomEncoder(device, precision="fp16", layers=2), tiny=False)
    single = run_apart(encode_some, RandomEncoder("cpu", precision="fp32", layers=2), tiny=False)
    assert np.einsum("nd,nd->n", half, single).min() >= 0.999


def test_a_lost_context_costs_one_process_and_no_node(device: str, tmp_path: Path) -> None:
    marker = tmp_path / "sabotage"
    spec = RandomEncoder(device, layers=2, marker=str(marker))
    nodes = spec.draw_nodes([400] * 40 + [60] * 100)
    encoder = ProcessEncoder(spec, environment=allocator_environment())
    try:
        prior = derive_encoder_prior(encoder.describe())
        embedder = NodeEmbedder(encoder, start_fit(prior), EmbedSettings(max_micro_batch_tokens=4000))
        calm = embedder.embed(nodes)
        first_pid = encoder.pid
        marker.touch()
        embedded = embedder.embed(nodes)
        assert encoder.pid != first_pid
    finally:
        encoder.close()
    assert not marker.exists()
    assert [step.kind for step in embedded.steps].count("restart") == 1
    assert embedded.failed == {}
    assert sum(embedded.batch_sizes) == len(nodes)
    assert np.einsum("nd,nd->n", calm.vectors, embedded.vectors).min() > 0.999
