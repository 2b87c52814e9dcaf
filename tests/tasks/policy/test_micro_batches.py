from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.policy.memory import MemoryModel, derive_prior
from tasks.policy.micro_batches import MicroBatchPlan, plan_micro_batches, summarise_plan
from tasks.records import ModelShape

GIB = 1024**3
MIB = 1024**2
MODEL = derive_prior(ModelShape(24, 1024, 16, 4096, 250_002, 8194), "fp16", "sdpa", "sdpa")
MATH = derive_prior(ModelShape(24, 1024, 16, 4096, 250_002, 8194), "fp16", "math", "math")


def draw_lengths(n: int, seed: int = 1, sigma: float = 0.9) -> NDArray[np.int64]:
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(np.log(245), sigma, n), 1, 8192).astype(np.int64)


def assert_plan_holds(
    plan: MicroBatchPlan, lengths: NDArray[np.int64], budget: int, max_tokens: int, max_nodes: int = 4096
) -> None:
    rows = np.concatenate([plan.oversized, *(batch.rows for batch in plan.batches)])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    padded = [batch.padded_tokens for batch in plan.batches]
    assert padded == sorted(padded, reverse=True)
    for batch in plan.batches:
        own = lengths[batch.rows]
        assert batch.padded_tokens == own.max()
        assert batch.masked == (own.min() < own.max())
        assert own.tolist() == sorted(own.tolist(), reverse=True)
        assert batch.predicted_bytes <= budget
        assert batch.nodes <= max_nodes
        assert batch.nodes == 1 or batch.nodes * batch.padded_tokens <= max_tokens
        assert not batch.masked or own.sum() >= 0.85 * batch.nodes * batch.padded_tokens


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 8192), max_size=300).map(np.array) | st.integers(1, 3000).map(draw_lengths),
    budget=st.sampled_from([40 * MIB, 120 * MIB, 300 * MIB, 2 * GIB, 14 * GIB]),
    model=st.sampled_from([MODEL, MATH]),
    max_tokens=st.sampled_from([512, 4096, 32_768]),
    min_tokens=st.sampled_from([1, 1024, 8192]),
    launch_tokens=st.sampled_from([0, 256, 4096]),
    max_nodes=st.sampled_from([1, 7, 4096]),
)
def test_every_node_once_within_the_budget_longest_first(
    lengths: NDArray[np.int64],
    budget: int,
    model: MemoryModel,
    max_tokens: int,
    min_tokens: int,
    launch_tokens: int,
    max_nodes: int,
) -> None:
    plan = plan_micro_batches(
        lengths,
        model,
        budget,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        launch_tokens=launch_tokens,
        max_nodes=max_nodes,
    )
    assert_plan_holds(plan, lengths, budget, max_tokens, max_nodes)
    # Oversized is what does not fit alone, no more and no less.
    too_long = model.predict(1, lengths, False) > budget if len(lengths) else np.array([], bool)
    assert sorted(plan.oversized.tolist()) == np.flatnonzero(too_long).tolist()


@pytest.mark.parametrize("sigma", [0.6, 0.9, 1.2])
@pytest.mark.parametrize("nodes", [8192, 100_000])
def test_log_normal_lengths_need_hardly_any_padding_or_mask(nodes: int, sigma: float) -> None:
    lengths = draw_lengths(nodes, sigma=sigma)
    plan = plan_micro_batches(lengths, MODEL, 8 * GIB, max_tokens=32_768)
    assert_plan_holds(plan, lengths, 8 * GIB, 32_768)
    summary = summarise_plan(plan, lengths)
    assert summary.padding_fraction < 0.02
    assert summary.unmasked_token_fraction >= 0.90
    assert summary.nodes == nodes
    assert summary.tokens == lengths.sum()
    assert summary.peak_bytes == max(batch.predicted_bytes for batch in plan.batches)


def test_few_nodes_are_joined_rather_than_launched_one_by_one() -> None:
    lengths = draw_lengths(200)
    plan = plan_micro_batches(lengths, MODEL, 8 * GIB, max_tokens=32_768)
    assert len(plan.batches) <= 30
    assert summarise_plan(plan, lengths).padding_fraction < 0.06


def test_a_length_too_many_for_one_batch_is_cut_evenly() -> None:
    plan = plan_micro_batches([128] * 65, MODEL, 8 * GIB, max_tokens=64 * 128)
    assert [batch.nodes for batch in plan.batches] == [33, 32]
    assert not any(batch.masked for batch in plan.batches)


def test_lengths_join_only_where_a_launch_costs_more_than_their_padding() -> None:
    lengths = [500] * 10 + [450] * 10  # together: 10,000 tokens, 5 % of them padding
    kwargs = {"max_tokens": 32_768, "min_tokens": 6000}
    dear = plan_micro_batches(lengths, MODEL, 8 * GIB, launch_tokens=1000, **kwargs)
    assert [(batch.nodes, batch.masked) for batch in dear.batches] == [(20, True)]
    apart = plan_micro_batches(lengths, MODEL, 8 * GIB, max_tokens=32_768, min_tokens=100, launch_tokens=0)
    assert [(batch.nodes, batch.masked) for batch in apart.batches] == [(10, False), (10, False)]
    # 250 and 25 tokens would be nearly all padding: apart, however dear a launch is.
    far = plan_micro_batches([250, 25], MODEL, 8 * GIB, max_tokens=32_768, launch_tokens=10_000)
    assert [batch.nodes for batch in far.batches] == [1, 1]


def test_a_node_beyond_max_tokens_goes_alone_and_one_beyond_the_budget_not_at_all() -> None:
    plan = plan_micro_batches([8192, 8192, 100], MODEL, 8 * GIB, max_tokens=4096)
    assert [batch.nodes for batch in plan.batches] == [1, 1, 1]
    tight = plan_micro_batches([100, 8192, 6000], MODEL, 100 * MIB, max_tokens=4096)
    assert tight.oversized.tolist() == [1, 2]
    assert [batch.rows.tolist() for batch in tight.batches] == [[0]]


def test_planning_the_rest_under_a_smaller_budget_is_planning_it_alone() -> None:
    lengths = draw_lengths(3000)
    plan = plan_micro_batches(lengths, MODEL, 2 * GIB, max_tokens=32_768)
    rest = np.concatenate([batch.rows for batch in plan.batches[5:]])
    again = plan_micro_batches(lengths[rest], MODEL, 128 * MIB, max_tokens=32_768)
    assert_plan_holds(again, lengths[rest], 128 * MIB, 32_768)


def test_nothing_to_plan_and_nodes_without_tokens() -> None:
    plan = plan_micro_batches([], MODEL, GIB, max_tokens=4096)
    assert plan.batches == ()
    assert plan.oversized.size == 0
    assert summarise_plan(plan, []).padding_fraction == 0
    with pytest.raises(ValueError, match="shortest length is 0"):
        plan_micro_batches([3, 0], MODEL, GIB, max_tokens=4096)
