"""The receiver against its own description: schemathesis makes requests of it, well and badly formed; each is signed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from deployments.receiver.signatures import sign_github, sign_standard
from tests.deployments.receiver.processes import SECRET

KINDS: dict[str, dict[str, Any]] = {
    "generic": {"kind": "generic"},
    "token": {"kind": "generic", "auth": "bearer", "prefix": "docs"},
    "github": {"kind": "github", "repository": "example/docs"},
    "bucket": {"kind": "s3", "bucket": "documents"},
    "events": {"kind": "cloudevents", "auth": "bearer", "source": "/wiki", "types": ["changed"]},
    "signed-events": {"kind": "cloudevents", "source": "/wiki", "types": ["changed"]},
}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
    missing_required_header,
    negative_data_rejection,
]


class Sign(requests.auth.AuthBase):
    """As the hook asks for, over whatever body and id the request has."""

    def __init__(self, hook: str, mode: schemathesis.GenerationMode) -> None:
        self._hook = KINDS.get(hook, {})
        self._mode = mode

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        body = request.body or b""
        body = body.encode() if isinstance(body, str) else body
        if self._hook.get("auth") == "bearer" or self._hook.get("kind") == "s3":
            request.headers["Authorization"] = f"Bearer {SECRET}"
        elif self._hook.get("kind") == "github" and request.method == "POST":
            request.headers["X-Hub-Signature-256"] = sign_github(SECRET.encode(), body)
            if self._mode.is_positive:  # of other events the body is not looked at
                request.headers["X-GitHub-Event"] = "push"
        else:
            name = request.headers.get("webhook-id", "")
            name = name.decode("latin-1") if isinstance(name, bytes) else name
            now = int(time.time())
            request.headers["webhook-timestamp"] = str(now)
            request.headers["webhook-signature"] = sign_standard(SECRET.encode(), name, now, body)
        return request


@pytest.fixture(scope="module")
def api(
    prefect_server: Any, tmp_path_factory: pytest.TempPathFactory, start_module_receiver: Callable[..., Any]
) -> Any:
    deployment = prefect_server.deploy("fuzzed")
    hooks = {name: {"deployment": deployment, "secret": "SECRET", **hook} for name, hook in KINDS.items()}
    receiver = start_module_receiver(prefect_server.url, hooks, quiet_s=2.0, max_body_bytes=65536)
    document = httpx.get(f"{receiver.url}/openapi.json").json()
    for operation in (operation for path in document["paths"].values() for operation in path.values()):
        # What Sign adds is not to be made up; what is refused without it is tested by hand.
        operation.pop("security", None)
        operation["parameters"] = [p for p in operation.get("parameters", []) if p["name"] != "webhook-timestamp"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=receiver.url)
    schema.location = f"{receiver.url}/openapi.json"
    return schema


ROUTES = [
    *(("POST", f"/hooks/{name}") for name in KINDS),
    *(("GET", f"/hooks/{name}/deliveries/{{delivery}}") for name in ("generic", "token", "github")),
    ("GET", "/healthz"),
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_answers_are_as_described(api: Any, method: str, path: str, mode: schemathesis.GenerationMode) -> None:
    if mode.is_negative and path in ("/healthz", "/hooks/token/deliveries/{delivery}"):
        pytest.skip("it takes nothing that could be wrong")
    operation = api[path][method]
    hook = path.split("/")[2] if path.startswith("/hooks/") else ""
    left_out = {
        # An event of GitHub's that is not a push is accepted whatever its body is, and ignored.
        "github": [negative_data_rejection],
        # Attributes are in headers or in the body, by the body's media type: OpenAPI has no words for it.
        "events": [negative_data_rejection],
    }
    checks = [check for check in CHECKS if check not in left_out.get(hook, [])]

    @given(case=operation.as_strategy(generation_mode=mode))
    # Without shrinking: schemathesis says how to make the request again, and a failure may cost no minutes.
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(auth=Sign(hook, mode), checks=checks)

    check()


def test_the_description_is_one_of_openapi_and_names_every_hook(api: Any) -> None:
    document = httpx.get(api.location).json()
    assert document["openapi"].startswith("3.")
    for name in KINDS:
        operation = document["paths"][f"/hooks/{name}"]["post"]
        assert {"202", "400", "401", "409", "413", "415", "422"} <= set(operation["responses"])
        assert operation["security"]
