"""One Prefect server for all tests of this folder; each uses names of its own."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from prefect_server import PrefectServer


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A real server; a test that stops it starts it again."""
    server = PrefectServer(tmp_path_factory.mktemp("prefect-server"))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def shared_api(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """The server is the configured one, in this process and all its threads."""
    from prefect.context import refresh_global_settings_context

    before = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = prefect_server.url
    refresh_global_settings_context()
    try:
        yield prefect_server
    finally:
        if before is None:
            del os.environ["PREFECT_API_URL"]
        else:
            os.environ["PREFECT_API_URL"] = before
        refresh_global_settings_context()
