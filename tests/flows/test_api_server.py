"""The embedded Prefect API, with a real server in a process of its own; scripts are the processes that own it."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.api_process import claim_folder
from flows.api_server import check_configured, find_configured_url
from tasks.errors import ApiUnavailable

RUN_A_FLOW = """
import json, logging, sys
from flows.api_server import embedded_api

with embedded_api(sys.argv[1]) as api:
    import psutil
    from prefect import flow, get_client, task
    from prefect.artifacts import create_markdown_artifact

    @task
    def add(number):
        logging.getLogger("tasks.test").info("adding %d", number)
        return number + 1

    @flow
    def trivial():
        create_markdown_artifact("# Books", key="books")
        return [add(number) for number in range(5)]

    numbers = trivial()
    with get_client(sync_client=True) as client:
        runs = [(run.name, run.state_name) for run in client.read_flow_runs()]
    servers = [process.pid for process in psutil.Process().children()]
print(json.dumps({"numbers": numbers, "runs": runs, "servers": servers, "embedded": api.embedded}))
"""

HOLD_THE_SERVER = """
import signal, sys, time
from flows.api_server import embedded_api

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
with embedded_api(sys.argv[1]) as api:
    print(api.url, flush=True)
    time.sleep(60)
"""

START_ONLY = """
import sys
from flows.api_server import embedded_api

with embedded_api(sys.argv[1]):
    pass
"""


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: a new database costs ten seconds of schema migrations."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Without the Prefect server or profile that the developer may have."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return {**clean, "PREFECT_HOME": str(tmp_path / "prefect-home")}


def test_a_flow_is_recorded_whole_and_the_server_is_gone(data_folder: Path, environment: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", RUN_A_FLOW, str(data_folder)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["numbers"] == [1, 2, 3, 4, 5]
    assert [state for _, state in told["runs"]] == ["Completed"]
    assert told["embedded"] is True
    assert run.stderr == "", "Prefect's own lines belong in the UI, not on the terminal"
    assert len(told["servers"]) == 1
    assert not psutil.pid_exists(told["servers"][0])
    # What Prefect's temporary server loses: states of very fast tasks, still in memory when it ends.
    with sqlite3.connect(data_folder / "prefect" / "prefect.db") as database:
        assert database.execute("select state_name from task_run").fetchall() == [("Completed",)] * 5
        assert database.execute(
            "select count(*) from events where event = 'prefect.task-run.Completed'"
        ).fetchone() == (5,)
        assert database.execute("select count(*) from log where message like 'adding %'").fetchone() == (5,)
        assert database.execute("select key from artifact").fetchall() == [("books",)]
    database.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_the_server_ends_with_its_owner(data_folder: Path, environment: dict[str, str], how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_SERVER, str(data_folder)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        assert owner.stdout.readline().startswith("http://127.0.0.1:")
        (server,) = psutil.Process(owner.pid).children()
        owner.send_signal(how)
        _, alive = psutil.wait_procs([server], timeout=20)
        assert alive == []
    assert owner.returncode == -how


def test_a_server_that_cannot_start_says_why(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "prefect.db").write_bytes(b"not a database" * 1000)
    run = subprocess.run(
        [sys.executable, "-c", START_ONLY, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 1
    message = run.stderr[run.stderr.index("tasks.errors.ApiUnavailable") :]
    assert "file is not a database" in message
    assert "PREFECT_API_URL" in message


def test_a_second_server_takes_a_folder_of_its_own(tmp_path: Path) -> None:
    first, first_lock = claim_folder(tmp_path / "prefect")
    second, second_lock = claim_folder(tmp_path / "prefect")
    assert (first.name, second.name) == ("prefect", "prefect-2")
    first_lock.close()
    again, again_lock = claim_folder(tmp_path / "prefect")
    assert again == first
    second_lock.close()
    again_lock.close()


@pytest.fixture
def configured_api() -> Iterator[str]:
    """Something that answers at /api/health, as a Prefect server does; here with 404."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[method-assign]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/api"
        server.shutdown()
        thread.join()


def test_a_configured_server_is_used(configured_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", configured_api)
    assert find_configured_url() == configured_api
    check_configured(configured_api)


def test_a_configured_server_that_is_down_is_named() -> None:
    with pytest.raises(ApiUnavailable, match=r"http://127\.0\.0\.1:1/api does not answer.*unset PREFECT_API_URL"):
        check_configured("http://127.0.0.1:1/api")
