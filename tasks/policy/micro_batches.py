"""Micro-batches from token counts and a byte budget: which nodes go through the model together.

Nodes of equal length need no padding and no attention mask, so no [b, 1, s, s] tensor and no slower attention kernel.
A launch costs time of its own, though: about as much as `launch_tokens` tokens, and a batch below `min_tokens` doesn't
fill the device and takes as long as one that does. Above that a device's throughput is flat: two unmasked batches of
4,000 tokens take as long as one of 8,000, so a masked batch that joins two lengths pays only where the lengths alone
would not fill the device. Hence:

1. a length with enough nodes for `min_tokens`, or for the most that fits, becomes unmasked batches, all of one size
   (33 + 32, not 64 + 1);
2. the other lengths, neighbours in the order of length, are joined into masked batches where that is cheaper than a
   launch each, by dynamic programming over the runs, with padding bounded in each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tasks.policy.memory import MemoryModel
from tasks.records import MicroBatch

MAX_NODES = 4096
"""Of one micro-batch: what gets lost and redone when one fails, and the rows that very short nodes could pile up."""

MIN_TOKENS = 1024
"""Below this a launch does not fill the device, nor below `launch_tokens`, if that is more."""

LAUNCH_TOKENS = 256
"""What a launch costs by itself, in tokens, where it was not measured: calibrate() measures it."""

MAX_PAD_FRACTION = 0.15
"""Padding of a masked batch at most, of its padded tokens. The cost decides below it: 8,192 log-normal lengths get 0.1
% in all, and 200 of them 4 %, where a bound of 6 % would take 33 batches instead of 25."""

MASK_COST = 1.05
"""A masked batch's time against an unmasked one of as many padded tokens: builds the mask, reads it in every layer."""

_WINDOW = 128  # lengths that one masked batch may join: 256 gave the same plans, and keeps the search linear


@dataclass(frozen=True, slots=True)
class MicroBatchPlan:
    """`batches` longest first; rows index the planned lengths. `oversized`: rows that don't fit even alone, longest
    first."""

    batches: tuple[MicroBatch, ...]
    oversized: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a plan amounts to; oversized rows are not in it."""

    micro_batches: int
    nodes: int
    tokens: int
    padding_fraction: float  # of the padded tokens
    unmasked_token_fraction: float
    peak_bytes: int


def plan_micro_batches(
    lengths: ArrayLike,
    model: MemoryModel,
    budget_bytes: int,
    *,
    max_tokens: int,
    min_tokens: int = MIN_TOKENS,
    launch_tokens: int = LAUNCH_TOKENS,
    max_nodes: int = MAX_NODES,
    max_pad_fraction: float = MAX_PAD_FRACTION,
) -> MicroBatchPlan:
    """Every row once, in a batch whose predicted peak is within the budget, or in `oversized`.

    `lengths`: tokens a node, shape (n,), each >= 1. `max_tokens` caps a batch's padded tokens; a single longer node
    still goes, alone. To plan anew under another budget, call it with the rows that are left: 8,192 nodes take some
    milliseconds.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.size == 0:
        return MicroBatchPlan((), np.empty(0, dtype=np.int64))
    if lengths.min() < 1:
        raise ValueError(f"A node without tokens can't be planned: the shortest length is {lengths.min()}")
    min_tokens = max(min_tokens, launch_tokens)
    order = np.argsort(-lengths, kind="stable").astype(np.int64, copy=False)
    # One group a length, longest first: order[start : start + count] are its rows.
    group_length, start, count = _group_equal(lengths[order])
    fits = np.minimum(model.largest_batch(group_length, False, budget_bytes), max_nodes)
    too_long = fits == 0
    per_batch = np.minimum(fits, np.maximum(max_tokens // group_length, 1))

    small = ~too_long & (count * group_length < min_tokens) & (count < per_batch)
    large = ~too_long & ~small
    pieces: list[tuple[NDArray[np.int64], int, bool]] = []
    for i in np.flatnonzero(large):
        rows = order[start[i] : start[i] + count[i]]
        batches = -(-int(count[i]) // int(per_batch[i]))
        bounds = (np.arange(batches + 1) * int(count[i])) // batches
        pieces.extend((rows[a:b], int(group_length[i]), False) for a, b in pairwise(bounds))
    index = np.flatnonzero(small)
    limits = _Limits(max_tokens, min_tokens, launch_tokens, max_nodes, max_pad_fraction)
    most_masked = model.largest_batch(group_length[index], True, budget_bytes)
    for first, last in _join_lengths(group_length[index], count[index], most_masked, limits):
        joined = [order[start[i] : start[i] + count[i]] for i in index[first:last]]
        rows = joined[0] if len(joined) == 1 else np.concatenate(joined)
        pieces.append((rows, int(group_length[index[first]]), len(joined) > 1))

    oversized = np.concatenate([order[start[i] : start[i] + count[i]] for i in np.flatnonzero(too_long)] or [order[:0]])
    return MicroBatchPlan(_to_batches(pieces, model), oversized)


def summarise_plan(plan: MicroBatchPlan, lengths: ArrayLike) -> PlanSummary:
    """Padding, mask and peak of a plan of these lengths."""
    lengths = np.asarray(lengths, dtype=np.int64)
    real = padded = unmasked = nodes = 0
    for batch in plan.batches:
        tokens = int(lengths[batch.rows].sum())
        real += tokens
        padded += batch.nodes * batch.padded_tokens
        unmasked += 0 if batch.masked else tokens
        nodes += batch.nodes
    return PlanSummary(
        micro_batches=len(plan.batches),
        nodes=nodes,
        tokens=real,
        padding_fraction=1 - real / padded if padded else 0.0,
        unmasked_token_fraction=unmasked / real if real else 1.0,
        peak_bytes=max((batch.predicted_bytes for batch in plan.batches), default=0),
    )


@dataclass(frozen=True, slots=True)
class _Limits:
    max_tokens: int
    min_tokens: int
    launch_tokens: int
    max_nodes: int
    max_pad_fraction: float


def _group_equal(
    descending: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(length, first position, count) of each run of equal lengths."""
    start = np.flatnonzero(np.concatenate([[True], descending[1:] != descending[:-1]]))
    count = np.diff(np.concatenate([start, [descending.size]]))
    return descending[start], start, count


def _join_lengths(
    length: NDArray[np.int64], count: NDArray[np.int64], most_masked: NDArray[np.int64], limits: _Limits
) -> list[tuple[int, int]]:
    """The cheapest cut of the groups into runs [first, last): each run is one batch. Shortest path over the cut
    positions."""
    groups = len(length)
    nodes_before = np.concatenate([[0], np.cumsum(count)])
    tokens_before = np.concatenate([[0], np.cumsum(count * length)])
    alone = limits.launch_tokens + np.maximum(length * count, limits.min_tokens).astype(np.float64)
    cost = np.zeros(groups + 1)
    cut_from = np.zeros(groups + 1, dtype=np.int64)
    for last in range(1, groups + 1):
        first = np.arange(max(0, last - _WINDOW), last - 1)
        cut_from[last], cost[last] = last - 1, cost[last - 1] + alone[last - 1]
        if first.size == 0:
            continue
        nodes = nodes_before[last] - nodes_before[first]
        padded = nodes * length[first]
        real = tokens_before[last] - tokens_before[first]
        joined = cost[first] + limits.launch_tokens + np.maximum(padded * MASK_COST, limits.min_tokens)
        allowed = (nodes <= np.minimum(most_masked[first], limits.max_nodes)) & (padded <= limits.max_tokens)
        allowed &= padded - real <= limits.max_pad_fraction * padded
        joined[~allowed] = np.inf
        best = int(joined.argmin())
        if joined[best] < cost[last]:
            cut_from[last], cost[last] = first[best], joined[best]
    runs = []
    last = groups
    while last > 0:
        runs.append((int(cut_from[last]), last))
        last = int(cut_from[last])
    return runs


def _to_batches(pieces: Sequence[tuple[NDArray[np.int64], int, bool]], model: MemoryModel) -> tuple[MicroBatch, ...]:
    """Longest first, then widest first: the largest peak comes early, where a wrong model is found out cheaply."""
    if not pieces:
        return ()
    nodes = np.array([len(rows) for rows, _, _ in pieces])
    padded = np.array([length for _, length, _ in pieces])
    masked = np.array([is_masked for _, _, is_masked in pieces])
    predicted = model.predict(nodes, padded, masked)
    return tuple(
        MicroBatch(pieces[i][0], pieces[i][1], pieces[i][2], int(predicted[i])) for i in np.lexsort((-nodes, -padded))
    )
