"""deployments/*.yaml against what they name: Prefect's models, the flows, their parameters, the pools, the environment."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig
from prefect.events.schemas.automations import AutomationCore
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.flows import load_flow_from_entrypoint
from prefect.settings import Settings
from prefect.settings.legacy import _get_settings_fields
from prefect.utilities.callables import parameter_schema

from flows.setup_automations import to_automation
from flows.setup_blocks import NOTIFY_BLOCK
from flows.setup_files import (
    AUTOMATIONS_FILE,
    POOLS_FILE,
    PREFECT_FILE,
    check_pools,
    find_variables,
    read_automations,
    read_deployments,
    read_pools,
)
from tasks.config import IngestSettings, PoolSettings
from tasks.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PREFECT = yaml.safe_load(PREFECT_FILE.read_text())
DEPLOYMENTS: list[dict[str, Any]] = PREFECT["deployments"]
SITE = dict.fromkeys(find_variables(DEPLOYMENTS), "x")
# Read by libraries that a worker's process loads, each with its documentation as the reason.
LIBRARIES = {
    "CUDA_VISIBLE_DEVICES",
    "DO_NOT_TRACK",
    "HF_HUB_DISABLE_TELEMETRY",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
}


def fill(value: Any) -> Any:
    """A deployment's values as a site's environment makes them."""
    match value:
        case str():
            return re.sub(r"\{\{\s*\$\w+\s*\}\}", "x", value)
        case dict():
            return {key: fill(entry) for key, entry in value.items()}
        case list():
            return [fill(entry) for entry in value]
    return value


def flow_of(deployment: dict[str, Any]) -> Flow[Any, Any]:
    return load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)


def test_prefects_own_schema_takes_the_file() -> None:
    jsonschema.validate(PREFECT, PrefectYamlModel.model_json_schema())
    PrefectYamlModel.model_validate(PREFECT)


def test_no_key_is_misspelt() -> None:
    """Prefect's models ignore what they don't know."""
    assert set(PREFECT) - {"definitions", "prefect-version"} <= set(PrefectYamlModel.model_fields)
    for deployment in DEPLOYMENTS:
        assert set(deployment) <= set(DeploymentConfig.model_fields), deployment["name"]
        assert set(deployment["work_pool"]) <= {"name", "work_queue_name", "job_variables"}
        for schedule in deployment.get("schedules", []):
            RawScheduleConfig.model_validate(schedule)
            assert schedule["slug"], "a schedule without one loses an operator's pause when it is deployed anew"
        for trigger in deployment.get("triggers", []):
            assert set(trigger) <= set(DeploymentEventTrigger.model_fields)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda entry: f"{entry['entrypoint']}/{entry['name']}")
def test_entry_point_and_parameters_fit(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    parameters = fill(deployment.get("parameters", {}))
    schema = parameter_schema(flow).model_dump_for_openapi()
    required = set(schema.get("required", [])) - set(parameters)
    assert required == set() or deployment["entrypoint"] == "flows.embed.embed_partitions", "the coordinator gives them"
    if required == set():
        flow.validate_parameters(parameters)
        settings = IngestSettings.model_validate(parameters["settings"])
        assert settings.pools.enabled
        assert settings.embedding.model == "BAAI/bge-m3"
        assert settings.source.name == settings.qdrant.collection == deployment["name"]
    for trigger in deployment.get("triggers", []):
        assert set(trigger["parameters"]) <= set(schema["properties"])
        assert trigger["match"]["prefect.resource.id"] == f"ballast.source.{deployment['name']}"


def test_what_the_coordinator_starts_is_deployed() -> None:
    names = {f"{flow_of(entry).name}/{entry['name']}": entry["work_pool"]["name"] for entry in DEPLOYMENTS}
    pools = PoolSettings()
    assert names[pools.gpu_deployment] == "gpu-pool"
    assert names[pools.cpu_deployment] == "cpu-pool"
    limits = {pool.name: pool.concurrency_limit or 0 for pool in read_pools(POOLS_FILE)}
    assert limits["gpu-pool"] >= pools.gpu_runs
    assert limits["cpu-pool"] >= pools.cpu_runs


def test_each_pool_and_queue_is_in_the_pools_file() -> None:
    deployments = read_deployments(PREFECT_FILE, SITE)
    pools = read_pools(POOLS_FILE)
    check_pools(deployments, pools, PREFECT_FILE, POOLS_FILE)
    queues = {queue.name: queue.concurrency_limit for pool in pools for queue in pool.queues}
    for deployment in deployments:
        if deployment.queue:
            assert queues[deployment.queue] == 1, "runs of one collection would overlap"


def test_no_deployment_has_a_lease() -> None:
    """A deployment's concurrency_limit ends its run when a server with the default lease storage restarts."""
    assert not any("concurrency_limit" in deployment for deployment in DEPLOYMENTS)


def test_each_name_in_a_jobs_environment_exists() -> None:
    settings = {name for field in _get_settings_fields(Settings).values() for name in (field.name,)}
    code = read_by_code()
    for deployment in DEPLOYMENTS:
        for name, value in deployment["work_pool"]["job_variables"]["env"].items():
            assert name in LIBRARIES | settings | code, name
            assert isinstance(value, str), f"{name}: YAML made {value!r} of it"


def read_by_code() -> set[str]:
    """Every text in the code that looks like the name of an environment variable."""
    names: set[str] = set()
    for folder in ("flows", "tasks", "deployments"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
            names |= {text for text in texts if isinstance(text, str) and re.fullmatch(r"[A-Z][A-Z0-9_]+", text)}
    return names


def test_the_second_collection_of_the_comment_works(tmp_path: Path) -> None:
    """What a user uncomments."""
    text = PREFECT_FILE.read_text()
    commented = re.search(r"  # A second collection:\n  #\n((?:  #   ?.*\n|  # - .*\n)+)", text)
    assert commented is not None
    entry = re.sub(r"(?m)^  # ", "  ", commented[1])
    path = tmp_path / "prefect.yaml"
    path.write_text(text.replace(commented[0], entry))
    second = next(entry for entry in yaml.safe_load(path.read_text())["deployments"] if entry["name"] == "handbook")
    assert second["entrypoint"] == "flows.ingest.ingest"
    assert second["schedules"] == DEPLOYMENTS[0]["schedules"]
    flow_of(second).validate_parameters(fill(second["parameters"]))
    assert len(entry.splitlines()) <= 10
    with pytest.raises(ConfigError, match="the work queue handbook of ingest-pool"):
        check_pools(read_deployments(path, SITE), read_pools(POOLS_FILE), path, POOLS_FILE)


def test_an_unset_variable_is_refused_and_named() -> None:
    for missing in SITE:
        with pytest.raises(ConfigError, match=f"takes {missing} from the environment"):
            read_deployments(PREFECT_FILE, {name: value for name, value in SITE.items() if name != missing})


@pytest.mark.parametrize("definition", read_automations(AUTOMATIONS_FILE), ids=lambda entry: str(entry["name"]))
def test_prefects_schema_takes_the_automation(definition: dict[str, Any]) -> None:
    block_id = "00000000-0000-0000-0000-000000000001"
    automation, lacking = to_automation(definition, {NOTIFY_BLOCK: block_id}, AUTOMATIONS_FILE)
    assert lacking is None
    assert automation.enabled
    assert set(definition) <= set(AutomationCore.model_fields)
    assert set(definition["trigger"]) <= set(type(automation.trigger).model_fields)
    without, lacking = to_automation(definition, {NOTIFY_BLOCK: None}, AUTOMATIONS_FILE)
    assert (lacking is None) == without.enabled


def test_automations_wait_for_events_that_are_emitted() -> None:
    code = "\n".join(path.read_text() for folder in ("flows", "tasks") for path in (ROOT / folder).rglob("*.py"))
    expected = {name for entry in read_automations(AUTOMATIONS_FILE) for name in entry["trigger"]["expect"]}
    for name in expected - {"prefect.flow-run.*", "prefect.flow-run.Failed", "prefect.flow-run.Crashed"}:
        assert name.removeprefix("prefect.flow-run.") in code, name


def test_a_silent_run_has_time_for_several_signs_of_life() -> None:
    silent = next(entry for entry in read_automations(AUTOMATIONS_FILE) if "silent" in entry["name"])
    for deployment in DEPLOYMENTS:
        env = deployment["work_pool"]["job_variables"]["env"]
        assert silent["trigger"]["within"] >= 6 * int(env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])


def test_a_run_tells_its_end_for_as_long_as_a_worker_outlasts_its_server() -> None:
    outlasted_s = 950  # measured, with PREFECT_WORKER_QUERY_SECONDS=2
    for deployment in DEPLOYMENTS:
        tries = int(deployment["work_pool"]["job_variables"]["env"]["PREFECT_CLIENT_MAX_RETRIES"])
        assert outlasted_s <= sum(2**number for number in range(1, tries + 1)) <= 2 * outlasted_s


def test_an_address_with_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="QDRANT_URL has a password in it") as refused:
        read_deployments(PREFECT_FILE, {**SITE, "QDRANT_URL": "https://ballast:hunter2@qdrant:6333"})
    assert "hunter2" not in str(refused.value)


def test_nothing_secret_is_a_variable_of_the_file() -> None:
    assert not [name for name in find_variables(PREFECT) if re.search("KEY|TOKEN|SECRET|PASSWORD", name)]
