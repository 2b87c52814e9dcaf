"""docker/make-env.sh: random secrets that nobody else can read, and never a second time."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "POSTGRES_PASSWORD",
    "REDIS_PASSWORD",
    "QDRANT_API_KEY",
    "BALLAST_WEBHOOK_SECRET_DOCUMENTS",
    "PREFECT_API_AUTH_STRING",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("compose.yaml", "env.example", "make-env.sh", "webhooks.toml", "prometheus.yml"):
        (tmp_path / "docker").mkdir(exist_ok=True)
        shutil.copy(ROOT / "docker" / name, tmp_path / "docker" / name)
    (tmp_path / "my $documents").mkdir()
    return tmp_path


def make_env(checkout: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / "docker" / "make-env.sh"), *arguments],
        cwd=checkout,
        env={"PATH": path or "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def read_env(checkout: Path) -> dict[str, str]:
    lines = (checkout / "docker" / ".env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_secrets_are_long_and_each_its_own(checkout: Path) -> None:
    result = make_env(checkout, "my $documents")
    assert result.returncode == 0, result.stderr
    first = read_env(checkout)
    secrets = [first[name].removeprefix("admin:") for name in sorted(SECRETS)]
    assert all(len(secret) == 64 and int(secret, 16) for secret in secrets)
    assert len(set(secrets)) == len(SECRETS)
    assert not any(secret in result.stdout + result.stderr for secret in secrets)
    assert stat.S_IMODE((checkout / "docker" / ".env").stat().st_mode) == 0o600

    (checkout / "docker" / ".env").unlink()
    assert make_env(checkout, "my $documents").returncode == 0
    assert all(read_env(checkout)[name] != first[name] for name in SECRETS)


def test_compose_reads_what_it_writes(checkout: Path, tool: Any) -> None:
    compose = tool("docker-compose")
    assert make_env(checkout, "my $documents").returncode == 0
    result = subprocess.run(
        [compose, "--file", "docker/compose.yaml", "config", "--format", "json"],
        cwd=checkout,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    services = json.loads(result.stdout)["services"]
    assert "worker-gpu-standin" in services, "no NVIDIA driver on the script's PATH: the CPU serves gpu-pool"
    assert "worker-gpu" not in services
    documents = [mount["source"] for mount in services["worker-ingest"]["volumes"] if mount["target"] == "/documents"]
    # `docker compose config` writes a dollar as two, so that its output can be read again.
    assert documents == [str(checkout / "my $$documents")]


def test_a_machine_with_a_driver_gets_the_gpu_profile(checkout: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "nvidia-smi").write_text("#!/bin/sh\n")
    (driver / "nvidia-smi").chmod(0o755)
    assert make_env(checkout, "my $documents", path=f"{driver}:/usr/bin:/bin").returncode == 0
    assert read_env(checkout)["COMPOSE_PROFILES"] == "gpu"


@pytest.mark.parametrize("name", ["docker/.env", "docker/.env.worker", "docker/.env.part"])
def test_git_never_takes_what_holds_secrets(name: str) -> None:
    assert subprocess.run(["git", "check-ignore", "--quiet", name], cwd=ROOT, check=False).returncode == 0


def test_what_is_there_is_left_alone(checkout: Path) -> None:
    (checkout / "docker" / ".env").write_text("POSTGRES_PASSWORD=mine\n")
    result = make_env(checkout, "my $documents")
    assert result.returncode == 1
    assert "left as it is" in result.stderr
    assert (checkout / "docker" / ".env").read_text() == "POSTGRES_PASSWORD=mine\n"


@pytest.mark.parametrize("arguments", [(), ("nowhere",), ("my $documents", "more")])
def test_it_needs_a_folder_that_exists(checkout: Path, arguments: tuple[str, ...]) -> None:
    result = make_env(checkout, *arguments)
    assert result.returncode == 2
    assert "usage:" in result.stderr
    assert not (checkout / "docker" / ".env").exists()
