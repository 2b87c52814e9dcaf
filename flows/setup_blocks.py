"""The blocks of `ballast setup`: secrets from the environment, kept encrypted by the Prefect server, never printed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, cast
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.blocks.system import Secret
from prefect.types import SecretDict
from pydantic import SecretStr

from tasks.errors import ConfigError
from tasks.secrets import SECRET_BLOCKS

NOTIFY_URL = "BALLAST_NOTIFY_URL"
NOTIFY_BLOCK = "ballast-notify"

Kind = TypeVar("Kind", bound=Block)
Outcome = Literal["created", "updated", "unchanged", "skipped"]


@dataclass(frozen=True, slots=True)
class NotifyBlock:
    """`block_id`: None where there is nowhere to notify."""

    name: str
    block_id: str | None
    outcome: Outcome
    note: str = ""


def set_up_secrets(environment: Mapping[str, str], *, dry_run: bool) -> Iterator[tuple[str, Outcome]]:
    """A Secret block for each secret in the environment; one that is not there leaves its block as it is."""
    for variable, name in SECRET_BLOCKS.items():
        value = environment.get(variable)
        if not value:
            yield name, "skipped"
            continue
        found = _load(Secret, name)
        if found is not None and found.get() == value:
            yield name, "unchanged"
            continue
        if not dry_run:
            Secret(value=SecretStr(value)).save(name, overwrite=True)
        yield name, "created" if found is None else "updated"


def set_up_notify(environment: Mapping[str, str], *, dry_run: bool) -> NotifyBlock:
    """The notification block for BALLAST_NOTIFY_URL. Raises ConfigError where that can't be used."""
    url = environment.get(NOTIFY_URL, "").strip()
    if not url:
        kept = _load(CustomWebhookNotificationBlock, NOTIFY_BLOCK) or _load(SlackWebhook, NOTIFY_BLOCK)
        if kept is not None:
            return NotifyBlock(
                NOTIFY_BLOCK, _id_of(kept), "unchanged", f"{NOTIFY_URL} is unset: the block stays as it is"
            )
        return NotifyBlock(NOTIFY_BLOCK, None, "skipped", f"{NOTIFY_URL} is unset: nobody is notified")
    wanted = make_notify_block(url)
    found: SlackWebhook | CustomWebhookNotificationBlock | None = _load(type(wanted), NOTIFY_BLOCK)
    if found is not None and _content(found) == _content(wanted):
        return NotifyBlock(NOTIFY_BLOCK, _id_of(found), "unchanged")
    outcome: Outcome = "created" if found is None else "updated"
    if dry_run:
        return NotifyBlock(NOTIFY_BLOCK, None if found is None else _id_of(found), outcome)
    return NotifyBlock(NOTIFY_BLOCK, str(wanted.save(NOTIFY_BLOCK, overwrite=True)), outcome)


def make_notify_block(url: str) -> SlackWebhook | CustomWebhookNotificationBlock:
    """A block that posts to `url`, which it keeps as a secret.

    What Apprise knows (slack://, mailto://, and the https addresses of Slack, Discord, Teams, ...) goes through Apprise;
    any other http(s) address gets a POST of {"subject": ..., "text": ...}. Raises ConfigError.
    """
    # Never the URL itself in a message: it is a password in many services.
    scheme = urlsplit(url).scheme
    if is_known_to_apprise(url):
        # Prefect's blocks around Apprise are one per service; this one hands any URL on as it is.
        return SlackWebhook(url=SecretStr(url))
    if scheme in ("http", "https") and urlsplit(url).hostname:
        return CustomWebhookNotificationBlock(
            name=NOTIFY_BLOCK,
            url="{{ address }}",
            json_data={"subject": "{{ subject }}", "text": "{{ subject }}\n{{ body }}"},
            secrets=SecretDict({"address": url}),
        )
    raise ConfigError(
        f"{NOTIFY_URL} is neither an http(s) address nor an Apprise URL (its scheme is {scheme or 'missing'}). For example "
        "https://chat.example.org/hooks/NAME, slack://..., mailto://..."
    )


def is_known_to_apprise(url: str) -> bool:
    """Whether Apprise has a service for the URL. It would log one that it can't parse, password and all."""
    from apprise import Apprise

    logger = logging.getLogger("apprise")
    before, logger.disabled = logger.disabled, True
    try:
        return Apprise.instantiate(url, suppress_exceptions=True) is not None
    finally:
        logger.disabled = before


def _load(kind: type[Kind], name: str) -> Kind | None:
    try:
        return cast(Kind, kind.load(name, validate=False))
    except ValueError:  # Prefect's error where there is no such block, or not even its type
        return None


def _id_of(block: Block) -> str:
    return str(block._block_document_id)


def _content(block: SlackWebhook | CustomWebhookNotificationBlock) -> tuple[object, ...]:
    if isinstance(block, SlackWebhook):
        return (block.url.get_secret_value(),)
    return block.url, block.json_data, block.secrets.get_secret_value()
