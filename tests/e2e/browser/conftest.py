"""A Prefect server with its UI, an ingest on it, and a headless Chromium that looks at both."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
COLLECTION = "harbour-handbook"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CHROMIUM_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 60_000  # a loaded machine; nothing is slower than that because of us


@dataclass(frozen=True)
class UiServer:
    """A server of the test's own, and what is asked of its API."""

    url: str

    def ask(self, path: str, **body: Any) -> Any:
        answer = httpx.post(f"{self.url}/api/{path}", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()


@pytest.fixture(scope="module")
def ui_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UiServer]:
    home = tmp_path_factory.mktemp("prefect-ui")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_UI_ENABLED": "true",
        # The pages ask 127.0.0.1:4200 otherwise, whatever --port says.
        "PREFECT_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.5",
        "DO_NOT_TRACK": "1",
    }
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (
        (home / "server.log").open("wb") as log,
        subprocess.Popen(
            command, env=environment, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        ) as server,
    ):
        try:
            wait_until_ready(url, server, home / "server.log")
            yield UiServer(url)
        finally:
            server.terminate()


def wait_until_ready(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{url}/api/ready", timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.3)
    pytest.fail(f"no Prefect server on {url}: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def crowded_run(ui_server: UiServer, minilm: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An ingest of the sample documents whose device ran out of memory; see crowded_run.py for what it gives."""
    folder = tmp_path_factory.mktemp("crowded")
    shutil.copytree(ROOT / "tests" / "samples", folder / "handbook")
    shutil.copytree(minilm, folder / "all-MiniLM-L6-v2")  # what the pages call the model
    environment = {
        **os.environ,
        "PREFECT_API_URL": f"{ui_server.url}/api",
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
        "PYTHONPATH": str(ROOT),
    }
    # As in a deployment, where a source is a short path: it is a part of the run's name.
    arguments = ["handbook", "data", "all-MiniLM-L6-v2", COLLECTION]
    run = subprocess.run(
        [sys.executable, str(HERE / "crowded_run.py"), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def page(crowded_run: dict[str, Any]) -> Iterator[Page]:
    """Chromium, after the run: what it shows is all there."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium: the check must install Debian's package chromium")
        pytest.skip("no Chromium on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=CHROMIUM_FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(PATIENCE_MS)
            expect.set_options(timeout=PATIENCE_MS)  # its own is 5 s
            yield page
        finally:
            browser.close()


@pytest.fixture
def take_picture(page: Page) -> Callable[[str], None]:
    """Keeps what the page shows now in the folder of BALLAST_SCREENSHOTS, if that is set; the README's are made so."""

    def take(name: str) -> None:
        folder = os.environ.get("BALLAST_SCREENSHOTS")
        if not folder:
            return
        page.wait_for_timeout(3000)  # the timeline and the fonts settle
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        Path(folder).mkdir(parents=True, exist_ok=True)
        picture.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
            Path(folder) / f"{name}.png", optimize=True
        )

    return take
