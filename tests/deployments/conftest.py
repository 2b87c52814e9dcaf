"""One Prefect server for all tests of this folder; each uses names of its own."""

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
def shared_api(prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrefectServer]:
    """The server is the configured one, in this process and all its threads, whatever another test's fixture configured."""
    from flows.api_server import EMBEDDED_API, route_client

    with route_client(prefect_server.url):
        monkeypatch.delenv(EMBEDDED_API)  # others may ask this one
        yield prefect_server
