"""Observers of a run: bars on a terminal, one key=value line an event in a pipe."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from tasks.observe import SilentObserver
from tasks.records import LadderStep, Partition, PartitionReport, RunSummary, VerifyReport
from tasks.report import hide_credentials, tabulate_partitions
from tasks.tables import clean_text, format_bytes, quote_value, to_lines

# A partition that spills a hundred nodes one by one would drown everything else; the tables have every step.
STEPS_SHOWN_PER_KIND = 3


class RunObserver(SilentObserver):
    """Shows nothing and remembers how the run ended."""

    def __init__(self) -> None:
        self.finished: tuple[RunSummary, tuple[str, ...]] | None = None
        self.verified: VerifyReport | None = None

    def run_finished(self, summary: RunSummary, off: Sequence[str]) -> None:
        self.finished = (summary, tuple(off))

    def verify_finished(self, report: VerifyReport) -> None:
        self.verified = report


class PlainObserver(RunObserver):
    """One line an event: nothing moves, nothing has a colour."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lock = threading.Lock()
        self._steps = StepFilter()

    def stage(self, name: str, detail: str = "") -> None:
        self._write(f"stage name={quote_value(name)} detail={quote_value(hide_credentials(detail))}")

    def ladder_step(self, partition_index: int, step: LadderStep) -> None:
        if self._steps.should_show(partition_index, step):
            self._write(
                f"ladder partition={partition_index} step={step.kind} nodes_before={step.nodes_before} "
                f"nodes_after={step.nodes_after} budget_after_bytes={step.budget_after_bytes} "
                f"free_bytes={step.free_bytes} reason={quote_value(step.reason)}"
            )

    def partition_done(self, report: PartitionReport) -> None:
        for line in to_lines(tabulate_partitions([report])):
            self._write(line)

    def note(self, message: str) -> None:
        self._write(f"note {quote_value(message)}")

    def _write(self, line: str) -> None:
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()


class BarsObserver(RunObserver):
    """A spinner with the stage, a bar for the source and one for the nodes, and the ladder's steps as they happen."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._lock = threading.Lock()
        self._steps = StepFilter()
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}", style="dim"),
            console=console,
            transient=True,
        )
        self._read = self._progress.add_task("read and chunk", total=1.0, visible=False, detail="")
        self._embed = self._progress.add_task("embed", total=None, visible=False, detail="")
        self._stage = self._progress.add_task("starting", total=None, detail="")
        self._done: dict[int, int] = {}
        self._spooled = 0
        self._fraction = 0.0
        self._tokens = 0
        self._since: float | None = None

    def __enter__(self) -> BarsObserver:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, name: str, detail: str = "") -> None:
        # Brackets in a path are no markup: rich would read "[a]" as a tag.
        shown = clean_text(hide_credentials(detail))
        self._progress.update(self._stage, description=name, detail=shown.replace("[", r"\["), visible=True)

    def partition_spooled(self, partition: Partition) -> None:
        with self._lock:
            self._spooled += partition.nodes
            self._fraction = max(self._fraction, min(partition.source_fraction, 1.0))
            self._progress.update(
                self._read, completed=self._fraction, visible=True, detail=f"{self._spooled:,} nodes so far"
            )
            self._progress.update(self._stage, visible=False)
            self._show_embedded("")

    def micro_batch_done(
        self, partition_index: int, nodes_done: int, nodes_total: int, tokens: int, device: str
    ) -> None:
        with self._lock:
            if self._since is None:
                self._since = time.monotonic()
            else:  # the first micro-batch only starts the clock
                self._tokens += tokens
            self._done[partition_index] = min(nodes_done, nodes_total)
            self._show_embedded(device)

    def ladder_step(self, partition_index: int, step: LadderStep) -> None:
        if self._steps.should_show(partition_index, step):
            self._print(
                f"partition {partition_index}: {step.kind}, batch {step.nodes_before} -> {step.nodes_after}, budget "
                f"{format_bytes(step.budget_after_bytes)}, {format_bytes(step.free_bytes)} free: {step.reason}",
                "yellow",
            )

    def partition_done(self, report: PartitionReport) -> None:
        with self._lock:
            self._done[report.index] = report.nodes
            self._show_embedded(report.device)

    def note(self, message: str) -> None:
        self._print(message, "cyan")

    def _show_embedded(self, device: str) -> None:
        elapsed = time.monotonic() - self._since if self._since is not None else 0.0
        rate = f"{self._tokens / elapsed:,.0f} tokens/s on {device}" if elapsed and device else ""
        self._progress.update(
            self._embed,
            completed=sum(self._done.values()),
            # The source is read lazily: how many nodes there will be is what its share read so far says.
            total=self._spooled / self._fraction if self._fraction else None,
            visible=True,
        )
        if rate:
            self._progress.update(self._embed, detail=rate)

    def _print(self, text: str, style: str) -> None:
        self._console.print(Text(clean_text(text), style=style))


class StepFilter:
    """Which of the ladder's steps are news: not the growing back, and of each kind only the first few a partition."""

    def __init__(self) -> None:
        self._seen: Counter[tuple[int, str]] = Counter()
        self._lock = threading.Lock()

    def should_show(self, partition_index: int, step: LadderStep) -> bool:
        if step.kind == "grow":
            return False
        with self._lock:
            self._seen[partition_index, step.kind] += 1
            return self._seen[partition_index, step.kind] <= STEPS_SHOWN_PER_KIND
