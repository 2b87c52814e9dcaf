"""What an operator sees of a run that stepped down: the real UI of a real server, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.browser.conftest import COLLECTION, UiServer

pytestmark = pytest.mark.timeout(900)

Take = Callable[[str], None]


@pytest.fixture(scope="module")
def run_id(crowded_run: dict[str, Any]) -> str:
    return str(crowded_run["flow_run"])


def open_artifact(page: Page, server: UiServer, run_id: str, name: str) -> None:
    found = server.ask("artifacts/filter", flow_runs={"id": {"any_": [run_id]}}, sort="CREATED_DESC")
    newest = next(artifact for artifact in found if artifact["key"] == f"{name}-{COLLECTION}")
    page.goto(f"{server.url}/v2/artifacts/artifact/{newest['id']}")
    expect(page.get_by_text(newest["key"]).first).to_be_visible()


def read_table(page: Page) -> list[dict[str, str]]:
    expect(page.locator("table tbody tr").first).to_be_visible()
    names = page.locator("table thead th").all_inner_texts()
    rows = [row.locator("td").all_inner_texts() for row in page.locator("table tbody tr").all()]
    return [dict(zip((name.strip() for name in names), row, strict=False)) for row in rows]


def test_the_list_of_runs_names_collection_and_source(
    page: Page, ui_server: UiServer, run_id: str, take_picture: Take
) -> None:
    page.goto(f"{ui_server.url}/v2/runs")
    expect(page.get_by_text(f"{COLLECTION} from handbook").first).to_be_visible()
    take_picture("runs")


def test_the_runs_page_tells_which_partition_stepped_down(
    page: Page, ui_server: UiServer, run_id: str, take_picture: Take
) -> None:
    page.goto(f"{ui_server.url}/v2/runs/flow-run/{run_id}?tab=TaskRuns")
    expect(page.get_by_text("CompletedDegraded").first).to_be_visible()
    for name in ("chunk partition 0", "embed partition 0", "upsert partition 0", "start devices", "settle"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    page.goto(f"{ui_server.url}/v2/runs/flow-run/{run_id}")
    reason = page.get_by_text(re.compile(r"CompletedDegraded.*partition \d: \d oom.*CUDA out of memory")).first
    expect(reason).to_be_visible()
    reason.scroll_into_view_if_needed()
    take_picture("run")


def test_the_tasks_page_tells_why(page: Page, ui_server: UiServer, run_id: str) -> None:
    tasks = ui_server.ask("task_runs/filter", flow_runs={"id": {"any_": [run_id]}})
    degraded = [task for task in tasks if task["state"]["name"] == "CompletedDegraded"]
    assert degraded
    for task in degraded:
        page.goto(f"{ui_server.url}/v2/runs/task-run/{task['id']}")
        expect(
            page.get_by_text(re.compile(r"\d oom.*CUDA out of memory|\d spill.*one node alone needs")).first
        ).to_be_visible()


def test_the_artifacts_tab_lists_progress_partitions_ladder_books_memory_and_report(
    page: Page, ui_server: UiServer, run_id: str, take_picture: Take
) -> None:
    page.goto(f"{ui_server.url}/v2/runs/flow-run/{run_id}?tab=Artifacts")
    for name in ("progress", "partitions", "ladder", "books", "memory", "report"):
        expect(page.get_by_text(f"{name}-{COLLECTION}").first).to_be_visible()
    take_picture("artifacts")


def test_progress_is_complete_and_says_how_much(page: Page, ui_server: UiServer, run_id: str, crowded_run: Any) -> None:
    open_artifact(page, ui_server, run_id, "progress")
    expect(page.get_by_text(f"{crowded_run['nodes']} nodes in 4 partitions").first).to_be_visible()
    expect(page.get_by_role("progressbar").or_(page.get_by_text("100%")).first).to_be_visible()


def test_the_partition_table_closes(page: Page, ui_server: UiServer, run_id: str, crowded_run: Any) -> None:
    open_artifact(page, ui_server, run_id, "partitions")
    *each, total = read_table(page)
    assert total["partition"] == "all 4"
    assert sum(int(row["nodes"]) for row in each) == int(total["nodes"]) == crowded_run["nodes"]
    assert sum(int(row["spilled"]) for row in each) == crowded_run["spilled"] > 0
    assert any("oom" in row["what happened"] for row in each)


def test_the_ladder_table_tells_each_step_with_its_reason(
    page: Page, ui_server: UiServer, run_id: str, take_picture: Take
) -> None:
    open_artifact(page, ui_server, run_id, "ladder")
    rows = read_table(page)
    assert {row["step"] for row in rows} & {"oom", "spill"}
    assert all(row["reason"] for row in rows)
    take_picture("ladder")


def test_the_report_has_books_failures_and_the_picture(
    page: Page, ui_server: UiServer, run_id: str, take_picture: Take
) -> None:
    open_artifact(page, ui_server, run_id, "report")
    expect(page.get_by_role("heading", name=f"{COLLECTION}: books closed")).to_be_visible()
    take_picture("report")
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert headings[:5] == ["Documents", "Nodes", "Not ingested", "Memory over time", "Partitions"]
    expect(page.get_by_text("to-be-written.txt").first).to_be_visible()
    picture = page.get_by_alt_text("Memory over time", exact=False)
    picture.scroll_into_view_if_needed()
    assert picture.evaluate("image => image.complete && image.naturalWidth") >= 690


def test_the_memory_artifact_is_the_picture_and_its_figures(
    page: Page, ui_server: UiServer, run_id: str, take_picture: Take
) -> None:
    open_artifact(page, ui_server, run_id, "memory")
    picture = page.get_by_alt_text("Memory over time", exact=False)
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.naturalWidth") >= 690
    used = [row["used"] for row in read_table(page)]
    assert all(re.fullmatch(r"[\d,.]+ [MG]iB", value) for value in used)
    take_picture("memory")


def test_events_carry_what_an_automation_needs(page: Page, ui_server: UiServer, run_id: str, crowded_run: Any) -> None:
    wanted = {"ballast.ladder.oom", "ballast.ladder.spill", "ballast.run.finished"}
    found = ui_server.ask("events/filter", filter={"event": {"prefix": ["ballast."]}}, limit=50)["events"]
    assert wanted <= {event["event"] for event in found}
    for event in found:
        assert event["resource"]["prefect.resource.id"] == f"ballast.collection.{COLLECTION}"
        assert f"prefect.flow-run.{run_id}" in {related["prefect.resource.id"] for related in event["related"]}
    finished = next(event for event in found if event["event"] == "ballast.run.finished")
    assert finished["payload"]["points_counted"] == finished["payload"]["nodes_planned"] == crowded_run["nodes"]
    # Its own page: the feed shows the newest fifty only, and each task's states are events as well.
    page.goto(f"{ui_server.url}/v2/events/event/{finished['occurred'][:10]}/{finished['id']}")
    expect(page.get_by_text("ballast.run.finished").first).to_be_visible()


def test_the_metrics_say_the_same_as_the_books(crowded_run: Any) -> None:
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(crowded_run["metrics"])
        for sample in family.samples
        if not sample.labels
    }
    assert samples["ballast_points_stored_total"] == crowded_run["nodes"]
    assert samples["ballast_spilled_nodes_total"] == crowded_run["spilled"]
    assert samples["ballast_ooms_total"] >= 1
    assert samples["ballast_failed_nodes_total"] == 0
