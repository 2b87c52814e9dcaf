"""The ladder: what to do when a micro-batch fails. budget -> 1/2 -> 1/4 ... -> one node at a time -> CPU pool.

Pure: a state and an outcome give the next state and an action. The loop that carries the actions out is
tasks/engine/embed_nodes.py. Additive increase, multiplicative decrease, as TCP does it: halving finds a batch that fits
within a few tries whatever the reason of the failure was, growing back slowly does not run into it again at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Action = Literal["retry", "replan", "spill_batch", "spill_longer", "restart", "give_up"]
"""retry: the same micro-batch once more. replan: plan what is left under the new cap. spill_batch: these nodes leave the
device. spill_longer: every node longer than half of this one leaves. restart: new process, then replan. give_up: all leave."""


@dataclass(frozen=True, slots=True)
class LadderSettings:
    grow_after: int = 8  # micro-batches without trouble before the cap grows a step
    growth_steps: int = 8  # additive steps from nothing back to the whole budget
    max_single_failures: int = (
        3  # one node alone failed so often in a row: longer nodes than half of it leave the device
    )
    max_restarts: int = 3  # device processes replaced in one partition before the device is given up


@dataclass(frozen=True, slots=True)
class LadderState:
    """`cap_bytes`: predicted bytes a micro-batch may have, None while nothing went wrong."""

    cap_bytes: int | None = None
    successes: int = 0
    single_failures: int = 0
    ambiguous_failures: int = 0
    sticky_failures: int = 0  # of the batch at hand
    restarts: int = 0

    def limit(self, budget_bytes: int) -> int:
        return budget_bytes if self.cap_bytes is None else min(budget_bytes, self.cap_bytes)

    def start_partition(self) -> LadderState:
        """The cap survives from partition to partition, the counts of trouble don't: each gets its tries on the device."""
        return replace(self, single_failures=0, ambiguous_failures=0, sticky_failures=0, restarts=0)


def climb(state: LadderState, settings: LadderSettings, *, budget_bytes: int) -> LadderState:
    """After a micro-batch that went through."""
    successes = state.successes + 1
    calm = replace(state, successes=successes, single_failures=0, ambiguous_failures=0, sticky_failures=0)
    if state.cap_bytes is None or successes % settings.grow_after:
        return calm
    cap_bytes = state.cap_bytes + max(1, budget_bytes // settings.growth_steps)
    return replace(calm, cap_bytes=None if cap_bytes >= budget_bytes else cap_bytes)


def step_down(
    state: LadderState, settings: LadderSettings, *, nodes: int, predicted_bytes: int
) -> tuple[LadderState, Action]:
    """After an out-of-memory: half of what failed, or, where one node alone failed, away with it.

    Half of the failed batch's own prediction, not of the budget: where the model is wrong or a neighbour has moved in, the
    failed batch may have been far below the budget, and half of the budget would plan it again.
    """
    if nodes > 1:
        return replace(state, cap_bytes=max(1, predicted_bytes // 2), successes=0, single_failures=0), "replan"
    singles = state.single_failures + 1
    if singles < settings.max_single_failures:
        return replace(state, cap_bytes=max(1, predicted_bytes), successes=0, single_failures=singles), "spill_batch"
    return replace(state, cap_bytes=max(1, predicted_bytes // 2), successes=0, single_failures=0), "spill_longer"


def clean_up(state: LadderState, settings: LadderSettings, *, nodes: int) -> tuple[LadderState, Action]:
    """After an ambiguous error: one retry with the memory cleaned up, then it counts as a lost process."""
    if state.ambiguous_failures == 0:
        return replace(state, ambiguous_failures=1, successes=0), "retry"
    return replace_process(replace(state, ambiguous_failures=0), settings, nodes=nodes)


def replace_process(state: LadderState, settings: LadderSettings, *, nodes: int) -> tuple[LadderState, Action]:
    """After a sticky error: a new process; a single node that killed two processes leaves the device; too many: give up."""
    restarts = state.restarts + 1
    next_state = replace(state, restarts=restarts, sticky_failures=state.sticky_failures + 1, successes=0)
    if restarts > settings.max_restarts:
        return next_state, "give_up"
    if nodes == 1 and next_state.sticky_failures > 1:
        return replace(next_state, sticky_failures=0), "spill_batch"
    return next_state, "restart"
