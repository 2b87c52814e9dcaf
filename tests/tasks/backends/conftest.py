"""One contract for every way to a Qdrant: embedded in memory and in a folder, and a server's two doubles on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from qdrant_client import QdrantClient

from tasks.backends.fake_qdrant_grpc import LoopbackQdrantGrpc
from tasks.backends.fake_qdrant_server import LoopbackQdrant
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.config import QdrantSettings


@pytest.fixture
def server() -> Iterator[LoopbackQdrant]:
    with LoopbackQdrant() as double:
        yield double


@pytest.fixture
def grpc_server(server: LoopbackQdrant) -> Iterator[LoopbackQdrantGrpc]:
    with LoopbackQdrantGrpc(server) as double:
        yield double


@pytest.fixture(params=["memory", "folder", "server", "grpc"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[QdrantStore]:
    if request.param == "memory":
        opened = QdrantStore(QdrantClient(":memory:"), place="in memory", is_embedded=True)
    elif request.param == "folder":
        opened = open_store(QdrantSettings(), str(tmp_path), environment={})
    else:
        settings = QdrantSettings(url=request.getfixturevalue("server").url, transport="rest")
        if request.param == "grpc":
            port = request.getfixturevalue("grpc_server").port
            settings = QdrantSettings(url=settings.url, transport="grpc", grpc_port=port)
        opened = open_store(settings, str(tmp_path), environment={})
    with closing(opened):
        yield opened
