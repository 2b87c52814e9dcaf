"""The commands of a deployment: set a Prefect server up, and receive webhooks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.cli_exit import ExitCodes
from flows.cli_options import Json, LogLevel, Quiet, open_terminal


def setup(
    prefect_file: Annotated[
        Path | None, typer.Option("--prefect-file", help="The deployments.", show_default="deployments/prefect.yaml")
    ] = None,
    pools_file: Annotated[
        Path | None, typer.Option("--pools-file", help="The work pools.", show_default="deployments/pools.yaml")
    ] = None,
    automations_file: Annotated[
        Path | None,
        typer.Option("--automations-file", help="The automations.", show_default="deployments/automations.yaml"),
    ] = None,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a server that is starting.")] = 60.0,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Set limits that were changed on the server back to the file's, and automations on."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the files and the server, change nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    log_level: LogLevel = "warning",
) -> None:
    """Make work pools, limits, blocks, deployments and automations on the Prefect server; can be run again.

    Sites set BALLAST_SOURCE, BALLAST_SPOOL, BALLAST_DATA_FOLDER and QDRANT_URL; QDRANT_API_KEY and BALLAST_NOTIFY_URL, where
    they are set, become blocks that the server keeps encrypted.
    """
    import os

    from flows import setup_files
    from flows.api_server import configure_client

    terminal = open_terminal(json=json, quiet=quiet)
    with terminal.logging_from(log_level), ExitCodes(terminal, if_interrupted=" Run it again to go on."):
        configure_client()
        from flows.setup_server import SetupFiles, set_up_server
        from flows.setup_steps import tabulate_setup, to_document

        files = SetupFiles(
            prefect=prefect_file or setup_files.PREFECT_FILE,
            pools=pools_file or setup_files.POOLS_FILE,
            automations=automations_file or setup_files.AUTOMATIONS_FILE,
        )
        steps = list(set_up_server(files, os.environ, wait_s=wait, force=force, dry_run=dry_run))
        if json:
            terminal.print_json(to_document(steps, dry_run=dry_run))
        else:
            terminal.print_tables(*tabulate_setup(steps))
            if dry_run:
                terminal.print_notice("Nothing was changed: --dry-run.")


def webhooks(
    config: Annotated[Path, typer.Option("--config", help="The receiver's configuration.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 4300,
    log_level: LogLevel = "info",
) -> None:
    """Receive signed webhooks and start the ingest of what they say has changed."""
    terminal = open_terminal(json=False, quiet=False)
    with terminal.logging_from(log_level), ExitCodes(terminal):
        from deployments.receiver.server import serve

        serve(config, host, port)
