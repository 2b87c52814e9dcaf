"""Every partition ends reported or lost, once, or the run gives up on a pool, whatever the workers do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.groups import MIN_START_FAILURES, Dispatcher, Group, GroupLimits
from tasks.records import Partition, Pool

POOLS: tuple[Pool, ...] = ("gpu", "cpu")


def make_partition(index: int, tokens: int) -> Partition:
    return Partition(index, f"partition-{index:06d}-{index:016x}.parquet", tokens, tokens, 1, 0.0)


def indexes(group: Group) -> list[int]:
    return [each.index for each in group.partitions]


@dataclass
class World:
    """Workers that can't start or die, devices that leave partitions and a spool that fills up; each by chance.

    Does with the dispatcher what PoolStages does: holds a pool for a while after each start failure, the longer the more of
    them there were, and gives up where none of the pool's workers can start.
    """

    dispatcher: Dispatcher
    tokens: list[int]
    chance: Random
    broken: dict[Pool, float]  # of its machines: the share that can't start
    death: float
    leaving: float
    room: int  # partitions in the spool before it is full
    spooled: int = 0
    is_complete: bool = False
    tick: int = 0
    done: dict[int, str] = field(default_factory=dict)
    left_tokens: dict[int, int] = field(default_factory=dict)
    on_cpu: set[int] = field(default_factory=set)  # and not settled
    charges: Counter[tuple[Pool, int]] = field(default_factory=Counter)
    in_a_row: Counter[Pool] = field(default_factory=Counter)  # start failures
    held_since: dict[Pool, tuple[int, int]] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)  # groups on machines that can start
    was_late: bool = False  # some group ended with something open
    deaths: int = 0  # of runs that had begun, and had not reported everything
    gave_up_on: Pool | None = None

    def run(self) -> None:
        while self.tick < 3000 * (len(self.tokens) + 1):
            self.tick += 1
            if self.spooled < len(self.tokens) and not self.is_full():
                self.dispatcher.add(make_partition(self.spooled, self.tokens[self.spooled]))
                self.spooled += 1
            elif self.spooled == len(self.tokens) and not self.is_complete:
                self.dispatcher.complete()
                self.is_complete = True
            held = self.find_held()
            if self.gave_up_on is not None:
                return
            self.start_groups(held)
            running = list(self.dispatcher.running())
            if running and self.chance.random() < 0.7:
                self.work(self.chance.choice(running))
            if self.is_complete and not self.dispatcher.is_busy:
                return
        raise AssertionError(f"no end: {self.dispatcher.running()} run")

    def is_full(self) -> bool:
        return self.dispatcher.is_busy and self.spooled - len(self.done) >= self.room

    def find_held(self) -> list[Pool]:
        held: list[Pool] = []
        for pool in POOLS:
            failures, _ = self.dispatcher.start_failures(pool)
            assert failures == self.in_a_row[pool]
            if not failures:
                self.held_since.pop(pool, None)
                continue
            count, since = self.held_since.get(pool, (0, 0))
            if count != failures:
                since = self.tick
                self.held_since[pool] = failures, since
            if not self.dispatcher.can_start(pool):
                self.gave_up_on = pool
            if self.tick - since < 2**failures:
                held.append(pool)
        return held

    def start_groups(self, held: list[Pool]) -> None:
        is_full = self.is_full()
        while True:
            was_at_work = {pool: self.dispatcher.is_at_work(pool) for pool in POOLS}
            group = self.dispatcher.next_group(is_full=is_full, held=held)
            if group is None:
                break
            assert group.pool not in held
            at_work = self.dispatcher.running()
            for pool in POOLS:
                assert sum(each.pool == pool for each in at_work) <= self.dispatcher.limits.runs(pool)
            open_now = self.open_now()
            assert len(open_now) == len(set(open_now))
            assert not set(indexes(group)) & self.done.keys()
            assert (group.pool == "cpu") == bool(set(indexes(group)) & self.on_cpu)
            assert group.pool == "gpu" or set(indexes(group)) <= self.on_cpu
            tokens = sum(
                self.left_tokens.get(each.index, each.tokens) if group.pool == "cpu" else each.tokens
                for each in group.partitions
            )
            may_be_small = (is_full or group.pool == "cpu") and not was_at_work[group.pool]
            assert (
                may_be_small or self.is_complete or self.was_late or tokens >= self.dispatcher.group_tokens(group.pool)
            )
        # Nobody waits for a pool that has nothing to do, except for one that is held, or for company on the GPU.
        on_gpu = set(range(self.spooled)) - self.done.keys() - self.on_cpu
        if self.on_cpu and "cpu" not in held:
            assert self.dispatcher.is_at_work("cpu")
        if on_gpu and "gpu" not in held and (is_full or self.is_complete):
            assert self.dispatcher.is_at_work("gpu")

    def open_now(self) -> list[int]:
        return [index for each in self.dispatcher.running() for index in self.dispatcher.open_partitions(each.number)]

    def work(self, group: Group) -> None:
        """The machine that takes it, one partition of it, or its end."""
        if group.number not in self.begun:
            if self.chance.random() < self.broken[group.pool]:
                self.was_late = True
                self.in_a_row[group.pool] += 1
                assert self.dispatcher.end(group.number, died_over=None, reason="no driver") == ()
                return
            self.begun.add(group.number)
        left = list(self.dispatcher.open_partitions(group.number))
        if not left:
            assert self.dispatcher.end(group.number, died_over=None, reason="") == ()
        elif self.chance.random() < self.death:
            self.die(group, left)
        else:
            self.report(group, left[0])

    def die(self, group: Group, left: list[int]) -> None:
        self.was_late = True
        self.deaths += 1
        died_over = self.chance.choice([*left, 10**6])
        self.in_a_row[group.pool] = 0  # it had started
        lost = self.dispatcher.end(group.number, died_over=died_over, reason="killed")
        most = self.dispatcher.limits.max_attempts
        gone: list[int] = []
        for index in [died_over] if died_over in left else left:
            self.charges[group.pool, index] += 1
            if self.charges[group.pool, index] == most:
                gone.append(index)
        if group.pool == "gpu" and self.dispatcher.limits.spill:
            self.on_cpu.update(gone)
            gone = []
        assert [each.index for each in lost] == gone
        for index in gone:
            self.settle(index, "lost")

    def report(self, group: Group, index: int) -> None:
        assert self.dispatcher.report(group.number, index)
        self.in_a_row[group.pool] = 0
        if group.pool == "gpu" and self.dispatcher.limits.spill and self.chance.random() < self.leaving:
            whole = next(each for each in group.partitions if each.index == index)
            self.left_tokens[index] = self.chance.randint(1, whole.tokens)
            self.on_cpu.add(index)
            self.dispatcher.leave(whole, self.left_tokens[index])
        else:
            self.settle(index, "reported")

    def settle(self, index: int, how: str) -> None:
        assert index not in self.done
        self.done[index] = how
        self.on_cpu.discard(index)


SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0])


@settings(deadline=None, max_examples=200)
@given(
    tokens=st.lists(st.integers(1, 150), max_size=25),
    gpu_runs=st.integers(1, 3),
    cpu_runs=st.integers(1, 2),
    max_attempts=st.integers(1, 3),
    group_tokens=st.integers(1, 400),
    spill=st.booleans(),
    gpus_broken=SHARES,
    cpus_broken=SHARES,
    death=SHARES,
    leaving=st.sampled_from([0.0, 0.3, 1.0]),
    room=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_every_partition_ends_reported_or_lost_once_or_the_run_gives_up(
    tokens: list[int],
    gpu_runs: int,
    cpu_runs: int,
    max_attempts: int,
    group_tokens: int,
    spill: bool,
    gpus_broken: float,
    cpus_broken: float,
    death: float,
    leaving: float,
    room: int,
    seed: int,
) -> None:
    dispatcher = Dispatcher(
        GroupLimits(
            gpu_runs=gpu_runs,
            cpu_runs=cpu_runs,
            startup_fraction=0.05,
            max_attempts=max_attempts,
            group_tokens=group_tokens,
            spill=spill,
        )
    )
    broken: dict[Pool, float] = {"gpu": gpus_broken, "cpu": cpus_broken}
    world = World(dispatcher, tokens, Random(seed), broken, death, leaving, room)
    world.run()
    if world.gave_up_on is not None:
        assert broken[world.gave_up_on] > 0
        assert dispatcher.is_busy  # something was to be done still
    else:
        assert sorted(world.done) == list(range(len(tokens)))
        assert dispatcher.next_group(is_full=True) is None
    if death == 0.0:  # machines that can't start send nothing to the CPU pool, and lose nothing
        assert "lost" not in world.done.values()
        assert not world.charges
    assert world.deaths <= 2 * max_attempts * len(tokens)  # each is counted for one partition at least


@settings(deadline=None)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=25), st.integers(1, 6), st.integers(0, 2**32))
def test_a_pool_of_which_no_machine_can_start_ends_the_run_and_costs_no_partition_anything(
    tokens: list[int], gpu_runs: int, seed: int
) -> None:
    dispatcher = Dispatcher(
        GroupLimits(gpu_runs=gpu_runs, cpu_runs=1, startup_fraction=0.05, max_attempts=1, group_tokens=100)
    )
    world = World(dispatcher, tokens, Random(seed), {"gpu": 1.0, "cpu": 0.0}, death=0.0, leaving=0.0, room=30)
    world.run()
    assert world.gave_up_on == "gpu"
    most = max(MIN_START_FAILURES, 2 * gpu_runs)
    assert most <= dispatcher.start_failures("gpu")[0] < most + gpu_runs
    assert not world.done
    assert not world.on_cpu
