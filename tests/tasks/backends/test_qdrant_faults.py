"""What the Qdrant client raises, REST and gRPC, and what becomes of it."""

from __future__ import annotations

import grpc
import httpx
import pytest
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

from tasks.backends.qdrant_faults import BatchTooLarge, to_store_error
from tasks.errors import StoreError, StoreRejected, StoreUnavailable


class Rpc(grpc.RpcError):
    """What a gRPC call raises: the error is the call itself."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def __repr__(self) -> str:
        return f"{self._code.name} {self._details}"


def unexpected(status: int, said: str = "") -> UnexpectedResponse:
    return UnexpectedResponse(status, "Reason", said.encode(), httpx.Headers())


def name_of(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    shown = f"{value.status_code} {value.content!r}" if isinstance(value, UnexpectedResponse) else repr(value)
    return shown[:50]


Code = grpc.StatusCode
AGAIN, SPLIT, NEVER = StoreUnavailable, BatchTooLarge, StoreRejected
TRANSIENT = (408, 425, 500, 502, 503, 504, 507)
REFUSED = (400, 401, 403, 404, 405, 409, 415, 422, 501)
TRANSIENT_CODES = (
    Code.UNAVAILABLE,
    Code.DEADLINE_EXCEEDED,
    Code.ABORTED,
    Code.INTERNAL,
    Code.UNKNOWN,
    Code.CANCELLED,
)
REFUSED_CODES = (
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.UNAUTHENTICATED,
    Code.PERMISSION_DENIED,
    Code.FAILED_PRECONDITION,
    Code.UNIMPLEMENTED,
    Code.OUT_OF_RANGE,
    Code.DATA_LOSS,
)
CAPACITY = "Write request is larger than rate limiter capacity, please try to split your request"


@pytest.mark.parametrize(
    ("error", "whole", "split"),
    [
        (ResourceExhaustedResponse("slow down", 4), AGAIN, AGAIN),
        (QdrantException("Retry-After header value is not a valid integer: soon"), AGAIN, AGAIN),
        (ResponseHandlingException(httpx.ReadTimeout("timed out")), AGAIN, AGAIN),
        (ResponseHandlingException(httpx.ConnectError("refused")), AGAIN, AGAIN),
        (ResponseHandlingException(httpx.RemoteProtocolError("peer closed the connection")), AGAIN, AGAIN),
        *((unexpected(status), AGAIN, AGAIN) for status in TRANSIENT),
        *((unexpected(status), NEVER, NEVER) for status in REFUSED),
        (unexpected(500, '{"status": {"error": "No space left on device"}}'), AGAIN, AGAIN),
        (unexpected(429), AGAIN, SPLIT),
        (unexpected(429, CAPACITY), NEVER, SPLIT),
        (unexpected(413), NEVER, SPLIT),
        (unexpected(400, "JSON payload (9 bytes) is larger than allowed (limit: 3)"), NEVER, SPLIT),
        *((Rpc(code, "said"), AGAIN, AGAIN) for code in TRANSIENT_CODES),
        *((Rpc(code, "said"), NEVER, NEVER) for code in REFUSED_CODES),
        (Rpc(Code.RESOURCE_EXHAUSTED, "rate limit"), AGAIN, SPLIT),
        (Rpc(Code.RESOURCE_EXHAUSTED, "Sent message larger than max"), NEVER, SPLIT),
        (Rpc(Code.RESOURCE_EXHAUSTED, CAPACITY), NEVER, SPLIT),
        (Rpc(Code.OUT_OF_RANGE, "decoded message length too large"), NEVER, SPLIT),
        (Rpc(Code.INTERNAL, "No space left on device: WAL buffer size exceeds"), AGAIN, AGAIN),
        (grpc.RpcError("without a status"), AGAIN, AGAIN),
        (ValueError("Collection x not found"), NEVER, NEVER),
        (KeyError("id"), NEVER, NEVER),
    ],
    ids=name_of,
)
def test_what_the_client_raises(error: Exception, whole: type[StoreError], split: type[StoreError]) -> None:
    assert type(to_store_error(error, action="upsert", place="at x")) is whole
    assert type(to_store_error(error, action="upsert", place="at x", can_split=True)) is split


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (ResourceExhaustedResponse("slow down", 4), 4.0),
        (unexpected(507), 15.0),
        (unexpected(500, "No space left on device"), 15.0),
        (Rpc(Code.INTERNAL, "No space left on device: WAL buffer size exceeds"), 15.0),
        (unexpected(503), None),
        (unexpected(429), None),
        (Rpc(Code.UNAVAILABLE), None),
        (Rpc(Code.RESOURCE_EXHAUSTED), None),
    ],
    ids=name_of,
)
def test_waits_that_are_told(error: Exception, seconds: float | None) -> None:
    mapped = to_store_error(error, action="upsert", place="at x")
    assert isinstance(mapped, StoreUnavailable)
    assert mapped.retry_after_s == seconds


@pytest.mark.parametrize(
    ("error", "is_throttled"),
    [
        (unexpected(429), True),
        (unexpected(429, CAPACITY), False),
        (unexpected(413), False),
        (Rpc(Code.RESOURCE_EXHAUSTED, "rate limit"), True),
        (Rpc(Code.RESOURCE_EXHAUSTED, "Received message larger than max"), False),
    ],
    ids=name_of,
)
def test_a_batch_is_too_much_at_once_or_too_soon(error: Exception, is_throttled: bool) -> None:
    mapped = to_store_error(error, action="upsert", place="at x", can_split=True)
    assert isinstance(mapped, BatchTooLarge)
    assert mapped.is_throttled == is_throttled


@pytest.mark.parametrize("error", [unexpected(401, "no"), unexpected(403, "no"), Rpc(Code.UNAUTHENTICATED, "no")])
def test_a_refused_key_names_the_variable(error: Exception) -> None:
    assert "QDRANT_API_KEY" in str(to_store_error(error, action="upsert", place="at x"))


def test_a_long_answer_is_cut() -> None:
    page = unexpected(502, "<html>" + "x" * 10_000)
    assert len(str(to_store_error(page, action="upsert", place="at x"))) < 400
