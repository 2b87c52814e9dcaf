"""The receiver as a process: read the configuration, refuse what can't work, serve until SIGTERM."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from deployments.receiver.app import make_app
from deployments.receiver.config import read_receiver_settings
from deployments.receiver.journal import Journal
from deployments.receiver.runs import connect_runs
from deployments.receiver.secrets import read_keys
from tasks.errors import ConfigError

logger = logging.getLogger(__name__)

# More at a time get 503 and come again. A connection buffers 64 KiB, and one read of the socket, before it is told to pause;
# what bodies take beyond that is bounded by max_held_bytes, for all of them together.
MAX_CONNECTIONS = 512
GRACE_S = 3


def serve(
    config_path: Path, host: str = "127.0.0.1", port: int = 4300, environment: Mapping[str, str] | None = None
) -> None:
    """Serve the hooks of `config_path`; blocks until SIGTERM or SIGINT, then ends the open bursts and releases their runs.

    `port` 0: a free one, in the log. `environment`: where secrets come from, os.environ by default; Secret blocks are read
    from the Prefect server. Raises ConfigError: the file, a secret, PREFECT_API_URL, the journal, the port.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each call to the Prefect server
    settings = read_receiver_settings(config_path)
    _require_server()
    keys = read_keys(settings.hooks, os.environ if environment is None else environment, read_secret_block)
    with _listen(host, port) as listener:
        app = make_app(
            settings, keys, Journal(Path(settings.journal)), lambda: connect_runs(settings.start_in_any_case_s)
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,  # one line a delivery of our own, without the query string and what may stand there
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        logger.info(
            "webhooks listening address=http://%s:%d hooks=%s",
            host,
            listener.getsockname()[1],
            ",".join(settings.hooks),
        )
        if threading.current_thread() is threading.main_thread():
            # uvicorn stops gently, then raises the signal again, for whoever handled it before: an orderly end is exit 0.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
        # The client's own five tries would hold up ours. Around the loop: each of its tasks has this context, and to enter
        # it takes 40 ms, too much for each call.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            server.run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"The receiver can't listen on {host}:{port}: {error.strerror}. Choose another --port."
        ) from error
    return listener


def _require_server() -> None:
    if not PREFECT_API_URL.value():
        raise ConfigError(
            "PREFECT_API_URL is not set, so there is no Prefect server that runs could be created on. Set it, as "
            "http://127.0.0.1:4200/api."
        )


def read_secret_block(name: str) -> str:
    """A Prefect Secret block's value. Raises KeyError: there is none; ConfigError: the server can't be asked."""
    import httpx
    from prefect.blocks.system import Secret

    try:
        block: Any = Secret.load(name)  # no coroutine: there is no event loop yet
    except ValueError as error:
        raise KeyError(name) from error
    except httpx.HTTPError as error:
        raise ConfigError(
            f"The Secret block {name} can't be read from the Prefect server: {error}. Start the server first, or give the "
            "secret as an environment variable."
        ) from error
    return str(block.get())
