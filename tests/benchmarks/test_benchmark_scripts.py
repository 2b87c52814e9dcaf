"""The benchmarks of incremental runs, upserts and memory run to their end in small: what they print on a machine is theirs."""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def run_script(name: str, *options: str, api: str | None = None) -> str:
    command = [sys.executable, str(FOLDER / name), "--tiny", *options]
    environment = {**os.environ, **({"PREFECT_API_URL": api} if api else {})}  # its start is not what is tested here
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr
    assert "the figures mean nothing" in result.stdout
    return result.stdout


def read_rows(report: str, heading: str) -> list[dict[str, str]]:
    """The first table after a heading, a dictionary a row."""
    lines = report.partition(heading)[2].splitlines()
    table: list[list[str]] = []
    for line in lines:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            break
    header, _, *rows = table
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_incremental_runs(prefect_api: str) -> None:
    report = run_script("incremental.py", api=prefect_api)
    first, again = read_rows(report, "## Unchanged: 12")
    assert int(first["embedded"]) >= 12
    assert float(first["workers' CPU s"]) > 0
    # No chunk worker and no encoder was started, and neither torch nor LlamaIndex was imported.
    assert (again["embedded"], float(again["workers' CPU s"]), again["imported"]) == ("0", 0.0, "none of them")

    (repaired,) = read_rows(report, "## Deleted by hand")
    assert (repaired["ended"], repaired["findings left"], repaired["of them after it"]) == ("Completed", "0", "0")
    assert repaired["points missing"] == repaired["documents found"] == repaired["nodes embedded"] == "1"

    first, edited = read_rows(report, "## One paragraph edited")
    assert int(first["nodes embedded"]) >= 20
    assert 1 <= int(edited["nodes embedded"]) <= 3
    assert int(edited["nodes embedded"]) + int(edited["payloads refreshed"]) == int(edited["points after"])

    (ledger,) = read_rows(report, "## Unchanged, by the size")
    assert ledger["documents"] == "50"


def test_upserts() -> None:
    rows = read_rows(run_script("upsert_rate.py"), "points of 32 dimensions")
    assert [row["client"].split(",")[0] for row in rows[::2]] == ["Ballast", "upload_points", "QdrantVectorStore.add"]
    assert all(int(row["bytes a point"].replace(",", "")) > 32 * 4 for row in rows)


def test_memory(prefect_api: str) -> None:
    (row,) = read_rows(run_script("memory_growth.py", api=prefect_api), "Peak resident memory")
    assert int(row["partitions"]) > 2
    assert int(row["flow"]) < int(row["whole tree"])
