"""Compose as Compose itself reads it, and the tools that read the other files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)")
Config = Callable[..., dict[str, Any]]


def find_tool(name: str) -> str:
    """The tool beside this Python or on PATH. Skips where it is not there; in CI that is a failure."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI must have it")
        pytest.skip(f"{name} is not installed: pip install --requirement requirements.lock")
    return found


@pytest.fixture
def tool() -> Callable[[str], str]:
    return find_tool


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of docker/ beside a folder deployments/, so that a .env of the checkout plays no part."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "docker", folder / "docker", ignore=shutil.ignore_patterns(".env*", "__pycache__"))
    shutil.copytree(ROOT / "deployments", folder / "deployments", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def values(stack: Path) -> Mapping[str, str]:
    """A recognisable value for every variable of the compose files; secrets begin with `secret-`."""
    names = {name for path in (stack / "docker").glob("compose*.yaml") for name in VARIABLE.findall(path.read_text())}
    return {name: f"secret-{name.lower()}" for name in sorted(names) if is_secret(name)} | {
        "BALLAST_DOCUMENTS": str(stack),
        "BALLAST_SHARED_SPOOL": str(stack),
        "BALLAST_PRIVATE_ADDRESS": "10.9.8.7",
        "BALLAST_MAIN_ADDRESS": "10.9.8.7",
    }


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is one."""
    return re.search(r"PASSWORD|SECRET|API_KEY|TOKEN|AUTH_STRING|NOTIFY_URL", name) is not None


def run_compose(stack: Path, values: Mapping[str, str], *files: str) -> subprocess.CompletedProcess[str]:
    named = [part for file in files for part in ("--file", str(stack / "docker" / file))]
    return subprocess.run(
        [find_tool("docker-compose"), *named, "--profile", "*", "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], "HOME": str(stack), **values},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="session")
def config(stack: Path, values: Mapping[str, str]) -> Config:
    """config("compose.yaml", ...) as Compose resolves it, every profile included."""

    def read(*files: str) -> dict[str, Any]:
        result = run_compose(stack, values, *files)
        assert result.returncode == 0, result.stderr
        resolved: dict[str, Any] = json.loads(result.stdout)
        return resolved

    return read


@pytest.fixture(scope="session")
def services(config: Config) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = config("compose.yaml")["services"]
    return found


@pytest.fixture(scope="session")
def worker_services(config: Config) -> dict[str, dict[str, Any]]:
    """Those of a further machine."""
    found: dict[str, dict[str, Any]] = config("compose.worker.yaml")["services"]
    return found


@pytest.fixture(scope="session")
def compose(stack: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """compose(values, *files): `docker compose config` with nothing else in its environment."""
    return lambda given, *files: run_compose(stack, given, *files)
