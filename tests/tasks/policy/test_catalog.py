from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.catalog import CATALOG, compare_models, count_flops, split_lengths, weights_bytes

GIB = 1024**3
BY_NAME = {model.name: model for model in CATALOG}
BGE_M3 = BY_NAME["BAAI/bge-m3"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("BAAI/bge-m3", 568),
        ("BAAI/bge-base-en-v1.5", 109),
        ("BAAI/bge-small-en-v1.5", 33.4),
        ("sentence-transformers/all-MiniLM-L6-v2", 22.7),
    ],
)
def test_shapes_give_the_published_parameter_counts(name: str, millions: float) -> None:
    # Ours leave out the pooler, h^2 + h: 0.2 % of bge-m3.
    assert BY_NAME[name].shape.parameters / 1e6 == pytest.approx(millions, rel=0.01)


def test_weights_take_two_or_four_bytes_a_parameter() -> None:
    assert weights_bytes(BGE_M3.shape, "fp16") == pytest.approx(1.06 * GIB, rel=0.01)
    assert weights_bytes(BGE_M3.shape, "fp32") == 2 * weights_bytes(BGE_M3.shape, "bf16")


def test_attention_makes_one_long_node_dearer_than_as_many_tokens_in_short_ones() -> None:
    short, long = count_flops(BGE_M3.shape, [512] * 16), count_flops(BGE_M3.shape, [8192])
    assert 1.5 < long / short < 2.5
    # Twice the multiply-adds of the layers' matrices, a token: 24 * (4 h^2 + 2 h i) = 302 M.
    assert count_flops(BGE_M3.shape, [1]) == pytest.approx(2 * 302e6, rel=0.01)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20_000), max_size=50), st.integers(1, 8192))
def test_splitting_keeps_every_token_and_the_limit(lengths: list[int], limit: int) -> None:
    pieces = split_lengths(lengths, limit)
    assert pieces.sum() == sum(lengths)
    assert len(pieces) == sum(-(-n // limit) for n in lengths)
    assert all(1 <= n <= limit for n in pieces)


def test_a_card_too_small_for_the_chosen_model_shows_the_lighter_choice() -> None:
    lengths = np.array([100, 400, 3000, 8192])
    fits = {fit.model: fit for fit in compare_models(lengths, 1 * GIB, "fp16", chosen=BGE_M3.shape)}
    assert not fits["BAAI/bge-m3"].fits  # 1.06 GiB of weights alone
    assert fits["BAAI/bge-m3"].largest_batch == 0
    assert fits["BAAI/bge-m3"].spilled_nodes == 4
    assert fits["BAAI/bge-m3"].relative_cost == pytest.approx(1)
    small = fits["BAAI/bge-small-en-v1.5"]
    assert small.fits
    assert small.spilled_nodes == 0
    assert small.largest_batch > 100
    costs = [fit.relative_cost for fit in fits.values()]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.05


def test_only_the_long_nodes_spill_where_the_weights_fit() -> None:
    (m3, *_) = compare_models([100, 8192], int(1.2 * GIB), "fp16", chosen=BGE_M3.shape)
    assert not m3.fits
    assert m3.spilled_nodes == 1
    (m3, *_) = compare_models([100, 8192], 15 * GIB, "fp16", chosen=BGE_M3.shape)
    assert m3.fits
    assert m3.largest_batch > 50


def test_no_nodes_is_no_reason_to_fail() -> None:
    assert all(fit.fits for fit in compare_models([], 15 * GIB, "fp16", chosen=BGE_M3.shape))
