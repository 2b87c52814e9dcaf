"""Partitions: the cut of the stream of nodes into units of scheduling, retry and durability."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_PARTITION_TOKENS = 50_000
"""Below this even a slow CPU is done before the cost of a task (some 30 ms) is lost in the work."""

MAX_PARTITION_TOKENS = 20_000_000
"""Above this a retry or a hand-over costs more than the fewer tasks save, whatever a probe says of the device's
speed."""


def choose_partition_tokens(tokens_per_s: float, target_s: float) -> int:
    """Tokens that a device of this measured speed embeds in `target_s` seconds, within sensible bounds."""
    return int(min(max(tokens_per_s * target_s, MIN_PARTITION_TOKENS), MAX_PARTITION_TOKENS))


class PartitionBuilder:
    """Counts the nodes of one partition as they stream by, and says when the next one has to start.

    A partition keeps every limit; a single node above one gets a partition of its own.
    """

    def __init__(self, max_nodes: int, max_tokens: int, max_host_bytes: int) -> None:
        self.max_nodes = max_nodes
        self.max_tokens = max_tokens
        self.max_host_bytes = max_host_bytes
        self.nodes = 0
        self.tokens = 0
        self.host_bytes = 0

    def add(self, tokens: int, host_bytes: int) -> bool:
        """Count a node. True: it no longer fitted, the partition before it is complete, and this node opens the
        next."""
        is_full = self.nodes > 0 and (
            self.nodes + 1 > self.max_nodes
            or self.tokens + tokens > self.max_tokens
            or self.host_bytes + host_bytes > self.max_host_bytes
        )
        if is_full:
            self.nodes = self.tokens = self.host_bytes = 0
        self.nodes += 1
        self.tokens += tokens
        self.host_bytes += host_bytes
        return is_full


def plan_partitions(lengths: ArrayLike, max_nodes: int, max_tokens: int) -> NDArray[np.int64]:
    """Boundaries of the partitions that PartitionBuilder would cut, without the host memory, which only a run knows.

    `lengths`: tokens a node in document order, shape (n,). Partition k holds nodes boundaries[k] to boundaries[k + 1]
    - 1; shape (partitions + 1,), from 0 to n; just [0] for no nodes.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    nodes = int(lengths.size)
    # A list: bisect on it takes 0.3 us a cut, searchsorted on the array 3 us.
    tokens_before = [0, *np.cumsum(lengths).tolist()]
    boundaries = [0]
    while (first := boundaries[-1]) < nodes:
        last = (
            bisect_right(
                tokens_before, tokens_before[first] + max_tokens, lo=first, hi=min(first + max_nodes, nodes) + 1
            )
            - 1
        )
        boundaries.append(max(last, first + 1))
    return np.array(boundaries, dtype=np.int64)
