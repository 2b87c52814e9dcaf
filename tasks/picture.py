"""A run's device memory over time, against its budget, as a picture for its report. A pure function of records."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tasks.records import BudgetMark, MemoryReading, RunSummary, StepKind
from tasks.tables import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Drawn = TypeVar("Drawn", MemoryReading, BudgetMark)

# Wide enough for the column that the UI gives a report (690 pixels), small enough for a row of its database.
WIDTH_IN, HEIGHT_IN, DPI = 8.0, 5.2, 110
COLOURS = 128

# A card of its own, so that it reads the same on the UI's dark and light pages.
PAPER, INK, FAINT = "#fbfbfd", "#23272f", "#9aa2af"
USED, OURS, BUDGET, PREDICTED, PEAK, BATCH = "#b8c4d6", "#4573b8", "#d9822b", "#8a7bc8", "#2f9e6e", "#7a8291"
STEP_COLOURS: Mapping[StepKind, str] = {
    "oom": "#c92a2a",
    "exhausted": "#c92a2a",
    "restart": "#a61e4d",
    "spill": "#9c36b5",
    "shrink": "#e67700",
    "redo_fp32": "#1971c2",
    "grow": "#2b8a3e",
}
STEP_NAMES: Mapping[StepKind, str] = {
    "oom": "out of memory",
    "exhausted": "device given up",
    "restart": "process replaced",
    "spill": "spill to the CPU pool",
    "shrink": "budget shrinks",
    "redo_fp32": "redone in fp32",
    "grow": "budget grows back",
}


def load_drawing() -> None:
    """What draw_memory() imports, a second or two: meant for a thread that has time, while a run embeds."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def draw_memory(summary: RunSummary) -> bytes | None:
    """A PNG: above, memory in use by all and by this run; below, a micro-batch's budget, need and size. None: nothing known.

    The two share their time and not their scale: a budget is what a micro-batch may take on top of the weights, and on a
    large machine a thousandth of its memory. Steps of the ladder cut through both.
    """
    series, marks = summary.memory_series, summary.budget_series
    planned = [mark for mark in marks if mark.step is None]
    if not series and not planned:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [bool(series), bool(planned)]
    height = HEIGHT_IN if all(rows) else 0.62 * HEIGHT_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=DPI, facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(sum(rows), 1, sharex=True, squeeze=False)
    axes: list[Axes] = list(grid[:, 0])
    # By hand: a layout engine draws it all twice, and takes most of the second that this costs.
    figure.subplots_adjust(left=0.075, right=0.925, top=1 - 0.25 / height, bottom=1.05 / height, hspace=0.48)
    end_s = max([reading.seconds for reading in series] + [mark.seconds for mark in marks] + [1.0])
    if series:
        _draw_readings(axes[0], series, summary.device)
    if planned:
        _draw_budget(axes[-1], planned, end_s)
    _draw_steps(axes, marks)
    for axis in axes:
        _dress(axis)
        axis.set_xlim(0, 1.01 * end_s)
        axis.grid(color=FAINT, alpha=0.18, linewidth=0.6)
        # Below the axis and its labels, clear of every line.
        below = -0.30 if axis is axes[-1] else -0.12
        handles, labels = axis.get_legend_handles_labels()
        named = dict(zip(labels, handles, strict=True))  # once, however many workers
        axis.legend(
            named.values(),
            named.keys(),
            loc="upper center",
            bbox_to_anchor=(0.5, below),
            ncols=4,
            fontsize=7,
            frameon=False,
            labelcolor=INK,
        )
    axes[-1].set_xlabel("seconds since the device was ready", color=INK, fontsize=8)
    return _to_png(canvas)


def to_data_url(png: bytes) -> str:
    """The picture as Markdown and HTML take it inline."""
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"


def explain_no_picture(summary: RunSummary) -> str:
    """Why draw_memory() gave nothing, for the report."""
    if not summary.partitions:
        return "No picture of the memory: nothing was embedded."
    return "No picture of the memory: no readings were taken where this run embedded."


def _draw_readings(axis: Axes, series: Sequence[MemoryReading], device: str) -> None:
    by_device: dict[str, list[MemoryReading]] = {}
    for reading in series:
        by_device.setdefault(reading.device_uuid, []).append(reading)
    unit, scale = _choose_unit(max(reading.used_bytes for reading in series))
    top = 0.0
    for name, readings in by_device.items():
        total = max(reading.total_bytes for reading in readings) / scale
        where = "" if len(by_device) == 1 else f", {name[:12]}"
        for own in _split_by_worker(readings):
            at = [reading.seconds for reading in own]
            used = [reading.used_bytes / scale for reading in own]
            axis.fill_between(at, used, color=USED, alpha=0.55, linewidth=0)
            axis.plot(at, used, color=USED, linewidth=1.2, label=f"used by all{where}")
            ours = [(r.seconds, r.process_bytes / scale) for r in own if r.process_bytes is not None]
            if ours:
                label = f"used by this run{where}"
                axis.plot(*zip(*ours, strict=True), color=OURS, linewidth=1.6, label=label)
        most = max(reading.used_bytes for reading in readings) / scale
        top = max(top, most)
        # A total far above all that was used would press the course flat: then it is told, not drawn.
        if total <= 3 * most:
            axis.axhline(total, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), label=f"in all: {total:,.1f} {unit}")
            top = max(top, total)
        else:
            axis.plot(
                [],
                [],
                color=FAINT,
                linewidth=1,
                linestyle=":",
                label=f"in all: {format_bytes(total * scale)}, far above",
            )
    axis.set_ylim(0, 1.06 * top or 1.0)
    host = set(by_device) == {"host"}
    axis.set_title("Memory of the host" if host else f"Memory of {device}", loc="left", color=INK, fontsize=9)
    axis.set_ylabel(unit, color=INK, fontsize=8)


def _draw_budget(axis: Axes, marks: Sequence[BudgetMark], end_s: float) -> None:
    known = [mark.budget_bytes for mark in marks]
    needs = [need for mark in marks for need in (mark.predicted_bytes, mark.peak_bytes) if need is not None]
    # A budget of gigabytes over micro-batches of megabytes: what they took is what there is to see.
    is_far = bool(needs) and min(known) > 20 * max(needs)
    unit, scale = _choose_unit(max(needs) if is_far else max(known))
    workers = _split_by_worker(marks)
    # A worker's last mark holds to the end of the picture, unless others came after it.
    courses = [
        [*(mark.seconds for mark in own), 1.01 * end_s if len(workers) == 1 else own[-1].seconds] for own in workers
    ]
    if is_far:
        label = f"budget of a micro-batch: {format_bytes(min(known))} or more, far above"
        axis.plot([], [], color=BUDGET, linewidth=1.6, label=label)
    else:
        axis.plot([], [], color=BUDGET, linewidth=1.6, label="budget of a micro-batch")
        for at, own in zip(courses, workers, strict=True):
            steps = [mark.budget_bytes / scale for mark in own]
            axis.step(at, [*steps, steps[-1]], where="post", color=BUDGET, linewidth=1.6)
    for needed, colour, label in (
        ([(m.seconds, m.predicted_bytes) for m in marks], PREDICTED, "predicted need"),
        ([(m.seconds, m.peak_bytes) for m in marks], PEAK, "measured peak"),
    ):
        points = [(seconds, need / scale) for seconds, need in needed if need is not None]
        if points:
            axis.plot(*zip(*points, strict=True), ".", color=colour, markersize=4, label=label, zorder=3)
    axis.set_ylim(0, 1.12 * max([*needs, *([] if is_far else known)], default=0) / scale or 1.0)
    axis.set_ylabel(f"{unit}, on top of the weights", color=INK, fontsize=8)
    axis.set_title("Micro-batches: budget, need and size", loc="left", color=INK, fontsize=9)
    batches = axis.twinx()
    for at, own in zip(courses, workers, strict=True):
        sizes = [float(mark.batch_nodes) for mark in own]
        batches.step(at, [*sizes, sizes[-1]], where="post", color=BATCH, linewidth=0.8, alpha=0.5)
    batches.set_ylim(0, 1.15 * max(mark.batch_nodes for mark in marks) or 1.0)
    batches.set_ylabel("nodes in a micro-batch", color=BATCH, fontsize=8)
    _dress(batches)
    axis.plot([], [], color=BATCH, linewidth=0.9, label="nodes in a micro-batch (right)")
    axis.set_zorder(batches.get_zorder() + 1)
    axis.patch.set_visible(False)


def _split_by_worker(each_one: Sequence[Drawn]) -> Sequence[Sequence[Drawn]]:
    """In the order in which the workers' runs began: a line through several of them would jump to and fro."""
    found: dict[int, list[Drawn]] = {}
    for each in each_one:
        found.setdefault(each.worker, []).append(each)
    return list(found.values())


def _draw_steps(axes: Sequence[Axes], marks: Sequence[BudgetMark]) -> None:
    by_kind: dict[StepKind, list[float]] = {}
    for mark in marks:
        if mark.step is not None:
            by_kind.setdefault(mark.step, []).append(mark.seconds)
    for kind, times in by_kind.items():
        colour = STEP_COLOURS[kind]
        for number, axis in enumerate(axes):
            for seconds in times:
                axis.axvline(seconds, color=colour, linewidth=0.8, alpha=0.55, zorder=1)
            if number == len(axes) - 1:
                axis.plot([], [], color=colour, linewidth=2.4, label=f"{STEP_NAMES[kind]} ({len(times)})")


def _dress(axis: Axes) -> None:
    axis.set_facecolor("none")
    axis.tick_params(colors=INK, labelsize=7)
    for side in axis.spines.values():
        side.set_color(FAINT)
        side.set_linewidth(0.7)


def _choose_unit(largest_bytes: float) -> tuple[str, int]:
    return ("GiB", GIB) if largest_bytes >= GIB / 2 else ("MiB", MIB)


def _to_png(canvas: Any) -> bytes:
    """As few colours as it needs: a quarter of the bytes that full colour takes."""
    from PIL import Image

    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3])
    png = io.BytesIO()
    picture.quantize(colors=COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        png, format="PNG", optimize=True
    )
    return png.getvalue()
