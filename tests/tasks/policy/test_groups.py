"""Which partitions go to which pool: every partition ends reported or lost, once, whatever the workers do."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.groups import ASSUMED_START_UP_S, ASSUMED_TOKENS_PER_S, Dispatcher, Group, GroupLimits
from tasks.policy.groups import choose_group_tokens as choose
from tasks.records import Partition, Pool


def limits(**changes: object) -> GroupLimits:
    return GroupLimits(
        **{"gpu_runs": 2, "cpu_runs": 1, "startup_fraction": 0.05, "max_attempts": 2, "group_tokens": 100, **changes}  # type: ignore[arg-type]
    )


def partition(index: int, tokens: int = 50) -> Partition:
    return Partition(index, f"partition-{index:06d}-{index:016x}.parquet", tokens, tokens, 1, 0.0)


def dispatch(*tokens: int, is_complete: bool = False, **changes: object) -> Dispatcher:
    """A dispatcher with a partition of as many tokens each, numbered from 0."""
    dispatcher = Dispatcher(limits(**changes))
    for index, each in enumerate(tokens):
        dispatcher.add(partition(index, each))
    if is_complete:
        dispatcher.complete()
    return dispatcher


def start(dispatcher: Dispatcher, *, is_full: bool = False) -> Group:
    group = dispatcher.next_group(is_full=is_full)
    assert group is not None
    return group


def indexes(group: Group | None) -> list[int]:
    return [] if group is None else [each.index for each in group.partitions]


# ---------------------------------------------------------------------------------------------- the size of a group


@pytest.mark.parametrize(
    ("start_up_s", "tokens_per_s", "fraction", "tokens"),
    [
        (45.0, 8000.0, 0.05, 6_840_000),  # 45 s of start-up are 5 % of 900 s: 855 s of work
        (30.0, 400.0, 0.5, 12_000),
        (10.0, 100.0, 1.0, 1),
        (0.0, 100.0, 0.05, 1),
    ],
)
def test_a_group_is_so_large_that_start_up_is_its_share(
    start_up_s: float, tokens_per_s: float, fraction: float, tokens: int
) -> None:
    assert choose(start_up_s, tokens_per_s, fraction) == tokens


@given(st.floats(0, 1e4), st.floats(1e-3, 1e6), st.floats(1e-3, 1))
def test_start_up_never_takes_more_than_its_share(start_up_s: float, tokens_per_s: float, fraction: float) -> None:
    work_s = choose(start_up_s, tokens_per_s, fraction) / tokens_per_s
    assert start_up_s <= fraction * (start_up_s + work_s) * (1 + 1e-9)


def test_what_workers_measure_moves_the_size_of_later_groups() -> None:
    dispatcher = Dispatcher(limits(group_tokens=None))
    before = dispatcher.group_tokens("gpu"), dispatcher.group_tokens("cpu")
    assert before == tuple(
        choose(ASSUMED_START_UP_S[pool], ASSUMED_TOKENS_PER_S[pool], 0.05) for pool in ASSUMED_START_UP_S
    )
    dispatcher.learn("gpu", tokens_per_s=0.0, start_up_s=0.0)  # a report of nothing embedded
    assert dispatcher.group_tokens("gpu") == before[0]
    dispatcher.learn("gpu", tokens_per_s=80_000.0, start_up_s=45.0)
    assert dispatcher.tokens_per_s("gpu") == 44_000.0
    assert dispatcher.group_tokens("gpu") > before[0]
    assert dispatcher.group_tokens("cpu") == before[1]
    for _ in range(60):
        dispatcher.learn("gpu", tokens_per_s=1_000.0, start_up_s=10.0)
    assert dispatcher.group_tokens("gpu") == choose(10.0, 1_000.0, 0.05)


# ---------------------------------------------------------------------------------------------- starting groups


@pytest.mark.parametrize(
    ("tokens", "is_complete", "is_full", "started"),
    [
        ([60], False, False, []),  # waits for company
        ([60, 40], False, False, [[0, 1]]),
        ([60, 60, 60], False, False, [[0, 1]]),
        ([60, 60, 60, 60], False, False, [[0, 1], [2, 3]]),
        ([100] * 3, False, False, [[0], [1]]),  # gpu_runs=2
        ([500], False, False, [[0]]),
        ([60], True, False, [[0]]),
        ([60, 60, 60], True, False, [[0, 1, 2]]),  # the third alone would be mostly start-up
        ([100, 100, 60], True, False, [[0], [1, 2]]),
        ([60], False, True, [[0]]),  # nothing can join it
        ([100, 60], False, True, [[0]]),  # the second waits for the first one's end, which makes room
        ([], True, True, []),
    ],
)
def test_when_a_group_starts(tokens: list[int], is_complete: bool, is_full: bool, started: list[list[int]]) -> None:
    dispatcher = dispatch(*tokens, is_complete=is_complete)
    groups = []
    while (group := dispatcher.next_group(is_full=is_full)) is not None:
        groups.append(group)
    assert [indexes(each) for each in groups] == started
    assert [each.number for each in groups] == list(range(len(started)))
    assert [each.pool for each in groups] == ["gpu"] * len(started)
    assert list(dispatcher.running()) == groups
    assert dispatcher.waiting_partitions == len(tokens) - sum(map(len, started))


def test_what_the_gpu_leaves_waits_for_more_of_it_until_the_gpu_is_done() -> None:
    dispatcher = dispatch(100, 100, is_complete=True)
    first, second = start(dispatcher), start(dispatcher)
    assert dispatcher.report(first.number, 0)
    dispatcher.leave(partition(0), 10)
    dispatcher.end(first.number, died_over=None, reason="")
    assert dispatcher.next_group() is None  # the second may leave some as well
    assert dispatcher.is_busy
    dispatcher.report(second.number, 1)
    dispatcher.leave(partition(1), 10)
    assert dispatcher.next_group() is None  # reported, but it has not ended
    dispatcher.end(second.number, died_over=None, reason="")
    left = start(dispatcher)
    assert (left.pool, indexes(left)) == ("cpu", [0, 1])
    dispatcher.report(left.number, 0)
    dispatcher.report(left.number, 1)
    assert dispatcher.is_busy
    assert dispatcher.end(left.number, died_over=None, reason="") == ()
    assert not dispatcher.is_busy


def test_the_cpu_pool_starts_at_once_with_enough_of_what_was_left() -> None:
    dispatcher = dispatch(100, 100)
    first = start(dispatcher)
    start(dispatcher)
    dispatcher.report(first.number, 0)
    dispatcher.leave(partition(0), 100)
    assert indexes(dispatcher.next_group()) == [0]


def test_a_full_spool_of_what_was_left_is_emptied_by_the_cpu_pool() -> None:
    dispatcher = dispatch(100)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    dispatcher.leave(partition(0), 10)
    dispatcher.end(group.number, died_over=None, reason="")
    assert dispatcher.next_group() is None
    assert start(dispatcher, is_full=True).pool == "cpu"


# ---------------------------------------------------------------------------------------------- deaths


def test_only_what_a_run_died_over_has_an_attempt_counted() -> None:
    dispatcher = dispatch(50, 50, 50, max_attempts=1, group_tokens=150)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    assert dispatcher.end(group.number, died_over=1, reason="killed") == ()
    dispatcher.complete()
    assert [(each.pool, indexes(each)) for each in (start(dispatcher),)] == [("gpu", [2])]
    dispatcher.report(1, 2)
    dispatcher.end(1, died_over=None, reason="")
    assert [(each.pool, indexes(each)) for each in (start(dispatcher),)] == [("cpu", [1])]


def test_what_a_run_died_over_runs_again_at_once() -> None:
    dispatcher = dispatch(100)
    group = start(dispatcher)
    dispatcher.end(group.number, died_over=0, reason="killed")
    dispatcher.add(partition(1, 10))
    assert indexes(start(dispatcher)) == [0]
    assert dispatcher.next_group() is None


@pytest.mark.parametrize(
    "died_over", [None, 0, 99], ids=["before its first", "one that it had reported", "an unknown one"]
)
def test_all_that_is_open_is_counted_where_nothing_says_what_a_run_died_over(died_over: int | None) -> None:
    dispatcher = dispatch(50, 50, 50, group_tokens=150)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    dispatcher.end(group.number, died_over=died_over, reason="gone")
    again = start(dispatcher)
    assert (again.pool, indexes(again)) == ("gpu", [1, 2])
    dispatcher.end(again.number, died_over=died_over, reason="gone")
    dispatcher.complete()
    assert (start(dispatcher).pool, dispatcher.waiting_partitions) == ("cpu", 0)


def test_the_way_of_a_partition_that_every_run_dies_over() -> None:
    dispatcher = dispatch(50, is_complete=True, max_attempts=3)
    pools: list[Pool] = []
    lost: tuple[Partition, ...] = ()
    while dispatcher.is_busy:
        group = start(dispatcher)
        pools.append(group.pool)
        lost = dispatcher.end(group.number, died_over=0, reason=f"death {len(pools)}")
    assert pools == ["gpu"] * 3 + ["cpu"] * 3
    assert [each.index for each in lost] == [0]
    assert dispatcher.lost == {0: "death 6"}


def test_without_spill_the_cpu_pool_gets_nothing_of_what_the_gpu_pool_dies_over() -> None:
    dispatcher = dispatch(50, 50, is_complete=True, max_attempts=1, spill=False)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    lost = dispatcher.end(group.number, died_over=1, reason="killed")
    assert [each.index for each in lost] == [1]
    assert not dispatcher.is_busy


def test_late_words_of_a_group_that_has_ended_change_nothing() -> None:
    dispatcher = dispatch(100)
    group = start(dispatcher)
    dispatcher.end(group.number, died_over=0, reason="silent")
    assert not dispatcher.report(group.number, 0)
    assert dispatcher.end(group.number, died_over=0, reason="silent") == ()
    again = start(dispatcher)
    assert indexes(again) == [0]
    assert dispatcher.report(again.number, 0)
    assert not dispatcher.report(again.number, 0)
    assert dispatcher.end(again.number, died_over=0, reason="killed, after its last report") == ()
    assert not dispatcher.is_busy
    assert not dispatcher.lost


# ---------------------------------------------------------------------------------------------- whatever happens


@dataclass
class World:
    """Workers that die, devices that leave partitions and a spool that fills up; each by chance."""

    dispatcher: Dispatcher
    tokens: list[int]
    chance: Random
    death: float
    leaving: float
    room: int  # partitions in the spool before it is full
    spooled: int = 0
    done: dict[int, str] = field(default_factory=dict)
    left_tokens: dict[int, int] = field(default_factory=dict)
    pools: set[Pool] = field(default_factory=set)
    deaths: int = 0  # of runs that had not reported everything

    def run(self) -> None:
        is_complete = False
        for _ in range(200 * (len(self.tokens) + 1)):
            if self.spooled < len(self.tokens) and not self.is_full():
                self.dispatcher.add(partition(self.spooled, self.tokens[self.spooled]))
                self.spooled += 1
            elif self.spooled == len(self.tokens) and not is_complete:
                self.dispatcher.complete()
                is_complete = True
            self.start_groups(is_complete)
            running = list(self.dispatcher.running())
            if running and self.chance.random() < 0.7:
                self.work(self.chance.choice(running))
            if is_complete and not self.dispatcher.is_busy:
                return
        raise AssertionError(f"no end: {self.dispatcher.waiting_partitions} wait, {self.dispatcher.running()} run")

    def is_full(self) -> bool:
        return self.spooled - len(self.done) >= self.room

    def start_groups(self, is_complete: bool) -> None:
        running_before = len(self.dispatcher.running())
        while True:
            is_full = self.is_full()
            group = self.dispatcher.next_group(is_full=is_full)
            if group is None:
                break
            at_work = self.dispatcher.running()
            for pool in ("gpu", "cpu"):
                assert sum(each.pool == pool for each in at_work) <= self.dispatcher.limits.runs(pool)
            open_now = [index for each in at_work for index in self.dispatcher.open_partitions(each.number)]
            assert len(open_now) == len(set(open_now))
            assert not set(indexes(group)) & self.done.keys()
            self.pools.add(group.pool)
            tokens = sum(self.left_tokens.get(each.index, each.tokens) for each in group.partitions)
            may_be_small = is_complete or self.deaths or (is_full and running_before == 0)
            assert may_be_small or tokens >= self.dispatcher.group_tokens(group.pool)
            running_before += 1

    def work(self, group: Group) -> None:
        """One partition of it, or its end."""
        left = list(self.dispatcher.open_partitions(group.number))
        if self.chance.random() < self.death or not left:
            died_over = self.chance.choice([None, *left, 10**6])
            self.deaths += bool(left)
            for lost in self.dispatcher.end(group.number, died_over=died_over, reason="killed"):
                self.settle(lost.index, "lost")
            return
        index = left[0]
        assert self.dispatcher.report(group.number, index)
        if group.pool == "gpu" and self.dispatcher.limits.spill and self.chance.random() < self.leaving:
            whole = next(each for each in group.partitions if each.index == index)
            self.left_tokens[index] = self.chance.randint(1, whole.tokens)
            self.dispatcher.leave(whole, self.left_tokens[index])
        else:
            self.settle(index, "reported")

    def settle(self, index: int, how: str) -> None:
        assert index not in self.done
        self.done[index] = how


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.integers(1, 150), max_size=25),
    gpu_runs=st.integers(1, 3),
    cpu_runs=st.integers(1, 2),
    max_attempts=st.integers(1, 3),
    group_tokens=st.integers(1, 400),
    spill=st.booleans(),
    death=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    leaving=st.sampled_from([0.0, 0.3, 1.0]),
    room=st.integers(1, 30),
    seed=st.integers(0, 2**32),
)
def test_every_partition_ends_reported_or_lost_once(
    tokens: list[int],
    gpu_runs: int,
    cpu_runs: int,
    max_attempts: int,
    group_tokens: int,
    spill: bool,
    death: float,
    leaving: float,
    room: int,
    seed: int,
) -> None:
    dispatcher = Dispatcher(
        limits(gpu_runs=gpu_runs, cpu_runs=cpu_runs, max_attempts=max_attempts, group_tokens=group_tokens, spill=spill)
    )
    world = World(dispatcher, tokens, Random(seed), death, leaving, room)
    world.run()
    assert sorted(world.done) == list(range(len(tokens)))
    assert {index for index, how in world.done.items() if how == "lost"} == dispatcher.lost.keys()
    if death == 0.0:
        assert not dispatcher.lost
    if not spill:
        assert world.pools <= {"gpu"}
    assert world.deaths <= 2 * max_attempts * len(tokens)  # each is counted for one partition at least
    assert dispatcher.next_group(is_full=True) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 11))
def test_one_bad_partition_costs_the_others_neither_an_attempt_nor_their_pool(
    tokens: list[int], max_attempts: int, bad: int
) -> None:
    """Runs die over it on either pool, and say so: it alone is lost, after as many runs as allowed."""
    bad %= len(tokens)
    dispatcher = dispatch(*tokens, is_complete=True, max_attempts=max_attempts)
    reported: list[tuple[int, Pool]] = []
    deaths = 0
    while dispatcher.is_busy:
        group = start(dispatcher)
        for index in list(dispatcher.open_partitions(group.number)):
            if index == bad:
                deaths += 1
                dispatcher.end(group.number, died_over=bad, reason="out of host memory")
                break
            dispatcher.report(group.number, index)
            reported.append((index, group.pool))
        else:
            dispatcher.end(group.number, died_over=None, reason="")
    assert sorted(reported) == [(index, "gpu") for index in range(len(tokens)) if index != bad]
    assert deaths == 2 * max_attempts
    assert list(dispatcher.lost) == [bad]
