"""Tables of raw values with units: one definition for people (Markdown, a terminal) and for programs (key=value)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Unit: TypeAlias = Literal["text", "count", "bytes", "seconds", "rate", "fraction", "factor", "score", "coefficient"]
Value: TypeAlias = str | int | float | bool | None

GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Column:
    """`key` is for programs and keeps its unit in its name; `label` is for people, whose values carry the unit."""

    key: str
    label: str
    unit: Unit = "count"


@dataclass(frozen=True, slots=True)
class Table:
    """`name` starts each of its key=value lines. `left_out`: rows that did not fit, told in a last line."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    left_out: int = 0


def format_value(value: Value, unit: Unit) -> str:
    """A value as people read it: 3.20 GiB, 12.5 s, 4.0 %; a dash where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    match unit:
        case "bytes":
            return format_bytes(value)
        case "seconds":
            return f"{value:.1f} s" if abs(value) < 600 else f"{value / 60:.1f} min"
        case "rate":
            return f"{value:,.0f}"
        case "fraction":
            return f"{value:.1%}".replace("%", " %")
        case "factor":
            return f"{value:.2f}x"
        case "score":
            return f"{value:.4f}"
        case "coefficient":
            return f"{value:.4g}"
        case "count" | "text":
            return f"{value:,}"


def format_bytes(value: float) -> str:
    """GiB from half a GiB on, MiB below."""
    return f"{value / GIB:,.2f} GiB" if abs(value) >= GIB / 2 else f"{value / MIB:,.1f} MiB"


def to_markdown(table: Table) -> str:
    """A GitHub table; numbers to the right. Ends with a newline."""
    lines = [
        "| " + " | ".join(escape_markdown(column.label) for column in table.columns) + " |",
        "|" + "|".join(" --- " if column.unit == "text" else " ---: " for column in table.columns) + "|",
    ]
    lines += ["| " + " | ".join(escape_markdown(cell) for cell in row) + " |" for row in format_rows(table)]
    if table.left_out:
        lines.append(f"\n... and {table.left_out:,} more")
    return "\n".join(lines) + "\n"


def to_artifact_rows(table: Table) -> list[dict[str, str]]:
    """Rows for a Prefect table artifact, as people read them."""
    labels = [column.label for column in table.columns]
    return [dict(zip(labels, row, strict=True)) for row in format_rows(table)]


def to_lines(table: Table) -> list[str]:
    """One `name key=value ...` line a row, raw values, for grep and awk; text that needs it is quoted."""
    return [
        " ".join([table.name, *(f"{c.key}={quote_value(v)}" for c, v in zip(table.columns, row, strict=True))])
        for row in table.rows
    ]


def format_rows(table: Table) -> list[list[str]]:
    """All cells as people read them."""
    return [[format_value(value, c.unit) for c, value in zip(table.columns, row, strict=True)] for row in table.rows]


def quote_value(value: Value) -> str:
    """`text` as it is where it is one word, else in double quotes on one line; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = " ".join(clean_text(str(value)).split())
    if text and not re.search(r"[\s\"'=]", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def escape_markdown(text: str) -> str:
    """Names and reasons come from documents: no pipe, newline, tag or emphasis of theirs may shape the report."""
    one_line = " ".join(clean_text(text).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line)


def clean_text(text: str) -> str:
    """Without control characters: a file name may hold escape sequences that a terminal would obey."""
    return "".join(char if char in "\n\t" or char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
