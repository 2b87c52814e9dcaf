"""What `ballast setup` did, step by step, and how it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tasks.tables import Column, Table

Outcome = Literal["created", "updated", "unchanged", "kept", "skipped"]


@dataclass(frozen=True, slots=True)
class SetupStep:
    """One thing on the server and what became of it. kept: it differs from the files, on purpose it is assumed."""

    kind: Literal["pool", "queue", "block", "deployment", "automation"]
    name: str
    outcome: Outcome
    note: str = ""


def count_outcomes(steps: Sequence[SetupStep]) -> dict[Outcome, int]:
    """How many steps ended how; every outcome is there."""
    counted = Counter(step.outcome for step in steps)
    outcomes: tuple[Outcome, ...] = ("created", "updated", "unchanged", "kept", "skipped")
    return {outcome: counted[outcome] for outcome in outcomes}


def tabulate_setup(steps: Sequence[SetupStep]) -> list[Table]:
    """A row a step, and the counts."""
    columns = [Column(name, name, "text") for name in ("kind", "name", "outcome", "note")]
    counts = count_outcomes(steps)
    return [
        Table("step", "Steps", columns, [(step.kind, step.name, step.outcome, step.note) for step in steps]),
        Table("setup", "Setup", [Column(outcome, outcome) for outcome in counts], [tuple(counts.values())]),
    ]


def to_document(steps: Sequence[SetupStep], *, dry_run: bool) -> dict[str, Any]:
    """The document of --json."""
    return {"dry_run": dry_run, "counts": count_outcomes(steps), "steps": [asdict(step) for step in steps]}
