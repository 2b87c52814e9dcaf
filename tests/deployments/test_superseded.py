"""Of a backlog of scheduled runs the first one works, and the others end at once; a trigger's run always works."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect_server import PrefectServer

from tasks.superseded import find_later_run

NOW = datetime.now(UTC)


class Backlog:
    """Runs of one deployment on a real server; all were due in the past."""

    def __init__(self, server: PrefectServer) -> None:
        self._server = server
        flow = server.ask("POST", "/flows/", {"name": f"flow-{uuid.uuid4().hex}"})
        made = server.ask("POST", "/deployments/", {"flow_id": flow["id"], "name": "documents"})
        self._deployment_id = made["id"]

    def add(self, due_h: float, **parameters: Any) -> FlowRun:
        """A scheduled run, due `due_h` hours ago."""
        due = (NOW - timedelta(hours=due_h)).isoformat()
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
        made = self._server.ask(
            "POST",
            f"/deployments/{self._deployment_id}/create_flow_run",
            {"state": state, "parameters": parameters, "enforce_parameter_schema": False},
        )
        with get_client(sync_client=True) as client:
            # Only the server's scheduler can say so.
            return client.read_flow_run(uuid.UUID(made["id"])).model_copy(update={"auto_scheduled": True})

    def work(self, run: FlowRun, end: str = "COMPLETED", name: str | None = None) -> None:
        for kind, state_name in (("PENDING", None), ("RUNNING", None), (end, name)):
            state = {"type": kind, **({"name": state_name} if state_name else {})}
            self._server.ask("POST", f"/flow_runs/{run.id}/set_state", {"state": state})


@pytest.fixture
def backlog(shared_api: PrefectServer) -> Backlog:
    return Backlog(shared_api)


def is_superseded(run: FlowRun, changed: list[str] | None = None) -> bool:
    return find_later_run(changed, patience_s=10, run=run) is not None


def test_a_backlog_collapses_into_its_first_run(backlog: Backlog) -> None:
    runs = [backlog.add(due_h) for due_h in (3, 2, 1)]
    assert not is_superseded(runs[0])
    backlog.work(runs[0])
    assert find_later_run(None, patience_s=10, run=runs[1]) == runs[0].name
    backlog.work(runs[1], name="Superseded")
    assert is_superseded(runs[2])
    assert not is_superseded(backlog.add(-1)), "due later than any of them began"


def test_a_run_that_was_superseded_supersedes_nobody(backlog: Backlog) -> None:
    first, second = backlog.add(2), backlog.add(1)
    backlog.work(first, name="Superseded")
    assert not is_superseded(second)


@pytest.mark.parametrize("end", ["FAILED", "CRASHED", "CANCELLED"])
def test_a_run_that_is_not_green_supersedes_nobody(backlog: Backlog, end: str) -> None:
    first, second = backlog.add(2), backlog.add(1)
    backlog.work(first, end)
    assert not is_superseded(second)


def test_a_run_over_some_paths_neither_supersedes_nor_is_superseded(backlog: Backlog) -> None:
    paths, whole = backlog.add(2, changed=["a.md"]), backlog.add(1)
    backlog.work(paths)
    assert not is_superseded(whole)
    backlog.work(whole)
    assert not is_superseded(paths, changed=["a.md"])
    by_hand = backlog.add(2).model_copy(update={"auto_scheduled": False})
    assert not is_superseded(by_hand)


def test_a_run_with_other_settings_does_not_count(backlog: Backlog) -> None:
    """Somebody tries another source or collection with the nightly's deployment."""
    nightly = backlog.add(2, settings={"source": {"uri": "docs"}, "qdrant": {"collection": "docs"}})
    others: list[Any] = [
        {"source": {"uri": "docs/drafts"}, "qdrant": {"collection": "docs"}},
        {"source": {"uri": "docs"}, "qdrant": {"collection": "trial"}},
        {"source": {"uri": "docs"}, "qdrant": {"collection": "docs"}, "chunking": {"max_tokens": 64}},
        {"source": {"uri": "docs"}, "no_such_knob": 1},
    ]
    for settings in others:
        backlog.work(backlog.add(1, settings=settings))
    assert not is_superseded(nightly)
    backlog.work(backlog.add(1, settings={"source": "docs", "qdrant": {"collection": "docs", "batch_points": 256}}))
    assert is_superseded(nightly), "the same, spelt otherwise"


def test_another_deployments_runs_do_not_count(backlog: Backlog, shared_api: PrefectServer) -> None:
    other = Backlog(shared_api)
    other.work(other.add(1))
    assert not is_superseded(backlog.add(2))


def test_outside_a_flow_run_there_is_nothing_to_supersede() -> None:
    assert find_later_run(None, patience_s=1) is None
