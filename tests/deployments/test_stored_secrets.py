"""A secret in a deployment's parameters is refused before it is stored: by set-up, by the server's schema, by the flow."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, validate

from flows.setup_files import PREFECT_FILE, find_variables, read_deployments
from tasks.errors import ConfigError

PREFECT = yaml.safe_load(PREFECT_FILE.read_text())
SITE = dict.fromkeys(find_variables(PREFECT["deployments"]), "x")


@pytest.mark.parametrize(
    "literal",
    ["ftp://ballast:hunter2@host/x", "https://host/x?sig=hunter2", "ftp://ballast:{{ $BALLAST_SPOOL }}@host/x"],
)
def test_a_secret_that_stands_in_the_file_is_refused_and_not_repeated(tmp_path: Path, literal: str) -> None:
    file = copy.deepcopy(PREFECT)
    file["deployments"][0]["parameters"]["settings"]["source"]["uri"] = literal
    path = tmp_path / "prefect.yaml"
    path.write_text(yaml.safe_dump(file))
    with pytest.raises(ConfigError, match=r"deployments\[0\]\.parameters\.settings\.source\.uri") as refused:
        read_deployments(path, SITE)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("source", {"uri": "ftp://ballast:hunter2@host/x"}),
        ("spool", "sftp://ballast:hunter2@host/x"),
        ("qdrant", {"url": "https://ballast:hunter2@host"}),
        ("qdrant", {"url": "ballast:hunter2@host:6333"}),
    ],
)
def test_the_server_refuses_a_run_with_a_password(knob: str, value: Any) -> None:
    """By the deployment's parameter schema: such a run is never stored."""
    flow: Any = load_flow_from_entrypoint("flows.ingest.ingest", use_placeholder_flow=False)
    schema = parameter_schema(flow.fn).model_dump()
    parameters = copy.deepcopy(PREFECT["deployments"][0]["parameters"])
    validate(parameters, schema, raise_on_error=True)
    parameters["settings"][knob] = value
    with pytest.raises(ValidationError, match="does not match"):
        validate(parameters, schema, raise_on_error=True)
    with pytest.raises(ConfigError) as refused:  # a deployment that does not enforce its schema
        flow.validate_parameters(parameters)
    assert "hunter2" not in str(refused.value)
