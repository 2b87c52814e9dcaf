"""compose.yaml and its companions, as Compose resolves them: secrets, ports, health, and what a container may do."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
ONE_SHOT = {"prefect-migrate", "setup"}
Services = dict[str, dict[str, Any]]
Compose = Callable[..., subprocess.CompletedProcess[str]]
REQUIRED = re.compile(r"\$\{([A-Z_][A-Z0-9_]*):\?([^}]+)\}")
VARIABLE = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)(:[-?][^}]*)?\}")
FILES = {
    "env.example": ("compose.yaml", "compose.private.yaml"),
    "env.worker.example": ("compose.worker.yaml",),
}


def read_env(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def written(*files: str) -> str:
    return "\n".join(
        line for file in files for line in (DOCKER / file).read_text().splitlines() if not line.lstrip().startswith("#")
    )


def is_secret(name: str) -> bool:
    return re.search(r"PASSWORD|SECRET|API_KEY|TOKEN|AUTH_STRING|NOTIFY_URL", name) is not None


# ------------------------------------------------------------------------------------------------------- variables


@pytest.mark.parametrize("example", FILES)
def test_the_example_and_the_compose_files_name_the_same_variables(example: str) -> None:
    used = {name for name, _ in VARIABLE.findall(written(*FILES[example]))}
    in_example = set(read_env(DOCKER / example)) - {"COMPOSE_PROFILES"}  # Compose's own
    assert used == in_example


@pytest.mark.parametrize("example", FILES)
def test_the_example_holds_no_value(example: str) -> None:
    assert not [name for name, value in read_env(DOCKER / example).items() if value]


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (files, name)
        for files in (("compose.yaml",), ("compose.yaml", "compose.private.yaml"), ("compose.worker.yaml",))
        for name in sorted({name for name, _ in REQUIRED.findall(written(files[-1]))})
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_an_unset_variable_is_named_with_the_way_out(
    compose: Compose, values: Mapping[str, str], files: tuple[str, ...], name: str
) -> None:
    for unset in ({}, {name: ""}):
        result = compose({**{key: value for key, value in values.items() if key != name}, **unset}, *files)
        assert result.returncode != 0
        message = next(message for found, message in REQUIRED.findall(written(*files)) if found == name)
        assert f"{name} is missing a value: {message}" in result.stderr


def test_no_secret_has_a_default() -> None:
    for path in DOCKER.glob("compose*.yaml"):
        for name, default in VARIABLE.findall(written(path.name)):
            if is_secret(name):
                assert default.startswith(":?") or default == ":-", f"{path.name}: {name}{default}"


def test_every_secret_of_a_container_comes_from_a_variable(services: Services, worker_services: Services) -> None:
    for service in (*services.values(), *worker_services.values()):
        for name, value in (service.get("environment") or {}).items():
            if is_secret(name) or ("URL" in name and "@" in value):
                assert "secret-" in value, name


def test_secrets_travel_in_the_environment_only(services: Services, worker_services: Services) -> None:
    # Labels, commands and health checks show in `docker ps` and in the list of processes.
    for service in (*services.values(), *worker_services.values()):
        rest = {key: value for key, value in service.items() if key != "environment"}
        assert "secret-" not in str(rest)


# ----------------------------------------------------------------------------------------- what a container may do


def test_containers_can_do_little(services: Services, worker_services: Services) -> None:
    for name, service in (*services.items(), *worker_services.items()):
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service, name
        assert "cap_add" not in service, name
        assert service.get("network_mode") is None, name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}, name
        limits = service["deploy"]["resources"]["limits"]
        assert limits["memory"], name
        assert limits["pids"], name
        assert not any(mount["source"].endswith("docker.sock") for mount in service.get("volumes", [])), name


def test_services_restart_and_jobs_do_not(services: Services) -> None:
    for name, service in services.items():
        assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped"), name


def test_every_service_has_a_health_check(services: Services, worker_services: Services) -> None:
    for name, service in (*services.items(), *worker_services.items()):
        check = service["healthcheck"]
        if name in ONE_SHOT:
            assert check == {"disable": True}
        else:
            assert check["test"], name
            assert check["start_period"], name


def test_who_waits_waits_for_health(services: Services) -> None:
    for name, service in services.items():
        for awaited, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if awaited in ONE_SHOT else "service_healthy"
            assert how["condition"] == expected, f"{name} waits for {awaited}"
    workers = [name for name in services if name.startswith("worker-")]
    assert len(workers) == 4
    assert all("setup" in services[name]["depends_on"] for name in [*workers, "webhooks"])


def test_only_the_front_doors_are_published_and_on_loopback(services: Services) -> None:
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert set(published) == {"prefect-api", "webhooks", "prometheus"}
    assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}


def test_postgres_and_redis_are_reached_by_the_prefect_server_alone(
    services: Services, config: Callable[..., dict[str, Any]]
) -> None:
    networks = config("compose.yaml")["networks"]
    assert networks["state"]["internal"] is True
    assert networks["backend"]["internal"] is True
    on_state = {name for name, service in services.items() if "state" in service["networks"]}
    assert on_state == {"postgres", "redis", "prefect-migrate", "prefect-api", "prefect-services"}
    assert set(services["qdrant"]["networks"]) == {"backend"}


def test_the_private_address_is_the_only_further_door(config: Callable[..., dict[str, Any]]) -> None:
    shared = config("compose.yaml", "compose.private.yaml")
    doors = {
        (name, port["host_ip"], port["target"])
        for name, service in shared["services"].items()
        for port in service.get("ports", [])
        if port["host_ip"] != "127.0.0.1"
    }
    address = "10.9.8.7"
    assert doors == {("prefect-api", address, 4200), ("qdrant", address, 6333), ("qdrant", address, 6334)}


# ------------------------------------------------------------------------------------------------- what fits together


def test_one_profile_serves_the_gpu_pool(services: Services) -> None:
    serving = {
        name: service.get("profiles")
        for name, service in services.items()
        if "gpu-pool" in (service.get("command") or [])
    }
    assert serving == {"worker-gpu": ["gpu"], "worker-gpu-standin": ["cpu-only"]}
    devices = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_only_the_stand_in_lets_a_cpu_pass_for_the_device(services: Services, worker_services: Services) -> None:
    every = (*services.items(), *worker_services.items())
    told = {name: (service.get("environment") or {}).get("BALLAST_DEVICE") for name, service in every}
    assert {name: device for name, device in told.items() if device} == {"worker-gpu-standin": "cpu"}
    # The rest of its environment is every worker's.
    standin = services["worker-gpu-standin"]["environment"]
    assert services["worker-gpu"]["environment"].items() <= standin.items()


def test_every_pool_has_a_worker(services: Services) -> None:
    served = {
        service["command"][service["command"].index("--pool") + 1]
        for name, service in services.items()
        if name.startswith("worker-")
    }
    assert served == {"ingest-pool", "gpu-pool", "cpu-pool"}


def test_workers_share_what_must_be_shared(services: Services, worker_services: Services) -> None:
    for name, service in (*services.items(), *worker_services.items()):
        if name.startswith("worker-"):
            targets = {mount["target"] for mount in service["volumes"]}
            assert {f"/var/lib/ballast/{folder}" for folder in ("models", "spool", "data")} <= targets, name
    setup = services["setup"]["environment"]
    targets = {mount["target"] for mount in services["worker-ingest"]["volumes"]}
    assert {setup["BALLAST_SOURCE"], setup["BALLAST_SPOOL"], setup["BALLAST_DATA_FOLDER"]} <= targets


def test_ports_agree(services: Services, worker_services: Services) -> None:
    api, receiver = services["prefect-api"], services["webhooks"]
    [api_port], [receiver_port] = api["ports"], receiver["ports"]
    assert option(api, "--port") == str(api_port["target"])
    assert f"127.0.0.1:{api_port['target']}/api" in str(api["healthcheck"]["test"])
    assert api["environment"]["PREFECT_SERVER_UI_API_URL"].endswith(f":{api_port['published']}/api")
    assert option(receiver, "--port") == str(receiver_port["target"])
    assert f"127.0.0.1:{receiver_port['target']}/" in str(receiver["healthcheck"]["test"])
    asked = scraped()
    assert set(asked) == {name for name in services if name.startswith("worker-")}
    for name, service in (*services.items(), *worker_services.items()):
        environment = service.get("environment") or {}
        if url := environment.get("PREFECT_API_URL"):
            assert url == f"http://prefect-api:{api_port['target']}/api", name
        if url := environment.get("QDRANT_URL"):
            assert url == "http://qdrant:6333", name
        if name.startswith("worker-"):
            assert f"127.0.0.1:{environment['PREFECT_WORKER_WEBSERVER_PORT']}/health" in str(
                service["healthcheck"]["test"]
            )
            # A run takes the first free port from BALLAST_METRICS_PORT on: as many as the worker has runs at a time.
            first = int(environment["BALLAST_METRICS_PORT"])
            assert asked[name] == set(range(first, first + int(option(service, "--limit")))), name


def scraped() -> dict[str, set[int]]:
    """The ports that Prometheus asks, by service."""
    found: dict[str, set[int]] = {}
    [job] = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    for entry in job["dns_sd_configs"]:
        for name in entry["names"]:
            found.setdefault(name, set()).add(entry["port"])
    return found


def test_a_further_machine_uses_the_names_of_the_first(services: Services, worker_services: Services) -> None:
    for name, service in worker_services.items():
        first = services[name]
        assert {host.split("=")[0] for host in service["extra_hosts"]} == {"prefect-api", "qdrant"}
        assert service["command"] == first["command"]
        assert service["image"] == first["image"]
        missing = set(first["environment"]) - set(service["environment"])
        assert missing <= {"PREFECT_UI_URL"}, name


def option(service: dict[str, Any], name: str) -> str:
    command: list[str] = service["command"]
    return command[command.index(name) + 1]
