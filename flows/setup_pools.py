"""The work pools of `ballast setup`, their base job templates, queues and limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound

from flows.setup_files import PoolDefinition, QueueDefinition
from flows.setup_steps import SetupStep
from tasks.errors import ConfigError


def set_up_pool(
    client: SyncPrefectClient, pool: PoolDefinition, template: dict[str, Any] | None, *, force: bool, dry_run: bool
) -> Iterator[SetupStep]:
    """The pool, then its queues."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate

    try:
        found = client.read_work_pool(pool.name)
    except ObjectNotFound:
        found = None
    if found is None:
        template = template or find_default_template(pool.type)
        if not dry_run:
            client.create_work_pool(
                WorkPoolCreate(
                    name=pool.name,
                    type=pool.type,
                    description=pool.description,
                    base_job_template=template,
                    concurrency_limit=pool.concurrency_limit,
                )
            )
        yield SetupStep("pool", pool.name, "created", describe_limit(pool.concurrency_limit))
    else:
        if found.type != pool.type:
            raise ConfigError(
                f"The work pool {pool.name} is of type {found.type} on the server, and {pool.type} in the pools file. Prefect "
                "can't change it: remove the pool there, or name the type that it has."
            )
        changes: dict[str, Any] = {}
        if template is not None and template != found.base_job_template:
            changes["base_job_template"] = template
        if force and found.concurrency_limit != pool.concurrency_limit:
            changes["concurrency_limit"] = pool.concurrency_limit
        if changes and not dry_run:
            client.update_work_pool(pool.name, WorkPoolUpdate(**changes))
        yield describe_step(
            "pool", pool.name, pool.concurrency_limit, found.concurrency_limit, bool(changes), force=force
        )
    for queue in pool.queues:
        yield set_up_queue(client, pool, queue, is_new_pool=found is None, force=force, dry_run=dry_run)


def set_up_queue(
    client: SyncPrefectClient,
    pool: PoolDefinition,
    queue: QueueDefinition,
    *,
    is_new_pool: bool,
    force: bool,
    dry_run: bool,
) -> SetupStep:
    # Not client.create_work_queue: SyncPrefectClient's can neither read a queue of a pool nor set a limit of none.
    name = f"{pool.name}/{queue.name}"
    of_pool = {"work_pool_name": pool.name}
    wanted = queue.model_dump(exclude_none=True)
    found: dict[str, Any] | None = None
    if not (is_new_pool and dry_run):
        listed = client.request(
            "POST", "/work_pools/{work_pool_name}/queues/filter", path_params=of_pool, json={}
        ).json()
        found = next((entry for entry in listed if entry["name"] == queue.name), None)
    if found is None:
        if not dry_run:
            client.request("POST", "/work_pools/{work_pool_name}/queues", path_params=of_pool, json=wanted)
        return SetupStep("queue", name, "created", describe_limit(queue.concurrency_limit))
    limit = found["concurrency_limit"]
    # A queue without any limit is one that Prefect made itself, for a deployment that came first.
    changed = limit != queue.concurrency_limit and (force or limit is None)
    if changed and not dry_run:
        client.request(
            "PATCH",
            "/work_pools/{work_pool_name}/queues/{name}",
            path_params={**of_pool, "name": queue.name},
            json={"concurrency_limit": queue.concurrency_limit},
        )
    return describe_step("queue", name, queue.concurrency_limit, limit, changed, force=force)


def find_default_template(pool_type: str) -> dict[str, Any]:
    """The base job template that Prefect has for a type of pool. Raises ConfigError."""
    from prefect.utilities.asyncutils import run_coro_as_sync
    from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

    template: dict[str, Any] | None = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type(pool_type))
    if template is None:
        raise ConfigError(
            f"Prefect knows no work pool type {pool_type!r} here. Correct `type`, install its package, or give the pool a "
            "base_job_template in the pools file."
        )
    return template


def describe_step(
    kind: Literal["pool", "queue"], name: str, wanted: int | None, found: int | None, changed: bool, *, force: bool
) -> SetupStep:
    """What became of a pool or queue that was there."""
    if changed:
        return SetupStep(kind, name, "updated", describe_limit(wanted))
    if wanted != found and not force:
        return SetupStep(
            kind, name, "kept", f"{describe_limit(found)} on the server, {wanted} in the file; --force sets it"
        )
    return SetupStep(kind, name, "unchanged", describe_limit(found))


def describe_limit(limit: int | None) -> str:
    return "no limit" if limit is None else f"limit {limit}"
