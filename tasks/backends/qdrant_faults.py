"""What the Qdrant client raises, in our errors: what is worth a retry, what needs smaller batches, what never works.

| the client raises                                               | means                | becomes             |
|-----------------------------------------------------------------|----------------------|---------------------|
| ResourceExhaustedResponse (429 with Retry-After)                 | wait as told         | StoreUnavailable    |
| ResponseHandlingException (reset, timeout, cut-off answer)       | may be applied       | StoreUnavailable    |
| 408, 425, 500, 502, 503, 504; UNAVAILABLE, DEADLINE_EXCEEDED ... | come back later      | StoreUnavailable    |
| 507, "No space left on device"                                   | disk or memory full  | StoreUnavailable    |
| 413, 400 "larger than allowed", message length limits            | too much at once     | BatchTooLarge, if   |
|                                                                 |                      | it can be split     |
| bare 429, RESOURCE_EXHAUSTED                                     | too fast or too much | BatchTooLarge, or   |
|                                                                 |                      | StoreUnavailable    |
| any other status; ValueError, KeyError of embedded Qdrant        | refused              | StoreRejected       |
"""

from __future__ import annotations

import json
import re
import sqlite3
from typing import TYPE_CHECKING

from tasks.errors import StoreError, StoreRejected, StoreUnavailable

if TYPE_CHECKING:
    import grpc  # type: ignore[import-untyped]
    from qdrant_client.http.exceptions import UnexpectedResponse

_TRANSIENT_STATUS = frozenset({408, 425, 500, 502, 503, 504})
_TRANSIENT_CODES = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "UNKNOWN", "CANCELLED"}
)
_FULL_DISK_PAUSE_S = 15.0  # somebody has to free space first, a quick retry only adds load
_FULL_DISK = re.compile(r"no space left", re.IGNORECASE)  # said with a 500 or INTERNAL, when the WAL can't grow

# "JSON payload (40000000 bytes) is larger than allowed (limit: 33554432 bytes)"; "decoded message length too large";
# "Sent message larger than max"; strict mode's "larger than rate limiter capacity, please try to split your request".
_TOO_LARGE = re.compile(r"larger than|length too large|too large|split your request", re.IGNORECASE)


class BatchTooLarge(StoreRejected):
    """Too many points or bytes in one request: send fewer. `is_throttled`: and not at once."""

    def __init__(self, message: str, *, is_throttled: bool = False) -> None:
        super().__init__(message)
        self.is_throttled = is_throttled


def client_errors() -> tuple[type[Exception], ...]:
    """All that the client lets out for a request that did not work, REST, gRPC or embedded."""
    import grpc
    from qdrant_client.common.client_exceptions import QdrantException
    from qdrant_client.http.exceptions import ApiException

    # Embedded Qdrant refuses with ValueError, and with KeyError where a server answers 404; sqlite3 is its disk.
    return (ApiException, QdrantException, grpc.RpcError, ValueError, KeyError, sqlite3.Error)


def to_store_error(error: Exception, *, action: str, place: str, can_split: bool = False) -> StoreError:
    """Our error for the client's. `action` and `place` start the message: "Qdrant at http://... could not upsert ...".

    can_split: the request can be sent in two halves; otherwise a throttled one waits and one too large is refused.
    """
    import grpc
    from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
    from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

    said = f"Qdrant {place} could not {action}"
    if isinstance(error, ResourceExhaustedResponse):
        seconds = float(error.retry_after_s)
        return StoreUnavailable(f"{said}: it is throttling and asks to wait {seconds:g} s.", retry_after_s=seconds)
    if isinstance(error, UnexpectedResponse):
        return _from_status(error, said, can_split)
    if isinstance(error, ResponseHandlingException):
        source = error.source
        return StoreUnavailable(f"{said}: no usable answer ({type(source).__name__}: {_shorten(str(source))}).")
    if isinstance(error, grpc.RpcError):
        return _from_rpc(error, said, can_split)
    if isinstance(error, (QdrantException, ApiException)):
        # A Retry-After that is a date, not seconds, ends here.
        return StoreUnavailable(f"{said}: {_shorten(str(error))}.")
    if isinstance(error, sqlite3.Error):
        return StoreError(
            f"{said}: its files can't be written or read ({error}). Check the disk's free space and permissions."
        )
    return StoreRejected(f"{said}: {_shorten(str(error))}.")


def _from_status(error: UnexpectedResponse, said: str, can_split: bool) -> StoreError:
    status, told = error.status_code, _read_reason(error)
    message = f"{said}: HTTP {status}: {told}."
    if status == 507 or (status == 500 and _FULL_DISK.search(told)):
        return _wait_for_space(message)
    if status in _TRANSIENT_STATUS:
        return StoreUnavailable(message)
    is_too_large = status == 413 or (status in (400, 429) and _TOO_LARGE.search(told) is not None)
    if can_split and (is_too_large or status == 429):
        return BatchTooLarge(message, is_throttled=not is_too_large)
    if status == 429 and not is_too_large:
        return StoreUnavailable(message)
    if status in (401, 403):
        return StoreRejected(f"{message} Set QDRANT_API_KEY to a key that may do this.")
    return StoreRejected(message)


def _from_rpc(error: grpc.RpcError, said: str, can_split: bool) -> StoreError:
    code_of, details_of = getattr(error, "code", None), getattr(error, "details", None)
    code = code_of().name if callable(code_of) else "UNKNOWN"
    told = _shorten(str(details_of() or "")) if callable(details_of) else _shorten(str(error))
    message = f"{said}: gRPC {code}: {told}."
    if _FULL_DISK.search(told):
        return _wait_for_space(message)
    is_too_large = _TOO_LARGE.search(told) is not None
    if can_split and (is_too_large or code == "RESOURCE_EXHAUSTED"):
        # With a retry-after the client raises ResourceExhaustedResponse instead.
        return BatchTooLarge(message, is_throttled=not is_too_large)
    if code in _TRANSIENT_CODES and not is_too_large:
        return StoreUnavailable(message)
    if code in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
        return StoreRejected(f"{message} Set QDRANT_API_KEY to a key that may do this.")
    return StoreRejected(message)


def _wait_for_space(message: str) -> StoreUnavailable:
    return StoreUnavailable(f"{message} Free disk space or memory on the server.", retry_after_s=_FULL_DISK_PAUSE_S)


def _read_reason(error: UnexpectedResponse) -> str:
    try:
        return _shorten(str(json.loads(error.content)["status"]["error"]))
    except (ValueError, KeyError, TypeError):  # a proxy's page, not Qdrant's JSON
        return _shorten(error.content.decode(errors="replace") or error.reason_phrase)


def _shorten(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]}..."
