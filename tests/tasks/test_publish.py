"""What a run publishes, on a real Prefect API, and what becomes of the run where that is away."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.context import SyncClientContext
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.publish import ProgressArtifact, publish_group, publish_ladder, publish_run, to_key
from tasks.records import Books, BudgetMark, LadderStep, Partition, PartitionReport, RunSummary

GIB = 1024**3

STEP = LadderStep("oom", "CUDA out of memory", 64, 32, 512, 8 * GIB, 4 * GIB, GIB, at_s=1.5)
REPORT = PartitionReport(
    index=0, nodes=100, tokens=20_000, gpu_nodes=100, cpu_nodes=0, failed_nodes={}, micro_batches=4, batch_min=8,
    batch_max=64, peak_bytes=3 * GIB, budget_bytes=8 * GIB, seconds=2.0, padding_tokens=10, redone_fp32=0, steps=(STEP,),
    device="cuda:0",
)  # fmt: skip
SUMMARY = RunSummary(
    collection="My Docs", physical_collection="docs__1a", model="m", fingerprint="1a", device="cuda:0", device_note="",
    books=Books(3, 1, 2, 0, 0, 100, 100, 0, 0, 0, 100), rejections=[], partitions=[REPORT], memory_series=[],
    tokens=20_000, seconds={"total": 7.5}, budget_series=[BudgetMark(0.0, 8 * GIB, 64, GIB, GIB)],
)  # fmt: skip


def make_partition(index: int, source_fraction: float) -> Partition:
    return Partition(index, f"p{index}", 50, 5000, 256, source_fraction)


@contextmanager
def server_away() -> Iterator[None]:
    """Calls made inside find nobody at the API's address."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/api"
        # The flow's own client would be taken again, were it not for settings of its own.
        with SyncClientContext(httpx_settings={"timeout": 5.0}), temporary_settings({PREFECT_API_URL: url}):
            yield


def publish_in_a_flow(publish: Callable[[], object]) -> dict[str, Any]:
    """The artifacts that the flow's run has in the end, the newest of each key."""

    @flow(name="publish", persist_result=False)
    def run() -> str:
        publish()
        return str(flow_run.get_id())

    run_id = run()
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(run_id)]))
        )
    return {str(artifact.key): artifact for artifact in sorted(found, key=lambda artifact: str(artifact.updated))}


@pytest.mark.usefixtures("prefect_api")
def test_a_runs_end_is_all_on_its_page() -> None:
    many = [replace(REPORT, index=index) for index in range(1000)]
    artifacts = publish_in_a_flow(lambda: publish_run(replace(SUMMARY, partitions=many), ()))
    assert set(artifacts) == {"partitions-my-docs", "books-my-docs", "memory-my-docs", "report-my-docs"}
    rows = json.loads(artifacts["partitions-my-docs"].data)
    assert len(rows) == 201
    assert (rows[-1]["partition"], rows[-1]["nodes"]) == ("all 1,000", "100,000")
    assert "800 are left out" in artifacts["partitions-my-docs"].description
    for name in ("memory", "report"):
        assert "](data:image/png;base64," in artifacts[f"{name}-my-docs"].data
    assert len(artifacts["report-my-docs"].data) < 200_000


@pytest.mark.usefixtures("prefect_api")
def test_what_a_workers_run_shows_is_under_keys_of_its_own() -> None:
    """An artifact's page shows the newest of its key: a group's would stand for the whole run's."""

    def publish() -> None:
        progress = ProgressArtifact("My Docs", "group")
        progress.update(make_partition(0, 1.0))
        progress.finish()
        publish_group(SUMMARY)

    artifacts = publish_in_a_flow(publish)
    assert set(artifacts) == {"group-progress-my-docs", "group-partitions-my-docs", "group-memory-my-docs"}
    assert "Share of the group" in artifacts["group-progress-my-docs"].description
    rows = json.loads(artifacts["group-partitions-my-docs"].data)
    assert [row["nodes"] for row in rows] == ["100"]


@pytest.mark.usefixtures("prefect_api")
def test_progress_that_a_server_missed_is_made_up_for() -> None:
    def publish() -> None:
        with server_away():
            progress = ProgressArtifact("My Docs")
            progress.update(make_partition(0, 0.5))
            progress.update(make_partition(1, 0.9))
        progress.finish()

    (artifact,) = publish_in_a_flow(publish).values()
    assert artifact.data == 100
    assert "100 nodes in 2 partitions" in artifact.description


@pytest.mark.usefixtures("prefect_api")
def test_progress_moves() -> None:
    def publish() -> None:
        progress = ProgressArtifact("My Docs")
        progress.update(make_partition(0, 0.25))
        progress.finish()

    (artifact,) = publish_in_a_flow(publish).values()
    assert artifact.data == 100
    assert "50 nodes in 1 partitions" in artifact.description


@pytest.mark.usefixtures("prefect_api")
def test_without_a_server_the_tables_are_in_the_log_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def publish() -> None:
        with server_away():
            ProgressArtifact("My Docs").finish(patience_s=0.1)
            publish_ladder("My Docs", REPORT)
            publish_run(SUMMARY, ("points: 1 missing",), patience_s=0.1)

    with caplog.at_level("INFO", logger="tasks.publish"):
        assert publish_in_a_flow(publish) == {}
    logged = [record.getMessage() for record in caplog.records if record.name == "tasks.publish"]
    assert any(re.match(r"partition index=0 nodes=100 ", line) for line in logged)
    assert any(line.startswith("ladder at_s=1.5 step=oom ") for line in logged)
    assert any(line.startswith("documents seen=3 ") for line in logged)
    # One wait for all of them, not one each.
    assert sum("not shown in the UI" in line for line in logged) == 3


@given(st.text(max_size=80))
@settings(deadline=None)
def test_every_collection_has_a_key_that_prefect_takes(collection: str) -> None:
    from prefect.client.schemas.actions import ArtifactCreate

    key = f"report-{to_key(collection)}"
    assert ArtifactCreate(key=key).key == key
