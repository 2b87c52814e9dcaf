"""The Prefect API a run talks to: the configured one, else an embedded one that lives exactly as long as the run."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import ApiUnavailable

logger = logging.getLogger(__name__)

# Tells tasks.exclusive that nobody else can ask this server: there is nobody to exclude.
EMBEDDED_API = "BALLAST_EMBEDDED_API"

# Measured on two slow cores: 3 s on an existing database, 9-13 s on a new one, of which 5-6 s of CPU are Prefect's 114
# schema migrations. A machine that is busy embedding takes a multiple of it.
START_TIMEOUT_S = 90.0
# The server drains for at most 10 s and then has 8 s to shut down before it ends itself.
STOP_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 15

CLIENT_SETTINGS: Mapping[str, str] = {
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
    # A log line from a thread outside a flow run can't be sent anywhere: not worth a warning each.
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # "Beginning flow run ..." is for the UI; the terminal has the observer's lines.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    # Never Prefect's own temporary server: a SIGKILL leaves it behind for ever.
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "false",
}


@dataclass(frozen=True, slots=True)
class PrefectApi:
    """Where the run is recorded. `embedded`: by a server of our own, whose log is `log_path`."""

    url: str
    embedded: bool
    log_path: Path | None = None


def configure_client() -> None:
    """Make Prefect quiet on the terminal and forward our loggers. To be called before Prefect is imported."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("flows", "tasks"):
        # The UI gets one line a partition; the root logger's WARNING would keep it from there.
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.INFO)


def find_configured_url() -> str | None:
    """The API URL of the environment, of prefect.toml or of the active profile; None where nothing is configured."""
    if url := os.environ.get("PREFECT_API_URL"):
        return url
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


@contextmanager
def embedded_api(data_folder: str | Path, *, meanwhile: Callable[[], object] | None = None) -> Iterator[PrefectApi]:
    """The configured Prefect API; where there is none, one of our own on loopback, its database in the data folder.

    `meanwhile` runs while the server starts: heavy imports belong there. Raises ApiUnavailable with the end of the
    server's log. The server ends with this context, and with this process, even if that is killed with SIGKILL.
    """
    configure_client()
    if url := find_configured_url():
        check_configured(url)
        if meanwhile is not None:
            meanwhile()
        yield PrefectApi(url, embedded=False)
        return
    folder = Path(data_folder).resolve() / "prefect"
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "server.log"
    process = start_process(folder, log_path)
    try:
        announced = listen_for_url(process)
        if meanwhile is not None:
            meanwhile()
        url = wait_for_url(process, announced, log_path)
        with route_client(url):
            try:
                yield PrefectApi(url, embedded=True, log_path=log_path)
            finally:
                drain_client()
    finally:
        stop_process(process, log_path)


def check_configured(url: str) -> None:
    """Raise ApiUnavailable where nothing listens at `url`; any answer will do, Prefect itself checks the rest."""
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=30).close()  # noqa: S310  what the user configured
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError) as error:
        raise ApiUnavailable(
            f"The configured Prefect API at {url} does not answer: {error}. Start it, or unset PREFECT_API_URL "
            "(in the environment, prefect.toml or the active Prefect profile) to use an embedded one."
        ) from error


def start_process(folder: Path, log_path: Path) -> subprocess.Popen[bytes]:
    """Start flows.api_process, away from the terminal's signals and from the user's Prefect settings."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    with log_path.open("ab") as log:
        return subprocess.Popen(  # noqa: S603  our own interpreter and module
            # -P: a folder named flows where the user happens to stand must not shadow ours.
            [sys.executable, "-P", "-m", "flows.api_process", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


class Announcement:
    """The first line of the server's stdout, read by a thread of its own so that waiting for it can time out."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.url = ""  # stays empty where the process ended without a word


def listen_for_url(process: subprocess.Popen[bytes]) -> Announcement:
    """Start to read the URL that the process prints when it serves."""
    announcement = Announcement()
    assert process.stdout is not None
    stdout = process.stdout

    def read() -> None:
        announcement.url = stdout.readline().decode().strip()
        announcement.arrived.set()

    threading.Thread(target=read, name="prefect-api-url", daemon=True).start()
    return announcement


def wait_for_url(process: subprocess.Popen[bytes], announcement: Announcement, log_path: Path) -> str:
    """The URL, once the API answers there. Raises ApiUnavailable."""
    if not announcement.arrived.wait(START_TIMEOUT_S):
        happened = f"did not answer within {START_TIMEOUT_S:.0f} s"
    elif not announcement.url:
        happened = f"ended with exit code {process.wait()} while it started"
    else:
        try:
            # Without a proxy: the environment's would not find its way back to this machine's loopback.
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with direct.open(f"{announcement.url}/health", timeout=30):
                return announcement.url
        except OSError as error:
            happened = f"does not answer at {announcement.url}: {error}"
    raise ApiUnavailable(
        f"The embedded Prefect API {happened}. Set PREFECT_API_URL to use a Prefect server of your own. "
        f"The end of {log_path}:\n{read_tail(log_path)}"
    )


def read_tail(path: Path) -> str:
    """The log's last lines, indented."""
    lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join(f"  {line}" for line in lines) or "  (it is empty)"


@contextmanager
def route_client(url: str) -> Iterator[None]:
    """Point this process, all its threads and its children at `url`; afterwards everything is as it was."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL, temporary_settings

    bypass = ",".join(filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "127.0.0.1"]))
    # Three places, since each is blind to another: children inherit the environment, threads of our own see only the
    # global settings, and a settings context that is already entered hides both.
    try:
        changes = {"PREFECT_API_URL": url, EMBEDDED_API: "1", "no_proxy": bypass, "NO_PROXY": bypass}
        with changed_environment(changes):
            refresh_global_settings_context()
            with temporary_settings({PREFECT_API_URL: url}):
                yield
    finally:
        refresh_global_settings_context()


@contextmanager
def changed_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """os.environ with `changes`, and as it was afterwards."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def drain_client() -> None:
    """Send what Prefect's background threads still hold: the last task states travel as events."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=5)
    EventsWorker.drain_all(timeout=5)


def stop_process(process: subprocess.Popen[bytes], log_path: Path) -> None:
    """Close the pipe, which is the sign to go, and make sure of it."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        logger.warning("embedded Prefect API did not end within %.0f s and is killed; see %s", STOP_TIMEOUT_S, log_path)
        process.kill()
        process.wait()
    finally:
        if process.poll() is None:  # interrupted while waiting: a second Ctrl-C
            process.kill()
            process.wait()
        process.stdout.close()
