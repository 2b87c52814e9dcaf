"""`ballast setup` on a real, empty Prefect server: what is there afterwards, again and again, and what it starts."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect_server import PrefectServer

from flows.setup_files import AUTOMATIONS_FILE, POOLS_FILE, read_automations

SITE = {
    "BALLAST_SOURCE": "/data/documents",
    "BALLAST_SPOOL": "/data/spool",
    "BALLAST_DATA_FOLDER": "/data/ballast",
    "QDRANT_URL": "http://qdrant:6333",
}
SILENT = "ballast: silent runs are crashed"
BALLAST = Path(sys.executable).parent / "ballast"  # not on the path where a virtual environment is not activated
KEY = f"key-{uuid.uuid4().hex}"


@dataclass
class Ended:
    code: int
    stdout: str
    stderr: str

    @property
    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = json.loads(self.stdout)["counts"]
        return counts

    def step(self, name: str) -> dict[str, str]:
        steps: list[dict[str, str]] = json.loads(self.stdout)["steps"]
        return next(step for step in steps if step["name"] == name)


def set_up(server: PrefectServer, *arguments: str, **site: str) -> Ended:
    """The command itself, from a folder that has nothing to do with the checkout."""
    ended = subprocess.run(
        [str(BALLAST), "setup", "--json", *arguments],
        env={**server.environment, **SITE, **site},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@pytest.fixture(scope="module")
def first(prefect_server: PrefectServer) -> Ended:
    """The first set-up, of an empty server."""
    return set_up(prefect_server, QDRANT_API_KEY=KEY)


def find(server: PrefectServer, path: str, **filters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.ask("POST", f"/{path}/filter", filters)
    return found


def deployment(server: PrefectServer, name: str) -> dict[str, Any]:
    found: dict[str, Any] = server.ask("GET", f"/deployments/name/{name}")
    return found


def emit(server: PrefectServer, event: str, resource_id: str, payload: object = None, **labels: str) -> None:
    record = {
        "id": str(uuid.uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource_id, **labels},
        "payload": payload or {},
    }
    server.ask("POST", "/events", [record])


def wait_for(look: Callable[[], Any], timeout_s: float = 40.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)
    return found


@dataclass
class Receiver:
    """Somebody's chat."""

    url: str
    received: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.received.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_address[1]}/hooks/{uuid.uuid4().hex}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def forced(first: Ended, prefect_server: PrefectServer, receiver: Receiver) -> Ended:
    """After an operator's changes, with --force, and now with somebody to notify."""
    prefect_server.ask("PATCH", "/work_pools/gpu-pool", {"concurrency_limit": 9})
    (automation,) = [entry for entry in find(prefect_server, "automations") if entry["name"] == SILENT]
    prefect_server.ask("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    return set_up(prefect_server, "--force", BALLAST_NOTIFY_URL=receiver.url)


def test_the_first_time_everything_is_made(first: Ended, prefect_server: PrefectServer) -> None:
    assert first.code == 0, first.stderr
    assert {name: count for name, count in first.counts.items() if count} == {"created": 12, "skipped": 1}

    pools = {pool["name"]: pool for pool in find(prefect_server, "work_pools")}
    assert {name: (pool["type"], pool["concurrency_limit"]) for name, pool in pools.items()} == {
        "ingest-pool": ("process", 8),
        "gpu-pool": ("process", 4),
        "cpu-pool": ("process", 2),
    }
    assert pools["gpu-pool"]["base_job_template"]["job_configuration"]["command"] == "{{ command }}"
    queues = prefect_server.ask("POST", "/work_pools/ingest-pool/queues/filter", {})
    assert {queue["name"]: queue["concurrency_limit"] for queue in queues}["documents"] == 1

    ingest = deployment(prefect_server, "ingest/documents")
    assert ingest["entrypoint"] == "flows.ingest.ingest"
    assert (ingest["work_pool_name"], ingest["work_queue_name"]) == ("ingest-pool", "documents")
    assert ingest["pull_steps"] in (None, []), "the worker imports the installed package"
    assert ingest["parameters"]["settings"]["source"] == {"uri": "/data/documents", "name": "documents"}
    assert ingest["parameters"]["settings"]["qdrant"]["url"] == "http://qdrant:6333"
    assert ingest["job_variables"]["env"]["CUDA_VISIBLE_DEVICES"] == ""
    schedule = ingest["schedules"][0]["schedule"]
    assert (schedule["cron"], schedule["timezone"]) == ("0 2 * * *", "Etc/UTC")
    gpu = deployment(prefect_server, "embed-partitions/gpu")
    assert gpu["work_pool_name"] == "gpu-pool"
    assert gpu["job_variables"]["env"]["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert gpu["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert "CUDA_VISIBLE_DEVICES" not in gpu["job_variables"]["env"], "the worker's own"
    assert deployment(prefect_server, "embed-partitions/cpu")["job_variables"]["env"]["CUDA_VISIBLE_DEVICES"] == ""
    assert deployment(prefect_server, "verify/documents")["schedules"][0]["schedule"]["cron"] == "0 5 * * 0"

    automations = {entry["name"]: entry for entry in find(prefect_server, "automations")}
    assert sorted(automations) == [
        "ballast: notify of ended runs",
        "ballast: notify of what is red or spilled",
        "ballast: silent runs are crashed",
        "documents changed",
    ]
    assert not automations["ballast: notify of ended runs"]["enabled"], "nobody to notify"
    assert first.step("ballast: notify of ended runs")["note"] == "off: BALLAST_NOTIFY_URL is unset"


def test_again_it_changes_nothing_and_leaves_alone_what_an_operator_changed(
    first: Ended, prefect_server: PrefectServer
) -> None:
    automations = find(prefect_server, "automations")
    automation = next(entry for entry in automations if entry["name"] == SILENT)
    ingest = deployment(prefect_server, "ingest/documents")
    schedule = f"/deployments/{ingest['id']}/schedules/{ingest['schedules'][0]['id']}"
    prefect_server.ask("PATCH", "/work_pools/gpu-pool", {"concurrency_limit": 9})
    prefect_server.ask("PATCH", f"/automations/{automation['id']}", {"enabled": False})
    prefect_server.ask("PATCH", schedule, {"active": False})

    again = set_up(prefect_server, QDRANT_API_KEY=KEY)
    assert again.code == 0, again.stderr
    assert {name: count for name, count in again.counts.items() if count} == {"unchanged": 11, "kept": 1, "skipped": 1}
    assert len(find(prefect_server, "automations")) == len(automations)
    assert again.step("gpu-pool")["note"] == "limit 9 on the server, 4 in the file; --force sets it"
    assert again.step(SILENT)["note"] == "off on the server; --force switches it on"
    assert prefect_server.ask("GET", "/work_pools/gpu-pool")["concurrency_limit"] == 9
    assert not deployment(prefect_server, "ingest/documents")["schedules"][0]["active"]

    would = set_up(prefect_server, "--force", "--dry-run")
    assert would.step("gpu-pool")["outcome"] == "updated"
    assert prefect_server.ask("GET", "/work_pools/gpu-pool")["concurrency_limit"] == 9, "--dry-run"


def test_force_sets_it_back(forced: Ended, prefect_server: PrefectServer) -> None:
    assert forced.code == 0, forced.stderr
    assert forced.step("gpu-pool")["outcome"] == forced.step(SILENT)["outcome"] == "updated"
    assert prefect_server.ask("GET", "/work_pools/gpu-pool")["concurrency_limit"] == 4
    (automation,) = [entry for entry in find(prefect_server, "automations") if entry["name"] == SILENT]
    assert automation["enabled"]


def test_the_secret_is_a_block_and_nowhere_in_clear(first: Ended, prefect_server: PrefectServer) -> None:
    blocks = find(prefect_server, "block_documents", include_secrets=True)
    assert {block["name"]: block["data"] for block in blocks}["ballast-qdrant-api-key"] == {"value": KEY}
    assert KEY not in first.stdout + first.stderr
    kept = [path for path in prefect_server.home.rglob("*") if path.is_file()]
    assert [path for path in kept if KEY.encode() in path.read_bytes()] == []


# ---------------------------------------------------------------------------------------------- events


def new_runs(server: PrefectServer, before: Sequence[str]) -> list[dict[str, Any]]:
    runs = find(server, "flow_runs")
    return [run for run in runs if run["id"] not in before and not run["auto_scheduled"]]


def test_an_event_starts_an_ingest_of_its_paths(first: Ended, prefect_server: PrefectServer) -> None:
    before = [run["id"] for run in find(prefect_server, "flow_runs")]
    changed = ["guides/ölwechsel.md", 'a "quoted" {{ name }}.md', "tables/x.csv"]
    emit(prefect_server, "ballast.source.changed", "ballast.source.documents", {"changed": changed})
    (run,) = wait_for(lambda: new_runs(prefect_server, before))
    assert run["parameters"]["changed"] == changed
    assert run["parameters"]["settings"] == deployment(prefect_server, "ingest/documents")["parameters"]["settings"]
    assert (run["work_pool_name"], run["work_queue_name"]) == ("ingest-pool", "documents")


def test_an_event_without_paths_or_of_another_source_starts_nothing(
    first: Ended, prefect_server: PrefectServer
) -> None:
    before = [run["id"] for run in find(prefect_server, "flow_runs")]
    failed = {"filter": {"event": {"name": ["prefect.automation.action.failed"]}}}
    known = prefect_server.ask("POST", "/events/filter", failed)["total"]
    emit(prefect_server, "ballast.source.changed", "ballast.source.elsewhere", {"changed": ["a.md"]})
    for payload in ({}, {"path": "a.md"}, {"changed": "a.md"}, {"changed": [1]}, {"changed": {"a.md": 1}}):
        emit(prefect_server, "ballast.source.changed", "ballast.source.documents", payload)
    wait_for(lambda: prefect_server.ask("POST", "/events/filter", failed)["total"] >= known + 5)
    assert new_runs(prefect_server, before) == []


def test_somebody_is_notified(forced: Ended, prefect_server: PrefectServer, receiver: Receiver) -> None:
    assert forced.step("ballast-notify")["outcome"] == "created"
    assert forced.step("ballast: notify of ended runs")["outcome"] == "updated"

    flow = prefect_server.ask("POST", "/flows/", {"name": "ingest"})
    crashed = prefect_server.ask(
        "POST", "/flow_runs/", {"flow_id": flow["id"], "name": "documents from /data", "state": {"type": "RUNNING"}}
    )
    emit(
        prefect_server, "ballast.books.failed", "ballast.collection.handbook", {"failed": 3},
        **{"prefect.resource.name": "handbook"},
    )  # fmt: skip
    state = {"type": "CRASHED", "name": "Crashed", "message": "the worker is gone"}
    prefect_server.ask("POST", f"/flow_runs/{crashed['id']}/set_state", {"state": state})
    wait_for(lambda: len(receiver.received) >= 2)
    notes = {note["subject"]: note["text"] for note in receiver.received}
    assert '{"failed": 3}' in notes["Ballast: ballast.books.failed in handbook"]
    assert "the worker is gone" in notes["Ballast: ingest documents from /data is Crashed"]

    token = receiver.url.rpartition("/")[2]
    assert token not in forced.stdout + forced.stderr
    kept = [path for path in prefect_server.home.rglob("*") if path.is_file()]
    assert [path for path in kept if token.encode() in path.read_bytes()] == []
    again = set_up(prefect_server, "--dry-run", BALLAST_NOTIFY_URL=receiver.url)
    assert again.step("ballast-notify")["outcome"] == "unchanged"
    assert again.step("ballast: notify of ended runs")["outcome"] == "unchanged"


def test_silent_runs_are_crashed_and_others_are_not(prefect_server: PrefectServer) -> None:
    """The shipped automation, with 10 s in place of its 5 minutes."""
    shipped = next(entry for entry in read_automations(AUTOMATIONS_FILE) if "silent" in entry["name"])
    quick = {**shipped, "name": "silent, quick", "trigger": {**shipped["trigger"], "within": 10}}
    prefect_server.ask("POST", "/automations/", quick)

    flow = prefect_server.ask("POST", "/flows/", {"name": "embed-partitions"})
    runs = {
        name: prefect_server.ask(
            "POST", "/flow_runs/", {"flow_id": flow["id"], "name": name, "state": {"type": "RUNNING"}}
        )["id"]
        for name in ("silent", "alive", "red", "without heartbeats")
    }

    def beat(name: str) -> None:
        emit(prefect_server, "prefect.flow-run.heartbeat", f"prefect.flow-run.{runs[name]}")

    def state(name: str) -> str:
        return str(prefect_server.ask("GET", f"/flow_runs/{runs[name]}")["state"]["name"])

    for name in ("silent", "alive", "red"):
        beat(name)
    # The event of an end bears the state's own name, not its type's.
    ended = {"type": "FAILED", "name": "DocumentsFailed"}
    prefect_server.ask("POST", f"/flow_runs/{runs['red']}/set_state", {"state": ended})

    def is_silent_crashed() -> bool:
        beat("alive")
        return state("silent") == "Crashed"

    wait_for(is_silent_crashed, 60)
    time.sleep(3)  # more than one look of the automation
    assert (state("alive"), state("red"), state("without heartbeats")) == ("Running", "DocumentsFailed", "Running")


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "site", "code", "message"),
    [
        ([], {"BALLAST_SPOOL": ""}, 2, "takes BALLAST_SPOOL from the environment, where it is unset or empty"),
        (["--prefect-file", "/nowhere.yaml"], {}, 2, "/nowhere.yaml can't be read"),
        ([], {"BALLAST_NOTIFY_URL": "ftp://secret@example.org"}, 2, "BALLAST_NOTIFY_URL is neither"),
        (["--wait", "0"], {"PREFECT_API_URL": "http://127.0.0.1:9/api"}, 4, "did not answer within 0 s"),
        ([], {"PREFECT_API_URL": ""}, 2, "No Prefect server is configured"),
    ],
)
def test_what_it_refuses(
    first: Ended, prefect_server: PrefectServer, arguments: list[str], site: dict[str, str], code: int, message: str
) -> None:
    refused = set_up(prefect_server, *arguments, **site)
    assert (refused.code, message in refused.stderr) == (code, True), refused.stderr
    assert "secret" not in refused.stderr


def test_a_pool_or_queue_that_no_file_has_is_refused_before_anything_is_changed(
    prefect_server: PrefectServer, tmp_path: Path
) -> None:
    pools = yaml.safe_load(POOLS_FILE.read_text())
    pools["pools"][0]["queues"] = []
    path = tmp_path / "pools.yaml"
    path.write_text(yaml.safe_dump(pools))
    refused = set_up(prefect_server, "--pools-file", str(path))
    assert refused.code == 2
    assert "waits in the work queue documents of ingest-pool" in refused.stderr
