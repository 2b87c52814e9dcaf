"""What is refused before anything is started, and that nothing is written where it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.check_inputs import check_data_folder, check_inputs
from tasks.config import IngestSettings
from tasks.errors import BallastError, ConfigError


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "nowhere"}, "does not exist"),
        ({"embedding": {"model": "./nowhere"}}, "No folder"),
        ({"qdrant": {"collection": "a/b"}}, "Collection name"),
        ({"data_folder": "/dev/null/x"}, "/dev/null is a file"),
        ({"data_folder": ""}, "data_folder is empty"),
    ],
)
def test_a_wrong_input_is_refused_and_leaves_nothing(
    wrong: dict[str, object], message: str, tmp_path: Path, minilm: str, samples: Path
) -> None:
    good = {"source": str(samples), "embedding": {"model": minilm}, "data_folder": str(tmp_path / "data")}
    check_inputs(IngestSettings.model_validate(good))
    with pytest.raises(BallastError, match=message):
        check_inputs(IngestSettings.model_validate({**good, **wrong}))
    assert list(tmp_path.iterdir()) == []


def test_a_data_folder_may_be_new_or_there(tmp_path: Path) -> None:
    check_data_folder(str(tmp_path))
    check_data_folder(str(tmp_path / "a" / "b"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_data_folder(str(tmp_path / "file"))
