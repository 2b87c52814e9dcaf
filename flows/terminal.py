"""What the command line shows: tables and bars on a terminal, plain lines in a pipe, one JSON document for machines."""

from __future__ import annotations

import io
import json
import logging
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flows.progress import BarsObserver, PlainObserver, RunObserver
from tasks.records import PlanReport, RunSummary, SearchHit
from tasks.report import (
    describe_times,
    find_discrepancies,
    hide_credentials,
    tabulate_documents,
    tabulate_nodes,
    tabulate_partitions,
    tabulate_rejections,
    tabulate_run,
)
from tasks.tables import Column, Table, clean_text, format_rows, to_lines

# More than a screen of them is not read: --json has all.
SHOWN_PARTITIONS = 30
SHOWN_REJECTIONS = 20
# A single row wider than this reads better from top to bottom.
WIDEST_ROW = 6


class Terminal:
    """Two streams and how to write to them.

    `json`: stdout gets exactly one document, at the end, and everything else goes to stderr. `quiet`: results and errors
    only. Colours, bars and boxes appear on a stream that is a terminal, and only there.
    """

    def __init__(
        self, *, json: bool = False, quiet: bool = False, stdout: TextIO | None = None, stderr: TextIO | None = None
    ) -> None:
        self.json = json
        self.quiet = quiet
        # Both are None in a process that was started with them closed.
        self._stdout = stdout or sys.stdout or io.StringIO()
        self._stderr = stderr or sys.stderr or io.StringIO()
        self._out = Console(file=self._stdout, highlight=False)
        self._err = Console(file=self._stderr, highlight=False)
        self.is_rich = self._stdout.isatty() and not json

    @contextmanager
    def watch(self) -> Iterator[RunObserver]:
        """The observer for a run. Bars go to stderr, so that a table on stdout stays clean."""
        if self.quiet:
            yield RunObserver()
        elif self._stderr.isatty() and (self.is_rich or self.json):
            with BarsObserver(self._err) as bars:
                yield bars
        else:
            yield PlainObserver(self._stderr if self.json else self._stdout)

    @contextmanager
    def logging_from(self, level: str) -> Iterator[None]:
        """Log records from `level` on go to stderr, above the bars. Prefect, imported in here, leaves that alone."""
        handler = ConsoleHandler(self._err)
        handler.setLevel(level.upper())
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        if handler.level > logging.INFO:
            # A run's own lines repeat what the observer or the error message shows; the UI has them all.
            handler.addFilter(lambda record: not record.name.startswith(("prefect.flow_runs", "prefect.task_runs")))
        root = logging.getLogger()
        before = root.handlers[:], root.level
        root.handlers[:] = [handler]
        root.setLevel(min(handler.level, logging.WARNING))
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.handlers[:] = before[0]
            root.setLevel(before[1])

    def print_json(self, document: Any) -> None:
        """The one document of --json."""
        self._stdout.write(json.dumps(document, ensure_ascii=False, indent=2, allow_nan=False) + "\n")
        self._stdout.flush()

    def print_tables(self, *tables: Table) -> None:
        """Boxes on a terminal, key=value lines in a pipe; empty tables are left out."""
        for table in tables:
            if not table.rows:
                continue
            if self.is_rich:
                self._out.print(to_rich(table, self._out.width))
                if table.left_out:
                    self._out.print(f"... and {table.left_out:,} more, see --json", style="dim")
            else:
                self.print_lines(to_lines(table))
                if table.left_out:
                    self.print_lines([f"# ... and {table.left_out} more of {table.name}, see --json"])

    def print_lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._stdout.write(clean_text(line) + "\n")
        self._stdout.flush()

    def print_summary(self, summary: RunSummary, off: Sequence[str]) -> None:
        """The end of `ballast ingest`."""
        discrepancies = find_discrepancies(summary, off)
        partitions = limit_rows(tabulate_partitions(summary.partitions), SHOWN_PARTITIONS)
        rejections = tabulate_rejections(summary.rejections, SHOWN_REJECTIONS)
        run = tabulate_run(summary, off)
        if self.quiet:  # else they have been shown as they came
            for note in summary.notes:
                self.print_notice(note)
        if not self.is_rich:
            # The partitions' lines have been written as they came; a quiet pipe gets them here.
            self.print_tables(*([partitions] if self.quiet else []), rejections)
            self.print_tables(tabulate_documents(summary.books), tabulate_nodes(summary.books), run)
            self.print_lines([f"off {line}" for line in discrepancies])
            return
        self.print_tables(partitions, rejections, tabulate_documents(summary.books), tabulate_nodes(summary.books), run)
        self._out.print(Text(f"{summary.device_note}; {describe_times(summary.seconds)}", style="dim"))
        for line in discrepancies:
            self._out.print(Text(f"The books do not close: {line}", style="bold red"))
        if not discrepancies:
            self._out.print(Text("Books closed.", style="green"))

    def print_plan_advice(self, plan: PlanReport) -> None:
        """One sentence for whoever has a card that is too small."""
        if not self.is_rich or not plan.spilled_nodes:
            return
        lighter = [fit.model for fit in plan.models if fit.fits and not fit.spilled_nodes]
        advice = f"; {', '.join(lighter)} would keep every node on the GPU" if lighter else ""
        self._out.print(Text(f"{plan.spilled_nodes:,} nodes would go to the CPU pool{advice}.", style="yellow"))

    def print_hits(self, hits: Sequence[SearchHit]) -> None:
        """Passages with score, document and position; where there is none, a sentence on stderr."""
        if not hits:
            self.print_notice("Nothing found: the collection is empty.")
        if not self.is_rich:
            self.print_lines(to_lines(tabulate_hits(hits)))
            return
        for rank, hit in enumerate(hits, start=1):
            heading = Text(f"{rank}. ", style="bold")
            heading.append(f"{hit.score:.4f}  ", style="cyan")
            heading.append(clean_text(hide_credentials(hit.doc_id)), style="bold")
            heading.append(f"  {describe_position(hit)}", style="dim")
            self._out.print(heading)
            passage = " ".join(clean_text(hit.text).split())
            width = min(self._out.width, 100)
            self._out.print(Text(textwrap.fill(passage, width, initial_indent="   ", subsequent_indent="   ")), "")

    def print_notice(self, message: str) -> None:
        """A sentence on stderr, whatever the mode."""
        self._err.print(Text(message, style="yellow"), soft_wrap=True)

    def show_cursor(self) -> None:
        """Before leaving without unwinding: the bars hide it."""
        self._err.show_cursor()

    def print_error(self, kind: str, message: str) -> None:
        """A readable error on stderr; with --json an object on stdout as well, so that a program needs one stream only."""
        if self.json:
            self.print_json({"error": {"type": kind, "message": message}})
        self._err.print(Text.assemble(("Error: ", "bold red"), clean_text(message)), soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Log records through rich's console, which knows how to write above its own bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.ERROR else "yellow" if record.levelno >= logging.WARNING else "dim"
        self._console.print(Text(clean_text(self.format(record)), style=style), soft_wrap=True)


def to_rich(table: Table, width: int) -> RichTable:
    """A box for a terminal `width` columns wide; a single long row stands upright."""
    rows = [[clean_text(cell) for cell in row] for row in format_rows(table)]
    if len(rows) == 1 and len(table.columns) > WIDEST_ROW:
        upright = RichTable(title=table.title, title_justify="left", box=box.SIMPLE, show_header=False)
        upright.add_column(style="dim")
        upright.add_column(overflow="fold")
        for column, cell in zip(table.columns, rows[0], strict=True):
            upright.add_row(Text(column.label), Text(cell))
        return upright
    labels = [column.label for column in table.columns]
    needed = sum(2 + max(len(cell) for cell in column) for column in zip(labels, *rows, strict=True)) + len(labels)
    is_tight = needed > width
    shown = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in table.columns:
        is_text = column.unit == "text"
        # Where it is tight, a heading's words stand on lines of their own and the width is there for names.
        shown.add_column(
            column.label.replace(" ", "\n") if is_tight else column.label,
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=not is_text,
        )
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def limit_rows(table: Table, limit: int) -> Table:
    """The table's first rows, and how many were left out."""
    return replace(table, rows=table.rows[:limit], left_out=table.left_out + max(len(table.rows) - limit, 0))


def tabulate_hits(hits: Sequence[SearchHit]) -> Table:
    """One row a passage, the passage last."""
    columns = [
        Column("rank", "rank"),
        Column("score", "score", "score"),
        Column("document", "document", "text"),
        Column("position", "position", "text"),
        Column("text", "passage", "text"),
    ]
    rows = [
        (rank, hit.score, hide_credentials(hit.doc_id), describe_position(hit), hit.text)
        for rank, hit in enumerate(hits, start=1)
    ]
    return Table("hit", "Passages", columns, rows)


def describe_position(hit: SearchHit) -> str:
    """Where in the document: characters, and page and heading where the reader found them."""
    parts = [
        f"{label}{clean_text(str(hit.metadata[key]))}"
        for key, label in (("page_label", "page "), ("header_path", ""))
        if str(hit.metadata.get(key) or "").strip("/")  # "/" is LlamaIndex's path of text under no heading
    ]
    if hit.start_char is not None and hit.end_char is not None:
        parts.append(f"chars {hit.start_char}-{hit.end_char}")
    return ", ".join(parts) or "-"
