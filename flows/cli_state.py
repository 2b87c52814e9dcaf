"""The commands about what is stored: `ballast verify`, `ballast failures`, `ballast collections`."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_exit import FAILED, OK, RUN_AGAIN, ExitCodes, stop_on_ctrl_c
from flows.cli_options import (
    ChunkOverlap,
    ChunkTokens,
    Collection,
    Config,
    ConfirmDeletes,
    DataFolder,
    Device,
    Json,
    LogLevel,
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
from flows.operations import Operations
from tasks.errors import BallastError


def verify(
    context: typer.Context,
    source: SourceArgument = None,
    collection: Collection = None,
    repair: Annotated[bool, typer.Option("--repair", help="Mend what is off, then look again.")] = False,
    source_name: SourceName = None,
    model: Model = None,
    revision: Revision = None,
    device: Device = None,
    precision: Precision = None,
    qdrant: Qdrant = None,
    data_folder: DataFolder = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = None,
    confirm_deletes: ConfirmDeletes = False,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """Compare the collection's points with its ledger, and with SOURCE where it is given; exit code 1 if anything is off.

    A repair embeds again with the collection's own model and chunking. Without SOURCE it does what needs no text: what is
    then still missing comes with the source's next ingest.
    """
    from tasks.json_ready import to_json_ready
    from tasks.observe import observing
    from tasks.settings import build_settings, has_source
    from tasks.tabulate_state import tabulate_findings, tabulate_verify

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
                "deletes.confirmed": confirm_deletes or None,
                "data_folder": data_folder,
            },
            needs_source=False,
        )
        with stop_on_ctrl_c(terminal), terminal.watch() as observer, observing(observer):
            context.ensure_object(Operations).verify(
                settings, observer, with_source=has_source(settings), repair=repair
            )
        report = observer.verified
        if report is None:
            raise BallastError("The flow ended without its report: see the run in Prefect's UI, or --log-level info.")
        if json:
            terminal.print_json(to_json_ready(report))
        else:
            terminal.print_tables(tabulate_findings(report), tabulate_verify(report))
            for note in report.notes:
                terminal.print_notice(note)
        raise typer.Exit(OK if report.is_clean else FAILED)


def failures(
    context: typer.Context,
    collection: Collection = None,
    retry: Annotated[bool, typer.Option("--retry", help="Let the next run try the parked ones again.")] = False,
    qdrant: Qdrant = None,
    data_folder: DataFolder = None,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """List the documents that the last runs could not use, with the reason; parked ones are not tried any more."""
    from tasks.json_ready import to_json_ready
    from tasks.settings import build_settings
    from tasks.tabulate_state import tabulate_failures

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal):
        settings = build_settings(
            config_file=config,
            overrides=overrides or (),
            flags={"qdrant.collection": collection, "qdrant.url": qdrant, "data_folder": data_folder},
            needs_source=False,
        )
        found = context.ensure_object(Operations).list_failures(settings.qdrant, settings.data_folder, retry=retry)
        if json:
            terminal.print_json(to_json_ready(found))
            return
        if not found:
            terminal.print_notice("No failed documents.")
        terminal.print_tables(tabulate_failures(found))


def collections(
    context: typer.Context,
    collection: Collection = None,
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="Remove all that the collection's name does not point to.")
    ] = False,
    qdrant: Qdrant = None,
    data_folder: DataFolder = None,
    config: Config = None,
    overrides: Set = None,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """List the physical collections behind each name: the live one, old ones, and one that is being built.

    --drop-old is about one collection, `documents` unless --collection names another.
    """
    from tasks.json_ready import to_json_ready
    from tasks.settings import build_settings
    from tasks.tabulate_state import tabulate_collections

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal):
        settings = build_settings(
            config_file=config,
            overrides=overrides or (),
            flags={"qdrant.collection": collection, "qdrant.url": qdrant, "data_folder": data_folder},
            needs_source=False,
        )
        is_named = "collection" in settings.qdrant.model_fields_set
        name = settings.qdrant.collection if is_named or drop_old else None
        found = context.ensure_object(Operations).list_collections(
            settings.qdrant, settings.data_folder, spool=settings.spool, name=name, drop_old=drop_old
        )
        if json:
            terminal.print_json(to_json_ready(found))
            return
        if not found:
            terminal.print_notice("No collections.")
        terminal.print_tables(tabulate_collections(found))
