"""A real Prefect server as a process on loopback, which a test may stop, kill and start again on the same database."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

# Shorter than the defaults where a test would only wait.
SERVER_SETTINGS: Mapping[str, str] = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.5",
    "DO_NOT_TRACK": "1",
}


def without_prefect(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """An environment in which no server is configured."""
    return {name: value for name, value in environment.items() if not name.startswith(("PREFECT_", "BALLAST_"))}


class PrefectServer:
    """`home` holds database, log and profile. The port stays the same across restarts."""

    def __init__(self, home: Path, settings: Mapping[str, str] | None = None) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.database = home / "prefect.db"
        self.settings = dict(settings or {})  # read at each start
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For commands that talk to this server, and know of no other."""
        return {**without_prefect(), "PREFECT_HOME": str(self.home), "PREFECT_API_URL": self.url, "DO_NOT_TRACK": "1"}

    def start(self) -> None:
        """Start, without waiting for the first answer."""
        with (self.home / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)],
                env={**without_prefect(), "PREFECT_HOME": str(self.home), **SERVER_SETTINGS, **self.settings},
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 90.0) -> None:
        """Until it answers."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                    raise
            time.sleep(0.2)

    def stop(self, *, kill: bool = False) -> None:
        """End the process, in order or with SIGKILL, and wait for it."""
        if self._process is None:
            return
        if kill:
            self._process.kill()
        else:
            self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON; None where there is none. Raises httpx.HTTPStatusError."""
        for pause_s in (0.2, 0.5, 1.0, 2.0, 4.0, 0.0):
            answer = httpx.request(method, f"{self.url}{path}", json=body, timeout=30, trust_env=False)
            if answer.status_code != 503:  # SQLite is busy; Prefect's own client repeats it as well
                break
            time.sleep(pause_s)
        answer.raise_for_status()
        return answer.json() if answer.content else None
