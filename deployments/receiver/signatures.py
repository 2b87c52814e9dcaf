"""Who sent it: signatures over the body as it came, compared in constant time. Pure: the clock is a parameter."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from deployments.receiver.refused import Refused

# Standard Webhooks allows several signatures for a change of keys; a header full of them would only cost time.
MAX_SIGNATURES = 8
MAX_TIMESTAMP_DIGITS = 12


def sign_standard(key: bytes, delivery: str, timestamp: int, body: bytes) -> str:
    """Standard Webhooks: "v1," and the base64 of HMAC-SHA256 over `id.timestamp.body`."""
    content = b"%s.%d.%s" % (delivery.encode(), timestamp, body)
    return f"v1,{base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()}"


def sign_github(key: bytes, body: bytes) -> str:
    """GitHub's X-Hub-Signature-256: "sha256=" and the hex HMAC-SHA256 of the body."""
    return f"sha256={hmac.digest(key, body, hashlib.sha256).hex()}"


def is_equal(given: str, expected: str) -> bool:
    # Over bytes: compare_digest refuses text that is not ASCII, and a header may hold Latin-1.
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


def verify_standard(
    keys: Sequence[bytes], headers: Mapping[str, str], body: bytes, *, now: float, tolerance_s: float
) -> str:
    """The delivery's id, signed with one of the keys and within the replay window. Raises Refused 401."""
    delivery, timestamp, signatures = read_standard(headers)
    expected = [sign_standard(key, delivery, timestamp, body) for key in keys]
    if not any(is_equal(given, right) for given in signatures for right in expected):
        raise Refused(
            401,
            "webhook-signature does not fit. It is v1, and the base64 of HMAC-SHA256 over id.timestamp.body with the "
            "hook's secret; the body is signed as it is sent, byte for byte.",
        )
    check_age(timestamp, now=now, tolerance_s=tolerance_s)
    return delivery


def check_age(timestamp: int, *, now: float, tolerance_s: float) -> None:
    """Raises Refused 401 outside the replay window."""
    age_s = now - timestamp
    if abs(age_s) > tolerance_s:
        raise Refused(
            401,
            f"webhook-timestamp is {abs(age_s):.0f} s {'old' if age_s > 0 else 'in the future'}; the limit is "
            f"{tolerance_s:g} s. Sign again when you send again, and check both clocks.",
        )


def read_standard(headers: Mapping[str, str]) -> tuple[str, int, list[str]]:
    """Id, timestamp and signatures of the three headers. Raises Refused 401 where one is missing or not of the form."""
    delivery, timestamp, signature = (headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature"))
    if not (delivery and timestamp and signature):
        raise Refused(
            401,
            "Not signed: send webhook-id, webhook-timestamp and webhook-signature (Standard Webhooks), or what the hook's "
            "auth asks for.",
        )
    if not (timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= MAX_TIMESTAMP_DIGITS):
        raise Refused(401, "webhook-timestamp is not a time: send seconds since 1970, in digits.")
    # Leading zeros or not, it is signed as it is written.
    if str(int(timestamp)) != timestamp:
        raise Refused(401, "webhook-timestamp has leading zeros. Send seconds since 1970 without them.")
    signatures = [part for part in signature.split(" ") if part.startswith("v1,")]
    if not signatures or len(signatures) > MAX_SIGNATURES:
        raise Refused(
            401, f"webhook-signature has {len(signatures)} signatures that begin with v1,; send 1 to {MAX_SIGNATURES}."
        )
    return delivery, int(timestamp), signatures


def verify_github(keys: Sequence[bytes], headers: Mapping[str, str], body: bytes) -> None:
    """Raises Refused 401. GitHub signs no time: a body that was taken before is refused by the journal."""
    given = headers.get("x-hub-signature-256", "")
    if not given:
        raise Refused(401, "Not signed: X-Hub-Signature-256 is missing. Give the webhook a secret in its settings.")
    if not any(is_equal(given, sign_github(key, body)) for key in keys):
        raise Refused(401, "X-Hub-Signature-256 does not fit: the webhook's secret is not this hook's.")


def verify_bearer(keys: Sequence[bytes], headers: Mapping[str, str]) -> None:
    """Raises Refused 401."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Refused(401, "No token: send Authorization: Bearer and the hook's secret.")
    if not any(hmac.compare_digest(token.strip().encode("latin-1", "replace"), key) for key in keys):
        raise Refused(401, "The bearer token does not fit: it is not this hook's secret.")
