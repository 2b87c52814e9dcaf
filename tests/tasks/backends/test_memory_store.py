from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from pathlib import Path

import pytest

from tasks.backends.memory_store import StoredFit, load_fit, save_fit
from tasks.records import MemoryKey, MemorySample

KEY = MemoryKey("rev1", "fp16", "sdpa", "2.13.0", "NVIDIA T4", 15 * 1024**3)
FIT = StoredFit((MemorySample(8, 512, False, 123_456_789), MemorySample(2, 8191, True, 999)), 21_500.5, 180)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = save_fit(tmp_path / "new" / "folder", KEY, FIT)
    assert load_fit(tmp_path / "new" / "folder", KEY) == FIT
    assert [path] == list(path.parent.iterdir())  # nothing half-written is left beside it


def test_saving_again_replaces(tmp_path: Path) -> None:
    save_fit(tmp_path, KEY, FIT)
    newer = replace(FIT, samples=())
    save_fit(tmp_path, KEY, newer)
    assert load_fit(tmp_path, KEY) == newer
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("field", [x.name for x in fields(MemoryKey)])
def test_a_fit_is_never_used_under_another_key(tmp_path: Path, field: str) -> None:
    save_fit(tmp_path, KEY, FIT)
    other = replace(KEY, **{field: 1 if field == "device_total_bytes" else "other"})
    assert load_fit(tmp_path, other) is None
    # Not even if the file's name says so.
    path = save_fit(tmp_path, other, FIT)
    save_fit(tmp_path, KEY, FIT).replace(path)
    assert load_fit(tmp_path, other) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "\x00\x01",
        lambda text: json.dumps({**json.loads(text), "version": 99}),
        lambda text: json.dumps({**json.loads(text), "samples": [{"nodes": 1}]}),
        lambda text: text.replace("123456789", "-5"),
        lambda text: text.replace("123456789", '"many"'),
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "tokens_per_s"}),
        lambda text: text.replace("21500.5", "NaN"),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored_and_said_so(tmp_path: Path, damage, caplog) -> None:
    path = save_fit(tmp_path, KEY, FIT)
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        assert load_fit(tmp_path, KEY) is None
    assert str(path) in caplog.text
    save_fit(tmp_path, KEY, FIT)
    assert load_fit(tmp_path, KEY) == FIT


def test_no_file_is_no_news(tmp_path: Path, caplog) -> None:
    assert load_fit(tmp_path / "nowhere", KEY) is None
    assert not caplog.records
