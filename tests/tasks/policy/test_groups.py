"""Which partitions go to which pool, in what groups, and what a run's end makes of them, case by case."""

from __future__ import annotations

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
    assert dispatcher.is_busy == bool(tokens)


def test_what_the_gpu_leaves_starts_while_the_gpu_goes_on() -> None:
    dispatcher = dispatch(50, 50, 50, group_tokens=150)
    on_gpu = start(dispatcher)
    assert dispatcher.report(on_gpu.number, 0)
    dispatcher.leave(partition(0), 10)
    first = start(dispatcher)
    assert (first.pool, indexes(first)) == ("cpu", [0])  # little, and none of the CPU pool is at work
    assert dispatcher.is_at_work("gpu")
    assert dispatcher.report(on_gpu.number, 1)
    dispatcher.leave(partition(1), 10)
    assert dispatcher.next_group() is None  # waits for company, as long as the first is under way
    dispatcher.report(first.number, 0)
    assert dispatcher.next_group() is None  # reported, but it has not ended
    dispatcher.end(first.number, died_over=None, reason="")
    assert not dispatcher.is_at_work("cpu")
    assert indexes(start(dispatcher)) == [1]


def test_a_second_group_of_the_cpu_pool_waits_for_enough_until_the_gpu_is_done() -> None:
    dispatcher = dispatch(100, 100, 100, 100, is_complete=True, cpu_runs=2, group_tokens=400)
    on_gpu = start(dispatcher)
    for index in range(2):
        dispatcher.report(on_gpu.number, index)
        dispatcher.leave(partition(index), 10)
        assert indexes(dispatcher.next_group()) == [[0], []][index]
    dispatcher.report(on_gpu.number, 2)
    dispatcher.leave(partition(2), 390)
    assert indexes(dispatcher.next_group()) == [1, 2]
    assert dispatcher.is_at_work("gpu")
    dispatcher.end(1, died_over=None, reason="")  # it could not start: it waits for nobody
    assert indexes(dispatcher.next_group()) == [0]


@pytest.mark.parametrize("cpu_at_work", [False, True])
def test_a_full_spool_starts_a_small_group_whatever_the_other_pool_does(cpu_at_work: bool) -> None:
    dispatcher = dispatch(100)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    if cpu_at_work:
        dispatcher.leave(partition(0), 10)
        assert start(dispatcher).pool == "cpu"
    dispatcher.add(partition(1, 10))
    assert dispatcher.next_group(is_full=True) is None  # the GPU pool's own run is under way still
    dispatcher.end(group.number, died_over=None, reason="")
    assert dispatcher.next_group() is None
    again = start(dispatcher, is_full=True)
    assert (again.pool, indexes(again)) == ("gpu", [1])


@pytest.mark.parametrize(
    ("held", "started"), [([], ["gpu", "cpu"]), (["gpu"], ["cpu"]), (["cpu"], ["gpu"]), (["gpu", "cpu"], [])]
)
def test_a_pool_that_is_held_gets_no_group_and_the_other_one_does(held: list[Pool], started: list[Pool]) -> None:
    dispatcher = dispatch(100, 100, gpu_runs=1)
    first = start(dispatcher)
    dispatcher.report(first.number, 0)
    dispatcher.leave(partition(0), 10)
    dispatcher.end(first.number, died_over=None, reason="")
    pools: list[Pool] = []
    while (group := dispatcher.next_group(held=held)) is not None:
        pools.append(group.pool)
    assert pools == started


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


@pytest.mark.parametrize("died_over", [0, 99], ids=["one that it had reported", "an unknown one"])
def test_all_that_is_open_is_counted_where_nothing_says_which_of_it_a_run_died_over(died_over: int) -> None:
    dispatcher = dispatch(50, 50, 50, group_tokens=150)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    dispatcher.end(group.number, died_over=died_over, reason="gone")
    again = start(dispatcher)
    assert (again.pool, indexes(again)) == ("gpu", [1, 2])
    dispatcher.end(again.number, died_over=died_over, reason="gone")
    last = start(dispatcher)
    assert (last.pool, indexes(last)) == ("cpu", [1, 2])
    assert dispatcher.start_failures("gpu") == (0, "")


def test_a_run_that_came_to_no_partition_is_charged_to_its_pool_and_to_no_partition() -> None:
    dispatcher = dispatch(50, 50, max_attempts=1)
    for failures in range(1, 20):
        group = start(dispatcher)  # late already: at once
        assert (group.pool, indexes(group)) == ("gpu", [0, 1])
        assert dispatcher.is_at_work("gpu")
        assert dispatcher.end(group.number, died_over=None, reason=f"no driver {failures}") == ()
        assert dispatcher.start_failures("gpu") == (failures, f"no driver {failures}")
        assert dispatcher.start_failures("cpu") == (0, "")
        assert not dispatcher.is_at_work("gpu")
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    assert dispatcher.start_failures("gpu")[0] == 0
    dispatcher.end(group.number, died_over=1, reason="killed")
    assert dispatcher.start_failures("gpu")[0] == 0
    last = start(dispatcher)
    assert (last.pool, indexes(last)) == ("cpu", [1])


def test_a_run_that_ended_with_all_of_it_reported_is_no_start_failure() -> None:
    dispatcher = dispatch(100)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    dispatcher.end(group.number, died_over=None, reason="")
    assert dispatcher.start_failures("gpu") == (0, "")


def test_a_healthy_machine_beside_one_that_cannot_start_keeps_all_of_it_on_its_pool() -> None:
    dispatcher = dispatch(*[100] * 8, is_complete=True)
    reported: list[tuple[int, Pool]] = []
    while dispatcher.is_busy:
        healthy = start(dispatcher)
        for _ in range(3):  # takes group after group, faster than the other works
            broken = dispatcher.next_group()
            if broken is not None:
                dispatcher.end(broken.number, died_over=None, reason="no driver")
                assert dispatcher.start_failures("gpu")[0] > 0
                assert dispatcher.is_at_work("gpu")  # which is why the run goes on
        for index in list(dispatcher.open_partitions(healthy.number)):
            dispatcher.report(healthy.number, index)
            reported.append((index, healthy.pool))
        assert dispatcher.start_failures("gpu")[0] == 0
        dispatcher.end(healthy.number, died_over=None, reason="")
    assert sorted(reported) == [(index, "gpu") for index in range(8)]


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


def test_what_the_gpu_pool_dies_over_waits_for_no_company_on_the_cpu_pool() -> None:
    dispatcher = dispatch(50, 50, max_attempts=1, cpu_runs=2)
    group = start(dispatcher)
    dispatcher.report(group.number, 0)
    dispatcher.leave(partition(0), 10)
    assert start(dispatcher).pool == "cpu"
    dispatcher.end(group.number, died_over=1, reason="killed")
    late = start(dispatcher)
    assert (late.pool, indexes(late)) == ("cpu", [1])


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
    lost: list[int] = []
    while dispatcher.is_busy:
        group = start(dispatcher)
        for index in list(dispatcher.open_partitions(group.number)):
            if index == bad:
                deaths += 1
                ended = dispatcher.end(group.number, died_over=bad, reason="out of host memory")
                lost += [each.index for each in ended]
                break
            dispatcher.report(group.number, index)
            reported.append((index, group.pool))
        else:
            dispatcher.end(group.number, died_over=None, reason="")
    assert sorted(reported) == [(index, "gpu") for index in range(len(tokens)) if index != bad]
    assert deaths == 2 * max_attempts
    assert lost == [bad]
