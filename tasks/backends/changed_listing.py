"""The part of a source that a trigger named: what a whole listing has of these paths, found by looking at them alone."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tasks.backends.filesystem import io_errors, is_local
from tasks.backends.listing import ROW_SIGN, TABLES, LinkedFolder, Listing, find_format
from tasks.records import FileRef, Rejection

_BOUNDARY = re.compile(rf"/|{ROW_SIGN.pattern}")
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)  # too long a name is no file's
# Where a look at one name says other things than a listing: it follows links (sftp, hdfs), takes a folder for a file (http).
_LISTED_WHOLE = frozenset({"http", "https", "sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs", "webHDFS"})


@dataclass(frozen=True, slots=True)
class ChangedPaths:
    """Which documents a changed-paths run looks at: each path itself, and all below it where it is a folder or a table."""

    paths: frozenset[str]

    @classmethod
    def of(cls, paths: Iterable[str]) -> ChangedPaths:
        """A path that may name a row (t.csv#7) stands for its whole table: a row can't be looked at alone."""
        named = frozenset(paths)
        return cls(named | {table for path in named for table in _find_tables(path)})

    def has(self, doc_id: str) -> bool:
        """Whether the document is one of these, or below one of these."""
        name = doc_id.removeprefix("./")  # Listed.set_row_names_apart()
        if name in self.paths:
            return True
        for sign in _BOUNDARY.finditer(name):
            parent = name[: sign.start()]
            if parent in self.paths and (sign[0] == "/" or is_table(parent)):
                return True
        return False

    def concerns(self, entry: FileRef | Rejection) -> bool:
        """Whether a whole listing's entry says something of these: also of a folder above that can't be listed."""
        if self.has(entry.doc_id):
            return True
        covers = entry.covers if isinstance(entry, Rejection) else None
        return covers is not None and any(path.startswith(covers) for path in self.paths)


def is_table(path: str) -> bool:
    """Whether a file of this name holds a document a row."""
    return find_format(path) in TABLES


def list_changed(listing: Listing, changed: ChangedPaths) -> list[FileRef | Rejection] | None:
    """The entries that a whole listing has for these paths, and of all below those that are folders.

    None where only a whole listing can tell: a path leads through a symbolic link to a folder, or is named as a row of a
    table would be, or a look at one name is not to be trusted on this file system. Raises io_errors() of the root.
    """
    protocols = (listing.fs.protocol,) if isinstance(listing.fs.protocol, str) else listing.fs.protocol
    if listing.only is not None or _LISTED_WHOLE.intersection(protocols):
        return None
    if any(_find_tables(path) for path in changed.paths):
        return None
    found: dict[str, FileRef | Rejection] = {}
    looked = _Looked(listing)
    try:
        for path in sorted(changed.paths):
            for entry in looked.look_at(path):
                found[entry.doc_id] = entry
    except (LinkedFolder, _NamedAsRow):
        return None
    return [entry for entry in found.values() if changed.concerns(entry)]


class _NamedAsRow(Exception):  # noqa: N818  no error: only a whole listing tells what is what
    """Beside a table there is what is named as one of its rows would be."""


class _Looked:
    """What has been found of the folders above the paths: looked at once each."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._is_local = is_local(listing.fs)
        self._root = listing.root.rstrip("/")
        self._above: dict[str, list[Rejection] | None] = {
            "": None
        }  # None: open; else closed, with what there is to say
        self._walked: set[str] = set()
        self._names: dict[str, list[str]] = {}
        if self._is_local:
            os.scandir(listing.root).close()

    def look_at(self, path: str) -> Iterator[FileRef | Rejection]:
        parts = path.split("/")
        folder = ""
        for part in parts[:-1]:
            folder = f"{folder}/{part}".lstrip("/")
            if folder in self._walked:
                return
            if folder not in self._above:
                self._above[folder] = self._look_above(folder)
            closed = self._above[folder]
            if closed is not None:
                yield from closed
                return
        if self._listing.is_hidden(path):
            return
        try:
            yield from self._look_at_last(path, folder)
        except io_errors() as error:
            if _is_gone(error):
                return
            if not folder:
                raise
            yield self._listing.reject_folder(self._join(folder), error)

    def _look_at_last(self, path: str, folder: str) -> Iterator[FileRef | Rejection]:
        if is_table(path):
            name = path.rsplit("/", 1)[-1]
            if any(each.startswith((f"{name}#", f"{name}:")) for each in self._list_names(folder)):
                raise _NamedAsRow
        listing, place = self._listing, self._join(path)
        try:
            info = listing.fs.info(place)
        except OSError as error:
            if self._is_local and os.path.islink(place):  # noqa: PTH114
                yield from listing.reject_broken_link(place, error)
                return
            raise
        if info["type"] == "directory":
            if listing.is_reached(path) and not self._is_left_out(place):
                if info.get("islink"):
                    raise LinkedFolder(path)
                self._walked.add(path)
                yield from listing.walk(place, has_links=False)
        elif listing.matches(path):
            yield listing.to_entry(path, {**info, "name": place})

    def _look_above(self, folder: str) -> list[Rejection] | None:
        """What a whole listing says instead of what is in this folder; None where it lists what is in it."""
        listing, place = self._listing, self._join(folder)
        if listing.is_hidden(folder):
            return []
        if not self._is_local:
            return None if listing.is_reached(folder) else []
        try:
            mode = os.lstat(place).st_mode
            if stat.S_ISLNK(mode):
                try:
                    is_folder = listing.fs.info(place)["type"] == "directory"
                except OSError as error:
                    return list(listing.reject_broken_link(place, error))
                if is_folder and listing.is_reached(folder) and not self._is_left_out(place):
                    raise LinkedFolder(folder)
                return []
            if not stat.S_ISDIR(mode) or not listing.is_reached(folder) or self._is_left_out(place):
                return []
            os.scandir(place).close()  # a name in it may be open to this user though the folder itself can't be listed
        except OSError as error:
            return [] if _is_gone(error) else [listing.reject_folder(place, error)]
        return None

    def _list_names(self, folder: str) -> list[str]:
        if folder not in self._names:
            place = self._join(folder) if folder else self._listing.root
            if self._is_local:
                names = [each.name for each in Path(place).iterdir()]
            else:
                found = self._listing.fs.ls(place, detail=False)
                names = [str(each).rstrip("/").rsplit("/", 1)[-1] for each in found]
            self._names[folder] = names
        return self._names[folder]

    def _is_left_out(self, place: str) -> bool:
        return os.path.realpath(place) in self._listing.left_out

    def _join(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else f"{self._listing.fs.root_marker}{name}"


def _find_tables(path: str) -> list[str]:
    """Of t.csv#1.md or t.csv:7: the table of which it may be named as a row."""
    tables = (path[: sign.start()] for sign in ROW_SIGN.finditer(path))
    return [table for table in tables if is_table(table)]


def _is_gone(error: BaseException) -> bool:
    return isinstance(error, OSError) and (isinstance(error, FileNotFoundError) or error.errno in _GONE)
