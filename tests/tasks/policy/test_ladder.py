"""The ladder, rung by rung."""

from hypothesis import given
from hypothesis import strategies as st

from tasks.policy.ladder import LadderSettings, LadderState, clean_up, climb, replace_process, step_down

SETTINGS = LadderSettings(grow_after=4, growth_steps=8, max_single_failures=3, max_restarts=2)
GIB = 1024**3


def test_every_rung_from_the_whole_budget_to_the_cpu_pool() -> None:
    """64 nodes at 8 GiB, each rung fails: 1/2, 1/4, ... one node, then away, and in the end all longer ones with it."""
    state, budget, nodes, predicted = LadderState(), 8 * GIB, 64, 8 * GIB
    seen = []
    while nodes > 1:
        state, action = step_down(state, SETTINGS, nodes=nodes, predicted_bytes=predicted)
        seen.append((nodes, state.limit(budget), action))
        nodes, predicted = nodes // 2, state.limit(budget)
    assert seen == [
        (64, 4 * GIB, "replan"),
        (32, 2 * GIB, "replan"),
        (16, 1 * GIB, "replan"),
        (8, GIB // 2, "replan"),
        (4, GIB // 4, "replan"),
        (2, GIB // 8, "replan"),
    ]
    actions = []
    for _ in range(4):
        state, action = step_down(state, SETTINGS, nodes=1, predicted_bytes=predicted)
        actions.append(action)
    assert actions == ["spill_batch", "spill_batch", "spill_longer", "spill_batch"]


def test_a_failed_batch_far_below_the_budget_is_halved_itself() -> None:
    state, action = step_down(LadderState(), SETTINGS, nodes=10, predicted_bytes=1 * GIB)
    assert action == "replan"
    assert state.limit(8 * GIB) == GIB // 2


def test_the_budget_grows_back_step_by_step_and_the_cap_goes_away() -> None:
    budget = 8 * GIB
    state, _ = step_down(LadderState(), SETTINGS, nodes=64, predicted_bytes=budget)
    limits = []
    for _ in range(SETTINGS.grow_after * 4):
        state = climb(state, SETTINGS, budget_bytes=budget)
        limits.append(state.limit(budget))
    assert limits[: SETTINGS.grow_after - 1] == [4 * GIB] * (SETTINGS.grow_after - 1)
    assert limits[SETTINGS.grow_after - 1 :: SETTINGS.grow_after] == [5 * GIB, 6 * GIB, 7 * GIB, 8 * GIB]
    assert state.cap_bytes is None


def test_a_success_forgives_single_failures() -> None:
    state = LadderState()
    for _ in range(SETTINGS.max_single_failures - 1):
        state, _ = step_down(state, SETTINGS, nodes=1, predicted_bytes=100)
    state = climb(state, SETTINGS, budget_bytes=1000)
    _, action = step_down(state, SETTINGS, nodes=1, predicted_bytes=100)
    assert action == "spill_batch"


def test_an_ambiguous_error_is_tried_once_more_then_costs_the_process() -> None:
    state, first = clean_up(LadderState(), SETTINGS, nodes=8)
    state, second = clean_up(state, SETTINGS, nodes=8)
    assert (first, second) == ("retry", "restart")
    assert state.restarts == 1


def test_a_node_that_kills_two_processes_leaves_and_too_many_restarts_give_the_device_up() -> None:
    state, first = replace_process(LadderState(), SETTINGS, nodes=1)
    state, second = replace_process(state, SETTINGS, nodes=1)
    state, third = replace_process(state, SETTINGS, nodes=8)
    assert (first, second, third) == ("restart", "spill_batch", "give_up")
    assert state.start_partition().restarts == 0


@given(
    st.lists(st.tuples(st.sampled_from(["oom", "done"]), st.integers(1, 64), st.integers(1, 2**34)), max_size=60),
    st.integers(1, 2**34),
)
def test_the_limit_stays_between_one_byte_and_the_budget(events: list[tuple[str, int, int]], budget: int) -> None:
    state = LadderState()
    for kind, nodes, predicted in events:
        if kind == "done":
            state = climb(state, SETTINGS, budget_bytes=budget)
        else:
            before = state.limit(budget)
            state, _ = step_down(state, SETTINGS, nodes=nodes, predicted_bytes=min(predicted, before))
            assert state.limit(budget) <= before
        assert 1 <= state.limit(budget) <= budget
