"""IngestSettings out of a TOML file, `key.path=value` overrides and flags; what can't be used is named by its path."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError

from tasks.config import IngestSettings, SourceSettings
from tasks.errors import ConfigError
from tasks.url_secrets import hide_secrets

# Known by being this very object: whatever URI stood for it, someone may have given. An empty one is never opened.
_NO_SOURCE = SourceSettings(uri="")
SECRET = re.compile(r"key|token(?!s)|secret|password", re.IGNORECASE)


def build_settings(
    *,
    config_file: Path | None = None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    needs_source: bool = True,
) -> IngestSettings:
    """Flags win over overrides, those over the file, that over the defaults.

    `flags` maps a key's path ("chunking.max_tokens") to its value; None means that the flag was not given.
    Where `needs_source` is False, a command that reads no source, a missing one is no error. Raises ConfigError.
    """
    tree = read_config(config_file) if config_file is not None else {}
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {override}: expected key.path=value, for example --set chunking.max_tokens=256.")
        set_value(tree, path.strip(), parse_override(value.strip()))
    for path, value in (flags or {}).items():
        if value is not None:
            set_value(tree, path, value)
    if str(tree.get("data_folder", "")).startswith(
        "~"
    ):  # a folder named ~ would be a trap: who removes it, removes all
        tree["data_folder"] = os.path.expanduser(tree["data_folder"])  # noqa: PTH111  an unknown user stays as it is
    if not needs_source:
        tree.setdefault("source", _NO_SOURCE)
    try:
        return IngestSettings.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(describe_errors(error)) from None


def has_source(settings: IngestSettings) -> bool:
    """Whether flag, override or file gave one; of settings that build_settings made."""
    return settings.source is not _NO_SOURCE


def read_config(path: Path) -> dict[str, Any]:
    """The TOML file's tree: the same names as IngestSettings. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}.") from error


def set_value(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set one leaf, making the tables on the way."""
    *groups, name = path.split(".")
    for group in groups:
        below = tree.setdefault(group, {})
        if group == "source" and isinstance(below, str):  # the short form of the whole group
            below = tree[group] = {"uri": below}
        if not isinstance(below, dict):
            raise ConfigError(f"{path}: {group} is a value, {below!r}, not a group of knobs.")
        tree = below
    tree[name] = value


def parse_override(text: str) -> Any:
    """Lists and tables are TOML; `none` unsets; the rest stays text, which pydantic turns into the knob's own type."""
    if text.lower() in ("none", "null"):
        return None
    if text.startswith(("[", "{", '"')):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"--set ...={text} is not TOML: {error}.") from error
    return text


def parse_bytes(flag: str, text: str) -> int:
    """ "15GiB" as bytes. Raises ConfigError."""
    try:
        value = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"{flag} {text}: not a size; write it as 15GiB, 8000MB or 16106127360.") from None
    if value <= 0:
        raise ConfigError(f"{flag} {text}: must be more than nothing.")
    return value


def describe_errors(error: ValidationError) -> str:
    """One line an error: the key's path, what is wrong, what came, and the nearest name for an unknown one."""
    return "\n".join(
        describe_error(tuple(str(part) for part in e["loc"]), e["type"], e["msg"], e["input"]) for e in error.errors()
    )


def describe_error(location: tuple[str, ...], kind: str, message: str, value: Any) -> str:
    path = ".".join(location)
    if kind == "extra_forbidden":
        known = list_knobs(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
        return f"{path}: no such knob; {hint}"
    if kind == "missing":
        return f"{path}: missing. Give SOURCE on the command line, or source.uri in the config file."
    if not path:  # about several knobs together: the message says which
        return f"{message}."
    if kind in ("tuple_type", "list_type"):
        shown = hide_secrets(str(value))
        return f"{path}: must be a list; it is {shown!r}. In TOML and with --set: '{path}=[\"{shown}\"]'."
    if kind == "value_error":  # a validator of ours: its message is whole
        message = message.removeprefix("Value error, ")
    shown = "..." if SECRET.search(location[-1] if location else "") else hide_secrets(repr(value))
    return f"{path}: {message[:1].lower()}{message[1:]}; it is {shown[:200]}."


def list_knobs(location: Sequence[str]) -> list[str]:
    """The names that a group of IngestSettings knows."""
    model: type[BaseModel] = IngestSettings
    for part in location:
        field = model.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return list(model.model_fields)
