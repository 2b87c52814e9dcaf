"""The GPU benchmarks run to their end without a GPU, on a tiny model: what they would print on one is theirs to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent


def run_script(name: str, out: Path) -> str:
    command = [sys.executable, str(FOLDER / name), "--device", "cpu", "--tiny", "--quick", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    assert out.read_text(encoding="utf-8").strip() == result.stdout.strip()
    return result.stdout


def read_rows(report: str, heading: str) -> list[dict[str, str]]:
    """The table under a heading, a dictionary a row."""
    lines = report.partition(heading)[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    header, _, *rows = table
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reports")


def test_memory(folder: Path) -> None:
    report = run_script("gpu_memory.py", folder / "memory.md")
    assert "the figures mean nothing" in report
    fitted, closed_form = read_rows(report, "## Error on shapes")
    assert (fitted["model"], closed_form["model"]) == ("fitted", "closed form")
    assert float(fitted["median"].rstrip("%")) <= 5
    assert float(fitted["worst under"].rstrip("%")) <= 3
    *capped, wrong = read_rows(report, "## Ballast under caps")
    assert {row["out of memory"] for row in capped} == {"0"}
    assert int(wrong["out of memory"]) >= 1  # a model that says 0.3 of the truth
    assert {row["nodes failed"] for row in (*capped, wrong)} == {"0"}
    for row in read_rows(report, "## A neighbour takes"):
        assert (row["the neighbour got its memory"], row["out of memory"], row["nodes failed"]) == ("yes", "0", "0")
        assert int(row["shrink steps"]) >= 1
    recorded = json.loads((folder / "memory.md.json").read_text(encoding="utf-8"))
    assert {"nodes", "padded_tokens", "masked", "peak_bytes", "prior", "fitted"} <= set(recorded[0])


def test_throughput(folder: Path) -> None:
    report = run_script("gpu_throughput.py", folder / "throughput.md")
    names = [row[""] for row in read_rows(report, "# Throughput")]
    assert names[0].startswith("Ballast")
    assert names[-1].startswith("LlamaIndex's defaults, emulated")
    assert any("batch_size=8" in name for name in names)
