"""The OpenAPI description of one hook: what it takes, by its kind and auth, and all that it may answer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from deployments.receiver.answers import Answer, Refusal
from deployments.receiver.bodies import CloudEvent, EventData, GenericBody, GithubPush, S3Body
from deployments.receiver.config import CloudEventsHook, GithubHook, Hook, S3Hook
from deployments.receiver.read_delivery import DELIVERY_ID

_REFUSALS = {
    400: "Not JSON, or no usable delivery id.",
    401: "No signature or token, a wrong one, or a timestamp outside the replay window.",
    404: "No such hook, or no such delivery.",
    408: "The body did not arrive in time.",
    409: "A replay: the delivery id came with another body, or a GitHub body with another id.",
    413: "The body is too large.",
    415: "Not JSON by its Content-Type.",
    422: "JSON of another form, or a name that can't be a document of the source.",
    503: "The journal can't be written, or more comes than can be taken: send it again later.",
}
_ID = {"type": "string", "pattern": f"^{DELIVERY_ID}$"}
_TIMESTAMP = {"type": "string", "pattern": "^(0|[1-9][0-9]{0,11})$"}


def describe_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": _REFUSALS[status], "model": Refusal} for status in statuses}


def describe_accepted(hook: Hook) -> dict[int | str, dict[str, Any]]:
    location = {"Location": {"description": "Where to ask for the delivery again.", "schema": {"type": "string"}}}
    responses: dict[int | str, dict[str, Any]] = {
        202: {"description": "It is written down and will be ingested, or ignored with a reason.", "headers": location}
    }
    if isinstance(hook, GithubHook | S3Hook):
        responses[200] = {"description": "A test of the sender's (ping): answered, and nothing else.", "model": Answer}
    return responses


def describe_hook(name: str, hook: Hook) -> dict[str, Any]:
    """Parameters, body and security of POST /hooks/NAME."""
    parameters, bodies = _describe_body(hook)
    return {
        "parameters": [*describe_auth_headers(hook), *parameters],
        "requestBody": {
            "required": True,
            "content": {media_type: {"schema": _to_schema(model)} for media_type, model in bodies.items()},
        },
        "security": [{describe_scheme(hook)[0]: []}],
        "summary": f"A delivery to {name} ({hook.kind}, {hook.auth})",
    }


def describe_scheme(hook: Hook) -> tuple[str, dict[str, Any]]:
    """Name and definition of the hook's security scheme."""
    if hook.auth == "bearer":
        return "bearer", {"type": "http", "scheme": "bearer"}
    if isinstance(hook, GithubHook):
        text = "GitHub: sha256= and the hex HMAC-SHA256 of the body."
        return "github", {"type": "apiKey", "in": "header", "name": "X-Hub-Signature-256", "description": text}
    text = "Standard Webhooks: v1, and the base64 HMAC-SHA256 of id.timestamp.body; several, parted by spaces, are allowed."
    return "standard_webhooks", {"type": "apiKey", "in": "header", "name": "webhook-signature", "description": text}


def describe_auth_headers(hook: Hook) -> list[dict[str, Any]]:
    if hook.auth == "bearer":
        optional = not isinstance(hook, CloudEventsHook)
        return [_header("webhook-id", _ID, "The delivery's id.", required=False)] if optional else []
    if isinstance(hook, GithubHook):
        return []
    return describe_standard_headers()


def describe_standard_headers() -> list[dict[str, Any]]:
    return [
        _header("webhook-id", _ID, "The delivery's id: the same for each try to send it."),
        _header("webhook-timestamp", _TIMESTAMP, "When it was sent, in seconds since 1970."),
    ]


def _describe_body(hook: Hook) -> tuple[list[dict[str, Any]], dict[str, type[BaseModel]]]:
    match hook:
        case GithubHook():
            event = {"type": "string", "minLength": 1}
            headers = [
                _header("X-GitHub-Event", event, "push has this body; ping gets 200, others are ignored."),
                _header("X-GitHub-Delivery", _ID, "The delivery's id."),
            ]
            return headers, {"application/json": GithubPush}
        case S3Hook():
            return [], {"application/json": S3Body}
        case CloudEventsHook():
            if hook.auth == "hmac":
                return [], {"application/cloudevents+json": CloudEvent}
            text = {"type": "string", "minLength": 1}
            names = ("ce-specversion", "ce-id", "ce-source", "ce-type", "ce-subject")
            headers = [_header(name, text, "Binary mode, with application/json.", required=False) for name in names]
            return headers, {"application/cloudevents+json": CloudEvent, "application/json": EventData}
        case _:
            return [], {"application/json": GenericBody}


def _header(name: str, schema: dict[str, Any], description: str, *, required: bool = True) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": required, "schema": schema, "description": description}


def _to_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Without references, which would have to be moved into the document's components."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolve(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {key: resolve(value) for key, value in node.items()}
        return [resolve(item) for item in node] if isinstance(node, list) else node

    resolved = resolve(schema)
    assert isinstance(resolved, dict)
    return resolved
