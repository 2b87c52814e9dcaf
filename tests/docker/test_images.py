"""The Dockerfile and the shell scripts, by their linters and by what must hold of an image."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE_FILES = sorted((ROOT / "docker").glob("compose*.yaml"))
# name:tag, where the tag has at least a major and a minor version: never latest, never a moving 17 or bookworm.
EXACT = re.compile(r"[a-z0-9./-]+:v?\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")
Tool = Callable[[str], str]


def stages() -> dict[str, list[str]]:
    """Instructions of each stage, continuation lines joined, comments out."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#"))
    found: dict[str, list[str]] = {"": []}
    stage = ""
    for line in text.replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            stage = match[2]
            # A stage on top of another begins with what that one says.
            found[stage] = [*found.get(match[1], []), line]
        elif line.strip():
            found[stage].append(line)
    return found


def test_hadolint_finds_nothing(tool: Tool) -> None:
    result = subprocess.run(
        [tool("hadolint"), "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


@pytest.mark.parametrize(
    "script", sorted([*ROOT.glob("docker/*.sh"), *ROOT.glob(".ci/*")]), ids=lambda path: str(path.relative_to(ROOT))
)
def test_shellcheck_finds_nothing(tool: Tool, script: Path) -> None:
    result = subprocess.run([tool("shellcheck"), str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_tag_is_exact() -> None:
    named = re.findall(r"^ARG \w*IMAGE=(\S+)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    for path in COMPOSE_FILES:
        named += re.findall(r"^\s*image: (\S+)$", path.read_text(), flags=re.MULTILINE)
    assert len(named) >= 8
    assert not [image for image in named if not EXACT.fullmatch(image)]
    # Every stage begins with an argument that has a default above, or with another stage.
    known = {"${PYTHON_IMAGE}", *stages()}
    bases = re.findall(r"^FROM (\S+) AS", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert set(bases) <= known


def test_our_images_have_our_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ours = [
        tag
        for path in COMPOSE_FILES
        for tag in re.findall(r"image: ballast-(?:server|cpu|cuda):(\S+)", path.read_text())
    ]
    ours += re.findall(r'image\.version="(\S+)"', DOCKERFILE.read_text())
    assert len(ours) >= 8
    assert set(ours) == {version}


def test_compose_builds_targets_that_there_are() -> None:
    targets = {
        target for path in COMPOSE_FILES for target in re.findall(r"target: (cpu|cuda|server|\w+)\}", path.read_text())
    }
    assert targets == {"server", "cpu", "cuda"}
    assert targets <= set(stages())


@pytest.mark.parametrize("target", ["server", "cpu", "cuda"])
def test_an_image_runs_as_nobody_special_and_says_how_it_is(target: str) -> None:
    lines = stages()[target]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] == "10001:10001"
    assert any(line.startswith("HEALTHCHECK ") for line in lines)
    assert "STOPSIGNAL SIGTERM" in lines
    assert 'ENTRYPOINT ["tini", "--"]' in lines
    assert any("org.opencontainers.image.title" in line for line in lines)


@pytest.mark.parametrize("target", ["server", "cpu", "cuda"])
def test_an_image_brings_packages_and_no_tools(target: str) -> None:
    lines = stages()[target]
    assert not [line for line in lines if re.search(r"pip |gcc|build-essential|git", line)]
    installed = [line for line in lines if "apt-get install" in line]
    assert len(installed) == 1
    assert re.search(r"--no-install-recommends 'tini=[\d.]+-\*'", installed[0])


def test_every_package_is_at_the_version_of_the_lock() -> None:
    text = "\n".join("\n".join(lines) for lines in stages().values())
    for command in re.findall(r"pip install [^&\n]*", text):
        is_locked = "--constraint requirements.lock" in command
        is_ours = "/wheels/" in command
        is_torch = "--no-deps" in command and "--requirement torch.txt" in command
        is_pinned = re.search(r"install --no-cache-dir \S+==[\d.]+\s*$", command)
        assert is_locked or is_ours or is_torch or is_pinned, command
    lock = (ROOT / "requirements.lock").read_text()
    assert re.search(r"^torch==\d+\.\d+\.\d+$", lock, flags=re.MULTILINE), "the CPU build satisfies the public version"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in wanted}
    locked = {line.split("==")[0] for line in lock.splitlines() if re.match(r"[a-z0-9]", line)}
    assert names <= locked, "constraints say nothing of a package that is not in the lock"


def test_the_wheel_brings_every_package() -> None:
    """Entry points are modules of the installed package: a folder that pyproject.toml forgets is missing in the image."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for top in ("flows", "tasks", "deployments")
        for path in (ROOT / top).rglob("*.py")
    }
    assert folders == set(packages)


def test_what_is_copied_enters_the_build() -> None:
    ignore = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set()
    for line in {line for lines in stages().values() for line in lines if line.startswith("COPY ")}:
        if "--from=" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)
    assert "**/.env*" in rules[rules.index("!deployments") :], "a .env beside what is let in stays out"
