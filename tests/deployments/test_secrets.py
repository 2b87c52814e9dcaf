"""Secrets come from the environment or from Secret blocks, and are nowhere else: not in any record the server keeps."""

from __future__ import annotations

import logging
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect_server import PrefectServer, without_prefect

from tasks.secrets import SECRET_BLOCKS, read_environment

BLOCK = SECRET_BLOCKS["QDRANT_API_KEY"]

# A flow that uses the key as a run does, and leaves behind all that a run leaves behind.
USE_KEY = """
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from tasks.secrets import read_environment

@task
def prepare(settings: dict) -> int:
    return len(read_environment()["QDRANT_API_KEY"])

@flow(log_prints=True)
def uses_the_key(settings: dict) -> int:
    found = prepare(settings)
    print("key of", found, "characters")
    create_markdown_artifact(key="used", markdown=f"a key of {found} characters")
    return found

print(uses_the_key({"collection": "documents"}))
"""


@pytest.fixture
def stored_key(shared_api: PrefectServer) -> Iterator[str]:
    from prefect.blocks.system import Secret
    from pydantic import SecretStr

    key = secrets.token_urlsafe(32)
    Secret(value=SecretStr(key)).save(BLOCK, overwrite=True)
    try:
        yield key
    finally:
        Secret.delete(BLOCK)


def test_a_block_fills_what_the_environment_lacks(stored_key: str) -> None:
    assert read_environment({"HOME": "/home/x"}) == {"HOME": "/home/x", "QDRANT_API_KEY": stored_key}


def test_the_environment_comes_first(stored_key: str) -> None:
    assert read_environment({"QDRANT_API_KEY": "mine"}) == {"QDRANT_API_KEY": "mine"}
    assert read_environment({"QDRANT_API_KEY": ""}) == {"QDRANT_API_KEY": ""}, "empty switches the block off"


def test_no_block_is_fine(shared_api: PrefectServer) -> None:
    assert read_environment({"HOME": "/home/x"}) == {"HOME": "/home/x"}


def test_without_a_server_nobody_is_asked(tmp_path: Path) -> None:
    script = "from tasks.secrets import read_environment; import sys; print(dict(read_environment({'A': 'b'})))"
    environment = {**without_prefect(), "PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "{'A': 'b'}\n"


def test_the_key_is_in_no_record_of_a_run(
    shared_api: PrefectServer, stored_key: str, caplog: pytest.LogCaptureFixture
) -> None:
    environment = {
        **shared_api.environment,
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks",
        "PREFECT_LOGGING_LEVEL": "DEBUG",
    }
    environment.pop("QDRANT_API_KEY", None)
    ended = subprocess.run(
        [sys.executable, "-c", USE_KEY], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.stdout.endswith(f"{len(stored_key)}\n"), ended.stderr
    with caplog.at_level(logging.DEBUG):
        assert read_environment({})["QDRANT_API_KEY"] == stored_key
    assert stored_key not in caplog.text
    assert stored_key not in ended.stdout + ended.stderr

    # Not what some route shows, but every byte the server keeps: parameters, states, logs, artifacts, results, events.
    def list_kept() -> list[Path]:
        return [path for path in shared_api.home.rglob("*") if path.is_file()]

    # A loaded server writes logs and events some seconds after it has taken them.
    deadline = time.monotonic() + 60
    while not any(b"a key of 43 characters" in path.read_bytes() for path in list_kept()):
        assert time.monotonic() < deadline, "the run's records are not there"
        time.sleep(0.5)
    kept = list_kept()
    assert any(path.name == "prefect.db" for path in kept)
    assert [path for path in kept if stored_key.encode() in path.read_bytes()] == []
