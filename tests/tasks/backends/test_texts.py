"""Metadata comes out JSON-ready whatever went in."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.texts import RESERVED_KEYS, Unusable, clean_metadata, clean_text, is_blank, to_json_value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (date(2026, 3, 1), "2026-03-01"),
        (datetime(2026, 3, 1, 12, tzinfo=UTC), "2026-03-01T12:00:00+00:00"),
        (timedelta(minutes=2), 120.0),
        (Decimal("12.50"), 12.5),
        (Decimal("0.1234567890123456789"), "0.1234567890123456789"),
        (Decimal("NaN"), None),
        (b"text", "text"),
        (b"\xff\xfe", "//4="),
        (float("nan"), None),
        (float("inf"), None),
        (2**63 - 1, 2**63 - 1),
        (2**63, str(2**63)),
        pytest.param(10**5000, hex(10**5000), id="5,001 digits"),
        (np.float32(1.5), 1.5),
        (np.float64("nan"), None),
        (np.array([1, 2]), [1, 2]),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        ({"b", "a"}, ["a", "b"]),
        ({1: (date(2026, 1, 1), None)}, {"1": ["2026-01-01", None]}),
        ("a\ud800b\x00", "a\ufffdb\ufffd"),
        (True, True),
    ],
)
def test_values_become_json(value: Any, expected: Any) -> None:
    assert to_json_value(value) == expected
    assert type(to_json_value(value)) is type(expected)


def test_reserved_keys_get_a_prefix_and_nothing_is_lost() -> None:
    values = {
        "doc_id": 1,
        "source_doc_id": 2,
        "_node_content": 3,
        "ref_doc_id": 4,
        "document_id": 5,
        "generation": 6,
        "a": 7,
    }
    cleaned = clean_metadata(values)
    assert sorted(cleaned.values()) == [1, 2, 3, 4, 5, 6, 7]
    assert not RESERVED_KEYS & set(cleaned)
    assert not [key for key in cleaned if key.startswith("_node_")]
    assert cleaned["source__node_content"] == 3


_scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary() | st.decimals()
)
_values = st.recursive(
    _scalars | st.datetimes() | st.timedeltas(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(st.characters()) | st.sampled_from(sorted(RESERVED_KEYS)), _values))
def test_any_metadata_can_be_written_as_json(values: dict[str, Any]) -> None:
    cleaned = clean_metadata(values)
    assert json.loads(json.dumps(cleaned, allow_nan=False, ensure_ascii=False).encode()) == cleaned
    assert len(cleaned) == len(values)
    assert clean_metadata(cleaned) == cleaned


def test_metadata_that_never_ends_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Unusable, match="deeper than 64 levels"):
        clean_metadata({"loop": loop})


@settings(deadline=None)
@given(st.text(st.characters()))
def test_clean_text_can_be_encoded_and_keeps_its_length(text: str) -> None:
    assert len(clean_text(text).encode("utf-32-le")) == 4 * len(text)


def test_blank_is_what_nobody_can_see() -> None:
    assert is_blank("\ufeff \n\u200b\u00ad\u3000")
    assert not is_blank(" . ")
