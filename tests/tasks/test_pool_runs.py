"""How a worker's run is seen, from what the server says of it. The calls themselves: tests/e2e/deployed."""

from __future__ import annotations

from uuid import UUID

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed, Pending, Running, Scheduled

from tasks.config import IngestSettings
from tasks.pool_runs import OPEN_STATES, _to_look, to_tag, to_worker_settings


def look(state: State | None) -> tuple[str, str]:
    run = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), state=state, state_type=None if state is None else state.type)
    seen = _to_look(run)
    return seen.phase, seen.state


@pytest.mark.parametrize(
    ("state", "phase", "told"),
    [
        (None, "waiting", "unknown"),
        (Scheduled(), "waiting", "Scheduled"),
        (AwaitingRetry(), "waiting", "AwaitingRetry"),
        (State(type=StateType.SCHEDULED, name="Late"), "waiting", "Late"),
        (State(type=StateType.PAUSED, name="Suspended"), "waiting", "Suspended"),
        (Pending(message="Submitted"), "pending", "Pending: Submitted"),
        (Running(), "running", "Running"),
        (State(type=StateType.CANCELLING, name="Cancelling"), "running", "Cancelling"),
        (Completed(name="CompletedDegraded"), "ended", "CompletedDegraded"),
        (Failed(message="exit code 9"), "ended", "Failed: exit code 9"),
        (Crashed(message="no heartbeat"), "ended", "Crashed: no heartbeat"),
        (Cancelled(), "ended", "Cancelled"),
    ],
    ids=lambda each: each.name if isinstance(each, State) else None,
)
def test_what_a_state_means(state: State | None, phase: str, told: str) -> None:
    assert look(state) == (phase, told)


@pytest.mark.parametrize("state_type", list(StateType))
def test_only_a_final_state_is_an_end(state_type: StateType) -> None:
    """A phase that were taken for an end would hand a worker's partitions out a second time."""
    state = State(type=state_type)
    assert (look(state)[0] == "ended") == state.is_final()
    assert (state_type in OPEN_STATES) != state.is_final()


def test_runs_of_two_collections_have_different_tags() -> None:
    assert to_tag("docs") != to_tag("docs-2")


def test_a_workers_parameters_are_the_ingests_without_its_source() -> None:
    source = {"uri": "https://files.example/docs?page=1", "name": "docs", "text_fields": ["body"]}
    settings = IngestSettings.model_validate({"source": source, "qdrant": {"collection": "docs"}, "spool": "s3://b/x"})
    sent = to_worker_settings(settings).model_dump(mode="json")
    assert "files.example" not in str(sent)
    assert IngestSettings.model_validate(sent).model_copy(update={"source": settings.source}) == settings
