"""The health check of Prefect's services: it tells a container whose services are at work from one whose are not."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from docket import Docket, Worker
from prefect.settings import PREFECT_SERVER_DOCKET_NAME, PREFECT_SERVER_DOCKET_URL, temporary_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("check_services", ROOT / "docker" / "check_services.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, True),  # as docket names a worker: host#pid
        (f"{socket.gethostname()}-api#1", False),  # the API's own worker, in another container
    ],
    ids=["here", "elsewhere"],
)
def test_a_worker_of_this_container_is_alive(check: Any, name: str | None, expected: bool) -> None:
    settings = {PREFECT_SERVER_DOCKET_NAME: f"docket-{uuid4()}", PREFECT_SERVER_DOCKET_URL: "memory://"}

    async def look() -> tuple[bool, bool]:
        docket_name, url = settings[PREFECT_SERVER_DOCKET_NAME], settings[PREFECT_SERVER_DOCKET_URL]
        async with Docket(name=docket_name, url=url) as docket:
            before = await check.is_alive()
            async with Worker(docket, name=name) as worker:
                working = asyncio.create_task(worker.run_forever())
                while not await docket.workers():
                    await asyncio.sleep(0.05)
                during = await check.is_alive()
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
        return before, during

    with temporary_settings(settings):
        assert asyncio.run(asyncio.wait_for(look(), 60)) == (False, expected)
