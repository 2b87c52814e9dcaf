"""webhooks.toml: what can't be used is named by its path, and nothing starts without a secret."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deployments.receiver.config import GithubHook, S3Hook, read_receiver_settings
from deployments.receiver.secrets import read_keys
from deployments.receiver.server import serve
from tasks.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
HOOK = '[hooks.docs]\nkind = "generic"\ndeployment = "ingest/documents"\nsecret = "SECRET"\n'


def no_block(name: str) -> str:
    raise KeyError(name)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "webhooks.toml"
        path.write_text(text)
        return path

    return write


def test_the_shipped_example_shows_every_kind_and_names_no_value() -> None:
    settings = read_receiver_settings(ROOT / "deployments" / "webhooks.toml")
    assert {hook.kind for hook in settings.hooks.values()} == {"generic", "github", "s3", "cloudevents"}
    environment = {name: "x" * 32 for hook in settings.hooks.values() for name in hook.secret}
    assert all(name.startswith("BALLAST_WEBHOOK_SECRET_") for name in environment)
    assert read_keys(settings.hooks, environment, no_block)["documents"] == (b"x" * 32,)


def test_a_prefix_ends_at_a_folder(write: Callable[[str], Path]) -> None:
    hook = read_receiver_settings(write(HOOK + 'prefix = "docs/en/"\n')).hooks["docs"]
    assert hook.prefix == "docs/en/"
    assert read_receiver_settings(write(HOOK + 'prefix = "docs"\n')).hooks["docs"].prefix == "docs/"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"hooks: missing"),
        ("[hooks]", r"hooks: dictionary should have at least 1 item"),
        ("[hooks", "is not TOML"),
        (HOOK.replace("secret", "secrets"), r"hooks\.docs\.secret: missing\. The secret's name, never its value"),
        (HOOK.replace("secret", "secrets"), r"hooks\.docs\.secrets: no such name; did you mean secret\?"),
        (HOOK + 'branch = "main"', r"hooks\.docs\.branch: no such name; known: deployment, auth"),
        ("max_held_bytes = 1000\n" + HOOK, r"max_held_bytes is 1000, below max_body_bytes, 4194304"),
        ("quite_s = 1\n" + HOOK, r"quite_s: no such name; did you mean quiet_s\?"),
        (HOOK.replace("generic", "gitlab"), r"hooks\.docs\.kind: 'gitlab' is unknown\. One of generic, github"),
        (HOOK.replace('kind = "generic"\n', ""), r"hooks\.docs\.kind: missing"),
        (HOOK.replace("ingest/documents", "documents"), r"hooks\.docs\.deployment: string should match"),
        (HOOK + 'auth = "none"', r"hooks\.docs\.auth: input should be 'hmac' or 'bearer'; it is 'none'"),
        (HOOK + 'prefix = "../up"', r"hooks\.docs\.prefix: it has \.\. as a part"),
        (HOOK.replace("docs]", '"a/../b"]'), r"hooks\.a/\.\./b"),
        (HOOK.replace('"SECRET"', "[]"), r"hooks\.docs\.secret"),
        ("max_window_s = 5\nquiet_s = 6\n" + HOOK, "max_window_s is 5, below quiet_s, 6; raise it"),
        ("start_in_any_case_s = 301\nmax_window_s = 200\n" + HOOK, "start_in_any_case_s is 301; it must be twice"),
        (HOOK.replace("generic", "github") + 'repository = "docs"', r"hooks\.docs\.repository: string should match"),
        (
            HOOK.replace("generic", "github") + 'repository = "a/b"\nauth = "bearer"',
            r"hooks\.docs\.auth: input should be 'hmac'",
        ),
        (HOOK.replace("generic", "s3"), r"hooks\.docs\.bucket: missing"),
        (HOOK.replace("generic", "cloudevents") + 'source = "/w"', r"hooks\.docs\.types: missing"),
    ],
)
def test_what_can_not_be_used_is_named(write: Callable[[str], Path], text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_receiver_settings(write(text))


def test_a_missing_file_says_where_to_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*deployments/webhooks\.toml"):
        read_receiver_settings(tmp_path / "none.toml")


def test_a_secret_in_the_place_of_its_name_is_not_shown(write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        read_receiver_settings(write(HOOK.replace('"SECRET"', '{value = "hunter2hunter2"}')))
    assert "hunter2" not in str(caught.value)


def github(**values: Any) -> GithubHook:
    return GithubHook(kind="github", deployment="a/b", repository="a/b", **values)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, r"hooks\.docs\.secret: the environment variable SECRET is not set.*secrets\.token_urlsafe"),
        ({"SECRET": ""}, "SECRET is empty"),
        ({"SECRET": "x" * 15}, "SECRET has 15 characters; the least is 16"),
    ],
)
def test_no_secret_or_a_short_one_is_refused(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_keys({"docs": github(secret="SECRET")}, environment, no_block)


def test_the_receiver_does_not_start_without_a_secret(write: Callable[[str], Path]) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    server = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})
    with server, pytest.raises(ConfigError, match="SECRET is not set"):
        serve(write(HOOK), environment={})


def test_the_receiver_does_not_start_without_a_prefect_server(write: Callable[[str], Path]) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    no_server = temporary_settings({}, restore_defaults={PREFECT_API_URL})
    with no_server, pytest.raises(ConfigError, match="PREFECT_API_URL is not set"):
        serve(write(HOOK), environment={"SECRET": "x" * 16})


def test_a_secret_may_be_a_block_and_two_while_it_is_changed() -> None:
    blocks = {"old-secret": "o" * 16, "new-secret": "n" * 16}
    hooks = {"docs": github(secret=["old-secret", "new-secret"])}
    assert read_keys(hooks, {}, blocks.__getitem__)["docs"] == (b"o" * 16, b"n" * 16)
    with pytest.raises(ConfigError, match="no Prefect Secret block of that name"):
        read_keys({"docs": github(secret="sekret")}, {}, blocks.__getitem__)


def test_base64_is_read_where_standard_webhooks_has_it() -> None:
    key = bytes(range(24))
    value = f"whsec_{base64.b64encode(key).decode()}"
    bucket = {"kind": "s3", "deployment": "a/b", "bucket": "b", "secret": "SECRET"}
    hooks = {"signed": S3Hook(**bucket, auth="hmac"), "token": S3Hook(**bucket), "github": github(secret="SECRET")}
    keys = read_keys(hooks, {"SECRET": value}, no_block)
    assert keys == {"signed": (key,), "token": (value.encode(),), "github": (value.encode(),)}
    for wrong, reason in (("whsec_not base64 !", "not base64"), ("whsec_" + "QUJD" * 3, "holds 9 bytes")):
        with pytest.raises(ConfigError, match=reason):
            read_keys({"signed": hooks["signed"]}, {"SECRET": wrong}, no_block)
