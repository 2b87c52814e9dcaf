"""The ladder as it is carried out: rung by rung, with faults at every position; no node lost, none embedded twice."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.fake_encoder import GIB, FakeEncoder, Neighbour, hash_row, to_unit_vector
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import MISSING, ON_CPU, ON_DEVICE, UNWATCHED, Embedded, EmbedSettings, Watch
from tasks.errors import DeviceError
from tasks.policy.ladder import LadderSettings
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import LadderStep, TokenIds

MIB = 1024**2
SETTINGS = EmbedSettings(max_micro_batch_tokens=65_536, margin_fraction=0.0, ladder=LadderSettings(grow_after=4))


class InlineCpu:
    """The CPU pool's contract without its processes: the same loop over a CPU encoder with room enough, at once."""

    def __init__(self, **limits: int) -> None:
        self.encoder = FakeEncoder(device="cpu", **limits)  # type: ignore[arg-type]
        self.rows: list[str] = []

    def submit(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Future[Embedded]:
        self.rows.extend(hash_row(ids) for ids in token_ids)
        future: Future[Embedded] = Future()
        future.set_result(make_embedder(self.encoder).embed(token_ids, watch))
        return future


def true_model(encoder: FakeEncoder, scale: float = 1.0) -> MemoryModel:
    """The fake's own law as a memory model; `scale` < 1 makes a model that promises too much room."""
    token, square = encoder.c1 * scale, encoder.c2 * scale
    return MemoryModel(encoder.c0 * scale, token, 0.0, 0.0, token, token, square, 0.0)


def make_embedder(
    encoder: FakeEncoder,
    *,
    spill: InlineCpu | None = None,
    model: MemoryModel | None = None,
    options: EmbedSettings = SETTINGS,
) -> NodeEmbedder:
    return NodeEmbedder(encoder, start_fit(model or true_model(encoder)), options, spill=spill)


def make_nodes(lengths: Sequence[int], seed: int = 0) -> list[TokenIds]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1000, 30_000, length, dtype=np.int32) for length in lengths]


def assert_whole(
    embedded: Embedded, nodes: Sequence[TokenIds], encoder: FakeEncoder, spill: InlineCpu | None = None
) -> None:
    """Every vector is its node's own, every row is placed, nothing was embedded twice."""
    embedded.collect_spilled()
    assert embedded.failed == {}
    assert (embedded.placed != MISSING).all()
    for row, ids in enumerate(nodes):
        np.testing.assert_allclose(embedded.vectors[row], to_unit_vector(ids, encoder.dimension), atol=1e-6)
    finished = encoder.finished + (spill.encoder.finished if spill else FakeEncoder().finished)
    assert set(finished) == {hash_row(ids) for ids in nodes}
    assert set(finished.values()) == {1}


def steps(embedded: Embedded, kind: str) -> list[LadderStep]:
    return [step for step in embedded.steps if step.kind == kind]


# ------------------------------------------------------------------------------------------ nothing goes wrong


def test_all_nodes_longest_first_within_the_budget() -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB)
    nodes = make_nodes([int(n) for n in np.random.default_rng(1).lognormal(5.5, 0.9, 500).clip(4, 4000)])
    embedded = make_embedder(encoder).embed(nodes)
    assert_whole(embedded, nodes, encoder)
    padded = [call.padded_tokens for call in encoder.calls]
    assert padded == sorted(padded, reverse=True)
    assert max(call.peak_bytes for call in encoder.calls) <= 1 * GIB
    assert embedded.steps == []
    assert (embedded.placed == ON_DEVICE).all()


def test_an_empty_partition_is_done_at_once() -> None:
    encoder = FakeEncoder()
    assert make_embedder(encoder).embed([]).nodes == 0
    assert encoder.calls == []


# ------------------------------------------------------------------------------------------ out of memory


def test_every_rung_from_the_budget_down_to_one_node_and_the_cpu_pool() -> None:
    """A device that refuses everything: 64, 32, 16, 8, 4, 2, 1, then the CPU pool gets every node, once."""
    encoder = FakeEncoder(always="oom", c0=0.0)
    spill = InlineCpu()
    nodes = make_nodes([128] * 64)
    embedded = make_embedder(encoder, spill=spill).embed(nodes)
    assert_whole(embedded, nodes, encoder, spill)
    batches = [len(call.rows) for call in encoder.calls]
    assert batches == [64, 32, 16, 8, 4, 2, 1, 1, 1]
    assert [(step.nodes_before, step.nodes_after) for step in steps(embedded, "oom")][:6] == [
        (64, 32), (32, 16), (16, 8), (8, 4), (4, 2), (2, 1),
    ]  # fmt: skip
    budgets = [step.budget_after_bytes for step in steps(embedded, "oom")][:6]
    assert all(after == before // 2 for before, after in pairwise(budgets))
    assert [step.nodes_before for step in steps(embedded, "spill")] == [1, 1]
    assert [step.nodes_before for step in steps(embedded, "exhausted")] == [62]
    assert encoder.released == len(encoder.calls)
    assert (embedded.placed == ON_CPU).all()


def count_calls(nodes: Sequence[TokenIds]) -> int:
    encoder = FakeEncoder(total_bytes=2 * GIB)
    make_embedder(encoder).embed(nodes)
    return len(encoder.calls)


MIXED = make_nodes([int(n) for n in np.random.default_rng(2).lognormal(5.5, 0.9, 200).clip(4, 4000)])


@pytest.mark.parametrize("position", range(count_calls(MIXED)))
def test_an_oom_at_every_position_loses_nothing(position: int) -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB, oom_calls={position})
    spill = InlineCpu()
    embedded = make_embedder(encoder, spill=spill).embed(MIXED)
    assert_whole(embedded, MIXED, encoder, spill)
    assert len(steps(embedded, "oom")) == 1
    failed = encoder.calls[position]
    if len(failed.rows) > 1:
        assert spill.rows == []
        assert steps(embedded, "oom")[0].nodes_after <= (len(failed.rows) + 1) // 2
    else:
        assert spill.rows == list(failed.rows)


def test_a_model_that_promises_too_much_room_is_corrected_by_the_ladder() -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB)
    spill = InlineCpu()
    embedder = make_embedder(encoder, spill=spill, model=true_model(encoder, scale=0.2))
    nodes = make_nodes([512] * 400)
    embedded = embedder.embed(nodes)
    assert_whole(embedded, nodes, encoder, spill)
    assert steps(embedded, "oom")
    # Peaks of what went through have taught the model: the next partition runs into nothing.
    assert steps(embedder.embed(make_nodes([512] * 400, seed=9)), "oom") == []


def test_the_budget_grows_back_after_a_run_of_successes() -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB, oom_calls={0}, c0=0.0)
    nodes = make_nodes([512] * 2000)
    embedded = make_embedder(encoder).embed(nodes)
    assert_whole(embedded, nodes, encoder)
    sizes = [len(call.rows) for call in encoder.calls]
    assert sizes[1] <= sizes[0] // 2
    assert max(sizes[1:]) > sizes[1]
    assert max(sizes[1:]) <= sizes[0]
    assert steps(embedded, "grow")


def test_the_cap_survives_into_the_next_partition() -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB, oom_calls={0}, c0=0.0)
    embedder = make_embedder(encoder)
    embedder.embed(make_nodes([512] * 40))
    first = len(encoder.calls[0].rows)
    before = len(encoder.calls)
    embedder.embed(make_nodes([512] * 40, seed=5))
    assert len(encoder.calls[before].rows) < first


def test_without_a_pool_a_node_that_does_not_fit_fails_by_name_and_the_rest_goes_on() -> None:
    encoder = FakeEncoder(total_bytes=1 * GIB + 300 * MIB)
    nodes = make_nodes([8000, 100, 100, 100])
    embedded = make_embedder(encoder).embed(nodes)
    assert list(embedded.failed) == [0]
    assert "spill_to_cpu" in embedded.failed[0]
    assert (embedded.placed[1:] == ON_DEVICE).all()


# ------------------------------------------------------------------------------------------ spill


def test_a_node_over_the_budget_goes_to_the_cpu_before_anything_fails() -> None:
    encoder = FakeEncoder(total_bytes=1 * GIB + 300 * MIB)
    spill = InlineCpu()
    nodes = make_nodes([8000, 7000, 100, 100, 100])
    embedded = make_embedder(encoder, spill=spill).embed(nodes)
    assert_whole(embedded, nodes, encoder, spill)
    assert [call.kind for call in encoder.calls if call.kind != "done"] == []
    assert list(embedded.placed) == [ON_CPU, ON_CPU, ON_DEVICE, ON_DEVICE, ON_DEVICE]
    assert spill.rows == [hash_row(nodes[0]), hash_row(nodes[1])]
    (step,) = steps(embedded, "spill")
    assert step.nodes_before == 2
    assert "alone needs" in step.reason


def test_single_failures_send_only_longer_nodes_away() -> None:
    """Nodes above 1,000 tokens fail whatever the budget says; those of 400 and fewer never see the CPU."""
    encoder = FakeEncoder(fault=lambda rows: "oom" if max(len(ids) for ids in rows) > 1000 else None)
    spill = InlineCpu()
    nodes = make_nodes([2000] * 10 + [400] * 50)
    embedded = make_embedder(encoder, spill=spill).embed(nodes)
    assert_whole(embedded, nodes, encoder, spill)
    assert list(embedded.placed) == [ON_CPU] * 10 + [ON_DEVICE] * 50


def test_a_pool_that_runs_out_of_memory_too_names_the_nodes() -> None:
    encoder = FakeEncoder(always="oom")
    spill = InlineCpu(total_bytes=1 * GIB + 100 * MIB)
    nodes = make_nodes([4000, 100])
    embedded = make_embedder(encoder, spill=spill).embed(nodes).collect_spilled()
    assert list(embedded.failed) == [0]
    assert embedded.placed[0] == MISSING
    assert embedded.placed[1] == ON_CPU
    assert [step.kind for step in embedded.steps if step.reason.startswith("CPU pool")] != []


# ------------------------------------------------------------------------------------------ neighbours


def test_a_neighbour_is_noticed_before_it_costs_an_oom_and_its_leaving_too() -> None:
    encoder = FakeEncoder(total_bytes=3 * GIB, c0=0.0, neighbours=[Neighbour(5, 20, int(1.5 * GIB))])
    nodes = make_nodes([512] * 2000)
    embedded = make_embedder(encoder).embed(nodes)
    assert_whole(embedded, nodes, encoder)
    assert [call.kind for call in encoder.calls if call.kind != "done"] == []
    sizes = [len(call.rows) for call in encoder.calls]
    assert max(sizes[5:20]) < min(sizes[:5])
    assert max(sizes[20:]) == max(sizes[:5])
    (shrink,) = steps(embedded, "shrink")
    assert shrink.nodes_after < shrink.nodes_before


# ------------------------------------------------------------------------------------------ lost processes


@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_sticky_error_costs_one_process_and_no_node(position: int) -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB, sticky_calls={position})
    spill = InlineCpu()
    embedded = make_embedder(encoder, spill=spill).embed(MIXED)
    assert_whole(embedded, MIXED, encoder, spill)
    assert encoder.restarts == 1
    assert len(steps(embedded, "restart")) == 1


def test_a_node_that_kills_processes_is_found_and_leaves_alone() -> None:
    nodes = make_nodes([256] * 8)
    poison = hash_row(nodes[5])
    encoder = FakeEncoder(fault=lambda rows: "sticky" if poison in {hash_row(ids) for ids in rows} else None)
    spill = InlineCpu()
    options = EmbedSettings(max_micro_batch_tokens=65_536, margin_fraction=0.0, ladder=LadderSettings(max_restarts=10))
    embedded = make_embedder(encoder, spill=spill, options=options).embed(nodes)
    assert_whole(embedded, nodes, encoder, spill)
    assert spill.rows == [poison]


def test_a_device_that_never_comes_back_hands_everything_over() -> None:
    encoder = FakeEncoder(always="sticky", restarts_left=1)
    spill = InlineCpu()
    nodes = make_nodes([256] * 20)
    embedded = make_embedder(encoder, spill=spill).embed(nodes)
    assert_whole(embedded, nodes, encoder, spill)
    assert steps(embedded, "exhausted")


def test_too_many_lost_processes_give_the_device_up_for_this_partition_only() -> None:
    healthy = False
    fault: Callable[[Sequence[TokenIds]], str | None] = lambda _rows: None if healthy else "sticky"  # noqa: E731
    encoder = FakeEncoder(fault=fault)  # type: ignore[arg-type]
    spill = InlineCpu()
    embedder = make_embedder(encoder, spill=spill)
    nodes = make_nodes([256] * 20)
    embedder.embed(nodes)
    assert len(spill.rows) == 20
    healthy = True
    assert (embedder.embed(make_nodes([256] * 20, seed=7)).placed == ON_DEVICE).all()


def test_an_ambiguous_error_is_tried_once_more_after_a_clean_up() -> None:
    encoder = FakeEncoder(ambiguous_calls={0})
    nodes = make_nodes([256] * 4)
    embedded = make_embedder(encoder).embed(nodes)
    assert_whole(embedded, nodes, encoder)
    assert (encoder.released, encoder.restarts) == (1, 0)
    assert encoder.calls[0].rows == encoder.calls[1].rows


# ------------------------------------------------------------------------------------------ vectors


def test_a_vector_that_is_never_finite_fails_its_node_alone() -> None:
    nodes = make_nodes([256] * 4)
    encoder = FakeEncoder(hopeless={hash_row(nodes[2])})
    embedded = make_embedder(encoder).embed(nodes)
    assert list(embedded.failed) == [2]
    assert list(embedded.placed) == [ON_DEVICE, ON_DEVICE, MISSING, ON_DEVICE]


def test_vectors_made_again_in_fp32_are_counted_and_shown() -> None:
    nodes = make_nodes([256] * 4)
    encoder = FakeEncoder(overflowing={hash_row(nodes[1])})
    embedded = make_embedder(encoder).embed(nodes)
    assert_whole(embedded, nodes, encoder)
    assert embedded.redone_fp32 == 1
    assert len(steps(embedded, "redo_fp32")) == 1


# ------------------------------------------------------------------------------------------ anything at any time

faults = st.sets(st.integers(0, 60), max_size=25)


@settings(deadline=None, max_examples=150)
@given(
    lengths=st.lists(st.integers(1, 6000), max_size=60),
    oom=faults,
    ambiguous=faults,
    sticky=st.sets(st.integers(0, 60), max_size=4),
    neighbours=st.lists(
        st.builds(Neighbour, st.integers(0, 30), st.integers(0, 60), st.integers(0, 3 * GIB)), max_size=3
    ),
    scale=st.floats(0.1, 3.0),
)
def test_whatever_fails_whenever_no_node_is_lost_or_embedded_twice(
    lengths: list[int],
    oom: set[int],
    ambiguous: set[int],
    sticky: set[int],
    neighbours: list[Neighbour],
    scale: float,
) -> None:
    encoder = FakeEncoder(
        total_bytes=3 * GIB, oom_calls=oom, ambiguous_calls=ambiguous, sticky_calls=sticky, neighbours=neighbours
    )
    spill = InlineCpu(total_bytes=64 * GIB)
    nodes = make_nodes(lengths)
    distinct = list({hash_row(ids): ids for ids in nodes}.values())
    embedded = make_embedder(encoder, spill=spill, model=true_model(encoder, scale)).embed(distinct)
    if distinct:
        assert_whole(embedded, distinct, encoder, spill)


def test_a_cpu_pool_that_cannot_start_costs_only_the_nodes_it_was_to_take() -> None:
    class Unavailable(InlineCpu):
        def submit(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Future[Embedded]:
            future: Future[Embedded] = Future()
            future.set_exception(DeviceError("The device process (pid 7) died by SIGKILL, while it loaded the model."))
            return future

    encoder = FakeEncoder(total_bytes=2 * GIB, c1=MIB)
    nodes = make_nodes([4000, 100, 90])  # the first alone needs 4 GB
    embedded = make_embedder(encoder, spill=Unavailable()).embed(nodes).collect_spilled()
    assert embedded.placed.tolist() == [MISSING, ON_DEVICE, ON_DEVICE]
    assert list(embedded.failed) == [0]
    assert "while it loaded the model" in embedded.failed[0]


# ------------------------------------------------------------------------------------------ told to stop


def test_a_stop_between_micro_batches_keeps_what_is_done_and_leaves_the_rest_missing() -> None:
    encoder = FakeEncoder(total_bytes=2 * GIB)
    stop = threading.Event()
    embedder = NodeEmbedder(
        encoder, start_fit(true_model(encoder)), replace(SETTINGS, max_micro_batch_tokens=1024), stop=stop
    )
    nodes = make_nodes([256] * 40)
    seen: list[int] = []

    def stop_after_three(count: int, _tokens: int, _budget: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            stop.set()

    embedded = embedder.embed(nodes, Watch(on_batch=stop_after_three)).collect_spilled()
    assert len(encoder.calls) == 3
    done = np.flatnonzero(embedded.placed == ON_DEVICE)
    assert len(done) == sum(seen) == 40 - len(embedded.missing_rows())
    for row in done:
        np.testing.assert_allclose(embedded.vectors[row], to_unit_vector(nodes[row], encoder.dimension), atol=1e-6)


def test_spilled_nodes_that_a_closed_pool_never_began_are_missing() -> None:
    cancelled: Future[Embedded] = Future()
    cancelled.cancel()
    embedded = make_embedder(FakeEncoder()).embed(make_nodes([9] * 4))
    embedded.spilled.append((np.array([1, 2]), cancelled))
    embedded.placed[[1, 2]] = ON_CPU
    assert list(embedded.collect_spilled().missing_rows()) == [1, 2]
