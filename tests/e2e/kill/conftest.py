"""Not a package: the tests in here import the modules beside them by name."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from killed_runs import Zygote


@pytest.fixture(scope="package")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    opened = Zygote(tmp_path_factory.mktemp("runs"))
    yield opened
    opened.close()
