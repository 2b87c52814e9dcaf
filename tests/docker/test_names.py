"""Every command, option, variable and module that docker/ and deployments/kubernetes/ name exists where it is named from."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
Services = dict[str, dict[str, Any]]

# Names that other programs document, by who reads them. Ours and Prefect's are looked up where they are defined.
DOCUMENTED: Mapping[str, set[str]] = {
    "Qdrant": {"QDRANT__SERVICE__API_KEY", "QDRANT__TELEMETRY_DISABLED", "QDRANT_INIT_FILE_PATH"},
    "Postgres's image": {"POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_INITDB_ARGS"},
    "our own command of the service redis": {"REDIS_PASSWORD"},
    "huggingface_hub": {"HF_HOME", "HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY"},
    "NVIDIA's container toolkit": {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"},
    "pip": {"PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_CACHE_DIR"},
    "Python": {"PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"},
    "every program": {"PATH", "HOME", "DO_NOT_TRACK"},
}
# prefect-kubernetes runs in Prefect's own image of the Kubernetes worker: prefect_kubernetes/settings.py.
OF_PREFECT_KUBERNETES = {
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_NAME",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_KEY",
}
# Of prefect-redis: module, class of its settings.
REDIS_SETTINGS = [
    ("prefect_redis.client", "RedisMessagingSettings"),
    ("prefect_redis.cleanup_queue", "RedisWorkerCleanupQueueSettings"),
]


def need(package: str) -> None:
    """Skips where `package` is not installed; in CI that is a failure."""
    if importlib.util.find_spec(package) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{package} is not installed, and CI must have it")
        pytest.skip(f"{package} is not installed: pip install --requirement requirements.lock")


# ---------------------------------------------------------------------------------------------------------- commands


def commands_of(services: Services) -> Iterator[tuple[str, list[str]]]:
    for name, service in services.items():
        if command := service.get("command"):
            yield f"compose {name}", command


def commands_of_images() -> Iterator[tuple[str, list[str]]]:
    for match in re.findall(r"^CMD (\[.*\])$", (ROOT / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE):
        yield "Dockerfile", json.loads(match)


def written_commands() -> Iterator[tuple[str, list[str]]]:
    """Those in comments and descriptions: a line that begins with the program's name, or stands in backticks."""
    for path in [*(ROOT / "docker").iterdir(), *(ROOT / "deployments" / "kubernetes").iterdir()]:
        if path.is_file() and path.name != ".env":
            for command in re.findall(
                r"(?:`|^# {3,})((?:ballast|prefect) [a-z][^`\n]*)", path.read_text(), re.MULTILINE
            ):
                yield path.name, command.split()


def test_every_command_and_option_exists(services: Services, worker_services: Services) -> None:
    found = [*commands_of(services), *commands_of(worker_services), *commands_of_images(), *written_commands()]
    checked = 0
    for where, (program, *arguments) in found:
        if program == "ballast":
            check_ballast(where, arguments)
        elif program == "prefect":
            check_prefect(where, arguments)
        else:
            assert program in {"sh", "--config.file=/etc/prometheus/prometheus.yml"}, f"{where}: {program}"
            continue
        checked += 1
    assert checked >= 14


def check_prefect(where: str, arguments: list[str]) -> None:
    from prefect.cli._app import _app

    # Parses as the program would, and raises what the user would read; nothing is run.
    command, bound, _ = _app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert callable(command), f"{where}: {arguments}"
    assert bound.arguments or arguments[-1] == "start", f"{where}: {arguments} is a group of commands, not a command"


def check_ballast(where: str, arguments: list[str]) -> None:
    import typer

    from flows.cli import app

    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    with group.make_context("ballast", [name]) as context:
        command = group.get_command(context, name)
        assert command is not None, f"{where}: there is no command `ballast {name}`"
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("wrong", [["worker", "start", "--pol", "gpu-pool"], ["server", "services", "begin"]])
def test_a_wrong_prefect_command_would_be_noticed(wrong: list[str]) -> None:
    from cyclopts.exceptions import CycloptsError

    with pytest.raises(CycloptsError):
        check_prefect("here", wrong)


def test_pools_are_those_that_setup_makes(services: Services) -> None:
    import yaml

    pools = {pool["name"] for pool in yaml.safe_load((ROOT / "deployments" / "pools.yaml").read_text())["pools"]}
    started = {
        command[command.index("--pool") + 1]
        for _, command in [*commands_of(services), *commands_of_images()]
        if "--pool" in command
    }
    assert started <= pools
    assert {path.stem for path in (ROOT / "deployments" / "kubernetes").glob("*.json")} == pools


# ----------------------------------------------------------------------------------------------------------- variables


@pytest.fixture(scope="module")
def prefect_names() -> set[str]:
    from prefect.settings import Settings

    return set(names_of(Settings))


def names_of(model: Any) -> Iterator[str]:
    """Every environment variable that a model of Prefect's settings reads, older names included."""
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from names_of(field.annotation)
        else:
            aliases = getattr(field.validation_alias, "choices", [field.validation_alias])
            yield from (alias.upper() for alias in aliases if isinstance(alias, str))
            yield f"{model.model_config.get('env_prefix', '')}{name}".upper()


def variables_of_images() -> Iterator[tuple[str, str]]:
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    for line in re.findall(r"^ENV (.*)$", text, flags=re.MULTILINE):
        yield from (("Dockerfile", name) for name in re.findall(r"(\w+)=", line))


def variables_of_templates() -> Iterator[tuple[str, str]]:
    for path in (ROOT / "deployments" / "kubernetes").glob("*.json"):
        [container] = json.loads(path.read_text())["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
            "containers"
        ]
        yield from ((path.name, entry["name"]) for entry in container["env"])
        yield from ((path.name, name) for name in re.findall(r"\b(?:PREFECT|QDRANT|BALLAST)_\w+", path.read_text()))


def test_every_variable_is_read_by_somebody(
    services: Services, worker_services: Services, prefect_names: set[str]
) -> None:
    used = {
        (f"compose {name}", variable)
        for name, service in (*services.items(), *worker_services.items())
        for variable in service.get("environment") or {}
    }
    used |= {*variables_of_images(), *variables_of_templates()}
    assert len({variable for _, variable in used}) > 40
    documented = set().union(*DOCUMENTED.values())
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("flows", "tasks", "deployments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".yaml"}
    )
    sources += (ROOT / "docker" / "webhooks.toml").read_text()
    unread = []
    for where, variable in sorted(used):
        if variable.startswith("PREFECT_REDIS_"):
            continue  # below
        if variable.startswith("PREFECT_"):
            is_read = variable in prefect_names | OF_PREFECT_KUBERNETES
        else:
            is_read = variable in documented or re.search(rf"\b{variable}\b", sources) is not None
        if not is_read:
            unread.append(f"{where}: {variable}")
    assert not unread


def test_nothing_is_documented_that_is_not_used(services: Services) -> None:
    used = {variable for service in services.values() for variable in service.get("environment") or {}}
    used |= {variable for _, variable in variables_of_images()}
    assert set().union(*DOCUMENTED.values()) <= used


def test_the_redis_variables_are_those_of_prefect_redis(services: Services) -> None:
    need("prefect_redis")
    read = {
        name
        for module, settings in REDIS_SETTINGS
        for name in names_of(getattr(importlib.import_module(module), settings))
    }
    used = {
        variable
        for service in services.values()
        for variable in service.get("environment") or {}
        if variable.startswith("PREFECT_REDIS_")
    }
    assert used == {"PREFECT_REDIS_MESSAGING_URL", "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL"}
    assert used <= read


# ------------------------------------------------------------------------------------------------------------- modules


def test_the_server_s_modules_have_what_prefect_looks_for(services: Services) -> None:
    need("prefect_redis")
    environment = services["prefect-services"]["environment"]
    wanted = {
        "PREFECT_MESSAGING_BROKER": {"Publisher", "Consumer"},
        "PREFECT_MESSAGING_CACHE": {"Cache"},
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": {"CausalOrdering"},
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": {"ConcurrencyLeaseStorage"},
        "PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE": {"WorkerCleanupQueue"},
    }
    named = {name for name, value in environment.items() if re.fullmatch(r"\w+(\.\w+)+", str(value))}
    assert named == set(wanted)
    for variable, classes in wanted.items():
        module = importlib.import_module(environment[variable])
        assert classes <= set(vars(module)), f"{variable}={environment[variable]}"


def test_the_api_and_the_services_are_set_alike(services: Services) -> None:
    api, background = (services[name]["environment"] for name in ("prefect-api", "prefect-services"))
    assert api.items() <= background.items()
    assert api == services["prefect-migrate"]["environment"]


def test_the_image_has_the_prefect_redis_that_is_tested() -> None:
    need("prefect_redis")
    from importlib.metadata import version

    assert f"ARG PREFECT_REDIS_VERSION={version('prefect-redis')}\n" in (ROOT / "docker" / "Dockerfile").read_text()


def test_the_receiver_takes_its_configuration(services: Services) -> None:
    from deployments.receiver.config import read_receiver_settings

    settings = read_receiver_settings(ROOT / "docker" / "webhooks.toml")
    receiver = services["webhooks"]
    folders = {mount["target"] for mount in receiver["volumes"]}
    assert str(Path(settings.journal).parent) in folders
    assert receiver["command"][receiver["command"].index("--config") + 1] in folders
    secrets = {secret for hook in settings.hooks.values() for secret in hook.secret}
    assert secrets == {name for name in receiver["environment"] if name.startswith("BALLAST_WEBHOOK_SECRET")}


def test_set_up_gets_what_the_deployments_ask_for(services: Services) -> None:
    import yaml

    from flows.setup_files import find_variables

    setup = services["setup"]
    asked = find_variables(yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text()))
    assert asked
    assert asked <= set(setup["environment"])
    for argument in setup["command"]:
        if "=" in argument:
            name = argument.split("/srv/ballast/")[1]
            assert (ROOT / name).is_file(), name
