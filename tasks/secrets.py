"""The environment a run works with: its process's own, and what is missing there from Prefect's Secret blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

# A value goes into a client and nowhere else: not into a parameter, a log line, an artifact or os.environ.
SECRET_BLOCKS: Mapping[str, str] = MappingProxyType({"QDRANT_API_KEY": "ballast-qdrant-api-key"})


def read_environment(environment: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """os.environ (or `environment`), and the values of Secret blocks for what is not set in it.

    A block that is not there is fine. Asks only a server that is configured, or the flow run's own; raises what the
    Prefect client raises where that is away.
    """
    given = os.environ if environment is None else environment
    missing = {variable: name for variable, name in SECRET_BLOCKS.items() if variable not in given}
    if not missing or not _has_server():
        return given
    found = {variable: value for variable, name in missing.items() if (value := _read_block(name)) is not None}
    return MappingProxyType({**given, **found})


def _has_server() -> bool:
    if os.environ.get("PREFECT_API_URL"):
        return True
    from prefect.settings import get_current_settings

    return get_current_settings().api.url is not None


def _read_block(name: str) -> str | None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    # By hand rather than Secret.load(): that registers and validates types, and its error for "no such block" is a
    # ValueError like any other.
    with get_client(sync_client=True) as client:
        try:
            document = client.read_block_document_by_name(name, "secret")
        except ObjectNotFound:
            return None
    value = document.data.get("value")
    return value if isinstance(value, str) and value else None
