"""The verify run's tasks against a Prefect server that is away; what they find: tests/flows/test_verify.py."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.config import IngestSettings
from tasks.errors import ApiUnavailable
from tasks.verify import inspect


def test_secrets_wait_as_long_for_the_server_as_pools_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDRANT_API_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = IngestSettings.model_validate(
        {"source": "docs", "data_folder": str(tmp_path), "pools": {"server_outage_s": 0.5}}
    )
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}),
        pytest.raises(ApiUnavailable, match=r"did not answer for 0\.5 s"),
    ):
        inspect.fn(settings, with_source=False)
