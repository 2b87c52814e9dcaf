"""The README keeps its word: its table of knobs is the code's, its commands run, its links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tasks.config import IngestSettings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def list_knobs(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from list_knobs(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def show_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is None:
        return "unset"
    if isinstance(field.default, tuple):
        return ", ".join(field.default)
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def write_knobs() -> str:
    rows = [f"| `{name}` | {show_default(field)} | {field.description} |" for name, field in list_knobs(IngestSettings)]
    return "\n".join(["| knob | default | what and why |", "| --- | --- | --- |", *rows])


def test_the_table_of_knobs_is_the_codes() -> None:
    expected = write_knobs()
    assert expected in README, f"Put this into the README:\n{expected}"


def list_commands() -> list[str]:
    """The `ballast` commands of the README's console blocks, in their order."""
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ballast")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths lead to the checkout, and what is written stays out of it."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "tests").symlink_to(ROOT / "tests")
    return folder


@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(checkout: Path, minilm: str) -> None:
    commands = list_commands()
    names = {"ingest", "plan", "search", "verify", "failures", "collections", "calibrate"}
    assert {shlex.split(command)[1] for command in commands} == names
    environment = {**os.environ, "MINILM": minilm, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands:
        result = subprocess.run(
            ["bash", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def test_files_that_the_readme_names_exist() -> None:
    named = set(re.findall(r"\]\(((?!http|#)[^)]+)\)", README))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = re.findall(r"(?:^\$ |`)make ([a-z]+)", README, flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= targets
