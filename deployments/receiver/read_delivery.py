"""From a request to a Delivery: size, signature, JSON, names, in this order; nothing of an unsigned body is looked at."""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from deployments.receiver.bodies import read_json
from deployments.receiver.config import CloudEventsHook, GenericHook, GithubHook, Hook, ReceiverSettings, S3Hook
from deployments.receiver.journal import Delivery, unite
from deployments.receiver.mapping import map_delivery
from deployments.receiver.refused import Refused
from deployments.receiver.signatures import (
    check_age,
    read_standard,
    verify_bearer,
    verify_github,
    verify_standard,
)
from tasks.policy.changed_paths import show_path

# What an id may be to stand in an address and a log line; all that senders of note make fit.
DELIVERY_ID = r"[A-Za-z0-9][A-Za-z0-9._:~-]{0,127}"


class HeldBytes:
    """How much of all bodies is in memory. For one event loop: no lock."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    @contextmanager
    def open(self) -> Iterator[Hold]:
        """One body's share, given back at the end."""
        hold = Hold(self)
        try:
            yield hold
        finally:
            self._held -= hold.size

    def take(self, size: int) -> None:
        """Raises Refused 503 where it would be too much."""
        if self._held + size > self._max_bytes:
            raise Refused(
                503,
                f"Deliveries that are not answered yet hold {self._held:,} bytes; the limit is {self._max_bytes:,} bytes. Send "
                "it again later; the operator can raise max_held_bytes.",
            )
        self._held += size


class Hold:
    def __init__(self, held: HeldBytes) -> None:
        self.size = 0
        self._held = held

    def grow_to(self, size: int) -> None:
        """Raises Refused 503."""
        if size > self.size:
            self._held.take(size - self.size)
            self.size = size


async def read_body(
    headers: Mapping[str, str], chunks: AsyncIterator[bytes], hold: Hold, *, max_bytes: int, timeout_s: float
) -> bytes:
    """Raises Refused: 413 as soon as it is too long, announced or not; 408 where it does not come; 400 for a bad length.

    503 where `hold` has no room for what comes; what is only announced, by whom nobody knows yet, takes none.
    """
    announced = headers.get("content-length")
    if announced is not None:
        if not (announced.isascii() and announced.isdigit()):
            raise Refused(400, "Content-Length is not a number. Send the body's length in bytes.")
        if len(announced) > 15 or int(announced) > max_bytes:
            raise _too_large(f"{announced[:15]} bytes", max_bytes)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in chunks:
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large("longer", max_bytes)
                hold.grow_to(size)
                parts.append(chunk)
    except TimeoutError:
        raise Refused(408, f"The body took more than {timeout_s:g} s to arrive. Send it again.") from None
    return b"".join(parts)


def _too_large(size: str, max_bytes: int) -> Refused:
    return Refused(
        413,
        f"The body is {size}; the limit is {max_bytes:,} bytes. Name fewer documents a delivery, or send {{}} for the whole "
        "source; the operator can raise max_body_bytes.",
    )


def check_before_body(
    hook: Hook, keys: Sequence[bytes], headers: Mapping[str, str], *, now: float, tolerance_s: float
) -> None:
    """What can be refused without the body. Pure.

    No or a wrong token, no signature, a time outside the replay window (401), an id that can't be used (400), no JSON (415).
    """
    if hook.auth == "bearer":
        verify_bearer(keys, headers)
    elif isinstance(hook, GithubHook):
        if not headers.get("x-hub-signature-256"):
            verify_github(keys, headers, b"")
    else:
        delivery_id, timestamp, _ = read_standard(headers)
        check_age(timestamp, now=now, tolerance_s=tolerance_s)
        _check_id(delivery_id)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        raise Refused(
            415, f"Content-Type is {show_path(media_type)}. Send application/json (GitHub: the webhook's content type)."
        )


def to_delivery(
    name: str,
    hook: Hook,
    keys: Sequence[bytes],
    headers: Mapping[str, str],
    body: bytes,
    settings: ReceiverSettings,
    now: float,
) -> Delivery:
    """Raises Refused 401 for the signature, 400 and 422 for the body. Pure."""
    signed_id: str | None = None
    if hook.auth == "hmac":
        if isinstance(hook, GithubHook):
            verify_github(keys, headers, body)
        else:
            signed_id = verify_standard(keys, headers, body, now=now, tolerance_s=settings.tolerance_s)
    digest = hashlib.sha256(body).hexdigest()
    mapped = map_delivery(hook, headers, _read_tree(hook, headers, body))
    delivery_id = signed_id or _find_id(hook, headers, mapped.event_id, digest)
    _check_id(delivery_id)
    # Not kept where its burst would not: 16 deliveries of 4 MiB, all of it short names, took 1 GB (measured).
    changed = unite([mapped.changed], settings.max_paths, settings.max_paths_bytes)
    return Delivery(
        name,
        delivery_id,
        digest,
        mapped.status,
        mapped.ignored,
        None if changed is None else tuple(changed),
        # GitHub's delivery id is not signed, its body is; a body says which push it is.
        is_body_unique=isinstance(hook, GithubHook) and mapped.status == "accepted",
    )


def _check_id(delivery_id: str) -> None:
    if re.fullmatch(DELIVERY_ID, delivery_id) is None:
        raise Refused(
            400,
            f"The delivery id {show_path(delivery_id)} can't be used: send 1 to 128 letters, digits and . _ : ~ - that begin "
            "with a letter or a digit.",
        )


def _read_tree(hook: Hook, headers: Mapping[str, str], body: bytes) -> Any:
    # An event in binary mode may have no data.
    return None if not body and isinstance(hook, CloudEventsHook) and "ce-id" in headers else read_json(body)


def _find_id(hook: Hook, headers: Mapping[str, str], event_id: str | None, digest: str) -> str:
    """The id where no signature covers one."""
    match hook:
        case GithubHook():
            delivery_id = headers.get("x-github-delivery", "")
            if not delivery_id:
                raise Refused(400, "X-GitHub-Delivery is missing: it is what makes a delivery known again.")
            return delivery_id
        case CloudEventsHook():
            # An event's id may be any text.
            given = event_id or digest
            return (
                given
                if re.fullmatch(DELIVERY_ID, given)
                else f"event-{hashlib.sha256(given.encode()).hexdigest()[:32]}"
            )
        case S3Hook():
            # MinIO gives none; its records hold a sequencer and the time, so that only a repetition has the same body.
            return headers.get("webhook-id", digest[:32])
        case GenericHook():
            # Without an id each is a new one: {} from cron every night is meant each time.
            return headers.get("webhook-id", str(uuid.uuid4()))
