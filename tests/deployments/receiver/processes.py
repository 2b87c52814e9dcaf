"""A real Prefect server and the receiver, each a process of its own on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[3]
SECRET = "a-secret-of-the-tests"
SCHEMA = {
    "type": "object",
    "title": "Parameters",
    "properties": {
        "settings": {"title": "settings", "type": "object"},
        "changed": {"title": "changed", "anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
    },
}


class PrefectServer:
    """`prefect server start` on a port of its own; it can be stopped and started again with what it knew."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self._folder / "server.log").open("ab")
        with log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
                env={
                    **os.environ,
                    "PREFECT_HOME": str(self._folder),
                    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                    "DO_NOT_TRACK": "1",
                    "PREFECT_UI_ENABLED": "false",
                    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
                    "PREFECT_LOGGING_LEVEL": "WARNING",
                    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
                },
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: is_up(f"{self.url}/health"), 90, lambda: (self._folder / "server.log").read_text())

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)
            self._process = None

    def request(self, method: str, path: str, body: Any = None) -> Any:
        while True:
            answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=60)
            if answer.status_code != 503:  # its database is locked now and then
                break
            time.sleep(0.2)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def post(self, path: str, body: Any) -> Any:
        return self.request("POST", path, body)

    def deploy(self, name: str, parameters: Mapping[str, Any] | None = None, schema: Any = SCHEMA) -> str:
        """A deployment `probe/NAME` with a parameter `changed`; no worker takes its runs."""
        flow = self.post("/flows/", {"name": "probe"})["id"]
        body = {
            "name": name,
            "flow_id": flow,
            "parameters": {"settings": {"source": "docs"}} if parameters is None else dict(parameters),
            "parameter_openapi_schema": schema,
            "enforce_parameter_schema": True,
        }
        self.post("/deployments/", body)
        return f"probe/{name}"

    def runs(self, hook: str) -> list[dict[str, Any]]:
        """Flow runs of a hook, in the order in which they were made."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.post(
                "/flow_runs/filter",
                {"flow_runs": {"tags": {"all_": [f"webhook:{hook}"]}}, "limit": 200, "offset": len(found)},
            )
            found += page
            if len(page) < 200:
                return sorted(found, key=lambda run: run["created"])

    def changed(self, hook: str) -> list[list[str] | None]:
        return [run["parameters"]["changed"] for run in self.runs(hook)]


class ReceiverProcess:
    """The receiver as a process of its own, on a free port."""

    def __init__(self, config: Path, api_url: str, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._log = config.with_suffix(".log")
        script = (
            "import logging, sys; from pathlib import Path; from deployments.receiver.server import serve\n"
            "logging.basicConfig(level=logging.INFO, stream=sys.stderr)\n"
            f"serve(Path({str(config)!r}), '127.0.0.1', {port})"
        )
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", script],
                cwd=ROOT,
                env={**os.environ, "PREFECT_API_URL": api_url, "PREFECT_HOME": str(config.parent), "SECRET": SECRET}
                | dict(environment or {}),
                stderr=log,
            )
        wait_until(lambda: is_up(f"{self.url}/healthz") or self.process.poll() is not None, 60, self.log)

    def log(self) -> str:
        return self._log.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(is_so: Callable[[], Any], timeout_s: float = 60, explain: Callable[[], str] = str) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := is_so()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {explain()}")
        time.sleep(0.05)
    return found


def to_toml(knobs: Mapping[str, Any], hooks: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"{name} = {json.dumps(value)}" for name, value in knobs.items()]
    for name, hook in hooks.items():
        lines += [f"[hooks.{name}]", *(f"{key} = {json.dumps(value)}" for key, value in hook.items())]
    return "\n".join(lines)
