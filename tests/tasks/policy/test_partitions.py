from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.partitions import (
    MAX_PARTITION_TOKENS,
    MIN_PARTITION_TOKENS,
    PartitionBuilder,
    choose_partition_tokens,
    plan_partitions,
)

lengths = st.lists(st.integers(1, 500), max_size=200)
limits = st.tuples(st.integers(1, 50), st.integers(1, 2000))


@settings(deadline=None)
@given(lengths, limits)
def test_every_node_once_in_order_within_the_limits(tokens: list[int], limit: tuple[int, int]) -> None:
    max_nodes, max_tokens = limit
    boundaries = plan_partitions(tokens, max_nodes, max_tokens).tolist()
    assert boundaries[0] == 0
    assert boundaries[-1] == len(tokens)
    for first, last in pairwise(boundaries):
        assert first < last
        assert last - first <= max_nodes
        assert sum(tokens[first:last]) <= max_tokens or last - first == 1
        # And no partition ends before it has to.
        is_full = last - first == max_nodes
        assert last == len(tokens) or is_full or sum(tokens[first : last + 1]) > max_tokens


@settings(deadline=None)
@given(lengths, limits)
def test_the_plan_is_what_a_run_will_cut(tokens: list[int], limit: tuple[int, int]) -> None:
    builder = PartitionBuilder(*limit, max_host_bytes=2**40)
    cuts = [i for i, n in enumerate(tokens) if builder.add(n, host_bytes=1)]
    ends = [len(tokens)] if tokens else []
    assert [0, *cuts, *ends] == plan_partitions(tokens, *limit).tolist()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 10_000)), min_size=1), st.integers(1, 20_000))
def test_host_memory_is_a_limit_too(nodes: list[tuple[int, int]], max_host_bytes: int) -> None:
    builder = PartitionBuilder(10, 2000, max_host_bytes)
    partitions: list[list[tuple[int, int]]] = [[]]
    for node in nodes:
        if builder.add(*node):
            partitions.append([])
        partitions[-1].append(node)
        assert builder.nodes == len(partitions[-1])
        assert builder.tokens == sum(tokens for tokens, _ in partitions[-1])
    for partition in partitions:
        assert len(partition) == 1 or sum(size for _, size in partition) <= max_host_bytes


@pytest.mark.parametrize(
    ("tokens_per_s", "expected"),
    [(0, MIN_PARTITION_TOKENS), (10, MIN_PARTITION_TOKENS), (10_000, 200_000), (1e9, MAX_PARTITION_TOKENS)],
)
def test_partition_size_follows_the_device_within_bounds(tokens_per_s: float, expected: int) -> None:
    assert choose_partition_tokens(tokens_per_s, 20.0) == expected


def test_a_million_nodes() -> None:
    tokens = np.random.default_rng(0).integers(1, 500, 1_000_000)
    boundaries = plan_partitions(tokens, 8192, 1_000_000)
    sums = np.add.reduceat(tokens, boundaries[:-1])
    assert sums.max() <= 1_000_000
    assert sums.sum() == tokens.sum()
