"""The flags that several commands share. Most are a knob of tasks.config; unset ones leave it to the file or the default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from flows.terminal import Terminal

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
SourceName = Annotated[
    str | None, typer.Option(help="What its documents go by in the collection.", show_default="the source's URI")
]
Changed = Annotated[
    list[str] | None,
    typer.Option("--changed", metavar="PATH", help="Look at this file or folder of SOURCE only; as often as wanted."),
]
ConfirmDeletes = Annotated[bool, typer.Option("--confirm-deletes", help="Delete all that has left the source.")]


def open_terminal(*, json: bool, quiet: bool) -> Terminal:
    # Not above: `ballast --help` needs neither numpy nor pydantic, and answers in half the time.
    from flows.terminal import Terminal

    return Terminal(json=json, quiet=quiet)
