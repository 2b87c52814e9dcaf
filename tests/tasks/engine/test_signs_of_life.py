"""A worker's beat moves while it lives, and never ends the run that it tells of."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from tasks.backends.spool import SpoolFolder
from tasks.backends.spool_reports import read_sign_of_life
from tasks.engine import signs_of_life
from tasks.engine.signs_of_life import SignsOfLife
from tasks.records import SignOfLife

RUN_ID = "01234567-89ab-4cde-8f01-23456789abcd"


def read(spool: SpoolFolder) -> SignOfLife:
    sign = read_sign_of_life(spool, RUN_ID)
    assert sign is not None
    return sign


def test_the_first_beat_is_there_when_start_returns_and_the_last_one_when_stop_does(tmp_path: Path) -> None:
    spool = SpoolFolder(str(tmp_path))
    signs = SignsOfLife(spool, RUN_ID)
    assert read_sign_of_life(spool, RUN_ID) is None
    signs.start()
    assert read(spool) == SignOfLife(1, readings=[], marks=[])
    signs.describe = lambda: SignOfLife(0, partition=4, device="cuda:0")
    signs.beat()
    assert (read(spool).beat, read(spool).partition, read(spool).device) == (2, 4, "cuda:0")
    signs.stop()
    assert read(spool).beat == 3
    signs.stop()
    assert read(spool).beat == 3


def test_it_beats_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs_of_life, "BEAT_S", 0.01)
    spool = SpoolFolder(str(tmp_path))
    signs, enough = SignsOfLife(spool, RUN_ID), threading.Event()
    described = [0]

    def describe() -> SignOfLife:
        described[0] += 1
        if described[0] == 5:
            enough.set()
        return SignOfLife(0)

    signs.describe = describe
    signs.start()
    assert enough.wait(30)
    signs.stop()
    assert read(spool).beat >= 5
    assert not any(thread.name == "signs-of-life" for thread in threading.enumerate())


def test_beats_from_several_threads_never_go_backwards(tmp_path: Path) -> None:
    spool = SpoolFolder(str(tmp_path))
    signs = SignsOfLife(spool, RUN_ID)
    threads = [threading.Thread(target=lambda: [signs.beat() for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        sign = read_sign_of_life(spool, RUN_ID)
        seen.append(sign.beat if sign is not None else 0)
    for thread in threads:
        thread.join()
    assert seen == sorted(seen)
    assert read(spool).beat == 80


def test_a_spool_that_is_away_for_a_moment_is_told_and_the_next_beat_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool = SpoolFolder(str(tmp_path / "share"))
    signs = SignsOfLife(spool, RUN_ID)
    (tmp_path / "share").rename(tmp_path / "elsewhere")
    with caplog.at_level(logging.WARNING, "tasks.engine.signs_of_life"):
        signs.beat()
    assert "sign of life not written beat=1" in caplog.text
    (tmp_path / "elsewhere").rename(tmp_path / "share")
    signs.beat()
    assert read(spool).beat == 2
