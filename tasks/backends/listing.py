"""What a source holds: one walk over a folder, or over what a glob can reach of it. Names and sizes, no contents."""

from __future__ import annotations

import os
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from tasks.backends.filesystem import explain_io_error, io_errors, is_local, is_web
from tasks.config import SourceSettings
from tasks.records import FileRef, Rejection

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
ROW_SIGN = re.compile(r"#|:(?=\d+\Z)")  # how tables.py names a row: table#id, or table:line where it has no id
_HIDDEN = (".", "~$")  # ~$: the lock file an office program leaves beside a document that is open


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
        places = {FORMATS.index(name) for name in TABLES}
        tables = {name for name, place in zip(self._doc_ids, self._formats, strict=True) if place in places}
        for row, doc_id in enumerate(self._doc_ids):
            signs = (sign.start() for sign in ROW_SIGN.finditer(doc_id))
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


def start_listing(fs: Any, path: str, settings: SourceSettings, left_out: frozenset[str]) -> Listing:
    """The listing of a file, a folder or a glob. Raises io_errors(), and ValueError for what is not a glob."""
    magic = "*[" if is_web(fs) else "*?["  # in a web address ? begins the query
    if any(sign in path for sign in magic) and not fs.exists(path):
        parts = path.split("/")
        fixed = next(place for place, part in enumerate(parts) if any(sign in part for sign in magic))
        root = "/".join(parts[:fixed]) or fs.root_marker
        return Listing(fs, root, settings, left_out, tuple(parts[fixed:]))
    info = fs.info(path)
    listing = Listing(fs, path, settings, left_out)
    if info["type"] != "directory" and not (is_web(fs) and path.endswith("/")):
        name = path.rstrip("/").rsplit("/", 1)[-1]
        listing.only = listing.to_entry(name.split("?")[0] if is_web(fs) else name, info)
    return listing


class LinkedFolder(Exception):  # noqa: N818  no error: see Listing.walk()
    """A symbolic link to a folder."""


@dataclass(slots=True)
class Listing:
    """One walk over a folder, or over what a glob can reach of it."""

    fs: Any
    root: str
    settings: SourceSettings
    left_out: frozenset[str]  # real paths
    pattern: tuple[str, ...] = ()
    only: FileRef | Rejection | None = None  # the source is this one file
    _listed: set[str] = field(default_factory=set, init=False)  # folders, by their real path where there are links
    _match: Callable[[str], object] = field(init=False)

    def __post_init__(self) -> None:
        from fsspec.utils import glob_translate

        self._match = re.compile(glob_translate("/".join(self.pattern)) if self.pattern else ".*", re.DOTALL).match

    def walk(self, folder: str | None = None, *, has_links: bool = True) -> Iterator[FileRef | Rejection]:
        """All of it, or what is in one real folder of it (a path). Repeatable, but for a walk of a folder after another.

        Links to folders come last, so that a folder is listed under its own name where it has one here. `has_links`: off, a
        link to a folder raises LinkedFolder: what is listed under its name depends on all other links.
        """
        if self.only is not None:
            yield self.only
            return
        if folder is None:
            self._listed.clear()
        folders = [self.root if folder is None else folder]
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
                yield self.reject_folder(folder, error)
                continue
            for info in found:
                name = self.relative(info["name"])
                if not name or self.is_hidden(name):
                    continue
                try:
                    kind = self._resolve(info)
                except OSError as error:
                    yield from self.reject_broken_link(info["name"], error)
                    continue
                if kind["type"] == "directory":
                    if self.is_reached(name) and os.path.realpath(info["name"]) not in self.left_out:
                        if kind.get("islink") and not has_links:
                            raise LinkedFolder(name)
                        (links if kind.get("islink") else folders).append(info["name"])
                elif self.matches(name):
                    yield self.to_entry(name, {**kind, "name": info["name"]})

    def matches(self, name: str) -> bool:
        return self._match(name) is not None

    def reject_broken_link(self, path: str, error: OSError) -> Iterator[Rejection]:
        """Nothing where the glob can match neither it nor what is behind it."""
        name = self.relative(path)
        if self.matches(name) or self.is_reached(name):
            # What it pointed to may be a table, or a folder on a disk that is not mounted today.
            yield self._reject(path, "failed", _explain_broken_link(error), "#" if find_format(name) in TABLES else "/")

    def reject_folder(self, path: str, error: BaseException) -> Rejection:
        return self._reject(path, "failed", f"a folder, with all that is in it: {explain_io_error(error)}", covers="/")

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
        file_format = find_format(doc_id)
        if file_format not in self.settings.formats:
            suffix = os.path.splitext(doc_id)[1].lower()  # noqa: PTH122  a tenth of the time of PurePath's
            what = f"format {suffix} is not read" if suffix.strip(".") else "a file without a suffix is not read"
            # There may be a hundred thousand pictures: one text for all of them.
            reason = sys.intern(f"{what}; source.formats has {', '.join(self.settings.formats)}")
            return Rejection(doc_id, "skipped", "read", reason, size)
        path = str(info["name"])
        return FileRef(doc_id, path if is_local(self.fs) else self.fs.unstrip_protocol(path), file_format, size)

    def relative(self, path: str) -> str:
        root = self.root.rstrip("/")
        return path[len(root) :].strip("/") if path.startswith(root) else path.strip("/")

    def _reject(self, path: str, status: Literal["failed", "skipped"], reason: str, covers: str = "") -> Rejection:
        name = self.relative(path).encode(errors="backslashreplace").decode()
        return Rejection(name, status, "read", reason, covers=f"{name}{covers}" if covers else None)

    def is_hidden(self, name: str) -> bool:
        last = name.rsplit("/", 1)[-1]
        return last.startswith(_HIDDEN) and not any(
            part.startswith(".") and fnmatchcase(last, part) for part in self.pattern
        )

    def is_reached(self, name: str) -> bool:
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
        if real in self._listed:
            return "a folder that is listed under another name already (symbolic links)"
        if (
            is_local(self.fs)
            and folder != self.root
            and (os.path.realpath(self.root) + "/").startswith(real.rstrip("/") + "/")
        ):
            return "a symbolic link to a folder that holds the source itself"
        self._listed.add(real)
        return ""


def find_format(name: str) -> str:
    suffix = os.path.splitext(name)[1][1:].lower()  # noqa: PTH122  as above
    return _ALIASES.get(suffix, suffix)


def _explain_broken_link(error: OSError) -> str:
    what = "its target is not there" if isinstance(error, FileNotFoundError) else explain_io_error(error)
    return f"a broken symbolic link: {what}"
