"""Records as JSON-ready values, for `--json`: derived values go with the fields, so that no reader works them out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.records import RunSummary
from tasks.report import embedding_tokens_per_s, find_discrepancies


def to_json_ready(value: Any) -> Any:
    """Records as JSON-ready values. A record's properties are its derived values, and go with its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: getattr(value, field.name) for field in fields(value)}
        derived = {
            name: getattr(value, name) for name, member in vars(type(value)).items() if isinstance(member, property)
        }
        return {name: to_json_ready(item) for name, item in (named | derived).items()}
    if isinstance(value, Mapping):
        return {str(key): to_json_ready(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return to_json_ready(value.tolist())
    if isinstance(value, np.generic):
        return to_json_ready(value.item())
    if isinstance(value, list | tuple | set | frozenset):
        return [to_json_ready(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON knows neither NaN nor infinity
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    # Metadata of a document may hold anything: a date of a parquet file, a decimal.
    return str(value)


def summary_to_json(summary: RunSummary, off: Sequence[str] | None = None) -> dict[str, Any]:
    """`ballast ingest --json`: the summary, and whether its books close."""
    discrepancies = find_discrepancies(summary, off)
    document: dict[str, Any] = to_json_ready(summary)
    document["books_closed"] = not discrepancies
    document["books_off"] = list(discrepancies)
    document["tokens_per_s"] = embedding_tokens_per_s(summary)
    return document
