"""What senders send, as far as it is read: also the schemas of the OpenAPI description."""

from __future__ import annotations

import json
import math
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.receiver.refused import Refused


class Body(BaseModel):
    """Strict, so that "1" is no list and 1 no name; what a sender adds is passed over unless a kind forbids it."""

    model_config = ConfigDict(strict=True, frozen=True)


class GenericBody(Body):
    """Which documents have changed or are gone; without `changed` the whole source is looked at."""

    # A misspelt name would quietly run over the whole source.
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    changed: list[str] | None = Field(None, description="Names below the source's root, after the hook's prefix.")


class GithubRepository(Body):
    full_name: str = Field(description="owner/name")


class GithubCommit(Body):
    added: list[str] | None = None
    modified: list[str] | None = None
    removed: list[str] | None = None


class GithubPush(Body):
    """GitHub's push event; only what is read of it."""

    ref: str = Field(description="refs/heads/BRANCH")
    repository: GithubRepository
    forced: bool = False
    created: bool = False
    deleted: bool = False
    commits: list[GithubCommit] = Field(default_factory=list)
    total_commits: int | None = Field(None, description="Gitea and Forgejo say how many there are.")


class S3Bucket(Body):
    name: str


class S3Object(Body):
    key: str = Field(description="URL-encoded, a space as +")


class S3Entity(Body):
    bucket: S3Bucket
    object: S3Object


class S3Record(Body):
    eventName: str = Field(description="ObjectCreated:Put, s3:ObjectRemoved:Delete, ...")  # noqa: N815  as it is sent
    s3: S3Entity


class S3Body(Body):
    """Object notifications of S3, MinIO and their like."""

    Records: list[S3Record]


class EventData(Body):
    changed: list[str] | None = Field(None, description="Names below the source's root, after the hook's prefix.")


class CloudEvent(Body):
    """A CloudEvents 1.0 event in structured mode; `data.changed` or else `subject` names what has changed."""

    specversion: Literal["1.0"]
    id: str = Field(min_length=1)
    source: str = Field(min_length=1)
    type: str = Field(min_length=1)
    subject: str | None = None
    data: EventData | None = None


B = TypeVar("B", bound=Body)


def read_json(body: bytes) -> Any:
    """Raises Refused 400: not JSON as RFC 8259 has it, or not in UTF-8."""
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_read_float)
    except UnicodeDecodeError as error:
        raise Refused(
            400, f"The body is not UTF-8: {error.reason} at byte {error.start}. Send JSON in UTF-8."
        ) from None
    except RecursionError:
        raise Refused(400, "The body's JSON is nested too deep. Send it flatter.") from None
    except ValueError as error:  # JSONDecodeError; a number with too many digits
        raise Refused(400, f"The body is not JSON: {_to_line(str(error))}.") from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _read_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is too large")
    return number


def parse_body(model: type[B], tree: Any, what: str) -> B:
    """Raises Refused 422 that names the first field which is not as it should be."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        path = _to_line(".".join(str(part) for part in first["loc"])) or "the body"
        raise Refused(422, f"Not {what}: {path}: {_to_line(first['msg'])}.") from None


def _to_line(text: str) -> str:
    """For an answer: ASCII (a lone surrogate has no UTF-8), one line, short."""
    return ascii(text)[1:-1][:200]
