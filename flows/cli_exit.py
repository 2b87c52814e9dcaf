"""How a command ends: whatever comes out of it becomes a message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import typer

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
