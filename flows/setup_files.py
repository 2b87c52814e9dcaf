"""The files of a deployment: what they say, checked before anything is changed on a server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tasks.errors import ConfigError
from tasks.url_secrets import has_password, has_secret_parameter

# Beside the packages, in a checkout as in an image.
DEPLOYMENTS_FOLDER = Path(__file__).resolve().parents[1] / "deployments"
PREFECT_FILE = DEPLOYMENTS_FOLDER / "prefect.yaml"
POOLS_FILE = DEPLOYMENTS_FOLDER / "pools.yaml"
AUTOMATIONS_FILE = DEPLOYMENTS_FOLDER / "automations.yaml"

_VARIABLE = re.compile(r"\{\{\s*\$([A-Za-z0-9_]+)\s*\}\}")


class Definition(BaseModel):
    """Unknown keys are errors: a misspelt limit would not limit anything."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class QueueDefinition(Definition):
    name: str = Field(min_length=1)
    concurrency_limit: int | None = Field(None, ge=0)
    priority: int | None = Field(None, ge=1)


class PoolDefinition(Definition):
    name: str = Field(min_length=1)
    type: str = "process"
    description: str | None = None
    concurrency_limit: int | None = Field(None, ge=0)
    base_job_template: str | None = Field(None, description="A JSON file, relative to the pools file.")
    queues: tuple[QueueDefinition, ...] = ()


class PoolsFile(Definition):
    pools: tuple[PoolDefinition, ...] = Field(min_length=1)


class DeploymentDefinition(BaseModel):
    """What set-up itself wants to know of a deployment; all of it is checked by `prefect deploy`."""

    name: str
    entrypoint: str
    pool: str
    queue: str | None


def read_pools(path: Path) -> tuple[PoolDefinition, ...]:
    """The work pools of a pools file. Raises ConfigError."""
    try:
        return PoolsFile.model_validate(_read_yaml(path)).pools
    except ValidationError as error:
        raise ConfigError(f"{path} can't be used: {_first_error(error)}.") from error


def read_template(pool: PoolDefinition, pools_file: Path) -> dict[str, Any] | None:
    """The pool's base job template; None: the default of its type. Raises ConfigError."""
    if pool.base_job_template is None:
        return None
    path = pools_file.parent / pool.base_job_template
    try:
        template = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base job template of {pool.name}, {path}, can't be read: {error}.") from error
    if not isinstance(template, dict) or not {"job_configuration", "variables"} <= set(template):
        raise ConfigError(f"{path}: a base job template is an object with `job_configuration` and `variables`.")
    return template


def read_deployments(path: Path, environment: Mapping[str, str]) -> list[DeploymentDefinition]:
    """The deployments of a prefect.yaml. Raises ConfigError where Prefect can't read it, a variable in it is
    unset, or an address in it has a password or a signature.

    Prefect itself takes an unset variable for an empty text: a source, or a Qdrant, that is nowhere.
    """
    from prefect.cli.deploy._models import PrefectYamlModel

    content = _read_yaml(path)
    try:
        model = PrefectYamlModel.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path} is not a prefect.yaml: {_first_error(error)}.") from error
    wanted = find_variables(content.get("deployments"))
    if unset := sorted(name for name in wanted if not environment.get(name, "").strip()):
        raise ConfigError(
            f"{path} takes {', '.join(unset)} from the environment, where {'it is' if len(unset) == 1 else 'they are'} "
            f"unset or empty. Set {'it' if len(unset) == 1 else 'them'} and run it again, or write the values into a copy "
            "of the file and name that with --prefect-file."
        )
    _refuse_secrets(content.get("deployments"), path, environment)
    found = []
    for deployment in model.deployments:
        if not deployment.name or not deployment.entrypoint or not (deployment.work_pool and deployment.work_pool.name):
            raise ConfigError(
                f"{path}: the deployment {deployment.name or '(without a name)'} needs a name, an entrypoint and a "
                "work_pool.name."
            )
        pool = deployment.work_pool
        found.append(
            DeploymentDefinition(
                name=deployment.name,
                entrypoint=deployment.entrypoint,
                pool=str(pool.name),
                queue=pool.work_queue_name,
            )
        )
    return found


def check_pools(
    deployments: list[DeploymentDefinition], pools: tuple[PoolDefinition, ...], prefect_file: Path, pools_file: Path
) -> None:
    """Raise ConfigError where a deployment names a pool, or a queue, that the pools file does not have."""
    queues = {pool.name: {queue.name for queue in pool.queues} | {"default"} for pool in pools}
    for deployment in deployments:
        if deployment.pool not in queues:
            raise ConfigError(
                f"{deployment.name} in {prefect_file} runs on the work pool {deployment.pool}, which {pools_file} does not "
                f"have; it has {', '.join(sorted(queues))}. Add it there."
            )
        if deployment.queue is not None and deployment.queue not in queues[deployment.pool]:
            raise ConfigError(
                f"{deployment.name} in {prefect_file} waits in the work queue {deployment.queue} of {deployment.pool}, which "
                f"{pools_file} does not have: Prefect would make it without a limit. Add it there, with concurrency_limit: 1."
            )


def read_automations(path: Path) -> list[dict[str, Any]]:
    """Automations as Prefect's schema has them, save that `block_document_id` may be a block's name. Raises ConfigError."""
    content = _read_yaml(path).get("automations")
    if not isinstance(content, list) or not all(isinstance(entry, dict) and entry.get("name") for entry in content):
        raise ConfigError(f"{path}: `automations` is a list of automations, each with a `name`.")
    names = [entry["name"] for entry in content]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{path} has more than one automation named {', '.join(doubled)}. Their names tell them apart."
        )
    return content


def find_variables(value: object) -> set[str]:
    """Names of the environment variables in every {{ $NAME }} of a parsed YAML value."""
    match value:
        case str():
            return set(_VARIABLE.findall(value))
        case dict():
            return set().union(*(find_variables(entry) for pair in value.items() for entry in pair))
        case list():
            return set().union(*map(find_variables, value))
    return set()


def _refuse_secrets(deployments: object, prefect_file: Path, environment: Mapping[str, str]) -> None:
    """Raise ConfigError where an address in a deployment has a password or a signature in it, as it will be on the server."""
    for place, text in _find_texts(deployments, "deployments"):
        names = ", ".join(sorted(find_variables(text)))
        filled = _VARIABLE.sub(lambda match: environment.get(match[1], ""), text)
        # A template of a password counts as well: what it is filled with is kept like any literal.
        with_password = has_password(text) or has_password(filled)
        if with_password or has_secret_parameter(filled):
            found = "a password" if with_password else "a signature or a token"
            raise ConfigError(
                f"{names or place} has {found} in it, and would be kept in clear among the parameters of "
                f"{prefect_file.name}'s deployments{f' ({place})' if names else ''}. Take it out; QDRANT_API_KEY, and what "
                "fsspec's own environment variables say, stay with the workers."
            )


def _find_texts(value: object, place: str) -> Iterator[tuple[str, str]]:
    match value:
        case str():
            yield place, value
        case dict():
            for name, entry in value.items():
                yield from _find_texts(entry, f"{place}.{name}")
        case list():
            for number, entry in enumerate(value):
                yield from _find_texts(entry, f"{place}[{number}]")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: the outermost YAML value is a mapping, not {type(content).__name__}.")
    return content


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
