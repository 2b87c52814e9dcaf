"""What every reader does to text and metadata: decode it or say why not, and make it safe to store as JSON."""

from __future__ import annotations

import base64
import codecs
import math
import re
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Literal

import numpy as np

# UTF-32-LE's mark begins with UTF-16-LE's: the longer ones come first.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\u00ad"
_MAX_DEPTH = 64
_MAX_TITLE_CHARS = 200

# LlamaIndex's node_to_metadata_dict overwrites the first three and `_node_*`; `generation` and `ballast_*` are the ledger's;
# the others are file_metadata's.
RESERVED_KEYS = frozenset(
    {
        *("doc_id", "document_id", "ref_doc_id", "generation", "file_name", "file_path", "format"),
        *("ballast_source", "ballast_nodes", "ballast_content"),
    }
)


class Unusable(Exception):  # noqa: N818  caught where the document's name is known, and returned as a Rejection
    """One document that can't be used, and why; `skipped` where there is nothing in it."""

    def __init__(self, reason: str, status: Literal["failed", "skipped"] = "failed") -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status


def find_byte_order_mark(head: bytes) -> tuple[str, int] | None:
    """Encoding and length in bytes of the mark that `head` begins with."""
    for mark, encoding in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    return None


def is_encoding(name: str) -> bool:
    """Whether Python can decode a file by this name. idna and punycode are for host names, and fail in ways of their own."""
    try:
        "a".encode(name)  # of nothing, Python would not even look the name up
        return codecs.lookup(name).name not in ("idna", "punycode")
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        return False


def decode_text(data: bytes, encoding: str) -> str:
    """Text by its byte order mark, else by `encoding`; line ends become \\n. Raises Unusable: mis-encoded or binary."""
    marked = find_byte_order_mark(data)
    encoding, start = marked or (encoding, 0)
    try:
        text = data[start:].decode(encoding)
    except UnicodeDecodeError as error:
        zero = data.find(b"\x00")
        if zero >= 0 and marked is None:
            raise Unusable(describe_binary(zero)) from error
        raise Unusable(describe_misencoded(error, start)) from error
    zero = text.find("\x00")
    if zero >= 0:
        raise Unusable(describe_binary(zero))
    return text.replace("\r\n", "\n").replace("\r", "\n")


def describe_binary(offset: int) -> str:
    return f"binary content: a NUL at offset {offset}. UTF-16 without a byte order mark needs source.encoding=utf-16-le"


def describe_misencoded(error: UnicodeDecodeError, start: int = 0) -> str:
    return (
        f"not valid {error.encoding}: byte 0x{error.object[error.start]:02x} at offset {start + error.start}. "
        "Save it as UTF-8, or name its encoding in source.encoding (cp1252, utf-16-le, ...)"
    )


def clean_text(text: str) -> str:
    """Lone surrogates can't be encoded and NUL is cut off or refused by what comes later: both become U+FFFD."""
    return _UNSTORABLE.sub("\ufffd", text)


def check_text_size(text: str, max_bytes: int) -> None:
    """Raises Unusable: more text than a document may have."""
    if len(text) <= max_bytes // 4:  # no character takes more
        return
    size_bytes = len(text.encode(errors="replace"))
    if size_bytes > max_bytes:
        raise Unusable(
            f"{size_bytes:,} bytes of text in one document; the limit is {max_bytes:,}. Split it, or raise "
            "source.max_text_bytes"
        )


def is_blank(text: str) -> bool:
    """Nothing in it that anyone could see: white space, byte order marks, zero-width characters."""
    return not text.strip().strip(_INVISIBLE).strip()


def clean_title(text: str) -> str:
    """One line, at most 200 characters: it is embedded with every node, so a long one takes the room of the text."""
    line = " ".join(clean_text(text).split())
    return line if len(line) <= _MAX_TITLE_CHARS else line[: _MAX_TITLE_CHARS - 3].rstrip() + "..."


def file_metadata(doc_id: str, file_format: str) -> dict[str, Any]:
    """What every document says of its file. Nothing that changes by itself, such as its time: it is hashed."""
    return {"file_name": doc_id.rsplit("/", 1)[-1], "file_path": doc_id, "format": file_format}


def clean_metadata(values: Mapping[Any, Any]) -> dict[str, Any]:
    """JSON-ready metadata; a reserved key gets the prefix `source_`. Raises Unusable: nested too deep."""
    cleaned: dict[str, Any] = {}
    for key, value in values.items():
        name = clean_text(str(key))
        while name in RESERVED_KEYS or name.startswith("_node_") or name in cleaned:
            name = f"source_{name}"
        cleaned[name] = to_json_value(value)
    return cleaned


def to_json_value(value: Any, depth: int = 0) -> Any:
    """JSON-ready: numbers that are not finite become None; what 64 bits or a float can't hold becomes a string."""
    if depth > _MAX_DEPTH:
        raise Unusable(
            f"metadata nested deeper than {_MAX_DEPTH} levels; name the wanted ones in source.metadata_fields"
        )
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else _to_digits(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean_text(str(key)): to_json_value(item, depth + 1) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)  # a set's own order changes from process to process
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_json_value(item, depth + 1) for item in value]
    return _scalar_to_json(value)


def _scalar_to_json(value: Any) -> Any:
    if isinstance(value, Decimal):
        if not value.is_finite():
            return None
        near = float(value)
        return near if math.isfinite(near) and Decimal(repr(near)) == value else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        raw = bytes(value)
        try:
            return clean_text(raw.decode())
        except UnicodeDecodeError:
            return base64.b64encode(raw).decode("ascii")
    if isinstance(value, datetime | date | time):
        # pandas' NaT is a datetime that equals nothing, itself included.
        return value.isoformat() if value == value else None
    if isinstance(value, timedelta):
        return value.total_seconds()
    return clean_text(str(value))


def _to_digits(value: int) -> str:
    # Above 4,300 digits Python refuses the quadratic conversion to decimal.
    return str(value) if value.bit_length() < 14_000 else hex(value)
