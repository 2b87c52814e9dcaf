"""Which names a trigger may give as changed documents: doc ids of a source, and nothing that leads out of it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tasks.errors import ConfigError

# PATH_MAX on Linux with its final NUL; an S3 key has at most 1,024 bytes.
MAX_PATH_BYTES = 4095
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:{1,2}/")
_SHOWN = 120


def check_changed_path(path: str) -> str | None:
    """None where `path` can be a document's id: relative to the source's root, parts joined by "/". Else why not.

    Any name that a file can have is allowed: other scripts, spaces, leading dots, colons, line ends. Refused: what is
    absolute, climbs (..), has a scheme, a backslash, a NUL or an empty part, is too long, or has no UTF-8 encoding.
    """
    if not path:
        return "is empty. Name a file below the source's root, as guide/install.md"
    try:
        size = len(path.encode())
    except UnicodeEncodeError:
        return "has a lone surrogate, so it has no UTF-8 encoding. Rename the file, or name another"
    if size > MAX_PATH_BYTES:
        return f"has {size:,} bytes; the limit is {MAX_PATH_BYTES:,}. No file system opens a longer name"
    if "\0" in path:
        return "has a NUL in it, which no file name can have. Leave it out"
    if "\\" in path:
        return "has a backslash in it. Write / between folders; a file with a backslash in its name can't be named here"
    if _SCHEME.match(path):
        return "is a URL. Only documents of the configured source can be named, relative to its root"
    if path.startswith("/"):
        return "is absolute. Name it relative to the source's root"
    for part in path.split("/"):
        if not part:
            return "has an empty part: // in it, or / at its end. Name one file, not a folder"
        if part in (".", ".."):
            return f"has {part} as a part. Name the file as the source lists it"
    return None


def require_changed_paths(paths: Iterable[str]) -> list[str]:
    """The paths, each once, sorted. Raises ConfigError for the first that check_changed_path() refuses."""
    unique = sorted(set(paths))
    for path in unique:
        reason = check_changed_path(path)
        if reason is not None:
            raise ConfigError(f"The changed path {show_path(path)} {reason}.")
    return unique


def show_path(path: str) -> str:
    """For messages and logs: quoted ASCII on one line, shortened."""
    shown = ascii(path[:_SHOWN])
    return shown if len(path) <= _SHOWN else f"{shown}..."
