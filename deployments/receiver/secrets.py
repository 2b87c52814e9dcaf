"""The hooks' secrets, by the names that the configuration gives: environment variables or Prefect Secret blocks."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping

from deployments.receiver.config import GithubHook, HookSettings
from tasks.errors import ConfigError

MIN_CHARACTERS = 16
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_STANDARD_WEBHOOKS = "whsec_"


def read_keys(
    hooks: Mapping[str, HookSettings], environment: Mapping[str, str], read_block: Callable[[str], str]
) -> dict[str, tuple[bytes, ...]]:
    """Each hook's keys, in the order of its `secret`. Raises ConfigError: one is missing, or shorter than 16 characters.

    `read_block(name)` gives a Secret block's value; KeyError: there is none of that name.
    """
    return {
        name: tuple(
            to_key(name, secret, _read(name, secret, environment, read_block), is_standard=_is_standard(hook))
            for secret in hook.secret
        )
        for name, hook in hooks.items()
    }


def _read(hook: str, secret: str, environment: Mapping[str, str], read_block: Callable[[str], str]) -> str:
    if _VARIABLE.fullmatch(secret):
        value = environment.get(secret)
        if not value:
            raise ConfigError(
                f"hooks.{hook}.secret: the environment variable {secret} is {'empty' if value == '' else 'not set'}. Set "
                f'it to what the sender has; make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
        return value
    try:
        return read_block(secret)
    except KeyError:
        raise ConfigError(
            f"hooks.{hook}.secret: there is no Prefect Secret block of that name, and the name of an environment variable is "
            "in capitals. Save the block in Prefect's UI (Blocks, Secret), or name a variable."
        ) from None


def _is_standard(hook: HookSettings) -> bool:
    return hook.auth == "hmac" and not isinstance(hook, GithubHook)


def to_key(hook: str, secret: str, value: str, *, is_standard: bool) -> bytes:
    """The bytes that sign, or the token. Raises ConfigError for a short one.

    `is_standard`: the scheme is that of Standard Webhooks, where a secret that begins with whsec_ is base64.
    """
    if len(value) < MIN_CHARACTERS:
        raise ConfigError(
            f"hooks.{hook}.secret: {secret} has {len(value)} characters; the least is {MIN_CHARACTERS}, or it could be "
            "guessed. Give hook and sender a longer one."
        )
    if not (is_standard and value.startswith(_STANDARD_WEBHOOKS)):
        return value.encode()
    try:
        key = base64.b64decode(value.removeprefix(_STANDARD_WEBHOOKS), validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError(
            f"hooks.{hook}.secret: {secret} begins with whsec_, but what follows is not base64. Copy it again."
        ) from None
    if len(key) < MIN_CHARACTERS:
        raise ConfigError(
            f"hooks.{hook}.secret: {secret} holds {len(key)} bytes of base64; the least is {MIN_CHARACTERS}. Make a longer one."
        )
    return key
