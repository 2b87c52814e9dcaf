"""What `ballast setup` does on a Prefect server: pools, limits, blocks, deployments, automations; again and again.

Whatever is there already and as it should be is left alone, and so is what an operator may have changed on purpose: the
limit of a pool or queue, and whether an automation is on. `force` sets those back to what the files say.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError

from flows.setup_automations import set_up_automation
from flows.setup_blocks import set_up_notify, set_up_secrets
from flows.setup_files import (
    DeploymentDefinition,
    check_pools,
    read_automations,
    read_deployments,
    read_pools,
    read_template,
)
from flows.setup_pools import set_up_pool
from flows.setup_steps import SetupStep
from tasks.errors import ApiUnavailable, BallastError, ConfigError

DEPLOY_TIMEOUT_S = 300.0
PAUSE_S = 1.0
DEPLOYMENTS_A_PAGE = 200


@dataclass(frozen=True, slots=True)
class SetupFiles:
    """Where the definitions are."""

    prefect: Path
    pools: Path
    automations: Path


def set_up_server(
    files: SetupFiles, environment: Mapping[str, str], *, wait_s: float, force: bool, dry_run: bool
) -> Iterator[SetupStep]:
    """Yield each step as it is done. All files are read, and checked, before the first one.

    Raises ConfigError (files, environment, access), ApiUnavailable (no server within `wait_s`), BallastError (Prefect
    refused a deployment).
    """
    pools = read_pools(files.pools)
    templates = {pool.name: read_template(pool, files.pools) for pool in pools}
    automations = read_automations(files.automations)
    deployments = read_deployments(files.prefect, environment)
    check_pools(deployments, pools, files.prefect, files.pools)
    with connect(wait_s) as client:
        for pool in pools:
            yield from set_up_pool(client, pool, templates[pool.name], force=force, dry_run=dry_run)
        for name, outcome in set_up_secrets(environment, dry_run=dry_run):
            yield SetupStep("block", name, outcome)
        notify = set_up_notify(environment, dry_run=dry_run)
        yield SetupStep("block", notify.name, notify.outcome, notify.note)
        yield from set_up_deployments(client, files.prefect, deployments, environment, dry_run=dry_run)
        for automation in automations:
            yield set_up_automation(
                client, automation, {notify.name: notify.block_id}, files.automations, force=force, dry_run=dry_run
            )


@contextmanager
def connect(wait_s: float) -> Iterator[SyncPrefectClient]:
    """A client of the configured server, once that answers. Raises ConfigError, ApiUnavailable."""
    from flows.api_server import find_configured_url

    url = find_configured_url()
    if not url:
        raise ConfigError(
            "No Prefect server is configured. Start one (prefect server start) and name it: "
            "export PREFECT_API_URL=http://127.0.0.1:4200/api"
        )
    deadline = time.monotonic() + wait_s
    with get_client(sync_client=True) as client:
        while (error := client.api_healthcheck()) is not None:
            if time.monotonic() >= deadline:
                raise ApiUnavailable(
                    f"The Prefect server at {url} did not answer within {wait_s:g} s: {error or type(error).__name__}. "
                    "Start it, correct PREFECT_API_URL, or give it longer with --wait."
                )
            time.sleep(PAUSE_S)
        with explained(url):
            client.read_work_pools(limit=1)  # /health needs no authentication, everything else may
            yield client


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Errors of the client as ours, with the way out."""
    try:
        yield
    except PrefectHTTPStatusError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise ConfigError(
                f"The Prefect server at {url} refused access ({code}). Set PREFECT_API_AUTH_STRING to what the server has as "
                "PREFECT_SERVER_API_AUTH_STRING."
            ) from error
        if code >= 500:
            raise ApiUnavailable(
                f"The Prefect server at {url} answered {code} to {error.request.method} {error.request.url.path}. See its "
                "log; ballast setup can be run again."
            ) from error
        raise BallastError(
            f"The Prefect server at {url} refused {error.request.method} {error.request.url.path} ({code}): "
            f"{error.response.text[:500]}"
        ) from error
    except httpx.TransportError as error:
        raise ApiUnavailable(
            f"The Prefect server at {url} went away: {type(error).__name__} {error}. Run ballast setup again."
        ) from error


# ---------------------------------------------------------------------------------------------- deployments


def set_up_deployments(
    client: SyncPrefectClient,
    prefect_file: Path,
    deployments: Sequence[DeploymentDefinition],
    environment: Mapping[str, str],
    *,
    dry_run: bool,
) -> Iterator[SetupStep]:
    """Deploy the whole file with Prefect's own command, which also makes each deployment's triggers anew."""
    before = read_specifications(client, deployments)
    if not dry_run:
        deploy(prefect_file, environment)
    after = before if dry_run else read_specifications(client, deployments)
    for deployment in deployments:
        key = deployment.entrypoint, deployment.name
        name = f"{deployment.name} ({deployment.entrypoint})"
        if key not in before:
            yield SetupStep("deployment", name, "created")
        elif dry_run:
            yield SetupStep("deployment", name, "skipped", "it is there; only deploying shows whether it differs")
        else:
            yield SetupStep("deployment", name, "unchanged" if before[key] == after.get(key) else "updated")


def deploy(prefect_file: Path, environment: Mapping[str, str]) -> None:
    """`prefect deploy --all`, in a process of its own. Raises BallastError with what it printed."""
    from flows.api_server import find_configured_url

    # -P: a folder named flows where the command runs must not shadow ours.
    command = [
        sys.executable,
        "-P",
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        str(prefect_file),
    ]
    try:
        ended = subprocess.run(  # noqa: S603  our own interpreter; the file is the user's
            command,
            env={**environment, "PREFECT_API_URL": str(find_configured_url()), "COLUMNS": "200"},
            cwd=prefect_file.resolve().parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEPLOY_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BallastError(
            f"prefect deploy did not end within {DEPLOY_TIMEOUT_S:g} s. Run it by hand to see what it waits for: "
            f"{' '.join(command[3:])}"
        ) from error
    if ended.returncode != 0:
        tail = "\n".join(f"  {line}" for line in ended.stdout.strip().splitlines()[-15:])
        raise BallastError(f"prefect deploy refused {prefect_file} (exit code {ended.returncode}):\n{tail}")


def read_specifications(
    client: SyncPrefectClient, deployments: Sequence[DeploymentDefinition]
) -> dict[tuple[str, str], dict[str, Any]]:
    """What makes out each deployment on the server, by entry point and name; without ids, times and status."""
    names = sorted({deployment.name for deployment in deployments})
    found = client.request(
        "POST",
        "/deployments/filter",
        json={"deployments": {"name": {"any_": names}}, "limit": DEPLOYMENTS_A_PAGE},
    ).json()
    kept = (
        "description", "tags", "parameters", "job_variables", "work_pool_name", "work_queue_name", "pull_steps",
        "enforce_parameter_schema", "parameter_openapi_schema", "concurrency_options",
    )  # fmt: skip
    return {
        (entry["entrypoint"], entry["name"]): {
            **{name: entry.get(name) for name in kept},
            "limit": (entry.get("global_concurrency_limit") or {}).get("limit"),
            "schedules": [(schedule["schedule"], schedule["active"]) for schedule in entry["schedules"]],
        }
        for entry in found
    }
