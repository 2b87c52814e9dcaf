"""Which partitions go to which pool, in groups of what size, and what becomes of them when a worker's run ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from tasks.records import Partition, Pool

# Until a worker has reported: a T4 with bge-m3 in fp16, and four cores without one; the closed form of the model's FLOPs.
ASSUMED_TOKENS_PER_S: dict[Pool, float] = {"gpu": 8_000.0, "cpu": 400.0}
ASSUMED_START_UP_S: dict[Pool, float] = {"gpu": 45.0, "cpu": 30.0}
MIN_START_FAILURES = 5
# A single partition must not stand for the device's speed: the newest report counts as much as all before it.
NEWEST = 0.5


@dataclass(frozen=True, slots=True)
class GroupLimits:
    """See PoolSettings in tasks/config.py."""

    gpu_runs: int
    cpu_runs: int
    startup_fraction: float
    max_attempts: int
    group_tokens: int | None = None
    spill: bool = True  # False: what the GPU pool can't embed is lost

    def runs(self, pool: Pool) -> int:
        return self.gpu_runs if pool == "gpu" else self.cpu_runs


@dataclass(frozen=True, slots=True)
class Group:
    """Partitions that one run of a pool works on, one after the other."""

    number: int
    pool: Pool
    partitions: tuple[Partition, ...]

    @property
    def tokens(self) -> int:
        return sum(partition.tokens for partition in self.partitions)


@dataclass(slots=True)
class _Waiting:
    partition: Partition
    tokens: int  # of what is left of it
    attempts: int = 0
    is_late: bool = False  # had been handed out before


@dataclass(slots=True)
class _PoolState:
    waiting: list[_Waiting] = field(default_factory=list)
    tokens_per_s: float = 0.0
    start_up_s: float = 0.0
    start_failures: int = 0  # runs in a row that ended before their first partition
    failure: str = ""  # why the last of them did


def choose_group_tokens(start_up_s: float, tokens_per_s: float, startup_fraction: float) -> int:
    """Tokens so many that start-up is at most `startup_fraction` of start-up and work together."""
    return max(1, math.ceil(start_up_s * (1.0 / startup_fraction - 1.0) * tokens_per_s))


class Dispatcher:
    """Follows each partition: waiting -> in a group of a pool -> reported, or back to waiting. Not thread-safe.

    A partition goes to the GPU pool first. What that leaves goes to the CPU pool; so does a partition that
    `max_attempts` runs of the GPU pool have died over. One that as many runs of the CPU pool die over is lost.
    """

    def __init__(self, limits: GroupLimits) -> None:
        self.limits = limits
        self._pools: dict[Pool, _PoolState] = {
            pool: _PoolState(tokens_per_s=ASSUMED_TOKENS_PER_S[pool], start_up_s=ASSUMED_START_UP_S[pool])
            for pool in ("gpu", "cpu")
        }
        self._running: dict[int, tuple[Group, dict[int, _Waiting]]] = {}
        self._numbers = 0
        self._is_complete = False

    # ------------------------------------------------------------------------------------------ in

    def add(self, partition: Partition) -> None:
        """A partition for the GPU pool."""
        self._pools["gpu"].waiting.append(_Waiting(partition, partition.tokens))

    def leave(self, partition: Partition, tokens: int) -> None:
        """What the GPU pool could not place of a partition, `tokens` in all, for the CPU pool."""
        self._pools["cpu"].waiting.append(_Waiting(partition, tokens))

    def complete(self) -> None:
        """No more partitions come: what waits need not wait for company."""
        self._is_complete = True

    def learn(self, pool: Pool, *, tokens_per_s: float, start_up_s: float) -> None:
        """What a worker of this pool has measured; zeros say nothing."""
        state = self._pools[pool]
        if tokens_per_s > 0:
            state.tokens_per_s += NEWEST * (tokens_per_s - state.tokens_per_s)
        if start_up_s > 0:
            state.start_up_s += NEWEST * (start_up_s - state.start_up_s)

    def tokens_per_s(self, pool: Pool) -> float:
        return self._pools[pool].tokens_per_s

    # ------------------------------------------------------------------------------------------ groups

    def group_tokens(self, pool: Pool) -> int:
        state = self._pools[pool]
        return self.limits.group_tokens or choose_group_tokens(
            state.start_up_s, state.tokens_per_s, self.limits.startup_fraction
        )

    def next_group(self, *, is_full: bool = False, held: Collection[Pool] = ()) -> Group | None:
        """A group to start now, or None. `is_full`: the spool takes no more, so that nothing could join what waits.

        `held`: pools that get none now, because their last runs ended before their first partition.
        """
        pools: tuple[Pool, ...] = ("gpu", "cpu")
        for pool in pools:
            group = self._form(pool, is_full=is_full) if pool not in held else None
            if group is not None:
                return group
        return None

    def _form(self, pool: Pool, *, is_full: bool) -> Group | None:
        state = self._pools[pool]
        running = sum(group.pool == pool for group, _ in self._running.values())
        if not state.waiting or running >= self.limits.runs(pool):
            return None
        enough = self.group_tokens(pool)
        together = sum(each.tokens for each in state.waiting)
        # What a dead worker left is late already; a spool that is full, with none of the pool at work, would stay so; and the
        # CPU pool has nothing better to do than to begin while the GPUs go on.
        is_due = any(each.is_late for each in state.waiting) or (not running and (is_full or pool == "cpu"))
        if together < enough and not is_due and not self._can_grow_no_more(pool):
            return None
        taken: list[_Waiting] = []
        tokens = 0
        while state.waiting and tokens < enough:
            taken.append(state.waiting.pop(0))
            tokens += taken[-1].tokens
        if self._can_grow_no_more(pool) and together - tokens < enough:
            taken += state.waiting  # else the last group would be one that is mostly start-up
            state.waiting = []
        group = Group(self._numbers, pool, tuple(each.partition for each in taken))
        self._numbers += 1
        self._running[group.number] = group, {each.partition.index: each for each in taken}
        return group

    def _can_grow_no_more(self, pool: Pool) -> bool:
        if not self._is_complete:
            return False
        gpu_at_work = any(group.pool == "gpu" for group, _ in self._running.values())
        return pool == "gpu" or not (gpu_at_work or self._pools["gpu"].waiting)

    # ------------------------------------------------------------------------------------------ out

    def report(self, number: int, index: int) -> bool:
        """Partition `index` of this group is dealt with; False where it had been taken from the group before."""
        if number not in self._running:
            return False
        group, open_partitions = self._running[number]
        self._pools[group.pool].start_failures = 0
        return open_partitions.pop(index, None) is not None

    def end(self, number: int, *, died_over: int | None, reason: str) -> tuple[Partition, ...]:
        """The group's run has ended. What it has not reported waits again; returns the partitions that are lost.

        died_over: the partition it was working on: that one has had an attempt. None where it came to none: then it says
        nothing of them, but of the worker; see start_failures().
        """
        group, open_partitions = self._running.pop(number, (None, {}))
        if group is None:
            return ()
        lost: list[Partition] = []
        pool: Pool = group.pool
        if died_over is None and open_partitions:
            self._pools[pool].start_failures += 1
            self._pools[pool].failure = reason
        elif died_over is not None:
            self._pools[pool].start_failures = 0
        for index, each in open_partitions.items():
            each.is_late = True
            if died_over is not None and (died_over not in open_partitions or index == died_over):
                each.attempts += 1
            if each.attempts < self.limits.max_attempts:
                self._pools[pool].waiting.append(each)
            elif pool == "gpu" and self.limits.spill:
                self._pools["cpu"].waiting.append(_Waiting(each.partition, each.tokens, is_late=True))
            else:
                lost.append(each.partition)
        return tuple(lost)

    def start_failures(self, pool: Pool) -> tuple[int, str]:
        """How many runs of this pool in a row ended before their first partition, and why the last one did."""
        return self._pools[pool].start_failures, self._pools[pool].failure

    def can_start(self, pool: Pool) -> bool:
        """False where so many runs in a row could not that no worker of this pool will, and none of it is at work."""
        # Twice as many as start at a time: one bad moment for all of them is not the end.
        most = max(MIN_START_FAILURES, 2 * self.limits.runs(pool))
        return self._pools[pool].start_failures < most or self.is_at_work(pool)

    def is_at_work(self, pool: Pool) -> bool:
        """Whether a group of this pool is under way."""
        return any(group.pool == pool for group, _ in self._running.values())

    # ------------------------------------------------------------------------------------------ state

    @property
    def is_busy(self) -> bool:
        return bool(self._running or any(state.waiting for state in self._pools.values()))

    def running(self) -> Sequence[Group]:
        return [group for group, _ in self._running.values()]

    def open_partitions(self, number: int) -> Collection[int]:
        """Partitions of a running group that it has not reported."""
        return self._running[number][1].keys()
