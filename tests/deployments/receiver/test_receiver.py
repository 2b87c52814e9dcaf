"""The receiver as a process, over HTTP, with a real Prefect server that is stopped, started and meddled with."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from deployments.receiver.signatures import sign_github, sign_standard
from tasks.backends.tcp_relay import TcpRelay
from tests.deployments.receiver.processes import SECRET, wait_until

Start = Callable[..., Any]
BURST = {"quiet_s": 1.0, "max_window_s": 5.0}
LONG = {"quiet_s": 60.0, "max_window_s": 60.0}


def signed(body: bytes, delivery: str, *, timestamp: float | None = None, secret: str = SECRET) -> dict[str, str]:
    at = int(time.time() if timestamp is None else timestamp)
    return {
        "content-type": "application/json",
        "webhook-id": delivery,
        "webhook-timestamp": str(at),
        "webhook-signature": sign_standard(secret.encode(), delivery, at, body),
    }


def send(receiver: Any, hook: str, body: Any, delivery: str | None = None, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    all_headers = {**signed(content, delivery or uuid4().hex), **headers}
    return httpx.post(f"{receiver.url}/hooks/{hook}", content=content, headers=all_headers, timeout=30)


def ask(receiver: Any, answer: Mapping[str, Any]) -> Any:
    found = httpx.get(f"{receiver.url}{answer['address']}", headers=signed(b"", answer["delivery"]), timeout=30)
    assert found.status_code == 200, found.text
    return found.json()


def is_released(receiver: Any, answer: Mapping[str, Any]) -> bool:
    return bool(ask(receiver, answer)["status"] == "released")


@pytest.fixture(scope="module")
def deployment(prefect_server: Any) -> str:
    return str(prefect_server.deploy("documents", {"settings": {"source": "docs"}, "changed": None}))


@pytest.fixture(scope="module")
def quiet(prefect_server: Any, deployment: str, start_module_receiver: Start) -> Any:
    """A receiver whose bursts don't end while a test looks, for what is refused or ignored."""
    common = {"deployment": deployment, "secret": "SECRET"}
    hooks = {
        "generic": {"kind": "generic", **common},
        "token": {"kind": "generic", "auth": "bearer", **common},
        "github": {"kind": "github", "repository": "example/docs", **common},
        "bucket": {"kind": "s3", "bucket": "documents", **common},
    }
    return start_module_receiver(prefect_server.url, hooks, max_body_bytes=2000, body_timeout_s=1.0, **LONG)


# ---------------------------------------------------------------------------------------------- a burst


def test_a_burst_is_one_run_over_all_its_paths(
    prefect_server: Any, deployment: str, start_receiver: Start, hook: str
) -> None:
    receiver = start_receiver(
        prefect_server.url, {hook: {"kind": "generic", "deployment": deployment, "secret": "SECRET"}}, **BURST
    )
    first = send(receiver, hook, {"changed": ["b.md", "a.md"]}, "first")
    assert first.status_code == 202
    (run,) = prefect_server.runs(hook)
    assert first.json() == {
        "delivery": "first",
        "status": "collecting",
        "run": run["id"],
        "page": f"http://127.0.0.1:{prefect_server.port}/runs/flow-run/{run['id']}",
        "coalesced": False,
        "changed": ["a.md", "b.md"],
        "reason": None,
        "address": f"/hooks/{hook}/deliveries/first",
    }
    assert first.headers["location"] == f"/hooks/{hook}/deliveries/first"
    assert (run["state"]["type"], run["state"]["name"]) == ("SCHEDULED", "Collecting")
    # Far more than the seconds by which workers take runs ahead of their time.
    assert run["estimated_start_time_delta"] == 0
    assert run["next_scheduled_start_time"] > run["created"]

    second = send(receiver, hook, {"changed": ["c.md"]}).json()
    assert (second["run"], second["coalesced"]) == (run["id"], True)
    again = send(receiver, hook, {"changed": ["b.md", "a.md"]}, "first")
    assert (again.status_code, again.json()) == (202, first.json())

    wait_until(lambda: is_released(receiver, first.json()))
    (run,) = prefect_server.runs(hook)
    assert run["parameters"] == {"settings": {"source": "docs"}, "changed": ["a.md", "b.md", "c.md"]}
    assert (run["state"]["type"], run["state"]["name"]) == ("SCHEDULED", "Scheduled")
    assert run["state"]["state_details"]["scheduled_time"] <= run["state"]["timestamp"]

    again = send(receiver, hook, {"changed": ["b.md", "a.md"]}, "first").json()
    assert (again["run"], again["status"]) == (run["id"], "released")
    later = send(receiver, hook, {}).json()
    assert (later["run"] != run["id"], later["coalesced"], later["changed"]) == (True, False, None)
    assert receiver.stop() == 0  # which ends the burst, too
    assert prefect_server.changed(hook) == [["a.md", "b.md", "c.md"], None]
    assert prefect_server.runs(hook)[1]["state"]["name"] == "Scheduled"
    log = receiver.log()
    assert f"webhook_delivery collecting hook={hook} delivery=first new=True changed=2 run={run['id']}" in log
    assert SECRET not in log
    assert "a.md" not in log


# ---------------------------------------------------------------------------------------------- things go wrong


def test_a_killed_receiver_loses_nothing_and_doubles_nothing(
    prefect_server: Any, deployment: str, start_receiver: Start, hook: str, tmp_path: Path
) -> None:
    hooks = {hook: {"kind": "generic", "deployment": deployment, "secret": "SECRET"}}
    receiver = start_receiver(prefect_server.url, hooks, **LONG)
    first = send(receiver, hook, {"changed": ["a.md"]}, "first").json()
    send(receiver, hook, {"changed": ["b.md"]})
    receiver.stop(signal.SIGKILL)
    assert prefect_server.changed(hook) == [["a.md"]]
    receiver = start_receiver(prefect_server.url, hooks, **LONG)
    wait_until(lambda: is_released(receiver, first))
    assert prefect_server.changed(hook) == [["a.md", "b.md"]]
    assert send(receiver, hook, {"changed": ["a.md"]}, "first").json()["run"] == first["run"]
    receiver.stop(signal.SIGKILL)

    # Killed between a run's release and the note of it: as the journal was before its last write.
    prefect_server.post(f"/flow_runs/{first['run']}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    db = sqlite3.connect(tmp_path / "journal.sqlite")
    with db:
        db.execute("UPDATE batch SET state = 'closed'")
    db.close()
    receiver = start_receiver(prefect_server.url, hooks, **LONG)
    wait_until(lambda: is_released(receiver, first))
    assert prefect_server.changed(hook) == [["a.md", "b.md"]]
    assert prefect_server.runs(hook)[0]["state"]["type"] == "RUNNING"
    receiver.stop(signal.SIGKILL)


def test_a_server_that_is_away_gets_its_runs_when_it_is_back(
    prefect_server: Any, start_receiver: Start, hook: str
) -> None:
    """Away in three ways: nobody listens, nobody answers, no such deployment; and a crash of the receiver meanwhile."""
    hooks = {hook: {"kind": "generic", "deployment": f"probe/{hook}", "secret": "SECRET"}}
    burst = {"quiet_s": 0.5, "max_window_s": 5.0, "run_wait_s": 0.5}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    receiver = start_receiver(nobody, hooks, **burst)
    answers = [send(receiver, hook, {"changed": [name]}) for name in ("a.md", "b.md")]
    ready = httpx.get(f"{receiver.url}/readyz", timeout=30)
    assert (ready.status_code, "Prefect server can't" in ready.json()["error"]) == (503, True)
    assert httpx.get(f"{receiver.url}/healthz").status_code == 200
    receiver.stop(signal.SIGKILL)

    relay = TcpRelay(prefect_server.port)  # takes connections, and carries nothing yet
    receiver = start_receiver(f"http://127.0.0.1:{relay.port}/api", hooks, **burst)
    try:
        answers.append(send(receiver, hook, {"changed": ["c.md"]}))
        relay.start()
        assert [answer.status_code for answer in answers] == [202] * 3
        for answer in answers:
            assert [answer.json()[name] for name in ("status", "run", "page")] == ["waiting", None, None]
        wait_until(lambda: "ballast setup" in httpx.get(f"{receiver.url}/readyz", timeout=30).text)
        prefect_server.deploy(hook)
        for answer in answers:
            wait_until(lambda answer=answer: is_released(receiver, answer.json()))  # type: ignore[misc]
        wait_until(lambda: httpx.get(f"{receiver.url}/readyz", timeout=30).status_code == 200)
        assert sorted(name for changed in prefect_server.changed(hook) for name in changed) == ["a.md", "b.md", "c.md"]
        runs = {run["id"]: run["parameters"]["changed"] for run in prefect_server.runs(hook)}
        for answer in answers:
            assert set(answer.json()["changed"]) <= set(runs[ask(receiver, answer.json())["run"]])
        receiver.stop(signal.SIGKILL)
    finally:
        relay.close()


STATES = ("PENDING", "RUNNING", "CANCELLED", "deleted")


@pytest.fixture(scope="module")
def busy(prefect_server: Any, deployment: str, start_module_receiver: Start) -> Any:
    hooks = {
        f"is-{state.lower()}": {"kind": "generic", "deployment": deployment, "secret": "SECRET"} for state in STATES
    }
    hooks["many"] = {"kind": "generic", "deployment": deployment, "secret": "SECRET"}
    return start_module_receiver(prefect_server.url, hooks, quiet_s=2.0, max_window_s=10.0, max_paths=3)


def test_runs_that_someone_started_or_took_away_are_followed_by_ones_for_what_they_missed(
    prefect_server: Any, busy: Any
) -> None:
    second = {}
    for state in STATES:
        hook = f"is-{state.lower()}"
        first = send(busy, hook, {"changed": ["a.md", "b.md"]}).json()
        if state == "deleted":
            prefect_server.request("DELETE", f"/flow_runs/{first['run']}")
        else:
            body = {"state": {"type": state}, "force": True}
            prefect_server.post(f"/flow_runs/{first['run']}/set_state", body)
        second[state] = send(busy, hook, {"changed": ["b.md", "c.md"]}).json()
        assert second[state]["coalesced"]
    for state in STATES:
        wait_until(lambda state=state: is_released(busy, second[state]))  # type: ignore[misc]
        runs = prefect_server.runs(f"is-{state.lower()}")
        # b.md changed again after that run had begun to look.
        missed = ["a.md", "b.md", "c.md"] if state == "deleted" else ["b.md", "c.md"]
        changed = [run["parameters"]["changed"] for run in runs]
        assert changed == ([missed] if state == "deleted" else [["a.md", "b.md"], missed]), state
        assert runs[-1]["state"]["name"] == "Scheduled"
        assert ask(busy, second[state])["run"] == runs[-1]["id"]


def test_too_many_paths_become_the_whole_source(prefect_server: Any, busy: Any) -> None:
    answers = [send(busy, "many", {"changed": [f"{name}.md"]}).json() for name in "abcd"]
    answers.append(send(busy, "many", {"changed": [f"{name}.md" for name in "abcd"]}).json())
    assert answers[-1]["changed"] is None
    wait_until(lambda: all(is_released(busy, answer) for answer in answers))
    assert None in prefect_server.changed("many")


# ---------------------------------------------------------------------------------------------- refusals


def test_what_is_not_signed_as_it_should_be_is_refused(quiet: Any) -> None:
    body = b'{"changed": ["a.md"]}'
    url = f"{quiet.url}/hooks/generic"
    old = signed(body, "x", timestamp=time.time() - 301)
    early = signed(body, "x", timestamp=time.time() + 330)
    other = signed(body, "x", secret="another-secret-of-16")
    for headers in ({}, old, early, other, {**signed(body, "x"), "webhook-id": "y"}):
        answer = httpx.post(url, content=body, headers={"content-type": "application/json", **headers})
        assert answer.status_code == 401, answer.text
        assert answer.json()["error"]
    assert httpx.post(url, content=body + b" ", headers=signed(body, "x")).status_code == 401


@pytest.mark.parametrize(
    ("body", "headers", "status", "reason"),
    [
        (b"{", {}, 400, "not JSON"),
        (b"", {}, 400, "not JSON"),
        (b"[]", {}, 422, "Not a generic delivery"),
        ({"changed": ["../../etc/passwd"]}, {}, 422, "has .. as a part"),
        ({"changed": ["http://169.254.169.254/latest"]}, {}, 422, "is a URL"),
        ({"changed": ["a.md"], "source": "s3://other"}, {}, 422, "source: Extra inputs"),
        (b"{}", {"content-type": "text/plain"}, 415, "Send application/json"),
        (b" " * 2001, {}, 413, "the limit is 2,000 bytes"),
    ],
)
def test_what_can_not_be_taken_is_refused_with_a_reason(
    quiet: Any, body: Any, headers: Any, status: int, reason: str
) -> None:
    answer = send(quiet, "generic", body, **headers)
    assert answer.status_code == status
    assert reason in answer.json()["error"]


def test_unknown_addresses_and_methods_are_refused_in_the_same_form(quiet: Any) -> None:
    assert send(quiet, "none", {}).status_code == 404
    assert "POST /hooks/NAME" in send(quiet, "none", {}).json()["error"]
    assert send(quiet, "..%2fgeneric", {}).status_code == 404
    answer = httpx.put(f"{quiet.url}/hooks/generic", content=b"{}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert httpx.get(f"{quiet.url}/hooks/generic/deliveries/none", headers=signed(b"", "none")).status_code == 404


def test_a_body_that_announces_no_length_is_cut_off_at_the_limit(quiet: Any) -> None:
    with connect(quiet, "Transfer-Encoding: chunked") as client:
        chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
        sent = 0
        with contextlib.suppress(OSError):  # the connection is closed on the rest of it
            while sent < 64 * 1024**2:
                client.sendall(chunk)
                sent += 1024
        assert client.recv(1000).startswith(b"HTTP/1.1 413")
        assert sent < 64 * 1024**2


def connect(
    receiver: Any, *headers: str, hook: str = "generic", delivery: str = "unfinished", timestamp: float | None = None
) -> socket.socket:
    """A connection on which a signed delivery has begun, up to its body."""
    host, port = receiver.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=20)
    lines = [f"POST /hooks/{hook} HTTP/1.1\r\nHost: {host}", *headers]
    lines += [f"{name}: {value}" for name, value in signed(b"", delivery, timestamp=timestamp).items()]
    client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    return client


def test_a_body_that_does_not_come_is_not_waited_for(quiet: Any) -> None:
    with connect(quiet, "Content-Length: 100") as client:
        client.sendall(b"{")
        assert client.recv(1000).startswith(b"HTTP/1.1 408")


def test_bodies_together_take_no_more_than_they_may(
    prefect_server: Any, deployment: str, start_receiver: Start, hook: str
) -> None:
    """And what its headers alone refuse is not waited for: these bodies never come."""
    hooks = {hook: {"kind": "generic", "deployment": deployment, "secret": "SECRET"}}
    receiver = start_receiver(prefect_server.url, hooks, max_body_bytes=2000, max_held_bytes=3000, **LONG)
    with connect(receiver, "Content-Length: 2000", hook=hook, timestamp=time.time() - 301) as late:
        assert late.recv(1000).startswith(b"HTTP/1.1 401")
    with connect(receiver, "Content-Length: 2000", hook=hook, delivery="no id") as nameless:
        assert nameless.recv(1000).startswith(b"HTTP/1.1 400")

    large = b'{"changed": ["a.md"]}' + b" " * 1500
    with connect(receiver, "Content-Length: 2000", hook=hook) as slow:
        slow.sendall(b" " * 1900)
        refused = wait_until(lambda: (answer := send(receiver, hook, large)).status_code == 503 and answer)
        assert "the limit is 3,000 bytes" in refused.json()["error"]
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("5", "close")
        assert send(receiver, hook, {"changed": ["b.md"]}).status_code == 202
    wait_until(lambda: send(receiver, hook, large).status_code == 202)


def test_a_replay_is_refused(quiet: Any) -> None:
    body = json.dumps(
        {"ref": "refs/heads/main", "repository": {"full_name": "example/docs"}, "commits": [{"added": ["a.md"]}]}
    ).encode()

    def push(delivery: str, event: str = "push", content: bytes = body) -> httpx.Response:
        headers = {"X-GitHub-Event": event, "X-GitHub-Delivery": delivery, "content-type": "application/json"}
        headers["X-Hub-Signature-256"] = sign_github(SECRET.encode(), body)
        return httpx.post(f"{quiet.url}/hooks/github", content=content, headers=headers, timeout=30)

    taken = push("a-1")
    assert (taken.status_code, taken.json()["changed"]) == (202, None)
    assert push("a-1").json() == taken.json()
    replayed = push("a-2")
    assert (replayed.status_code, "a replay" in replayed.json()["error"]) == (409, True)
    assert push("a-3", content=body + b" ").status_code == 401
    assert (push("a-4", "ping").status_code, push("a-4", "ping").json()["status"]) == (200, "pong")
    ignored = push("a-5", "issues")
    assert (ignored.status_code, ignored.json()["status"], ignored.json()["run"]) == (202, "ignored", None)

    assert send(quiet, "generic", {"changed": ["a.md"]}, "b-1").status_code == 202
    other = send(quiet, "generic", {"changed": ["b.md"]}, "b-1")
    assert (other.status_code, "another body" in other.json()["error"]) == (409, True)


def test_a_token_is_asked_for_before_the_body_and_for_what_became_of_it(quiet: Any) -> None:
    url, token = f"{quiet.url}/hooks/bucket", {"authorization": f"Bearer {SECRET}"}
    body = {
        "Records": [
            {"eventName": "s3:ObjectCreated:Put", "s3": {"bucket": {"name": "documents"}, "object": {"key": "a+b.md"}}}
        ]
    }
    assert httpx.post(url, json=body).status_code == 401
    assert httpx.post(url, json=body, headers={"authorization": "Bearer no"}).status_code == 401
    taken = httpx.post(url, json=body, headers=token).json()
    assert taken["changed"] == ["a b.md"]
    assert httpx.post(url, json=body, headers=token).json()["delivery"] == taken["delivery"]  # MinIO tried again
    address = f"{quiet.url}{taken['address']}"
    assert httpx.get(address).status_code == 401
    assert httpx.get(address, headers=token).json()["delivery"] == taken["delivery"]
    # Without an id each {} is meant: cron, every night.
    nights = [httpx.post(f"{quiet.url}/hooks/token", json={}, headers=token).json() for _ in range(2)]
    assert nights[0]["delivery"] != nights[1]["delivery"]


def test_the_answer_for_another_delivery_is_not_given_away(quiet: Any) -> None:
    taken = send(quiet, "generic", {"changed": ["mine.md"]}, "mine").json()
    assert httpx.get(f"{quiet.url}{taken['address']}", headers=signed(b"", "other")).status_code == 401
