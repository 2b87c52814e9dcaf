"""From what senders send to doc ids, kind by kind."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.receiver.bodies import read_json
from deployments.receiver.config import CloudEventsHook, GenericHook, GithubHook, S3Hook
from deployments.receiver.mapping import GITHUB_MAX_COMMITS, GITHUB_MAX_FILES, Mapped, map_delivery
from deployments.receiver.refused import Refused
from tasks.policy.changed_paths import check_changed_path

COMMON: dict[str, Any] = {"deployment": "ingest/documents", "secret": ("SECRET",)}
GENERIC = GenericHook(kind="generic", **COMMON)
PREFIXED = GenericHook(kind="generic", prefix="docs", **COMMON)
GITHUB = GithubHook(kind="github", repository="Example/Handbook", branch="main", prefix="docs", **COMMON)
S3 = S3Hook(kind="s3", bucket="documents", prefix="published", **COMMON)
EVENTS = CloudEventsHook(kind="cloudevents", auth="bearer", source="/wiki", types=("page.changed",), **COMMON)
SIGNED_EVENTS = CloudEventsHook(kind="cloudevents", source="/wiki", types=("page.changed",), **COMMON)

JSON = {"content-type": "application/json"}
STRUCTURED = {"content-type": "application/cloudevents+json; charset=utf-8"}
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\\"), min_size=1, max_size=30).filter(
    lambda name: check_changed_path(name) is None
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def refuse(hook: Any, headers: dict[str, str], tree: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        map_delivery(hook, headers, tree)
    return caught.value


# ---------------------------------------------------------------------------------------------- generic


@pytest.mark.parametrize(
    ("hook", "tree", "changed"),
    [
        (GENERIC, {}, None),
        (GENERIC, {"changed": None}, None),
        (GENERIC, {"changed": ["b.md", "a.md", "b.md"]}, ("a.md", "b.md")),
        (PREFIXED, {"changed": ["docs/a.md", "docs2/b.md", "c.md", "docs/en/d.md"]}, ("a.md", "en/d.md")),
    ],
)
def test_generic_names_documents_or_the_whole_source(hook: GenericHook, tree: Any, changed: Any) -> None:
    assert map_delivery(hook, JSON, tree) == Mapped(changed)


def test_generic_that_names_nothing_here_is_ignored_with_a_reason() -> None:
    assert map_delivery(GENERIC, JSON, {"changed": []}).ignored == "it names nothing"
    assert map_delivery(PREFIXED, JSON, {"changed": ["src/a.py"]}).ignored == "none of its 1 names is below docs/"


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"change": ["a.md"]}, "change: Extra inputs are not permitted"),
        ({"changed": "a.md"}, "changed: Input should be a valid list"),
        ({"changed": [1]}, "changed.0: Input should be a valid string"),
        ({"changed": ["a\ud800"]}, "changed"),
        ([], "the body"),
        (None, "the body"),
        ({"changed": ["../a.md"]}, "has .. as a part"),
        ({"changed": ["a.md", "/etc/passwd"]}, "is absolute"),
        ({"changed": ["s3://other/a.md"]}, "is a URL"),
        ({"changed": ["a\\b.md"]}, "has a backslash"),
        ({"changed": ["a\0.md"]}, "has a NUL"),
        ({"changed": [""]}, "is empty"),
        ({"changed": ["x" * 5000]}, "has 5,000 bytes"),
    ],
)
def test_generic_refuses_what_is_no_document(tree: Any, reason: str) -> None:
    refused = refuse(GENERIC, JSON, tree)
    assert refused.status == 422
    assert reason in refused.reason
    assert refused.reason.isascii()


def test_a_prefix_is_no_way_out() -> None:
    assert "has .. as a part" in refuse(PREFIXED, JSON, {"changed": ["docs/../../etc/passwd"]}).reason


# ---------------------------------------------------------------------------------------------- GitHub


def push(*commits: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {
        "ref": "refs/heads/main",
        "before": "0" * 40,
        "after": "1" * 40,
        "forced": False,
        "created": False,
        "deleted": False,
        "repository": {"id": 1, "full_name": "example/handbook", "private": False},
        "commits": list(commits),
        **values,
    }


def commit(added: Any = (), modified: Any = (), removed: Any = ()) -> dict[str, Any]:
    return {"id": "2" * 40, "added": list(added), "modified": list(modified), "removed": list(removed)}


PUSH = {**JSON, "x-github-event": "push"}


def test_a_push_names_what_all_its_commits_touched() -> None:
    tree = push(
        commit(added=["docs/new.md", "src/x.py"]), commit(modified=["docs/b.md"], removed=["docs/gone.md"]), commit()
    )
    assert map_delivery(GITHUB, PUSH, tree).changed == ("b.md", "gone.md", "new.md")


@pytest.mark.parametrize(
    "tree",
    [
        push(commit(["docs/a.md"]), forced=True),
        push(commit(["docs/a.md"]), created=True),
        push(),  # a branch set back: no commits, and yet another content
        push(*[commit(["docs/a.md"])] * GITHUB_MAX_COMMITS),
        push(commit([f"docs/{place}.md" for place in range(GITHUB_MAX_FILES)])),
        push(commit(["docs/a.md"]), total_commits=2),
        push({"id": "2" * 40, "added": ["docs/a.md"]}),
        push(commit(["docs/a\\b.md"])),
        push(commit(["docs//b.md"])),
    ],
    ids=["forced", "created", "empty", "commits cut", "files cut", "gitea cut", "no lists", "backslash", "empty part"],
)
def test_a_push_that_does_not_say_all_is_about_the_whole_source(tree: Any) -> None:
    assert map_delivery(GITHUB, PUSH, tree) == Mapped(None)


@pytest.mark.parametrize(
    ("headers", "tree", "reason"),
    [
        (PUSH, push(commit(["docs/a.md"]), ref="refs/heads/other"), "to 'refs/heads/other', not to refs/heads/main"),
        (PUSH, push(commit(["docs/a.md"]), ref="refs/tags/main"), "to 'refs/tags/main'"),
        (PUSH, push(commit(["docs/a.md"]), repository={"full_name": "a/b"}), "repository is 'a/b'"),
        (PUSH, push(deleted=True), "branch was deleted"),
        (PUSH, push(commit(["src/x.py"])), "none of its 1 names is below docs/"),
        ({**JSON, "x-github-event": "issues"}, {"action": "opened"}, "the event is 'issues', not push"),
        (JSON, push(), "X-GitHub-Event is missing"),
    ],
)
def test_other_events_of_github_are_ignored_with_a_reason(headers: Any, tree: Any, reason: str) -> None:
    mapped = map_delivery(GITHUB, headers, tree)
    assert (mapped.changed, mapped.status) == ((), "ignored")
    assert reason in (mapped.ignored or "")


def test_a_ping_is_answered() -> None:
    assert map_delivery(GITHUB, {**JSON, "x-github-event": "ping"}, {"zen": "Keep it simple."}).status == "pong"


def test_a_push_with_a_name_that_climbs_is_refused() -> None:
    assert refuse(GITHUB, PUSH, push(commit(["docs/../../x.md"]))).status == 422
    assert refuse(GITHUB, PUSH, {"ref": 1}).status == 422


# ---------------------------------------------------------------------------------------------- S3


def notify(*keys: str, event: str = "s3:ObjectCreated:Put", bucket: str = "documents") -> dict[str, Any]:
    return {
        "EventName": event,
        "Records": [
            {"eventName": event, "s3": {"bucket": {"name": bucket}, "object": {"key": key, "sequencer": "17"}}}
            for key in keys
        ],
    }


@pytest.mark.parametrize("event", ["s3:ObjectCreated:Put", "ObjectRemoved:Delete", "LifecycleExpiration:Delete"])
def test_keys_are_decoded_and_cut(event: str) -> None:
    tree = notify("published/with+space.md", "published%2Fplus%2B%C3%BC.md", "published/folder/", event=event)
    assert map_delivery(S3, JSON, tree).changed == ("plus+ü.md", "with space.md")


@settings(deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=4))
def test_any_key_survives_its_encoding(names: list[str]) -> None:
    tree = notify(*(quote_plus(f"published/{name}") for name in names))
    assert map_delivery(S3, JSON, tree).changed == tuple(sorted(set(names)))


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        (notify("published/a.md", bucket="others"), "no object of the bucket documents"),
        (notify("published/a.md", event="s3:ObjectAccessed:Get"), "no object of the bucket documents"),
        (notify("drafts/a.md"), "none of its 1 names is below published/"),
        (notify("published/folder/"), "it names nothing"),
        ({"Records": []}, "no object"),
    ],
)
def test_other_notifications_are_ignored_with_a_reason(tree: Any, reason: str) -> None:
    mapped = map_delivery(S3, JSON, tree)
    assert mapped.status == "ignored"
    assert reason in (mapped.ignored or "")


def test_keys_that_lead_elsewhere_are_refused_and_odd_ones_mean_the_whole_source() -> None:
    assert "has .. as a part" in refuse(S3, JSON, notify("published/%2E%2E/%2E%2E/etc/passwd")).reason
    assert "not URL-encoded" in refuse(S3, JSON, notify("published/%FF.md")).reason
    assert map_delivery(S3, JSON, notify("published//a.md")) == Mapped(None)
    assert map_delivery(S3, JSON, {"Service": "Amazon S3", "Event": "s3:TestEvent"}).status == "pong"


# ---------------------------------------------------------------------------------------------- CloudEvents


def event(**values: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": "e1", "source": "/wiki", "type": "page.changed", **values}


def binary(**values: Any) -> dict[str, str]:
    return {**JSON, **{f"ce-{name}": str(value) for name, value in event(**values).items()}}


@pytest.mark.parametrize(
    ("headers", "tree", "changed"),
    [
        (STRUCTURED, event(data={"changed": ["b.md", "a.md"]}), ("a.md", "b.md")),
        (STRUCTURED, event(subject="a.md"), ("a.md",)),
        (STRUCTURED, event(subject="a.md", data={"changed": ["b.md"]}), ("b.md",)),
        (STRUCTURED, event(data={"other": 1}), None),
        (STRUCTURED, event(), None),
        (binary(), {"changed": ["a.md"]}, ("a.md",)),
        (binary(subject=quote("ü +.md")), {}, ("ü +.md",)),
        (binary(), None, None),
    ],
)
def test_events_in_both_modes(headers: Any, tree: Any, changed: Any) -> None:
    assert map_delivery(EVENTS, headers, tree) == Mapped(changed, event_id="e1")


@pytest.mark.parametrize("change", [{"source": "/other"}, {"type": "page.read"}])
def test_other_events_are_ignored(change: dict[str, str]) -> None:
    for headers, tree in ((STRUCTURED, event(**change)), (binary(**change), {})):
        mapped = map_delivery(EVENTS, headers, tree)
        assert mapped.status == "ignored"
        assert f"the event's {next(iter(change))} is '{next(iter(change.values()))}'" in (mapped.ignored or "")


@pytest.mark.parametrize(
    ("hook", "headers", "tree", "status", "reason"),
    [
        (SIGNED_EVENTS, binary(subject="a.md"), {}, 400, "which the signature does not cover"),
        (EVENTS, JSON, event(), 400, "Not a CloudEvent"),
        (EVENTS, STRUCTURED, event(specversion="0.3"), 422, "specversion"),
        (EVENTS, STRUCTURED, {"id": "e1"}, 422, "specversion: Field required"),
        (EVENTS, STRUCTURED, event(data=[1]), 422, "data"),
        (EVENTS, STRUCTURED, event(subject="../a.md"), 422, "has .. as a part"),
        (EVENTS, binary(subject="%2e%2e/a.md"), {}, 422, "has .. as a part"),
        (EVENTS, binary(subject="%ff"), {}, 422, "not percent-encoded UTF-8"),
        (EVENTS, {**JSON, "ce-id": "e1"}, {}, 422, "specversion: Field required"),
    ],
)
def test_events_of_another_form_are_refused(hook: Any, headers: Any, tree: Any, status: int, reason: str) -> None:
    refused = refuse(hook, headers, tree)
    assert refused.status == status
    assert reason in refused.reason


# ---------------------------------------------------------------------------------------------- any JSON


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from([GENERIC, PREFIXED, GITHUB, S3, EVENTS, SIGNED_EVENTS]),
    st.sampled_from([JSON, PUSH, STRUCTURED, binary()]),
    ANY_JSON
    | st.builds(lambda names: {"changed": names}, st.lists(st.text(max_size=12), max_size=4))
    | st.builds(lambda keys: notify(*keys), st.lists(st.text(max_size=12), max_size=4))
    | st.builds(lambda names: push(commit(names)), st.lists(st.text(max_size=12), max_size=4)),
)
def test_any_json_is_mapped_or_refused_and_what_is_mapped_can_be_a_document(hook: Any, headers: Any, tree: Any) -> None:
    try:
        mapped = map_delivery(hook, headers, tree)
    except Refused as refused:
        assert refused.status in (400, 422)  # noqa: PT017  either is right
        refused.reason.encode("ascii")
        return
    for path in mapped.changed or ():
        assert check_changed_path(path) is None
    assert bool(mapped.ignored) == (mapped.changed == ())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"NaN",
        b"[Infinity]",
        b"1e999",
        b"1" * 5000,
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'"\x00"',
        "{}".encode("utf-16"),
    ],
)
def test_what_is_no_json_is_refused_with_a_reason(body: bytes) -> None:
    with pytest.raises(Refused, match="The body") as caught:
        read_json(body)
    assert caught.value.status == 400


@settings(deadline=None)
@given(ANY_JSON)
def test_json_is_read_as_it_was_written(tree: Any) -> None:
    assert read_json(json.dumps(tree).encode()) == tree
