"""`ballast`: the command line. Commands parse, call and print; heavy imports wait until a command runs."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.operations import Operations
from tasks.errors import (
    ApiUnavailable,
    BallastError,
    ConfigError,
    DeviceError,
    ModelError,
    SourceError,
    StoreLocked,
    StoreMismatch,
    StoreMissing,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from flows.terminal import Terminal

OK = 0
FAILED = 1
USAGE = 2
REFUSED = 3
UNAVAILABLE = 4
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130

MAX_HITS = 1000
RUN_AGAIN = " What is stored stays; run it again to go on."
# What a disk does to any program: no space, no quota, read-only, no permission, broken.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})

EPILOG = (
    "Exit codes: 0 all fine; 1 the run failed, documents failed, the books don't close, or a search found nothing; "
    "2 wrong usage or configuration; 3 refused before any work (no such collection, "
    "or one of another model, locked folder, unreadable source, unknown model); 4 a service or device is not available, "
    "try again; 70 a bug in Ballast; 130 interrupted. "
    "QDRANT_URL and QDRANT_API_KEY choose a Qdrant server, PREFECT_API_URL a Prefect server; without them both are "
    "embedded, in the data folder."
)

app = typer.Typer(
    name="ballast",
    help="GPU-memory-aware document ingestion for Qdrant.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class ExitCodes:
    """The outermost door of a command: turns whatever comes out into a message and an exit code.

    Ballast's own errors are one readable message, no traceback. Anything else is a bug and shown whole, with exit 70.
    """

    def __init__(self, terminal: Terminal, *, if_interrupted: str = "") -> None:
        self._terminal = terminal
        self._if_interrupted = if_interrupted

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        match error:
            case (
                None | typer.Exit() | typer.Abort() | BrokenPipeError()
            ):  # typer ends quietly where nobody reads any more
                return
            case BallastError():
                self._terminal.print_error(type(error).__name__, str(error))
                raise typer.Exit(exit_code_of(error)) from None
            case KeyboardInterrupt():
                self._terminal.print_error("Interrupted", f"interrupted.{self._if_interrupted}")
                raise typer.Exit(INTERRUPTED) from None
            case OSError() if error.errno in DISK_ERRORS:
                where = f" ({error.filename})" if error.filename else ""
                self._terminal.print_error(
                    type(error).__name__,
                    f"{error.strerror}{where}. Make room or give the permission, or name another --data-folder; "
                    "then run it again.",
                )
                raise typer.Exit(FAILED) from None
            case Exception():
                traceback.print_exception(error)
                self._terminal.print_error(type(error).__name__, f"this is a bug in Ballast: {error}")
                raise typer.Exit(BUG) from None


@contextmanager
def stop_on_ctrl_c(terminal: Terminal) -> Iterator[None]:
    """The first Ctrl-C lets the run end in order, which takes as long as the partition on the device; the second ends now.

    Ending now is safe: the worker processes and the embedded API end with this process, and the next run goes on where
    this one was.
    """

    def stop(_signal: int, _frame: object) -> None:
        if asked:
            terminal.show_cursor()
            os._exit(INTERRUPTED)
        asked.append(True)
        terminal.print_notice("Stopping after the micro-batch on the device. Ctrl-C again to stop at once.")
        raise KeyboardInterrupt

    asked: list[bool] = []
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def exit_code_of(error: BallastError) -> int:
    """1 where nothing says otherwise."""
    match error:
        case ConfigError():
            return USAGE
        case StoreMismatch() | StoreMissing() | StoreLocked() | SourceError() | ModelError():
            return REFUSED
        case StoreUnavailable() | DeviceError() | ApiUnavailable():
            return UNAVAILABLE
    return FAILED


# ---------------------------------------------------------------------------------------------- options

SourceArgument = Annotated[
    str | None,
    typer.Argument(metavar="SOURCE", help="A file, a folder, a glob or an fsspec URL.", show_default=False),
]
Collection = Annotated[str | None, typer.Option(help="Collection name.", show_default="documents")]
Model = Annotated[str | None, typer.Option(help="A model id on the hub, or a folder.", show_default="BAAI/bge-m3")]
Revision = Annotated[str | None, typer.Option(help="The hub's commit, branch or tag.")]
Device = Annotated[str | None, typer.Option(help="auto, cuda:N or cpu.", show_default="auto")]
Precision = Annotated[Literal["auto", "fp32", "fp16", "bf16"] | None, typer.Option(help="Of the weights.")]
Qdrant = Annotated[
    str | None, typer.Option("--qdrant", metavar="URL", help="A Qdrant server.", show_default="QDRANT_URL, or embedded")
]
DataFolder = Annotated[str | None, typer.Option(help="Embedded Qdrant, spool, fits.", show_default=".ballast")]
ChunkTokens = Annotated[int | None, typer.Option(help="Tokens of a node at most.", show_default="up to 512")]
ChunkOverlap = Annotated[int | None, typer.Option(help="Tokens that a node repeats.", show_default="32")]
MemoryFraction = Annotated[float | None, typer.Option(help="Share of the device this run may use.", show_default="1")]
GpuMemory = Annotated[str | None, typer.Option(help="Plan for a device of this size, e.g. 15GiB.")]
Config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML; tables as in the knobs' list.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any knob: chunking.max_tokens=256.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, the rest on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors only.")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Log lines on stderr.")]


def print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ballast {version('ballast')}")
        raise typer.Exit


@app.callback()
def describe(
    show_version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True)] = False,
) -> None:
    """GPU-memory-aware document ingestion for Qdrant: no CUDA out of memory, no lost document, no batch size to choose."""


def open_terminal(*, json: bool, quiet: bool) -> Terminal:
    # Not above: `ballast --help` needs neither numpy nor pydantic, and answers in half the time.
    from flows.terminal import Terminal

    return Terminal(json=json, quiet=quiet)


# ---------------------------------------------------------------------------------------------- commands


@app.command(epilog=EPILOG)
def ingest(
    context: typer.Context,
    source: SourceArgument = None,
    collection: Collection = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    precision: Precision = None,
    qdrant: Qdrant = None,
    data_folder: DataFolder = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = None,
    memory_fraction: MemoryFraction = None,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """Read, chunk, embed and store SOURCE; end with closed books."""
    from tasks.json_ready import summary_to_json
    from tasks.observe import observing
    from tasks.settings import build_settings

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal, if_interrupted=RUN_AGAIN):
        settings = build_settings(
            config_file=config,
            overrides=overrides or (),
            flags={
                "source.uri": source,
                "qdrant.collection": collection,
                "qdrant.url": qdrant,
                "embedding.model": model,
                "embedding.revision": revision,
                "embedding.device": device,
                "embedding.precision": precision,
                "chunking.max_tokens": chunk_tokens,
                "chunking.overlap_tokens": chunk_overlap,
                "budget.fraction": memory_fraction,
                "data_folder": data_folder,
            },
        )
        with stop_on_ctrl_c(terminal), terminal.watch() as observer, observing(observer):
            is_green = context.ensure_object(Operations).ingest(settings, observer)
        if observer.finished is None:
            raise BallastError("The flow ended without its books: see the run in Prefect's UI, or --log-level info.")
        summary, off = observer.finished
        if json:
            terminal.print_json(summary_to_json(summary, off))
        else:
            terminal.print_summary(summary, off)
        raise typer.Exit(OK if is_green else FAILED)


@app.command(epilog=EPILOG)
def plan(
    context: typer.Context,
    source: SourceArgument = None,
    gpu_memory: GpuMemory = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    precision: Precision = None,
    data_folder: DataFolder = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = None,
    memory_fraction: MemoryFraction = None,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """Say what an ingest of SOURCE would do and whether it fits; nothing is embedded or written."""
    from tasks.json_ready import to_json_ready
    from tasks.observe import observing
    from tasks.report import tabulate_models, tabulate_plan, tabulate_rejections
    from tasks.settings import build_settings, parse_bytes

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal):
        settings = build_settings(
            config_file=config,
            overrides=overrides or (),
            flags={
                "source.uri": source,
                "embedding.model": model,
                "embedding.revision": revision,
                "embedding.device": device,
                "embedding.precision": precision,
                "chunking.max_tokens": chunk_tokens,
                "chunking.overlap_tokens": chunk_overlap,
                "budget.fraction": memory_fraction,
                "data_folder": data_folder,
            },
        )
        gpu_memory_bytes = None if gpu_memory is None else parse_bytes("--gpu-memory", gpu_memory)
        with terminal.watch() as observer, observing(observer):
            report = context.ensure_object(Operations).plan(settings, gpu_memory_bytes)
        if json:
            terminal.print_json(to_json_ready(report))
        else:
            terminal.print_tables(
                tabulate_rejections(report.rejections), tabulate_plan(report), tabulate_models(report)
            )
            terminal.print_plan_advice(report)


@app.command(epilog=EPILOG)
def search(
    context: typer.Context,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to look for, in plain words.")],
    collection: Collection = None,
    limit: Annotated[int, typer.Option(help="Passages at most, 1 to 1000.")] = 5,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    precision: Precision = None,
    qdrant: Qdrant = None,
    data_folder: DataFolder = None,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """Print the passages nearest to QUESTION; exit code 1 where there is none."""
    from tasks.json_ready import to_json_ready
    from tasks.settings import build_settings

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal):
        settings = build_settings(
            config_file=config,
            overrides=overrides or (),
            flags={
                "qdrant.collection": collection,
                "qdrant.url": qdrant,
                "embedding.model": model,
                "embedding.revision": revision,
                "embedding.device": device,
                "embedding.precision": precision,
                "data_folder": data_folder,
            },
            needs_source=False,
        )
        if not 1 <= limit <= MAX_HITS:  # not by typer: --json gets its document
            raise ConfigError(f"--limit {limit}: it can be 1 to {MAX_HITS}.")
        hits = context.ensure_object(Operations).search(
            question,
            embedding=settings.embedding,
            qdrant=settings.qdrant,
            data_folder=settings.data_folder,
            limit=limit,
        )
        if json:
            terminal.print_json(to_json_ready(hits))
        else:
            terminal.print_hits(hits)
        raise typer.Exit(OK if hits else FAILED)


@app.command(epilog=EPILOG)
def calibrate(
    context: typer.Context,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    precision: Precision = None,
    data_folder: DataFolder = None,
    memory_fraction: MemoryFraction = None,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """Probe the device and store the fitted memory model; print its error on held-back probes."""
    from tasks.json_ready import to_json_ready
    from tasks.observe import observing
    from tasks.report import tabulate_calibration, tabulate_coefficients, tabulate_probes
    from tasks.settings import build_settings

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal):
        settings = build_settings(
            config_file=config,
            overrides=overrides or (),
            flags={
                "embedding.model": model,
                "embedding.revision": revision,
                "embedding.device": device,
                "embedding.precision": precision,
                "budget.fraction": memory_fraction,
                "data_folder": data_folder,
            },
            needs_source=False,
        )
        with terminal.watch() as observer, observing(observer):
            report = context.ensure_object(Operations).calibrate(
                settings.embedding, settings.budget, settings.data_folder
            )
        if json:
            terminal.print_json(to_json_ready(report))
        else:
            terminal.print_tables(tabulate_calibration(report), tabulate_coefficients(report), tabulate_probes(report))


def main() -> None:
    """The `ballast` script."""
    app()
