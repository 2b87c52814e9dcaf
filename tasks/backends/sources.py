"""Document sources: list a file, a folder, a glob or an fsspec URL, then hand out what is in it, in a fixed order."""

from __future__ import annotations

import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Literal

from tasks.backends.filesystem import (
    connect,
    explain_io_error,
    has_password,
    hide_secrets,
    io_errors,
    is_local,
    is_local_file,
    is_web,
    is_web_refusal,
    remove_secrets,
)
from tasks.backends.tables import read_table
from tasks.backends.texts import is_encoding
from tasks.config import SourceSettings
from tasks.errors import ConfigError, SourceError
from tasks.records import Document, FileRef, Rejection

FORMATS = ("md", "txt", "html", "pdf", "docx", "csv", "jsonl", "parquet")
TABLES = ("csv", "jsonl", "parquet")
_ALIASES = {
    "markdown": "md",
    "text": "txt",
    "htm": "html",
    "xhtml": "html",
    "tsv": "csv",
    "ndjson": "jsonl",
    "pq": "parquet",
}
_ROW_SIGN = re.compile(r"#|:(?=\d+\Z)")  # how tables.py names a row: table#id, or table:line where it has no id
_HIDDEN = (".", "~$")  # ~$: the lock file an office program leaves beside a document that is open


class Source:
    """What was listed: names and sizes, no contents. Iterates as often as wanted; tables are read row by row meanwhile.

    Yields a FileRef for a file that holds one document (read_file reads it, in another process), a Document for a row
    of a table, and a Rejection for what is not read. Sorted by doc_id, rows in their file's order.
    """

    def __init__(self, name: str, key: str, fs: Any, entries: Listed, settings: SourceSettings) -> None:
        self.name = name  # for messages
        self.key = key  # what tells its documents from those of another source in the same collection
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


def open_source(settings: SourceSettings, *, leave_out: Collection[str] = ()) -> Source:
    """List it. Raises SourceError: not there, not listable, nothing to read in it; ConfigError: format, encoding or
    a password in the URI.

    `leave_out`: local folders that are not part of the source wherever they lie, such as the run's own data folder.
    """
    _check_settings(settings)
    if not settings.uri.strip():  # Path("") is the working folder: nobody's answer to an unset shell variable
        raise ConfigError("The source is empty. Give a file, a folder, a glob or a URL; . is the working folder.")
    name = hide_secrets(settings.uri)
    if has_password(settings.uri) and not is_local_file(settings.uri):
        raise ConfigError(
            f"The source {name} has a password in it; it is a parameter of the run, and so would be stored and shown. Give it "
            "by the driver's environment variables (AWS_SECRET_ACCESS_KEY, ...) or by fsspec's: "
            'FSSPEC_FTP=\'{"username": "...", "password": "..."}\', or a file in ~/.config/fsspec.'
        )
    fs, path = connect(settings.uri)
    left_out = frozenset(map(os.path.realpath, leave_out)) if is_local(fs) else frozenset()
    # A listing that was cached for the last run would hide what has been added since.
    fs.invalidate_cache()
    try:
        entries = Listed(_list_entries(fs, path, settings, left_out))
    except ValueError as error:  # "**" as part of a name
        raise SourceError(f"The source {name} is not a glob: {error}") from error
    except io_errors() as error:
        if isinstance(error, FileNotFoundError) and not is_web_refusal(error):
            here = f", seen from {os.getcwd()}" if is_local(fs) and not os.path.isabs(settings.uri) else ""  # noqa: PTH109, PTH117
            raise SourceError(
                f"The source {name} does not exist{here}. Give a file, a folder, a glob or a URL."
            ) from error
        raise SourceError(f"The source {name} can't be listed: {explain_io_error(error)}") from error
    _refuse_nothing_to_read(name, entries, settings)
    entries.set_row_names_apart()
    entries.sort()
    return Source(name, _find_key(fs, path, settings), fs, entries, settings)


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


def _refuse_nothing_to_read(name: str, entries: Listed, settings: SourceSettings) -> None:
    # A folder that could not be listed is a failed document: that ends the run red by itself, and says more.
    if any(isinstance(entry, FileRef) or entry.status == "failed" for entry in entries):
        return
    suffixes = Counter(PurePosixPath(entry.doc_id).suffix or "without a suffix" for entry in entries)
    others = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(8)) or "no files at all"
    raise SourceError(
        f"No document found in {name}: {others}. Formats read: {', '.join(settings.formats)} (source.formats)."
    )


# ---------------------------------------------------------------------------------------------- listing


class Listed:
    """FileRefs and Rejections in columns: 100,000 files took 11 MB, and 33 MB as objects with a URI each."""

    def __init__(self, entries: Iterable[FileRef | Rejection]) -> None:
        self._doc_ids: list[str] = []
        self._sizes = array("q")
        self._formats = array("b")  # places in FORMATS
        self._prefix = ""  # of all URIs but those in _uris: what comes before the doc_id
        self._uris: dict[int, str] = {}
        self._rejections: dict[int, Rejection] = {}
        for entry in entries:
            self._add(entry)

    def _add(self, entry: FileRef | Rejection) -> None:
        row = len(self._doc_ids)
        self._doc_ids.append(entry.doc_id)
        self._sizes.append(entry.source_bytes)
        self._formats.append(FORMATS.index(entry.format) if isinstance(entry, FileRef) else -1)
        if isinstance(entry, Rejection):
            self._rejections[row] = entry
            return
        self._prefix = self._prefix or entry.uri.removesuffix(entry.doc_id)
        if f"{self._prefix}{entry.doc_id}" != entry.uri:
            self._uris[row] = entry.uri

    def set_row_names_apart(self) -> None:
        """What is named as a row of a listed table would be (t.csv#1.md, t.csv:7 beside t.csv) is rejected as ./t.csv#1.md.

        One id for two documents would close no books, and one would delete the other; no path listed begins with "./".
        """
        tables = {name for name, place in zip(self._doc_ids, self._formats, strict=True) if FORMATS[place] in TABLES}
        for row, doc_id in enumerate(self._doc_ids):
            signs = (sign.start() for sign in _ROW_SIGN.finditer(doc_id))
            table = next((doc_id[:place] for place in signs if doc_id[:place] in tables), None)
            if table is None:
                continue
            name = self._doc_ids[row] = f"./{doc_id}"
            if row in self._rejections:
                self._rejections[row] = replace(self._rejections[row], doc_id=name)
                continue
            reason = (
                f"named as a row of the table {table} would be. Rename it, or take one of the two out of the source"
            )
            # Its points may be stored from before the table came: they stay until someone has decided.
            self._rejections[row] = Rejection(name, "failed", "read", reason, self._sizes[row], covers=doc_id)
            self._formats[row] = -1

    def sort(self) -> None:
        """By the code points of the doc_id: the same on every machine, whatever its locale."""
        order = sorted(range(len(self._doc_ids)), key=self._doc_ids.__getitem__)
        self._doc_ids = [self._doc_ids[row] for row in order]
        self._sizes = array("q", (self._sizes[row] for row in order))
        self._formats = array("b", (self._formats[row] for row in order))
        moved = {row: place for place, row in enumerate(order) if row in self._uris or row in self._rejections}
        self._uris = {moved[row]: uri for row, uri in self._uris.items()}
        self._rejections = {moved[row]: rejection for row, rejection in self._rejections.items()}

    def total_bytes(self) -> int:
        return sum(self._sizes)

    def __iter__(self) -> Iterator[FileRef | Rejection]:
        for row, doc_id in enumerate(self._doc_ids):
            if row in self._rejections:
                yield self._rejections[row]
            else:
                uri = self._uris.get(row) or f"{self._prefix}{doc_id}"
                yield FileRef(doc_id, uri, FORMATS[self._formats[row]], self._sizes[row])


def _list_entries(
    fs: Any, path: str, settings: SourceSettings, left_out: frozenset[str]
) -> Iterable[FileRef | Rejection]:
    magic = "*[" if is_web(fs) else "*?["  # in a web address ? begins the query
    if any(sign in path for sign in magic) and not fs.exists(path):
        parts = path.split("/")
        fixed = next(place for place, part in enumerate(parts) if any(sign in part for sign in magic))
        root = "/".join(parts[:fixed]) or fs.root_marker
        return _Listing(fs, root, settings, left_out, tuple(parts[fixed:])).walk()
    info = fs.info(path)
    listing = _Listing(fs, path, settings, left_out)
    if info["type"] == "directory" or (is_web(fs) and path.endswith("/")):
        return listing.walk()
    name = path.rstrip("/").rsplit("/", 1)[-1]
    return [listing.to_entry(name.split("?")[0] if is_web(fs) else name, info)]


@dataclass(slots=True)
class _Listing:
    """One walk over a folder, or over what a glob can reach of it."""

    fs: Any
    root: str
    settings: SourceSettings
    left_out: frozenset[str]  # real paths
    pattern: tuple[str, ...] = ()
    listed: set[str] = field(default_factory=set)  # folders, by their real path where there are links

    def walk(self) -> Iterator[FileRef | Rejection]:
        """Links to folders come last, so that a folder is listed under its own name where it has one here."""
        from fsspec.utils import glob_translate

        matches = re.compile(glob_translate("/".join(self.pattern)) if self.pattern else ".*", re.DOTALL).match
        folders = [self.root]
        links: list[str] = []
        while folders or links:
            folder = folders.pop() if folders else links.pop()
            problem = self._find_loop(folder)
            if problem:
                yield self._reject(folder, "skipped", problem)
                continue
            try:
                found = sorted(self.fs.ls(folder, detail=True), key=lambda info: str(info["name"]), reverse=True)
            except io_errors() as error:
                if folder == self.root:
                    raise
                reason = f"a folder, with all that is in it: {explain_io_error(error)}"
                yield self._reject(folder, "failed", reason, covers="/")
                continue
            for info in found:
                name = self._relative(info["name"])
                if not name or self._is_hidden(name):
                    continue
                try:
                    kind = self._resolve(info)
                except OSError as error:
                    # What it pointed to may be a table, or a folder on a disk that is not mounted today.
                    if matches(name) or self._is_reached(name):
                        covers = "#" if _find_format(name) in TABLES else "/"
                        yield self._reject(info["name"], "failed", _explain_broken_link(error), covers)
                    continue
                if kind["type"] == "directory":
                    if self._is_reached(name) and os.path.realpath(info["name"]) not in self.left_out:
                        (links if kind.get("islink") else folders).append(info["name"])
                elif matches(name):
                    yield self.to_entry(name, {**kind, "name": info["name"]})

    def to_entry(self, doc_id: str, info: dict[str, Any]) -> FileRef | Rejection:
        """One file: to be read, or skipped for its format, or failed for its name."""
        size = int(info.get("size") or 0)
        try:
            doc_id.encode()
        except UnicodeEncodeError:
            reason = "a file name that is not valid UTF-8, so no id can be made of it. Rename it"
            return Rejection(doc_id.encode(errors="backslashreplace").decode(), "failed", "read", reason, size)
        if info["type"] != "file":
            return Rejection(doc_id, "skipped", "read", "not a regular file (a pipe, a socket or a device)")
        file_format = _find_format(doc_id)
        if file_format not in self.settings.formats:
            suffix = os.path.splitext(doc_id)[1].lower()  # noqa: PTH122  a tenth of the time of PurePath's
            what = f"format {suffix} is not read" if suffix.strip(".") else "a file without a suffix is not read"
            # There may be a hundred thousand pictures: one text for all of them.
            reason = sys.intern(f"{what}; source.formats has {', '.join(self.settings.formats)}")
            return Rejection(doc_id, "skipped", "read", reason, size)
        path = str(info["name"])
        return FileRef(doc_id, path if is_local(self.fs) else self.fs.unstrip_protocol(path), file_format, size)

    def _relative(self, path: str) -> str:
        root = self.root.rstrip("/")
        return path[len(root) :].strip("/") if path.startswith(root) else path.strip("/")

    def _reject(self, path: str, status: Literal["failed", "skipped"], reason: str, covers: str = "") -> Rejection:
        name = self._relative(path).encode(errors="backslashreplace").decode()
        return Rejection(name, status, "read", reason, covers=f"{name}{covers}" if covers else None)

    def _is_hidden(self, name: str) -> bool:
        last = name.rsplit("/", 1)[-1]
        return last.startswith(_HIDDEN) and not any(
            part.startswith(".") and fnmatchcase(last, part) for part in self.pattern
        )

    def _is_reached(self, name: str) -> bool:
        """Whether the glob can match anything in this folder."""
        if not self.pattern:
            return True
        parts = name.split("/")
        for part, pattern in zip(parts, self.pattern, strict=False):
            if pattern == "**":
                return True
            if not fnmatchcase(part, pattern):
                return False
        return len(parts) < len(self.pattern)

    def _resolve(self, info: dict[str, Any]) -> dict[str, Any]:
        """A symbolic link's target; listing does not follow it."""
        if not info.get("islink"):
            return info
        return {**self.fs.info(info["name"]), "islink": True}

    def _find_loop(self, folder: str) -> str:
        """Why this folder must not be listed again: it has been, or what is listed lies in it."""
        real = os.path.realpath(folder) if is_local(self.fs) else folder
        if real in self.listed:
            return "a folder that is listed under another name already (symbolic links)"
        if (
            is_local(self.fs)
            and folder != self.root
            and (os.path.realpath(self.root) + "/").startswith(real.rstrip("/") + "/")
        ):
            return "a symbolic link to a folder that holds the source itself"
        self.listed.add(real)
        return ""


def _find_format(name: str) -> str:
    suffix = os.path.splitext(name)[1][1:].lower()  # noqa: PTH122  as above
    return _ALIASES.get(suffix, suffix)


def _explain_broken_link(error: OSError) -> str:
    what = "its target is not there" if isinstance(error, FileNotFoundError) else explain_io_error(error)
    return f"a broken symbolic link: {what}"
