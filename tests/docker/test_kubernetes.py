"""The work pools' job templates for Kubernetes: their variables, and the Job that comes of them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deployments" / "kubernetes"
POOLS = ["gpu-pool", "cpu-pool", "ingest-pool"]
PLACEHOLDER = re.compile(r"\{\{ (\w+) \}\}")
# Prefect's worker wants these two in the pod's spec, where Kubernetes has no such fields and drops them.
OF_PREFECT = ("parallelism", "completions")
KUBERNETES = "1.31"

Template = dict[str, Any]


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def template(pool: str) -> Template:
    return read(pool)


def read(pool: str) -> Template:
    found: Template = json.loads((FOLDER / f"{pool}.json").read_text(encoding="utf-8"))
    return found


def render(template: Template, **values: Any) -> dict[str, Any]:
    """The Job, as Prefect's worker templates it: by name, with the defaults of the variables."""
    from prefect.utilities.templating import apply_values

    variables = template["variables"]["properties"]
    given = {name: entry["default"] for name, entry in variables.items()} | {
        "name": "documents",
        "command": "prefect flow-run execute",
        **values,
    }
    configuration = apply_values(template["job_configuration"], given)
    job: dict[str, Any] = copy.deepcopy(configuration["job_manifest"])
    container(job)["args"] = str(container(job)["args"]).split()
    for name in OF_PREFECT:
        del job["spec"]["template"]["spec"][name]
    return job


def container(job: dict[str, Any]) -> dict[str, Any]:
    [only] = job["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


def test_there_is_a_template_for_each_pool() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(POOLS)


def test_setup_takes_the_template(pool: str, template: Template) -> None:
    from flows.setup_files import POOLS_FILE, read_pools, read_template

    [of_process] = [entry for entry in read_pools(POOLS_FILE) if entry.name == pool]
    of_kubernetes = of_process.model_copy(update={"type": "kubernetes", "base_job_template": f"kubernetes/{pool}.json"})
    assert read_template(of_kubernetes, POOLS_FILE) == template


def test_declared_variables_are_used_and_used_ones_declared(template: Template) -> None:
    used = set(PLACEHOLDER.findall(json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_every_variable_has_a_default_that_its_schema_takes_and_a_description(template: Template) -> None:
    schema = template["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    for name, entry in schema["properties"].items():
        assert entry["title"], name
        assert entry["description"], name
        assert "default" in entry, name
    defaults = {name: entry["default"] for name, entry in schema["properties"].items()}
    jsonschema.Draft202012Validator(schema).validate(defaults)


def test_kubernetes_takes_the_job(template: Template) -> None:
    import kubernetes_validate

    job = render(
        template,
        labels={"team": "search"},
        annotations={"note": "x"},
        node_selector={"nvidia.com/gpu.product": "Tesla-T4"},
        tolerations=[{"key": "dedicated", "operator": "Equal", "value": "ballast", "effect": "NoSchedule"}],
    )
    kubernetes_validate.validate(job, KUBERNETES, strict=True)  # strict: a field that there is not is an error
    kubernetes_validate.validate(render(template), KUBERNETES, strict=True)


def test_a_job_is_never_started_again_by_kubernetes(template: Template) -> None:
    job = render(template)
    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 30


def test_only_the_gpu_pool_asks_for_a_gpu() -> None:
    for pool in POOLS:
        job = render(read(pool))
        resources = container(job)["resources"]
        tolerated = [entry["key"] for entry in job["spec"]["template"]["spec"]["tolerations"]]
        if pool == "gpu-pool":
            # Kubernetes demands that they are equal.
            assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1
            assert tolerated == ["nvidia.com/gpu"]
        else:
            assert not [name for part in resources.values() for name in part if "gpu" in name]
            assert tolerated == []


def test_requests_and_limits_are_set(template: Template) -> None:
    resources = container(render(template))["resources"]
    for part in ("requests", "limits"):
        assert set(resources[part]) - {"nvidia.com/gpu"} == {"cpu", "memory"}


def test_a_pod_can_do_little(template: Template) -> None:
    job = render(template)
    pod = job["spec"]["template"]["spec"]
    user = re.search(r"useradd --uid (\d+)", (ROOT / "docker" / "Dockerfile").read_text())
    assert user
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert str(security["runAsUser"]) == str(security["fsGroup"]) == user[1]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_secrets_come_from_the_secret(template: Template) -> None:
    environment = {entry["name"]: entry for entry in container(render(template, secret_name="mine"))["env"]}
    for name in ("PREFECT_API_AUTH_STRING", "QDRANT_API_KEY"):
        assert environment[name] == {"name": name, "valueFrom": {"secretKeyRef": {"name": "mine", "key": name}}}
    assert "secret" not in json.dumps({name: entry.get("value") for name, entry in environment.items()})


def test_volumes_are_where_the_image_has_them(template: Template) -> None:
    job = render(template)
    volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container(job)["volumeMounts"]}
    assert set(mounts) == set(volumes)
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    for name in ("spool", "models", "data"):
        assert mounts[name] == f"/var/lib/ballast/{name}"
        assert mounts[name] in dockerfile
        assert volumes[name]["persistentVolumeClaim"]["claimName"] == f"ballast-{name}"
    assert mounts["tmp"] == "/tmp"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_images_are_those_of_compose(template: Template) -> None:
    image = template["variables"]["properties"]["image"]["default"]
    assert f"image: {image}\n" in (ROOT / "docker" / "compose.yaml").read_text()


def test_the_templates_differ_only_where_the_pools_do() -> None:
    plain = {pool: render(read(pool)) for pool in POOLS}
    for job in plain.values():
        pod = job["spec"]["template"]["spec"]
        for name in ("tolerations", "runtimeClassName", "terminationGracePeriodSeconds"):
            pod.pop(name, None)
        for name in ("image", "resources"):
            del container(job)[name]
        pod["volumes"] = [volume for volume in pod["volumes"] if volume["name"] != "documents"]
        container(job)["volumeMounts"] = [
            mount for mount in container(job)["volumeMounts"] if mount["name"] != "documents"
        ]
    assert plain["gpu-pool"] == plain["cpu-pool"] == plain["ingest-pool"]
