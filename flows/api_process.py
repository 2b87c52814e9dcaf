"""The embedded Prefect API's own process: `python -m flows.api_process FOLDER`, started by flows.api_server only.

It prints one line, its URL, once it answers; everything else goes to stderr. It ends when its stdin reaches end-of-file
or its parent is gone, however that happened: a SIGKILLed parent can't clean up, and Prefect's own temporary server
outlives one.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import uvicorn

# A server that was orphaned a moment ago still holds its database: wait for it before opening another one.
SLOT_WAIT_S = 3.0
# Prefect keeps events and task states in memory queues on their way to the database.
DRAIN_TIMEOUT_S = 10.0
DRAIN_ORPHANED_S = 2.0
DRAIN_QUIET_S = 0.3
EXIT_TIMEOUT_S = 8.0

SERVER_SETTINGS: Mapping[str, str] = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    # Nothing listens for automations here, and reading them costs every event a look-up.
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
    # The default of 5 s would hold a short run's last events, and the exit, for so long.
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "0.5",
}


def main(folder: Path) -> None:
    """Serve until the parent goes. `folder` holds the database; a second server at the same time takes `folder-2`."""
    announce = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    watch = ParentWatch()
    # Ctrl-C on the terminal is the parent's business: its flow must still be able to report its last state.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    home, _lock = claim_folder(folder)
    os.environ.update(SERVER_SETTINGS)
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{home / 'prefect.db'}"
    # A prefect.toml, a .env or a pyproject.toml in the user's folder is not about this server.
    os.chdir(home)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        # The kernel picks the port and we keep the socket: no other process can take it in between.
        listener.bind(("127.0.0.1", 0))
        asyncio.run(serve(listener, announce, watch))


def claim_folder(folder: Path) -> tuple[Path, IO[str]]:
    """The first of folder, folder-2, folder-3 ... that no other server uses, and the file that holds its lock.

    Two servers on one SQLite file end in "database is locked"; a shared server would end with its first owner. So a
    second run at the same time keeps its history in a folder of its own.
    """
    deadline = time.monotonic() + SLOT_WAIT_S
    slot = 1
    while True:
        home = folder if slot == 1 else folder.with_name(f"{folder.name}-{slot}")
        home.mkdir(parents=True, exist_ok=True)
        lock = (home / "server.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            if time.monotonic() < deadline:
                time.sleep(0.1)
            else:
                slot += 1
        else:
            return home, lock


class ParentWatch:
    """Notices that the parent is gone, and makes sure that this process ends soon after."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        # Until the server runs there is nothing to save: SQLite rolls a torn migration back.
        self.on_gone: Callable[[], object] = end_now
        threading.Thread(target=self._watch, name="watch-parent", daemon=True).start()

    def is_orphaned(self) -> bool:
        """Whether the parent is dead, rather than done with us."""
        return os.getppid() != self._parent

    def _watch(self) -> None:
        # A process forked by our parent holds the pipe's other end as well, so end-of-file alone could never come.
        while not self.is_orphaned():
            readable, _, _ = select.select([0], [], [], 0.5)
            if readable and not os.read(0, 1):
                break
        self.on_gone()
        time.sleep(DRAIN_TIMEOUT_S + EXIT_TIMEOUT_S)
        end_now()


def end_now() -> None:
    os._exit(1)


async def serve(listener: socket.socket, announce: IO[str], watch: ParentWatch) -> None:
    """Run Prefect's API on `listener`; say where once it answers; drain and stop when the parent goes."""
    # The imports make objects that stay; collecting among them took 0.6 s of their 2.5 s.
    gc.disable()
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=3)
    )
    serving = asyncio.create_task(run_server(server, listener))
    while not server.started:
        await asyncio.sleep(0.02)
    gc.freeze()
    gc.enable()
    loop = asyncio.get_running_loop()
    parent_gone = asyncio.Event()
    watch.on_gone = lambda: loop.call_soon_threadsafe(parent_gone.set)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}/api", file=announce, flush=True)
    announce.close()
    await parent_gone.wait()
    await drain_events(DRAIN_ORPHANED_S if watch.is_orphaned() else DRAIN_TIMEOUT_S)
    server.should_exit = True
    await serving


async def run_server(server: uvicorn.Server, listener: socket.socket) -> None:
    try:
        await server.serve(sockets=[listener])
    except SystemExit:
        # The start-up failed and the log says why; a traceback of uvicorn's own exit would bury it.
        os._exit(3)


async def drain_events(timeout_s: float) -> None:
    """Wait until every event that has arrived was handled, else a short run's task states never reach the database."""
    from prefect.server.utilities.messaging.memory import METRICS

    deadline = time.monotonic() + timeout_s
    quiet_since = time.monotonic()
    last: tuple[int, int] | None = None
    while time.monotonic() < deadline:
        seen = (
            sum(topic["published"] for topic in METRICS.values()),
            sum(topic["consumed"] for topic in METRICS.values()),
        )
        if seen != last or seen[0] != seen[1]:
            last, quiet_since = seen, time.monotonic()
        elif time.monotonic() - quiet_since >= DRAIN_QUIET_S:
            return
        await asyncio.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
