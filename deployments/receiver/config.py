"""Which webhooks there are and what each may start: webhooks.toml. Nothing that a delivery says can add to it."""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from tasks.errors import ConfigError
from tasks.policy.changed_paths import check_changed_path


class Settings(BaseModel):
    """A group of knobs: an unknown name is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_prefix(prefix: str) -> str:
    prefix = prefix.rstrip("/")
    reason = check_changed_path(prefix) if prefix else None
    if reason is not None:
        raise ValueError(f"it {reason}")
    return f"{prefix}/" if prefix else ""


Secrets = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Prefix = Annotated[str, AfterValidator(_check_prefix)]
Name = Annotated[str, Field(min_length=1)]


class HookSettings(Settings):
    """What every kind of hook has."""

    deployment: str = Field(
        pattern=r"^[^/]+/[^/]+$", description="Flow and deployment to run, as ingest/documents; it knows its source."
    )
    auth: Literal["hmac", "bearer"] = Field(
        "hmac",
        description="hmac: a signature over the body (GitHub's, or that of Standard Webhooks); bearer: a token, for senders "
        "that can't sign.",
    )
    secret: Secrets = Field(
        description="The secret's name, never its value: an environment variable (IN_CAPITALS), or else a Prefect Secret "
        "block (in-lower-case). A list of two while a secret is changed: either is taken."
    )
    prefix: Prefix = Field(
        "", description="Folder that is cut off names to make doc ids; names outside it are ignored."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_secret(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("secret"), str):
            return {**values, "secret": (values["secret"],)}
        return values


class GenericHook(HookSettings):
    kind: Literal["generic"]


class GithubHook(HookSettings):
    kind: Literal["github"]
    auth: Literal["hmac"] = Field("hmac", description="GitHub signs: X-Hub-Signature-256.")
    repository: str = Field(pattern=r"^[^/\s]+/[^/\s]+$", description="Full name, as owner/repository.")
    branch: Name = Field("main", description="Pushes to other branches are ignored.")


class S3Hook(HookSettings):
    kind: Literal["s3"]
    auth: Literal["hmac", "bearer"] = Field("bearer", description="MinIO sends a bearer token (auth_token).")
    bucket: Name = Field(description="Events of other buckets are ignored.")


class CloudEventsHook(HookSettings):
    kind: Literal["cloudevents"]
    source: Name = Field(description="The event's source; events of others are ignored.")
    types: tuple[Name, ...] = Field(min_length=1, description="The event's types; events of others are ignored.")


Hook = Annotated[GenericHook | GithubHook | S3Hook | CloudEventsHook, Field(discriminator="kind")]
HookName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class ReceiverSettings(Settings):
    """The receiver, and its hooks by name: POST /hooks/NAME."""

    hooks: dict[HookName, Hook] = Field(min_length=1)
    journal: str = Field(
        ".ballast/webhooks.sqlite", description="SQLite file of what was accepted; on a disk that survives a restart."
    )
    quiet_s: float = Field(
        10.0, ge=0, le=600, description="A burst ends when nothing more has come for so long; then its run starts."
    )
    max_window_s: float = Field(60.0, ge=0, le=3600, description="A burst that does not end is cut after so long.")
    max_paths: int = Field(4000, gt=0, description="A burst that names more documents runs over the whole source.")
    max_paths_bytes: ByteSize = Field(
        ByteSize(256 * 1024),
        description="The same by the size of their names; a Prefect server refuses parameters above 512 KiB.",
    )
    max_body_bytes: ByteSize = Field(
        ByteSize(4 * 1024**2), description="A larger delivery is refused. GitHub sends up to 25 MB."
    )
    max_held_bytes: ByteSize = Field(
        ByteSize(64 * 1024**2),
        description="Bodies of all deliveries that are not answered yet; what comes above it gets 503, and comes again.",
    )
    body_timeout_s: float = Field(30.0, gt=0, description="A body that takes longer to arrive is refused.")
    tolerance_s: float = Field(
        300.0, gt=0, description="How old, or how far in the future, a signed timestamp may be (replay window)."
    )
    keep_days: float = Field(
        30.0, gt=0, description="How long a delivery's id is known, so that the same one starts nothing."
    )
    run_wait_s: float = Field(
        2.0,
        ge=0,
        description="How long the answer to a burst's first delivery waits for the run's id, to the others a quarter of it; "
        "then it says null, and where to ask.",
    )
    start_in_any_case_s: float = Field(
        3600.0,
        ge=300,
        description="A run that collects starts by itself after so long, should the receiver be gone for good. Far above "
        "the workers' prefetch seconds.",
    )

    @model_validator(mode="after")
    def _windows_fit(self) -> ReceiverSettings:
        if self.max_window_s < self.quiet_s:
            raise ValueError(f"max_window_s is {self.max_window_s:g}, below quiet_s, {self.quiet_s:g}; raise it")
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_bytes is {self.max_held_bytes}, below max_body_bytes, {self.max_body_bytes}; raise it, or no such "
                "delivery can be taken"
            )
        if self.start_in_any_case_s < 2 * self.max_window_s:
            raise ValueError(
                f"start_in_any_case_s is {self.start_in_any_case_s:g}; it must be twice max_window_s, "
                f"{self.max_window_s:g}, or runs start while they still collect"
            )
        return self


def read_receiver_settings(path: Path) -> ReceiverSettings:
    """The TOML file. Raises ConfigError: not there, not TOML, an unknown name, a value that can't be used."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"The webhooks' configuration {path} can't be read: {error.strerror or error}. "
            "Start from deployments/webhooks.toml."
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The webhooks' configuration {path} is not TOML: {error}.") from error
    try:
        return ReceiverSettings.model_validate(tree)
    except ValidationError as error:
        lines = "\n".join(_describe(e["loc"], e["type"], e["msg"], e["input"]) for e in error.errors())
        raise ConfigError(f"The webhooks' configuration {path} can't be used:\n{lines}") from None


_KINDS: dict[str, type[HookSettings]] = {
    "generic": GenericHook,
    "github": GithubHook,
    "s3": S3Hook,
    "cloudevents": CloudEventsHook,
}


def _describe(location: tuple[int | str, ...], kind: str, message: str, value: Any) -> str:
    parts = [str(part) for part in location]
    model: type[BaseModel] = ReceiverSettings
    # pydantic puts the kind of the hook behind its name: hooks.docs.github.branch is hooks.docs.branch in the file.
    if len(parts) > 2 and parts[0] == "hooks" and parts[2] in _KINDS:
        model = _KINDS[parts.pop(2)]
    path = ".".join(parts).removesuffix(".[key]")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(parts[-1], model.model_fields, n=1)
        return f"{path}: no such name; " + (
            f"did you mean {near[0]}?" if near else f"known: {', '.join(model.model_fields)}."
        )
    if kind == "missing":
        field = model.model_fields.get(parts[-1])
        return f"{path}: missing. {(field.description if field else None) or 'Add it.'}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: missing. One of {', '.join(_KINDS)}."
    if kind == "union_tag_invalid":
        return f"{path}.kind: {value.get('kind')!r} is unknown. One of {', '.join(_KINDS)}."
    message = message.removeprefix("Value error, ")
    # A value in a place for a name may be the secret itself.
    shown = "" if re.search("secret", path) or not parts else f"; it is {value!r:.200}"
    return f"{path or 'windows'}: {message[:1].lower()}{message[1:]}{shown}."
