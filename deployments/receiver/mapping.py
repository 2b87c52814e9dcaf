"""From a delivery to the documents that it names, one function a kind. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote_plus

from deployments.receiver.bodies import (
    CloudEvent,
    EventData,
    GenericBody,
    GithubCommit,
    GithubPush,
    S3Body,
    parse_body,
)
from deployments.receiver.config import CloudEventsHook, GenericHook, GithubHook, Hook, S3Hook
from deployments.receiver.refused import Refused
from tasks.policy.changed_paths import check_changed_path, show_path

# A push event lists at most 2,048 commits and caps a commit's lists of files at 3,000 or more.
GITHUB_MAX_COMMITS = 2048
GITHUB_MAX_FILES = 3000
_STRUCTURED = "application/cloudevents+json"


@dataclass(frozen=True, slots=True)
class Mapped:
    """`changed`: doc ids, None for the whole source. `ignored`: why it starts nothing; then `changed` is empty."""

    changed: tuple[str, ...] | None
    ignored: str | None = None
    status: Literal["accepted", "ignored", "pong"] = "accepted"
    event_id: str | None = None  # that the sender gave in headers or body, beside the signature's


def map_delivery(hook: Hook, headers: Mapping[str, str], tree: Any) -> Mapped:
    """`tree`: the body's JSON. `headers`: by lower-case name. Raises Refused 400 or 422."""
    match hook:
        case GenericHook():
            return map_generic(hook, tree)
        case GithubHook():
            return map_github(hook, headers, tree)
        case S3Hook():
            return map_s3(hook, tree)
        case CloudEventsHook():
            return map_cloudevents(hook, headers, tree)


# ---------------------------------------------------------------------------------------------- generic


def map_generic(hook: GenericHook, tree: Any) -> Mapped:
    changed = parse_body(GenericBody, tree, 'a generic delivery, {"changed": ["guide/a.md"]} or {}').changed
    return Mapped(None) if changed is None else _select(changed, hook.prefix)


# ---------------------------------------------------------------------------------------------- GitHub


def map_github(hook: GithubHook, headers: Mapping[str, str], tree: Any) -> Mapped:
    """A push to the branch: what its commits added, modified and removed. The whole source where that can't be known."""
    event = headers.get("x-github-event", "")
    if event == "ping":
        return Mapped((), "a ping: nothing to do", "pong")
    if event != "push":
        name = ascii(event[:60])
        return _ignore(
            f"the event is {name}, not push" if event else "X-GitHub-Event is missing: not known to be a push"
        )
    push = parse_body(GithubPush, tree, "a push event of GitHub")
    if push.repository.full_name.lower() != hook.repository.lower():
        return _ignore(f"the repository is {show_path(push.repository.full_name)}, not {hook.repository}")
    if push.ref != f"refs/heads/{hook.branch}":
        return _ignore(f"the push is to {show_path(push.ref)}, not to refs/heads/{hook.branch}")
    if push.deleted:
        return _ignore("the branch was deleted, and with it nothing that is checked out")
    if push.forced or push.created or _is_cut(push):
        return Mapped(None)
    return _select(
        (name for commit in push.commits for names in _files(commit) for name in names or ()),
        hook.prefix,
        is_foreign=True,
    )


def _is_cut(push: GithubPush) -> bool:
    return (
        not push.commits
        or len(push.commits) >= GITHUB_MAX_COMMITS
        or (push.total_commits or 0) > len(push.commits)
        or any(names is None or len(names) >= GITHUB_MAX_FILES for commit in push.commits for names in _files(commit))
    )


def _files(commit: GithubCommit) -> tuple[list[str] | None, ...]:
    return commit.added, commit.modified, commit.removed


# ---------------------------------------------------------------------------------------------- S3

_CHANGES = re.compile(r"(s3:)?(ObjectCreated|ObjectRemoved|ObjectRestore:Completed|LifecycleExpiration)")


def map_s3(hook: S3Hook, tree: Any) -> Mapped:
    """The keys of objects that were created or removed. MinIO and S3 send them URL-encoded."""
    if isinstance(tree, dict) and tree.get("Event") == "s3:TestEvent":
        return Mapped((), "a test event: nothing to do", "pong")
    records = parse_body(S3Body, tree, "an S3 notification").Records
    keys = [
        _decode_key(record.s3.object.key)
        for record in records
        if record.s3.bucket.name == hook.bucket and _CHANGES.match(record.eventName)
    ]
    if not keys:
        return _ignore(f"no object of the bucket {hook.bucket} was created or removed")
    # A key that ends in / is a folder that some tool made up; no document.
    return _select((key for key in keys if not key.endswith("/")), hook.prefix, is_foreign=True)


def _decode_key(key: str) -> str:
    try:
        return unquote_plus(key, errors="strict")
    except UnicodeError:
        raise Refused(422, f"The key {show_path(key)} is not URL-encoded UTF-8. Rename the object.") from None


# ---------------------------------------------------------------------------------------------- CloudEvents


def map_cloudevents(hook: CloudEventsHook, headers: Mapping[str, str], tree: Any) -> Mapped:
    """Binary mode has the attributes in headers (ce-...), structured mode in the body.

    A signature covers the body only: where the hook is signed, attributes in headers could be anyone's.
    """
    if _media_type(headers) == _STRUCTURED:
        event = parse_body(CloudEvent, tree, "a CloudEvent in structured mode")
    elif "ce-id" in headers:
        if hook.auth == "hmac":
            raise Refused(
                400,
                "A CloudEvent in binary mode has its subject in headers, which the signature does not cover. Send structured "
                f"mode ({_STRUCTURED}), or set the hook's auth to bearer.",
            )
        data = parse_body(EventData, {} if tree is None else tree, "a CloudEvent's data")
        names = ("specversion", "id", "source", "type", "subject")
        attributes = {name: headers[f"ce-{name}"] for name in names if f"ce-{name}" in headers}
        if "subject" in attributes:
            attributes["subject"] = _decode_attribute(attributes["subject"])
        event = parse_body(CloudEvent, attributes, "a CloudEvent in binary mode").model_copy(update={"data": data})
    else:
        raise Refused(
            400,
            f"Not a CloudEvent: send Content-Type {_STRUCTURED}, or the attributes as headers (ce-id, ce-source, ...).",
        )
    mapped = _map_event(hook, event)
    return Mapped(mapped.changed, mapped.ignored, mapped.status, event_id=event.id)


def _map_event(hook: CloudEventsHook, event: CloudEvent) -> Mapped:
    if event.source != hook.source:
        return _ignore(f"the event's source is {show_path(event.source)}, not {hook.source}")
    if event.type not in hook.types:
        return _ignore(f"the event's type is {show_path(event.type)}, not {' or '.join(hook.types)}")
    if event.data is not None and event.data.changed is not None:
        return _select(event.data.changed, hook.prefix)
    return Mapped(None) if event.subject is None else _select([event.subject], hook.prefix)


def _decode_attribute(value: str) -> str:
    """Of a header in binary mode: percent-encoded, and + is a plus."""
    try:
        return unquote_plus(value.replace("+", "%2B"), errors="strict")
    except UnicodeError:
        raise Refused(
            422, "ce-subject is not percent-encoded UTF-8. Encode it as the CloudEvents HTTP binding says."
        ) from None


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


# ---------------------------------------------------------------------------------------------- names


def _ignore(reason: str) -> Mapped:
    return Mapped((), reason, "ignored")


def _select(names: Iterable[str], prefix: str, *, is_foreign: bool = False) -> Mapped:
    """Names below the prefix, without it. Raises Refused 422 for one that can't be a document of the source.

    `is_foreign`: repositories and buckets hold names that no source lists and no one meant badly (a backslash, "//").
    Refusing them would lose the delivery's other names: the whole source is looked at instead. What climbs is refused.
    """
    changed = []
    count = 0
    for name in names:
        count += 1
        # First as a whole: docs/../../x begins with the prefix, too.
        reason = check_changed_path(name)
        if reason is None and not name.startswith(prefix):
            continue
        if reason is not None:
            if is_foreign and not _is_hostile(name):
                return Mapped(None)
            raise Refused(422, f"The changed path {show_path(name)} {reason}.")
        changed.append(name.removeprefix(prefix))
    if not changed:
        return _ignore(f"none of its {count} names is below {prefix}" if count else "it names nothing")
    return Mapped(tuple(sorted(set(changed))))


def _is_hostile(name: str) -> bool:
    return name.startswith("/") or "\0" in name or "://" in name or ".." in re.split(r"[/\\]", name)
