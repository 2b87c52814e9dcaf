"""Ids, fingerprints and generations: stable, distinct, and blind to the order of keys only."""

from __future__ import annotations

import datetime
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.identity import (
    compute_fingerprint,
    compute_generation,
    compute_node_id,
    compute_nodes_digest,
)

any_text = st.text(st.characters(codec=None), max_size=12)  # lone surrogates included
nodes = st.tuples(any_text, any_text, any_text, st.integers(0, 9))
scalars = st.none() | st.booleans() | st.integers() | st.floats() | any_text
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3), max_leaves=6
)


def test_ids_stay_what_they_were() -> None:
    # Stored collections hold these: a change here means that every corpus is embedded again.
    assert compute_node_id("docs", "guide.md", "ab" * 32, 0) == "82f41b99-32a6-572b-a635-b98f3cd1ab39"
    assert (
        compute_fingerprint({"model": "m", "max_tokens": 256})
        == "95988dd037679a145d79d00122006e5639f7d5ebfd79de2268ddb41d5c6c6e94"
    )
    assert (
        compute_generation("f", "docs", "guide.md", "text", {"title": "T"})
        == "a558c948c16609dd1c4ca59c1c2bece3b76583f9076c677c52be5f807ee8354a"
    )


@given(nodes, nodes)
@settings(deadline=None)
def test_node_ids_are_equal_only_for_equal_nodes(
    one: tuple[str, str, str, int], other: tuple[str, str, str, int]
) -> None:
    assert (compute_node_id(*one) == compute_node_id(*other)) == (one == other)
    assert uuid.UUID(compute_node_id(*one)).version == 5


@given(st.dictionaries(any_text, values, max_size=5), st.randoms())
@settings(deadline=None)
def test_the_order_of_keys_does_not_count(parts: dict[str, Any], random: Any) -> None:
    shuffled = list(parts.items())
    random.shuffle(shuffled)
    assert compute_fingerprint(parts) == compute_fingerprint(dict(shuffled))
    assert compute_generation("f", "s", "d", "t", parts) == compute_generation("f", "s", "d", "t", dict(shuffled))


@given(any_text, any_text, any_text, any_text)
@settings(deadline=None)
def test_field_boundaries_never_blur(a: str, b: str, c: str, d: str) -> None:
    for place in range(3):  # fingerprint and text are not mixed up with what stands between them
        one, other = [a, "s", "d", b], [c, "s", "d", d]
        one[place], other[place] = a, c
        same = one == other
        assert (compute_generation(*one, {}) == compute_generation(*other, {})) == same
    assert (compute_fingerprint({a: b}) == compute_fingerprint({c: d})) == ((a, b) == (c, d))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "bc"), ("ab", "c")),
        (1, "1"),
        (1, 1.0),
        (True, 1),
        (None, "null"),
        (float("nan"), "nan"),
        (float("inf"), float("-inf")),
        ([], {}),
        (["a", "b"], ["ab"]),
        ([["a"], "b"], [["a", "b"]]),
        ({"a": {"b": 1}}, {"a": {}, "b": 1}),
        (["list", "a"], [["a"]]),
        (b"ab", "6162"),
        (datetime.date(2026, 11, 22), "2026-11-22"),
        ("\ud83d\ude00", "\U0001f600"),
        (["float", "0x1.0000000000000p+0"], 1.0),
    ],
)
def test_values_that_look_alike_are_told_apart(one: Any, other: Any) -> None:
    assert compute_fingerprint({"x": one}) != compute_fingerprint({"x": other})


def test_numpy_values_count_as_what_they_hold() -> None:
    assert compute_fingerprint({"x": np.int64(3), "y": np.array([1, 2])}) == compute_fingerprint({"x": 3, "y": [1, 2]})
    assert compute_fingerprint({"x": float("nan")}) == compute_fingerprint({"x": np.float64("nan")})


def test_a_value_without_a_stable_encoding_is_refused() -> None:
    with pytest.raises(ValueError, match="type object in a document's metadata"):
        compute_generation("f", "s", "d", "t", {"x": object()})


@given(st.lists(st.uuids(), unique=True), st.data())
@settings(deadline=None)
def test_the_digest_of_a_set_of_ids_depends_on_nothing_else(ids: list[uuid.UUID], data: st.DataObject) -> None:
    names = [str(each) for each in ids]
    whole = compute_nodes_digest(names)
    assert compute_nodes_digest(data.draw(st.permutations(names))) == whole
    if names:
        assert compute_nodes_digest(names[1:]) != whole
