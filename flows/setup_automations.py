"""The automations of `ballast setup`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import AutomationCore
from pydantic import ValidationError

from flows.setup_blocks import NOTIFY_URL
from flows.setup_steps import SetupStep
from tasks.errors import ConfigError

# Said each time: the client leaves out what is not set, and the server then keeps what it has.
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"description": "", "enabled": True, "tags": [], "actions_on_trigger": [], "actions_on_resolve": []}
)


def set_up_automation(
    client: SyncPrefectClient,
    definition: Mapping[str, Any],
    blocks: Mapping[str, str | None],
    path: Path,
    *,
    force: bool,
    dry_run: bool,
) -> SetupStep:
    """One automation, known by its name. Where a block that it needs could not be made it is there, switched off."""
    wanted, lacking = to_automation(definition, blocks, path)
    name, note = wanted.name, f"off: {lacking} is unset" if lacking else ""
    found = next(iter(client.read_automations_by_name(name)), None)
    if found is None:
        if not dry_run:
            client.create_automation(wanted)
        return SetupStep("automation", name, "created", note)
    was_idle = all(action.type == "do-nothing" for action in found.actions)
    if not (force or lacking or was_idle):
        wanted = wanted.model_copy(update={"enabled": found.enabled})
    is_same = all(getattr(found, field) == getattr(wanted, field) for field in ("trigger", "actions", *_DEFAULTS))
    if not note and not found.enabled and not wanted.enabled:
        note = "off on the server; --force switches it on"
    if is_same:
        return SetupStep("automation", name, "unchanged", note)
    if not dry_run:
        client.update_automation(found.id, wanted)
    return SetupStep("automation", name, "updated", note)


def to_automation(
    definition: Mapping[str, Any], blocks: Mapping[str, str | None], path: Path
) -> tuple[AutomationCore, str | None]:
    """An entry of the automations file as Prefect's model; and the variable that is unset, where its block is not there.

    Raises ConfigError where Prefect's schema does not take it.
    """
    lacking: str | None = None
    actions: list[Any] = []
    for action in definition.get("actions") or ():
        block = action.get("block_document_id") if isinstance(action, dict) else None
        if isinstance(block, str) and block in blocks:
            if blocks[block] is None:
                lacking = NOTIFY_URL
            action = {**action, "block_document_id": blocks[block]}
        actions.append(action)
    changes: dict[str, Any] = {"actions": actions}
    if lacking:
        changes = {"actions": [{"type": "do-nothing"}], "enabled": False}
    try:
        return AutomationCore.model_validate({**_DEFAULTS, **definition, **changes}), lacking
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"{path}: Prefect's schema does not take the automation {definition.get('name')!r}: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from error
