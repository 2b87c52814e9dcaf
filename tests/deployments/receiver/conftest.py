"""One Prefect server for all tests here, and receivers that end with the test or module that started them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.deployments.receiver.processes import PrefectServer, ReceiverProcess, to_toml


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect-server"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def hook() -> str:
    """A name that no other test has: runs are told apart by it."""
    return f"h{uuid4().hex[:12]}"


def _start_in(folder: Path, *, apart: bool = False) -> Iterator[Callable[..., ReceiverProcess]]:
    started: list[ReceiverProcess] = []

    def start(api_url: str, hooks: Mapping[str, Mapping[str, Any]], **knobs: Any) -> ReceiverProcess:
        home = folder / str(len(started)) if apart else folder
        home.mkdir(exist_ok=True)
        config = home / "webhooks.toml"
        config.write_text(to_toml({"journal": str(home / "journal.sqlite"), **knobs}, hooks))
        started.append(ReceiverProcess(config, api_url))
        return started[-1]

    yield start
    for receiver in started:
        if receiver.process.poll() is None:
            receiver.process.kill()
            receiver.process.wait()


@pytest.fixture
def start_receiver(tmp_path: Path) -> Iterator[Callable[..., ReceiverProcess]]:
    """start_receiver(api_url, hooks, **knobs): the same folder, so the same journal, each time."""
    yield from _start_in(tmp_path)


@pytest.fixture(scope="module")
def start_module_receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ReceiverProcess]]:
    """The same for receivers that a whole module uses, each with a journal of its own."""
    yield from _start_in(tmp_path_factory.mktemp("receiver"), apart=True)
