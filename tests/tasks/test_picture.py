"""The picture of a run's memory: a real PNG, small, of whatever is known."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.picture import STEP_COLOURS, STEP_NAMES, draw_memory, explain_no_picture, to_data_url
from tasks.records import Books, BudgetMark, MemoryReading, RunSummary, StepKind
from tasks.report import tabulate_memory

GIB = 1024**3
MIB = 1024**2

EMPTY = RunSummary(
    collection="docs", physical_collection="docs__1a", model="m", fingerprint="1a", device="cuda:0", device_note="",
    books=Books(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), rejections=[], partitions=[], memory_series=[], tokens=0, seconds={},
)  # fmt: skip
GPU = [MemoryReading(float(t), "GPU-1", (2 + t % 3) * GIB, 8 * GIB, 15 * GIB, GIB) for t in range(60)]
HOST = [replace(reading, device_uuid="host", process_bytes=700 * MIB, total_bytes=512 * GIB) for reading in GPU]
MARKS = [BudgetMark(float(t), 8 * GIB, 1 + t % 64, 3 * GIB, 2 * GIB) for t in range(60)]
STEPS = [BudgetMark(1.5 * n, 4 * GIB, 0, step=kind) for n, kind in enumerate(get_args(StepKind))]


def open_png(png: bytes | None) -> Image.Image:
    assert png is not None
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    return picture.convert("RGB")


def count_pixels(picture: Image.Image, colour: str) -> int:
    """How much of `colour`, give or take what the palette made of it."""
    wanted = tuple(int(colour[at : at + 2], 16) for at in (1, 3, 5))
    found = picture.getcolors(picture.width * picture.height) or []
    near = (count for count, rgb in found if all(abs(a - b) < 24 for a, b in zip(wanted, rgb, strict=True)))  # type: ignore[arg-type]
    return sum(near)


@pytest.mark.parametrize(
    ("series", "marks"),
    [
        (GPU, MARKS),
        (GPU, []),
        ([], MARKS),
        (HOST, MARKS[:1]),
        (GPU[:1], STEPS),
        (GPU + [replace(reading, device_uuid="GPU-2") for reading in GPU], MARKS),
        ([replace(reading, process_bytes=None) for reading in GPU], MARKS),
        (GPU, [BudgetMark(0.0, 8 * GIB, 4)]),
        (GPU, [BudgetMark(0.0, 0, 0)]),
        ([replace(GPU[0], used_bytes=0, total_bytes=0)], []),
    ],
    ids=[
        "all",
        "no budget",
        "no readings",
        "host",
        "steps only",
        "two cards",
        "no share",
        "no needs",
        "zero",
        "nothing",
    ],
)
def test_it_draws_what_is_known(series: list[MemoryReading], marks: list[BudgetMark]) -> None:
    picture = open_png(draw_memory(replace(EMPTY, memory_series=series, budget_series=marks)))
    assert picture.width >= 690, "the UI's column"
    assert picture.getpixel((0, 0)) == pytest.approx((251, 251, 253), abs=4), "a paper of its own: dark pages, too"


def test_each_worker_has_a_line_of_its_own() -> None:
    """Two cards, one with half the other's memory: a line through both would cross the picture at every reading."""
    small = [replace(mark, budget_bytes=4 * GIB, batch_nodes=1, seconds=mark.seconds + 0.5, worker=1) for mark in MARKS]
    large = [replace(mark, batch_nodes=64) for mark in MARKS]
    readings = [replace(reading, used_bytes=12 * GIB, worker=1) for reading in GPU]
    both = sorted([*large, *small], key=lambda mark: mark.seconds)
    split = replace(EMPTY, memory_series=[*GPU, *readings], budget_series=both)
    joined = replace(split, budget_series=[replace(mark, worker=0) for mark in both])
    apart, across = (count_pixels(open_png(draw_memory(each)), "#d9822b") for each in (split, joined))
    assert 0 < 3 * apart < across
    rows = tabulate_memory([GPU[2], readings[2]], both).rows
    assert [row[-2:] for row in rows] == [(8 * GIB, 64), (4 * GIB, 1)]


def test_nothing_known_gives_no_picture_and_a_sentence() -> None:
    assert draw_memory(EMPTY) is None
    assert "nothing was embedded" in explain_no_picture(EMPTY)


def test_the_ladders_steps_show_in_their_colours() -> None:
    plain = open_png(draw_memory(replace(EMPTY, memory_series=GPU, budget_series=MARKS)))
    oom = BudgetMark(30.0, 8 * GIB, 0, step="oom")
    stepped = open_png(draw_memory(replace(EMPTY, memory_series=GPU, budget_series=[*MARKS, oom])))
    assert count_pixels(stepped, STEP_COLOURS["oom"]) > count_pixels(plain, STEP_COLOURS["oom"])
    assert set(STEP_COLOURS) == set(STEP_NAMES) == set(get_args(StepKind))


def test_the_fullest_series_is_a_small_file() -> None:
    noise = random.Random(1)
    series = [replace(GPU[0], seconds=float(t), used_bytes=noise.randrange(15 * GIB)) for t in range(2000)]
    marks = [
        BudgetMark(
            float(t), noise.randrange(8 * GIB), noise.randrange(64), noise.randrange(8 * GIB), noise.randrange(GIB)
        )
        for t in range(2000)
    ]
    steps = [replace(mark, step="oom") for mark in marks[::10]]
    png = draw_memory(
        replace(EMPTY, memory_series=series, budget_series=sorted(marks + steps, key=lambda m: m.seconds))
    )
    assert png is not None
    assert len(png) < 60_000
    assert to_data_url(png).startswith("data:image/png;base64,iVBORw0KGgo")


@given(
    readings=st.lists(
        st.tuples(st.floats(0, 1e7), st.integers(0, 2**45), st.one_of(st.none(), st.integers(0, 2**45))), max_size=20
    ),
    marks=st.lists(
        st.tuples(
            st.floats(0, 1e7), st.integers(0, 2**45), st.integers(0, 4096), st.sampled_from([None, "oom", "grow"])
        ),
        max_size=20,
    ),
)
@settings(deadline=None, max_examples=8)
def test_no_series_breaks_it(
    readings: list[tuple[float, int, int | None]], marks: list[tuple[float, int, int, StepKind | None]]
) -> None:
    series = [
        MemoryReading(at, "GPU-1", used, 0, used, ours) for at, used, ours in sorted(readings, key=lambda r: r[0])
    ]
    course = [BudgetMark(at, budget, nodes, step=step) for at, budget, nodes, step in sorted(marks, key=lambda m: m[0])]
    png = draw_memory(replace(EMPTY, memory_series=series, budget_series=course))
    assert (png is None) == (not series and all(mark.step is not None for mark in course))
