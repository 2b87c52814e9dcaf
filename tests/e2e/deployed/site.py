"""A whole deployment on loopback: Prefect server, Qdrant over HTTP, webhook receiver and workers, each its own process."""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import signal
import socket
import subprocess
import sys
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from flows.setup_files import PREFECT_FILE
from tasks.backends.fake_qdrant_server import LoopbackQdrant
from tests.deployments.prefect_server import PrefectServer

BALLAST = Path(sys.executable).parent / "ballast"  # not on the path where a virtual environment is not activated
SECRET = uuid.uuid4().hex
API_KEY = f"key-{uuid.uuid4().hex}"
COLLECTION = "documents"  # as in the shipped prefect.yaml
PATIENCE_S = 600.0  # for a whole ingest, on a machine with other work
# By the closed form for MiniLM in fp32 one node of 128 tokens needs 35.7 million bytes: what is longer spills.
DEVICE_BYTES = 35_800_000


@dataclass
class Site:
    """`folder` holds everything; the deployments are the shipped ones, with a small model and shorter times."""

    folder: Path
    model: str
    qdrant: LoopbackQdrant
    server: PrefectServer = field(init=False)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    receiver_url: str = ""

    def __post_init__(self) -> None:
        self.documents.mkdir(parents=True)
        # The page's own address, for the browser test; leases on disk, as the README tells.
        self.server = PrefectServer(
            self.folder / "server",
            {"PREFECT_UI_ENABLED": "true", "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false"},
        )
        self.server.settings["PREFECT_UI_API_URL"] = self.server.url

    # ------------------------------------------------------------------------------------------ what there is

    @property
    def documents(self) -> Path:
        return self.folder / "documents"

    @property
    def environment(self) -> dict[str, str]:
        return {
            **self.server.environment,
            "BALLAST_SOURCE": str(self.documents),
            "BALLAST_SPOOL": str(self.folder / "spool"),
            "BALLAST_DATA_FOLDER": str(self.folder / "data"),
            "QDRANT_URL": self.qdrant.url,
            "QDRANT_API_KEY": API_KEY,
            "BALLAST_WEBHOOK_SECRET_DOCUMENTS": SECRET,
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def write_documents(self, count: int, *, words: int, prefix: str = "ship") -> None:
        for number in range(count):
            text = (
                f"# {prefix} {number}\n\n" + f"The {prefix} number {number} waits for the tide and its pilot. " * words
            )
            (self.documents / f"{prefix}-{number:03}.md").write_text(text)

    # ------------------------------------------------------------------------------------------ processes

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, check=False, timeout=180
        )
        assert ended.returncode == 0, f"{command}: {ended.stdout}{ended.stderr}"
        return ended

    def start(self, name: str, *command: str, without: str = "", **environment: str) -> subprocess.Popen[bytes]:
        given = {**self.environment, **environment}
        given.pop(without, None)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=given,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self.processes[name]

    def start_worker(self, pool: str, name: str | None = None) -> subprocess.Popen[bytes]:
        # Without the key: it comes out of the Secret block that the set-up has made.
        worker = name or pool
        # Two coordinators at a time, or the worker itself would keep runs apart; one embeds at a time, as on a GPU.
        limit = "2" if pool == "ingest-pool" else "1"
        # With its type it needs no server to start.
        start = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
        command = [*start, "--limit", limit, "--name", worker]
        return self.start(worker, *command, without="QDRANT_API_KEY", PREFECT_HOME=str(self.folder / worker))

    def start_receiver(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = self.folder / "webhooks.toml"
        config.write_text(
            f'journal = "{self.folder}/webhooks.sqlite"\nquiet_s = 1\nmax_window_s = 5\n\n'
            '[hooks.documents]\nkind = "generic"\ndeployment = "ingest/documents"\nauth = "hmac"\n'
            'secret = "BALLAST_WEBHOOK_SECRET_DOCUMENTS"\n'
        )
        self.start("receiver", str(BALLAST), "webhooks", "--config", str(config), "--port", str(port))
        self.receiver_url = f"http://127.0.0.1:{port}"
        self.wait_until(lambda: self._get_status("/readyz") == 200, "the receiver is ready", 60)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        if number is signal.SIGKILL:  # the machine, with all that runs on it
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.send_signal(number)
        process.wait(60)

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name, signal.SIGKILL)
        self.server.stop(kill=True)

    # ------------------------------------------------------------------------------------------ set-up and triggers

    def write_prefect_file(self, **settings: Any) -> Path:
        """The shipped file with a model that is here, a device that is too small, and times of seconds."""
        shipped = yaml.safe_load(PREFECT_FILE.read_text())
        file = copy.deepcopy(shipped)
        for deployment in file["deployments"]:
            if "parameters" in deployment:
                given = deployment["parameters"]["settings"]
                given["embedding"] = {"model": self.model, "device": "cpu", "calibrate": False}
                given["budget"] = {"max_bytes": DEVICE_BYTES}
                given["partition"] = {"max_tokens": 2500}
                given["chunking"] = {"workers": 1}
                given["pools"] = {"enabled": True, "poll_s": 0.3, "silent_s": 15, "group_tokens": 6000, "gpu_runs": 2}
                given["qdrant"] |= {"transport": "rest"}
                for name, values in settings.items():
                    given[name] = {**given.get(name, {}), **values}
        path = self.folder / "prefect.yaml"
        path.write_text(yaml.safe_dump(file, sort_keys=False))
        return path

    def set_up(self, **settings: Any) -> dict[str, Any]:
        ended = self.run(str(BALLAST), "setup", "--json", "--prefect-file", str(self.write_prefect_file(**settings)))
        found: dict[str, Any] = json.loads(ended.stdout)
        return found

    def deliver(self, body: Any, *, delivery: str, secret: str = SECRET) -> httpx.Response:
        """One signed delivery, after the Standard Webhooks scheme."""
        content, moment = json.dumps(body).encode(), str(int(time.time()))
        signed = hmac.new(secret.encode(), f"{delivery}.{moment}.".encode() + content, hashlib.sha256).digest()
        headers = {
            "content-type": "application/json",
            "webhook-id": delivery,
            "webhook-timestamp": moment,
            "webhook-signature": f"v1,{b64encode(signed).decode()}",
        }
        return httpx.post(
            f"{self.receiver_url}/hooks/documents", content=content, headers=headers, timeout=30, trust_env=False
        )

    def trigger(self, body: Any, *, delivery: str) -> str:
        """Deliver, and the id of the run that came of it: told again for the same delivery, once the server had time for it."""
        answers = [self.deliver(body, delivery=delivery)]
        assert answers[0].status_code == 202, answers[0].text

        def has_run() -> bool:
            answers.append(self.deliver(body, delivery=delivery))
            return answers[-1].json()["run"] is not None

        self.wait_until(has_run, f"delivery {delivery} has a run")
        return str(answers[-1].json()["run"])

    def _get_status(self, path: str) -> int:
        try:
            return httpx.get(f"{self.receiver_url}{path}", timeout=10, trust_env=False).status_code
        except httpx.TransportError:
            return 0

    # ------------------------------------------------------------------------------------------ looking

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        return self.server.ask(method, path, body)

    def read_run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run_id}")
        return found

    def list_runs(self, flow: str) -> list[dict[str, Any]]:
        """Of one flow, the oldest first."""
        found: list[dict[str, Any]] = self.ask(
            "POST", "/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_ASC"}
        )
        return found

    def list_tasks(self, run_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("POST", "/task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        return found

    def list_artifacts(self, run_id: str) -> dict[str, Any]:
        found = self.ask("POST", "/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run_id]}}})
        return {each["key"]: each for each in sorted(found, key=lambda each: str(each["updated"]))}

    def wait_for_run(self, run_id: str, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The run once it has ended."""
        ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
        self.wait_until(lambda: self.read_run(run_id)["state_type"] in ended, f"run {run_id} has ended", timeout_s)
        return self.read_run(run_id)

    def wait_until(self, is_so: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if is_so():
                    return
            except httpx.TransportError:
                pass  # a server that is being restarted
            assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{self.read_logs()}"
            time.sleep(0.3)

    def count_points(self, doc_id: str | None = None) -> int:
        """Exactly, as any reader of the collection would."""
        from qdrant_client import models

        condition = None
        if doc_id is not None:
            condition = models.Filter(must=[models.FieldCondition(key="doc_id", match=models.MatchValue(value=doc_id))])
        return self.qdrant.memory.count(COLLECTION, count_filter=condition, exact=True).count

    def read_logs(self, names: Sequence[str] | None = None) -> str:
        logs = [log for log in sorted(self.folder.glob("*.log")) if names is None or log.stem in names]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
