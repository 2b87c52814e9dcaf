"""A deployment on loopback: set-up, webhook, GPU pool, CPU pool, points, closed books; then what goes wrong."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.backends.fake_qdrant_server import LoopbackQdrant
from tests.e2e.deployed.site import API_KEY, Site

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def site(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with LoopbackQdrant() as qdrant:
        site = Site(tmp_path_factory.mktemp("site"), minilm, qdrant)
        try:
            site.server.start()
            yield site
        finally:
            site.close()


@pytest.fixture(scope="module")
def first(site: Site) -> dict[str, Any]:
    """The first run: set up, three workers, one signed delivery over the whole source."""
    site.write_documents(4, words=6, prefix="buoy")  # short: they fit the device
    site.write_documents(8, words=40)
    before = site.set_up()
    again = site.set_up()
    for pool in ("ingest-pool", "gpu-pool", "cpu-pool"):
        site.start_worker(pool)
    site.start_receiver()
    run = site.wait_for_run(site.trigger({}, delivery="first"))
    accepted = site.deliver({}, delivery="first").json()
    return {"set_up": before, "set_up_again": again, "accepted": accepted, "run": run}


def test_set_up_can_be_run_again(first: dict[str, Any]) -> None:
    assert first["set_up"]["counts"].get("created", 0) > 0
    assert first["set_up_again"]["counts"].get("created", 0) == 0


def test_a_signed_delivery_ends_in_points_and_closed_books(site: Site, first: dict[str, Any]) -> None:
    run = first["run"]
    assert run["state_type"] == "COMPLETED", (run["state"]["message"], site.read_logs())
    assert first["accepted"]["page"].endswith(run["id"])
    artifacts = site.list_artifacts(run["id"])
    rows = json.loads(artifacts["books-documents"]["data"])
    documents, nodes = rows[0], rows[1]
    assert (documents["seen"], documents["written"]) == ("12", "12")
    assert int(nodes["GPU"]) > 0
    assert int(nodes["CPU"]) > 0
    assert int(nodes["planned"]) == int(nodes["GPU"]) + int(nodes["CPU"]) == site.count_points()
    assert artifacts["books-documents"]["description"] == "The books close"
    assert artifacts["progress-documents"]["data"] == 100


def test_the_page_tells_why_nodes_left_the_device(site: Site, first: dict[str, Any]) -> None:
    tasks = site.list_tasks(first["run"]["id"])
    names = [task["name"] for task in tasks]
    assert any(name.startswith("hand group 0 to gpu-pool") for name in names)
    assert any("to cpu-pool" in name for name in names)
    degraded = [task["state"] for task in tasks if task["state"] and task["state"]["name"] == "CompletedDegraded"]
    assert degraded
    assert any("spill" in state["message"] and "cpu-pool" in state["message"] for state in degraded)
    # The ingest needs their reports, not their ends.
    workers = [site.wait_for_run(worker["id"]) for worker in site.list_runs("embed-partitions")]
    assert all(worker["state_type"] == "COMPLETED" for worker in workers), [worker["state"] for worker in workers]
    assert {worker["work_pool_name"] for worker in workers} == {"gpu-pool", "cpu-pool"}


def test_no_secret_is_on_the_server_in_the_open(site: Site, first: dict[str, Any]) -> None:
    assert any(headers.get("api-key") == API_KEY for _, headers, _ in site.qdrant.requests)
    database = site.server.database
    # What was written last is in the write-ahead log only, until it is merged.
    files = [database, *database.parent.glob(f"{database.name}-wal")]
    assert [file.name for file in files if API_KEY.encode() in file.read_bytes()] == []
    assert API_KEY not in site.read_logs()


def test_the_same_delivery_again_starts_nothing(site: Site, first: dict[str, Any]) -> None:
    runs = len(site.list_runs("ingest"))
    answer = site.deliver({}, delivery="first")
    assert answer.json()["run"] == first["accepted"]["run"]
    assert len(site.list_runs("ingest")) == runs


def test_a_bad_signature_starts_nothing(site: Site, first: dict[str, Any]) -> None:
    runs = len(site.list_runs("ingest"))
    answer = site.deliver({}, delivery="forged", secret="not the secret, but as long")
    assert answer.status_code == 401
    assert len(site.list_runs("ingest")) == runs


def test_two_triggers_of_one_collection_dont_overlap(site: Site, first: dict[str, Any]) -> None:
    """A webhook's changed paths, and a verify that somebody starts in the UI on another queue, at the same time."""
    (site.documents / "buoy-000.md").write_text("# A new buoy\n\nIt is green and carries a bell.")
    (site.documents / "ship-001.md").unlink()
    kept = site.count_points("ship-002.md")
    found = site.ask("GET", "/deployments/name/verify/documents")
    other = site.ask("POST", f"/deployments/{found['id']}/create_flow_run", {"work_queue_name": "default"})
    triggered = site.trigger({"changed": ["buoy-000.md", "ship-001.md"]}, delivery="second")
    ingest, verify = site.wait_for_run(triggered), site.wait_for_run(other["id"])
    assert ingest["state_type"] == "COMPLETED", ingest["state"]["message"]
    assert site.count_points("buoy-000.md") == 1
    assert site.count_points("ship-001.md") == 0
    assert site.count_points("ship-002.md") == kept > 0

    def span(run: dict[str, Any]) -> tuple[str, str]:
        # Its own first and last: a worker's run closes its model when the ingest run, which has its reports, is over already.
        tasks = [task for task in site.list_tasks(run["id"]) if task["name"] in ("prepare", "settle", "inspect")]
        return min(task["start_time"] for task in tasks), max(task["end_time"] for task in tasks)

    spans = sorted([span(ingest), span(verify)])
    assert spans[0][1] <= spans[1][0], spans


def test_a_killed_worker_and_a_restarted_server_lose_nothing(site: Site, first: dict[str, Any]) -> None:
    site.write_documents(60, words=6, prefix="tug")  # short: the CPU pool has had its turn
    before = {worker["id"] for worker in site.list_runs("embed-partitions")}
    run_id = site.trigger({}, delivery="third")

    def list_new(state: str) -> list[dict[str, Any]]:
        new = [worker for worker in site.list_runs("embed-partitions") if worker["id"] not in before]
        return [worker for worker in new if worker["state_type"] == state and worker["work_pool_name"] == "gpu-pool"]

    site.wait_until(lambda: bool(list_new("RUNNING")), "a worker embeds")
    victim = list_new("RUNNING")[0]["id"]
    # With all its children, as a machine that loses its power: nobody tells the server.
    site.end("gpu-pool", signal.SIGKILL)
    site.server.stop(kill=True)
    site.start_worker("gpu-pool", "gpu-pool-2")
    site.server.start()
    site.server.wait()
    run = site.wait_for_run(run_id)
    assert run["state_type"] == "COMPLETED", (run["state"]["message"], site.read_logs(["ingest-pool", "gpu-pool-2"]))
    rows = json.loads(site.list_artifacts(run_id)["books-documents"]["data"])
    assert rows[0]["written"] == "60"
    assert int(rows[1]["planned"]) == int(rows[1]["GPU"]) + int(rows[1]["CPU"])
    assert site.count_points("tug-059.md") > 0
    assert site.read_run(victim)["state_type"] in ("CRASHED", "CANCELLED", "CANCELLING")
    spool = Path(site.folder / "spool")
    assert list(spool.rglob("partition-*")) == []


def test_a_killed_coordinator_is_followed_up_by_the_next_run(site: Site, first: dict[str, Any]) -> None:
    site.write_documents(60, words=6, prefix="ferry")
    before = {worker["id"] for worker in site.list_runs("embed-partitions")}
    run_id = site.trigger({}, delivery="fourth")
    site.wait_until(
        lambda: any(
            worker["state_type"] == "RUNNING" and worker["id"] not in before
            for worker in site.list_runs("embed-partitions")
        ),
        "a worker embeds",
    )
    site.end("ingest-pool", signal.SIGKILL)
    site.ask(
        "POST", f"/flow_runs/{run_id}/set_state", {"state": {"type": "CRASHED"}, "force": True}
    )  # as the automation
    site.start_worker("ingest-pool", "ingest-pool-2")
    follower = site.wait_for_run(site.trigger({}, delivery="fifth"))
    assert follower["state_type"] == "COMPLETED", (follower["state"]["message"], site.read_logs(["ingest-pool-2"]))
    assert site.count_points("ferry-059.md") > 0
    rows = json.loads(site.list_artifacts(follower["id"])["books-documents"]["data"])
    assert int(rows[0]["seen"]) == len(list(site.documents.iterdir()))
