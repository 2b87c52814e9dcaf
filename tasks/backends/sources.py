"""Document sources: list a file, a folder, a glob or an fsspec URL, then hand out what is in it, in a fixed order."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from tasks.backends.changed_listing import ChangedPaths, list_changed
from tasks.backends.filesystem import (
    connect,
    explain_io_error,
    io_errors,
    is_local,
    is_web_refusal,
)
from tasks.backends.listing import FORMATS, TABLES, Listed, Listing, start_listing
from tasks.backends.tables import read_table
from tasks.backends.texts import is_encoding
from tasks.config import SourceSettings
from tasks.errors import ConfigError, SourceError
from tasks.records import Document, FileRef, Rejection
from tasks.url_secrets import hide_secrets, remove_secrets


class Source:
    """What was listed: names and sizes, no contents. Iterates as often as wanted; tables are read row by row meanwhile.

    Yields a FileRef for a file that holds one document (read_file reads it, in another process), a Document for a row
    of a table, and a Rejection for what is not read. Sorted by doc_id, rows in their file's order.
    """

    def __init__(
        self,
        name: str,
        key: str,
        fs: Any,
        entries: Listed,
        settings: SourceSettings,
        changed: ChangedPaths | None = None,
    ) -> None:
        self.name = name  # for messages
        self.key = key  # what tells its documents from those of another source in the same collection
        self.changed = changed  # the documents that were looked at; None: all of the source
        self._fs = fs
        self._entries = entries
        self._settings = settings

    def total_bytes(self) -> int:
        """Sizes of all files listed, rejected ones too: what the source_bytes of everything yielded add up to."""
        return self._entries.total_bytes()

    def __iter__(self) -> Iterator[FileRef | Document | Rejection]:
        for entry in self._entries:
            if isinstance(entry, FileRef) and entry.format in TABLES:
                yield from read_table(self._fs, entry, self._settings)
            else:
                yield entry


def open_source(
    settings: SourceSettings, *, leave_out: Collection[str] = (), changed: Collection[str] | None = None
) -> Source:
    """List it. Raises SourceError: not there, not listable, nothing to read in it; ConfigError: format, encoding.

    `leave_out`: local folders that are not part of the source wherever they lie, such as the run's own data folder.
    `changed`: doc ids, without any that leads out of the source (policy.changed_paths); only what the source has of these
    is listed, just as a whole listing would list it: a folder stands for all that is in it, a table for its rows.
    """
    _check_settings(settings)
    if not settings.uri.strip():  # Path("") is the working folder: nobody's answer to an unset shell variable
        raise ConfigError("The source is empty. Give a file, a folder, a glob or a URL; . is the working folder.")
    name = hide_secrets(settings.uri)
    fs, path = connect(settings.uri)
    left_out = frozenset(map(os.path.realpath, leave_out)) if is_local(fs) else frozenset()
    # A listing that was cached for the last run would hide what has been added since.
    fs.invalidate_cache()
    only = None if changed is None else ChangedPaths.of(changed)
    try:
        listing = start_listing(fs, path, settings, left_out)
        entries = _list_all(listing) if only is None else _list_changed(listing, only)
        # Where nothing of it is there, the source itself may be away: an empty mount point must not look like deletions.
        if only is None or (only.paths and not _has_readable(entries)):
            _refuse_nothing_to_read(name, entries if only is None else listing.walk(), settings)
    except ValueError as error:  # "**" as part of a name
        raise SourceError(f"The source {name} is not a glob: {error}") from error
    except io_errors() as error:
        if isinstance(error, FileNotFoundError) and not is_web_refusal(error):
            here = f", seen from {os.getcwd()}" if is_local(fs) and not os.path.isabs(settings.uri) else ""  # noqa: PTH109, PTH117
            raise SourceError(
                f"The source {name} does not exist{here}. Give a file, a folder, a glob or a URL."
            ) from error
        raise SourceError(f"The source {name} can't be listed: {explain_io_error(error)}") from error
    return Source(name, _find_key(fs, path, settings), fs, entries, settings, only)


def _list_all(listing: Listing) -> Listed:
    return _arrange(listing.walk())


def _list_changed(listing: Listing, changed: ChangedPaths) -> Listed:
    found = list_changed(listing, changed) if changed.paths else []
    if found is None:
        return Listed(entry for entry in _list_all(listing) if changed.concerns(entry))
    return _arrange(found)


def _arrange(found: Iterable[FileRef | Rejection]) -> Listed:
    entries = Listed(found)
    entries.set_row_names_apart()
    entries.sort()
    return entries


def _find_key(fs: Any, path: str, settings: SourceSettings) -> str:
    """The name given, else the URI in one spelling. Links stay: a link that is set to a new release is the same source."""
    if settings.name:
        return settings.name
    if is_local(fs):
        return os.path.abspath(path).encode(errors="backslashreplace").decode()  # noqa: PTH100  it also takes out ..
    # An archive's own path is the last link of a chain: zip://*.md::docs.zip
    links = [remove_secrets(link) for link in settings.uri.split("::")]
    return "::".join(link.rstrip("/") if "://" in link else os.path.abspath(link) for link in links)  # noqa: PTH100


def _check_settings(settings: SourceSettings) -> None:
    unknown = [name for name in settings.formats if name not in FORMATS]
    if unknown:
        raise ConfigError(f"source.formats has {', '.join(unknown)}; what can be read is {', '.join(FORMATS)}.")
    if not is_encoding(settings.encoding):
        raise ConfigError(
            f"source.encoding is {settings.encoding!r}; use a name that Python knows: utf-8, cp1252, utf-16-le."
        )


def _has_readable(entries: Iterable[FileRef | Rejection]) -> bool:
    # A folder that could not be listed is a failed document: that ends the run red by itself, and says more.
    return any(isinstance(entry, FileRef) or entry.status == "failed" for entry in entries)


def _refuse_nothing_to_read(name: str, entries: Iterable[FileRef | Rejection], settings: SourceSettings) -> None:
    suffixes: Counter[str] = Counter()
    for entry in entries:
        if _has_readable([entry]):
            return
        suffixes[PurePosixPath(entry.doc_id).suffix or "without a suffix"] += 1
    others = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8)) or "no files at all"
    raise SourceError(
        f"No document found in {name}: {others}. Formats read: {', '.join(settings.formats)} (source.formats)."
    )
