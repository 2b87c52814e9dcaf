"""`ballast`: the command line. Commands parse, call and print; heavy imports wait until a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_deploy import setup, webhooks
from flows.cli_exit import EPILOG, FAILED, OK, RUN_AGAIN, ExitCodes, stop_on_ctrl_c
from flows.cli_options import (
    Changed,
    ChunkOverlap,
    ChunkTokens,
    Collection,
    Config,
    ConfirmDeletes,
    DataFolder,
    Device,
    GpuMemory,
    Json,
    LogLevel,
    MemoryFraction,
    Model,
    Precision,
    Qdrant,
    Quiet,
    Revision,
    Set,
    SourceArgument,
    SourceName,
    open_terminal,
)
from flows.cli_state import collections, failures, verify
from flows.operations import Operations
from tasks.errors import BallastError, ConfigError

MAX_HITS = 1000

app = typer.Typer(
    name="ballast",
    help="GPU-memory-aware document ingestion for Qdrant.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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


# ---------------------------------------------------------------------------------------------- commands


@app.command(epilog=EPILOG)
def ingest(
    context: typer.Context,
    source: SourceArgument = None,
    collection: Collection = None,
    source_name: SourceName = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    precision: Precision = None,
    qdrant: Qdrant = None,
    data_folder: DataFolder = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = None,
    memory_fraction: MemoryFraction = None,
    confirm_deletes: ConfirmDeletes = False,
    changed: Changed = None,
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
                "source.name": source_name,
                "qdrant.collection": collection,
                "qdrant.url": qdrant,
                "embedding.model": model,
                "embedding.revision": revision,
                "embedding.device": device,
                "embedding.precision": precision,
                "chunking.max_tokens": chunk_tokens,
                "chunking.overlap_tokens": chunk_overlap,
                "budget.fraction": memory_fraction,
                "deletes.confirmed": confirm_deletes or None,
                "data_folder": data_folder,
            },
        )
        with stop_on_ctrl_c(terminal), terminal.watch() as observer, observing(observer):
            is_green = context.ensure_object(Operations).ingest(settings, observer, changed=changed or None)
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
    from tasks.report import tabulate_rejections
    from tasks.settings import build_settings, parse_bytes
    from tasks.tabulate_plan import tabulate_models, tabulate_plan

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
    from tasks.settings import build_settings
    from tasks.tabulate_plan import tabulate_calibration, tabulate_coefficients, tabulate_probes

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


for command in (verify, failures, collections, setup, webhooks):
    app.command(epilog=EPILOG)(command)


def main() -> None:
    """The `ballast` script."""
    app()
