"""Calls to the Prefect API through Prefect's own client, against a server that is away, refuses, or comes back."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.errors import ApiUnavailable, RunStopped
from tasks.server_calls import ask_server, is_server_away

NOBODY = UUID(int=1)


class Server:
    """Answers with `statuses` in turn, then with 200. Not listening until start()."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.paths: list[str] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._server: ThreadingHTTPServer | None = None
        self.client = SyncPrefectClient(f"http://127.0.0.1:{self.port}/api")
        self.client.__enter__()

    def start(self) -> None:
        if self._server is not None:
            return
        asked, statuses = self.paths, self.statuses

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                status = statuses.pop(0) if statuses else 200
                body = json.dumps("3.8.8" if status == 200 else {"detail": "no"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.client.__exit__(None, None, None)
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def ask_version(self) -> str:
        return self.client.api_version()

    def ask_run(self) -> object:
        return self.client.read_flow_run(NOBODY)


@pytest.fixture(autouse=True)
def no_retries_of_prefect_s_own() -> Iterator[None]:
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        yield


@pytest.fixture
def away() -> Iterator[Server]:
    """Nothing listens at its port yet."""
    server = Server()
    yield server
    server.stop()


def test_a_server_that_is_started_later_answers(away: Server, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def request() -> str:
        calls.append(0)
        if len(calls) == 2:
            away.start()
        return away.ask_version()

    assert ask_server(request, 60.0) == "3.8.8"
    assert len(calls) == 2
    assert caplog.text.count("prefect_api away") == 1


@pytest.mark.parametrize("status", [503])
def test_a_server_that_can_t_answer_now_is_asked_again(away: Server, status: int) -> None:
    away.statuses.append(status)
    away.start()
    assert ask_server(away.ask_version, 60.0) == "3.8.8"
    assert len(away.paths) == 2


@pytest.mark.parametrize("status", [401, 422])
def test_what_the_server_refuses_is_not_repeated(away: Server, status: int) -> None:
    away.statuses += [status] * 3
    away.start()
    with pytest.raises(PrefectHTTPStatusError) as refused:
        ask_server(away.ask_version, 60.0)
    assert refused.value.response.status_code == status
    assert len(away.paths) == 1


def test_what_is_not_there_is_prefect_s_own_error(away: Server) -> None:
    away.statuses.append(404)
    away.start()
    with pytest.raises(ObjectNotFound):
        ask_server(away.ask_run, 60.0)
    assert len(away.paths) == 1


def test_no_patience_is_one_call(away: Server) -> None:
    calls = []

    def request() -> str:
        calls.append(0)
        return away.ask_version()

    with pytest.raises(ApiUnavailable, match=r"did not answer for 0 s .*Connect.*pools\.server_outage_s") as error:
        ask_server(request, 0.0)
    assert len(calls) == 1
    # A task's state keeps its exception: no frame of the client's with it.
    assert error.value.__cause__ is None
    assert error.value.__context__ is None


def test_stop_set_from_elsewhere_ends_a_long_wait(away: Server) -> None:
    stop, has_asked = threading.Event(), threading.Event()

    def request() -> str:
        has_asked.set()
        return away.ask_version()

    def set_stop() -> None:
        has_asked.wait()
        stop.set()

    setter = threading.Thread(target=set_stop)
    setter.start()
    with pytest.raises(RunStopped):
        ask_server(request, 3600.0, stop)
    setter.join()


def test_an_answer_counts_though_the_run_is_told_to_stop(away: Server) -> None:
    """What the request did is done: a run that was started must be known, so that it can be ended."""
    away.start()
    stop = threading.Event()
    stop.set()
    assert ask_server(away.ask_version, 60.0, stop) == "3.8.8"


def test_an_error_of_the_request_s_own_is_raised_at_once() -> None:
    calls = []

    def request() -> None:
        calls.append(0)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        ask_server(request, 60.0)
    assert len(calls) == 1


ASKED = httpx.Request("GET", "http://127.0.0.1/api")


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (httpx.ConnectError("refused"), True),
        (httpx.ReadTimeout("slow"), True),
        (httpx.PoolTimeout("busy"), True),
        (httpx.RemoteProtocolError("cut off"), True),
        (ConnectionResetError(), True),
        (httpx.HTTPStatusError("", request=ASKED, response=httpx.Response(503, request=ASKED)), True),
        (httpx.HTTPStatusError("", request=ASKED, response=httpx.Response(429, request=ASKED)), True),
        (httpx.HTTPStatusError("", request=ASKED, response=httpx.Response(404, request=ASKED)), False),
        (httpx.TooManyRedirects("a login page"), False),
        (FileNotFoundError(), False),
        (ValueError(), False),
    ],
    ids=repr,
)
def test_which_errors_mean_that_a_server_is_away(error: Exception, away: bool) -> None:
    assert is_server_away(error) is away
