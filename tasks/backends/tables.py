"""Tables: csv, jsonl and parquet, streamed, one document a row; a row that can't be used is a Rejection."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import itertools
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from typing import IO, Any
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from tasks.backends.filesystem import explain_io_error, io_errors, open_binary
from tasks.backends.texts import (
    Unusable,
    check_text_size,
    clean_metadata,
    clean_text,
    describe_binary,
    describe_misencoded,
    file_metadata,
    find_byte_order_mark,
    is_blank,
)
from tasks.config import SourceSettings
from tasks.records import Document, FileRef, Rejection

_DELIMITERS = (",", ";", "\t", "|")
_BLOCK_BYTES = 256 * 1024
_BATCH_ROWS = 256  # of parquet at a time: a row may hold a whole article
_HOPELESS_ROWS = 100  # a file whose first hundred rows all fail has the wrong shape, not some bad rows


@dataclass(frozen=True, slots=True)
class _Row:
    """One row as its format gives it: the values by column, or what is wrong with it."""

    number: int  # line of the file, or row of a parquet file; from 1
    values: Mapping[str, Any] | None
    problem: str = ""
    source_bytes: int = 0


def read_table(fs: Any, ref: FileRef, settings: SourceSettings) -> Iterator[Document | Rejection]:
    """The rows of `ref` in order, as documents `file#id`; their source_bytes add up to the file's."""
    return _spread_bytes(_stop_if_hopeless(_read_rows(fs, ref, settings), ref), ref.source_bytes)


def _read_rows(fs: Any, ref: FileRef, settings: SourceSettings) -> Iterator[Document | Rejection]:
    rows = {"csv": _csv_rows, "jsonl": _jsonl_rows, "parquet": _parquet_rows}[ref.format]
    seen = SeenIds()
    count = 0
    try:
        with open_binary(fs, ref.uri) as stream, contextlib.closing(rows(stream, settings, ref)) as found:
            for row in found:
                count += 1
                yield _to_document(row, ref, settings, seen)
        if not count:
            yield Rejection(ref.doc_id, "skipped", "read", "no rows in it")
    except Unusable as problem:
        yield Rejection(ref.doc_id, problem.status, "read", problem.reason, covers=_cover_rows(ref))
    except io_errors() as error:
        reason = f"{explain_io_error(error)}; {count} rows were read before"
        yield Rejection(ref.doc_id, "failed", "read", reason, covers=_cover_rows(ref))
    except UnicodeDecodeError as error:  # of an encoding in which nothing can be found again after a bad byte
        reason = f"not valid {error.encoding} after {count} rows: {error.reason}. What follows is not read"
        yield Rejection(ref.doc_id, "failed", "read", reason, covers=_cover_rows(ref))


def _cover_rows(ref: FileRef) -> str:
    """How the ids of all rows begin: any of them may be among what was not seen."""
    return f"{ref.doc_id}#"


def _to_document(row: _Row, ref: FileRef, settings: SourceSettings, seen: SeenIds) -> Document | Rejection:
    # A row without a usable id is named by its place, file:line, which no row with an id can be called.
    name = f"{ref.doc_id}:{row.number}"
    try:
        row_id = _find_id(row, settings)
    except Unusable as problem:
        # Whose row it is can't be known: any that is stored and not seen may be the one.
        return Rejection(name, problem.status, "read", problem.reason, row.source_bytes, covers=_cover_rows(ref))
    if not seen.add(row_id):
        what = f"{settings.id_field} {row_id!r:.60} occurs more than once in this file"
        reason = f"{what}; the first one counts. Give each row an id of its own"
        return Rejection(name, "failed", "read", reason, row.source_bytes, content_hash=_hash_unusable(row))
    name = f"{ref.doc_id}#{row_id}"
    try:
        return _read_row(name, row, ref, settings)
    except Unusable as problem:
        content_hash = _hash_unusable(row)
        return Rejection(name, problem.status, "read", problem.reason, row.source_bytes, content_hash=content_hash)


def _read_row(name: str, row: _Row, ref: FileRef, settings: SourceSettings) -> Document:
    values = row.values or {}
    text = _find_text(values, settings)
    if is_blank(text):
        raise Unusable("no text in it", "skipped")
    check_text_size(text, settings.max_text_bytes)
    metadata = {**clean_metadata(_select_metadata(values, settings)), **file_metadata(ref.doc_id, ref.format)}
    return Document(name, text, metadata, "text", row.source_bytes, _hash_row(text, metadata))


def _hash_row(text: str, metadata: Mapping[str, Any]) -> str:
    """sha256 (hex) of what the row says; the order of its columns does not count. Metadata is JSON-ready by now."""
    found = json.dumps([text, metadata], ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(found.encode()).hexdigest()


def _hash_unusable(row: _Row) -> str:
    """sha256 (hex) of values of which no document can be made, perhaps because they are not JSON."""
    try:
        return hashlib.sha256(repr(row.values).encode(errors="backslashreplace")).hexdigest()
    except RecursionError:  # nested as deep as the JSON parser goes: never known again, so tried again each time
        return ""


def _find_id(row: _Row, settings: SourceSettings) -> str:
    """A row's number would do as an id only until a row is inserted above it: then every later document changes."""
    if row.values is None:
        raise Unusable(row.problem)
    values = row.values
    value = values.get(settings.id_field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas turns a column of integers with a gap into floats
    is_usable = isinstance(value, str | int | Decimal | UUID | date) and not isinstance(value, bool)
    if not is_usable or is_blank(str(value)):
        has = f"{settings.id_field} is {value!r:.60}" if settings.id_field in values else f"no {settings.id_field!r}"
        raise Unusable(
            f"no id: {has}; every row needs one that stays the same. Name the right field in source.id_field. "
            f"The row has: {_list_names(values)}"
        )
    return clean_text(str(value))


def _find_text(values: Mapping[str, Any], settings: SourceSettings) -> str:
    present = [name for name in settings.text_fields if name in values]
    if not present:
        wanted = _list_names(settings.text_fields)
        raise Unusable(
            f"no text: no field {wanted}. Name the right ones in source.text_fields. The row has: {_list_names(values)}"
        )
    parts = []
    for name in present:
        value = values[name]
        if isinstance(value, bytes):
            raise Unusable(f"{name} is binary, not text. Name another field in source.text_fields")
        if isinstance(value, dict | list | tuple | set):
            raise Unusable(f"{name} is a {type(value).__name__}, not text. Name another field in source.text_fields")
        if value is not None and not is_blank(str(value)):
            parts.append(clean_text(str(value)).replace("\r\n", "\n").replace("\r", "\n"))
    return "\n\n".join(parts)


def _select_metadata(values: Mapping[str, Any], settings: SourceSettings) -> dict[str, Any]:
    if settings.metadata_fields is not None:
        return {name: values[name] for name in settings.metadata_fields if name in values}
    return {
        name: value for name, value in values.items() if name != settings.id_field and name not in settings.text_fields
    }


def _list_names(names: Iterable[Any]) -> str:
    shown = [str(name) for name in itertools.islice(names, 21)]
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "")


# ---------------------------------------------------------------------------------------------- csv and jsonl


def _find_encoding(stream: IO[bytes], settings: SourceSettings) -> str:
    """By the byte order mark, else as the settings say; leaves the stream after the mark."""
    encoding, start = find_byte_order_mark(stream.read(4)) or (settings.encoding, 0)
    stream.seek(start)
    return encoding


@dataclass(frozen=True, slots=True)
class _LongLine:
    """A line above the limit, which was passed over without being held."""

    bytes: int


def _read_lines(stream: IO[bytes], encoding: str, max_bytes: int) -> Iterator[bytes | str | _LongLine]:
    """Lines with their ends: as bytes, so that one bad line stays one; as text where 0x0A may be half a character."""
    wide = "\n".encode(encoding) != b"\n"
    source: Any = io.TextIOWrapper(stream, encoding=encoding, newline="") if wide else stream
    try:
        while line := source.readline(max_bytes + 1):
            if len(line) <= max_bytes:
                yield line
                continue
            size = _count_bytes(line, encoding)
            while line and line[-1:] not in ("\n", b"\n"):
                line = source.readline(_BLOCK_BYTES)
                size += _count_bytes(line, encoding)
            yield _LongLine(size)
    finally:
        if wide and not stream.closed:
            source.detach()  # else it closes the stream, which is not its own


def _jsonl_rows(stream: IO[bytes], settings: SourceSettings, _ref: FileRef) -> Generator[_Row, None, None]:
    encoding = _find_encoding(stream, settings)
    for number, line in enumerate(_read_lines(stream, encoding, settings.max_text_bytes), start=1):
        if isinstance(line, _LongLine):
            yield _Row(number, None, f"line {number} has {_describe_long(line, settings)}", line.bytes)
            continue
        values: Any = None
        problem = ""
        try:
            text = line if isinstance(line, str) else line.decode(encoding)
            if is_blank(text):
                continue
            values = json.loads(text.rstrip("\r\n"))
            if not isinstance(values, dict):
                values, problem = None, f"line {number} is a {type(values).__name__}; an object a line is expected"
        except UnicodeDecodeError as error:
            problem = f"line {number} is {describe_misencoded(error)}"
        except RecursionError:
            problem = f"line {number} is nested too deep"
        except json.JSONDecodeError as error:
            problem = f"line {number} is not JSON: {error.msg}, column {error.colno}"
        except ValueError as error:  # a number of more than 4,300 digits
            problem = f"line {number} is not JSON: {error}"
        yield _Row(number, values, problem, _count_bytes(line, encoding))


def _describe_long(line: _LongLine, settings: SourceSettings) -> str:
    limit = f"{settings.max_text_bytes:,}"
    return f"{line.bytes:,} bytes; the limit is {limit}. Split its text into rows, or raise source.max_text_bytes"


def _count_bytes(line: bytes | str, encoding: str) -> int:
    return len(line if isinstance(line, bytes) else line.encode(encoding, "replace"))


@dataclass(slots=True)
class _CsvLines:
    """Decoded lines for csv.reader, counted: a row may take several."""

    stream: IO[bytes]
    encoding: str
    settings: SourceSettings
    number: int = 0
    bytes: int = 0

    def __iter__(self) -> Iterator[str]:
        for line in _read_lines(self.stream, self.encoding, self.settings.max_text_bytes):
            self.number += 1
            if isinstance(
                line, _LongLine
            ):  # a quote in it may have been opened or closed: what follows can mean anything
                long = _describe_long(line, self.settings)
                raise Unusable(f"line {self.number} has {long}. What follows is not read")
            self.bytes += _count_bytes(line, self.encoding)
            # A generator that raises is over: bad bytes are let through as lone surrogates, and found in their row.
            yield line if isinstance(line, str) else line.decode(self.encoding, "surrogateescape")


def _csv_rows(stream: IO[bytes], settings: SourceSettings, _ref: FileRef) -> Generator[_Row, None, None]:
    """By the header's names. The delimiter is the one of , ; tab | that gives a header with the fields wanted."""
    # Python's own limit of 128 KiB a field holds for the whole process; an article is longer.
    csv.field_size_limit(int(settings.max_text_bytes))
    counted = _CsvLines(stream, _find_encoding(stream, settings), settings)
    lines = iter(counted)
    first = next((line for line in lines if not is_blank(line)), None)
    if first is None:
        return
    delimiter, header = _find_delimiter(first, settings)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    taken = 0
    while True:
        start = counted.number + 1
        values: dict[str, str] | None = None
        try:
            cells = next(reader)
            if not cells:
                continue
            problem = _find_bad_cells(cells, header, delimiter)
            if not problem:
                values = dict(zip(header, cells, strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"lines {start} to {counted.number} are not csv: {error}. A quote is misplaced or never closed"
        yield _Row(start, values, problem, counted.bytes - taken)
        taken = counted.bytes


def _find_delimiter(first: str, settings: SourceSettings) -> tuple[str, list[str]]:
    wanted = {settings.id_field, *settings.text_fields}
    for delimiter in _DELIMITERS:
        try:
            header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter, strict=True))]
        except csv.Error:
            continue
        if wanted <= set(header):
            _check_columns(header, settings)
            return delimiter, header
    header = first.strip().split(",")
    _check_columns(header, settings)
    raise Unusable(f"line 1 is not a csv header: {', '.join(header):.200}")


def _find_bad_cells(cells: Sequence[str], header: Sequence[str], delimiter: str) -> str:
    if len(cells) != len(header):
        way_out = (
            f"quote the cells that hold a {delimiter!r}" if len(cells) > len(header) else "fill in the missing ones"
        )
        return f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'} in a table of {len(header)} columns; {way_out}"
    for cell in cells:
        if "\x00" in cell:
            return describe_binary(cell.index("\x00"))
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            byte = ord(cell[error.start]) & 0xFF
            return f"mis-encoded: byte 0x{byte:02x}. Save it as UTF-8, or name its encoding in source.encoding"
    return ""


def _check_columns(header: Sequence[str], settings: SourceSettings) -> None:
    """A table without the columns that the settings name fails once, as a file, and not once a row."""
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise Unusable(f"column names occur more than once: {_list_names(repeated)}")
    wanted = {"source.id_field": [settings.id_field], "source.text_fields": settings.text_fields}
    if settings.metadata_fields is not None:
        wanted["source.metadata_fields"] = settings.metadata_fields
    for knob, names in wanted.items():
        missing = [name for name in names if name not in header]
        if missing:
            raise Unusable(
                f"no column {_list_names(missing)}: name the right ones in {knob}. There are: {_list_names(header)}"
            )


# ---------------------------------------------------------------------------------------------- parquet


def _parquet_rows(stream: IO[bytes], settings: SourceSettings, ref: FileRef) -> Generator[_Row, None, None]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        header = list(table.schema_arrow.names)
        _check_columns(header, settings)
        wanted = {settings.id_field, *settings.text_fields, *(settings.metadata_fields or ())}
        columns = header if settings.metadata_fields is None else [name for name in header if name in wanted]
        row_bytes = ref.source_bytes // max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                yield _parquet_row(batch, index, number, row_bytes)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        # OSError: a torn page, beside what the file system raises. UnicodeDecodeError: torn column names.
        raise Unusable(f"damaged parquet after row {number}: {type(error).__name__} {error}") from error


def _parquet_row(batch: Any, index: int, number: int, row_bytes: int) -> _Row:
    try:
        values = {name: batch.column(place)[index].as_py() for place, name in enumerate(batch.schema.names)}
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date that Python has no year for
        return _Row(number, None, f"row {number}: {type(error).__name__} {error}", row_bytes)
    return _Row(number, values, "", row_bytes)


# ---------------------------------------------------------------------------------------------- over all rows


class SeenIds:
    """Which ids have been seen, in 8 bytes each: a set of a table's ids would take 100 and not fit for a large one.

    64-bit hashes: among ten million ids, two collide with a chance of 3 in a million; then a row fails, and says so.
    """

    def __init__(self, buffer_ids: int = 65_536) -> None:
        self._buffer_ids = buffer_ids
        self._recent: set[int] = set()
        self._sorted: list[NDArray[np.uint64]] = []

    def add(self, row_id: str) -> bool:
        """False where it was there already."""
        key = int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "big")
        if key in self._recent or any(_is_in(np.uint64(key), run) for run in self._sorted):
            return False
        self._recent.add(key)
        if len(self._recent) >= self._buffer_ids:
            run = np.sort(np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent)))
            self._recent.clear()
            # Runs of like size are merged, so that there are only log2(ids / buffer) of them to look through.
            while self._sorted and len(self._sorted[-1]) <= len(run):
                run = np.sort(np.concatenate([self._sorted.pop(), run]), kind="stable")
            self._sorted.append(run)
        return True


def _is_in(key: np.uint64, run: NDArray[np.uint64]) -> bool:
    place = int(np.searchsorted(run, key))
    return place < len(run) and bool(run[place] == key)


def _stop_if_hopeless(rows: Iterator[Document | Rejection], ref: FileRef) -> Iterator[Document | Rejection]:
    for number, row in enumerate(rows, start=1):
        yield row
        if not isinstance(row, Rejection) or row.status != "failed":
            yield from rows
            return
        if row.doc_id == ref.doc_id:  # about the file itself: nothing comes after it, and one name is rejected once
            return
        if number == _HOPELESS_ROWS:
            yield Rejection(
                ref.doc_id,
                "failed",
                "read",
                f"given up: its first {number} rows all failed, so the rest is not read. {row.reason}",
                covers=_cover_rows(ref),
            )
            return


def _spread_bytes(rows: Iterator[Document | Rejection], total_bytes: int) -> Iterator[Document | Rejection]:
    """Where a format knows no bytes a row (parquet), or leaves some over (a header), the last row takes the rest."""
    told = 0
    held: Document | Rejection | None = None
    for row in rows:
        if held is not None:
            yield held
            told += held.source_bytes
        held = row
    if held is not None:
        yield replace(held, source_bytes=max(0, total_bytes - told))
