"""One file, one document: md, txt, html, pdf, docx. Runs in worker processes; a file that can't be read is a Rejection.

LlamaIndex's readers are not called, the libraries below them are: PDFReader retries every error three times and returns
one document a page; HTMLTagReader keeps one kind of tag and loses all else; MarkdownReader drops links and splits; none
of them tells an encrypted, scanned, mis-encoded or torn file from an empty one.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import logging
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any, Literal
from xml.etree import ElementTree

from tasks.backends.filesystem import (
    connect_to_file,
    describe_too_large,
    explain_io_error,
    io_errors,
    read_blocks,
    read_bytes,
)
from tasks.backends.texts import (
    Unusable,
    check_text_size,
    clean_metadata,
    clean_text,
    clean_title,
    decode_text,
    file_metadata,
    find_byte_order_mark,
    is_blank,
    is_encoding,
    to_json_value,
)
from tasks.config import SourceSettings
from tasks.records import Document, FileRef, Rejection

# What parsers raise beside their own errors, since they trust the types, keys and numbers that a file claims. 17,600 PDFs with
# bytes changed, cut and doubled raised most of them in pypdf; pyyaml and markdownify raise others by a single word.
_DAMAGE = (
    ValueError,
    NotImplementedError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    RecursionError,
    EOFError,
    struct.error,
    zlib.error,
)

logger = logging.getLogger(__name__)

Parsed = tuple[str, dict[str, Any], Literal["text", "markdown"]]

# Raise it when this file or texts.py begins to make another text or other metadata of the same bytes: every file is then
# read again, and only what really changed is embedded again. The libraries' own versions are in the fingerprint.
_PARSING_VERSION = 1
_TEXT_FORMATS = ("md", "txt", "html")  # decoded by source.encoding

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}#\s+(.+?)\s*#*\s*$")
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_MAX_FRONT_MATTER_CHARS = 64 * 1024
_DROPPED_TAGS = ("script", "style", "nav", "template", "noscript", "svg", "iframe", "head")
_NUMBERS = ("colspan", "start")
_OLE_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_XML_BYTES_PER_TEXT = 8  # Word writes some marks for each word that was touched
_NO_MEMORY = "more memory is needed to read it than there is. Lower chunking.workers, or split it"
_CORE_TITLE = "{http://purl.org/dc/elements/1.1/}title"


def read_file(ref: FileRef, settings: SourceSettings) -> Document | Rejection:
    """The document in `ref`, or why there is none: what is wrong with a file is never raised. For a process pool.

    Its content_hash is hash_content's, of the very bytes that were parsed. A Rejection has one too, but where the file was
    not read: it could not be, or is above a limit.
    """
    content_hash = ""
    try:
        limit = _check_size(ref, settings)
        data = read_bytes(connect_to_file(ref.uri, settings.uri), ref.uri, *limit)
        content_hash = _hash_blocks([data], ref, settings)
        return _parse_document(data, ref, settings, content_hash)
    except Unusable as problem:
        return _reject(ref, problem.status, problem.reason, content_hash)
    except io_errors() as error:
        return _reject(ref, "failed", explain_io_error(error))
    except MemoryError:
        return _reject(ref, "failed", _NO_MEMORY, content_hash)


def hash_content(ref: FileRef, settings: SourceSettings) -> str | Rejection:
    """sha256 (hex) of the raw bytes and of what decides how they are read: equal means that the document is the same.

    In blocks: its memory does not depend on the file. A file that can't be read is a Rejection, as read_file's is.
    """
    try:
        limit = _check_size(ref, settings)
        blocks = read_blocks(connect_to_file(ref.uri, settings.uri), ref.uri, *limit)
        return _hash_blocks(blocks, ref, settings)
    except Unusable as problem:
        return _reject(ref, problem.status, problem.reason)
    except io_errors() as error:
        return _reject(ref, "failed", explain_io_error(error))


def _hash_blocks(blocks: Iterable[bytes], ref: FileRef, settings: SourceSettings) -> str:
    # Of a packed file only its text can be too long, and that shows after it has been read: another limit, another outcome.
    decides = _name_codec(settings.encoding) if ref.format in _TEXT_FORMATS else str(int(settings.max_text_bytes))
    # There is no NUL in either, so no two headers and contents run together to the same bytes.
    digest = hashlib.sha256(f"{_PARSING_VERSION}\0{ref.format}\0{decides}\0".encode())
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


@functools.cache
def _name_codec(encoding: str) -> str:
    return codecs.lookup(encoding).name  # UTF8, utf-8 and utf_8 are one


def _check_size(ref: FileRef, settings: SourceSettings) -> tuple[int, str]:
    """(bytes that the file may have, the knob that says so)."""
    limit = (int(settings.max_file_bytes), "max_file_bytes")
    if ref.format in _TEXT_FORMATS:
        limit = min(limit, (int(settings.max_text_bytes), "max_text_bytes"))
    if ref.source_bytes > limit[0]:
        raise Unusable(describe_too_large(ref.source_bytes, *limit))
    return limit


def _reject(ref: FileRef, status: Literal["failed", "skipped"], reason: str, content_hash: str = "") -> Rejection:
    return Rejection(ref.doc_id, status, "read", reason, ref.source_bytes, content_hash=content_hash)


def _parse_document(data: bytes, ref: FileRef, settings: SourceSettings, content_hash: str) -> Document:
    if not data:
        raise Unusable("empty file", "skipped")
    text, found, text_format = _PARSERS[ref.format](data, settings)
    text = clean_text(text)
    if is_blank(text):
        raise Unusable("no text in it", "skipped")
    metadata = {**clean_metadata(found), **file_metadata(ref.doc_id, ref.format)}
    return Document(ref.doc_id, text, metadata, text_format, ref.source_bytes, content_hash)


# ---------------------------------------------------------------------------------------------- text and Markdown


def _parse_text(data: bytes, settings: SourceSettings) -> Parsed:
    return decode_text(data, settings.encoding), {}, "text"


def _parse_markdown(data: bytes, settings: SourceSettings) -> Parsed:
    """Raw Markdown without its front matter, which becomes metadata; title: the one in it, else the first # heading."""
    text = decode_text(data, settings.encoding)
    metadata: dict[str, Any] = {}
    match = _FRONT_MATTER.match(text)
    if match and match.end() <= _MAX_FRONT_MATTER_CHARS:
        front_matter = _parse_front_matter(match.group(1))
        if front_matter is not None:
            metadata, text = front_matter, text[match.end() :].lstrip("\n")
    title = metadata.get("title")
    title = title if isinstance(title, str) else _find_heading(text)
    if title:
        metadata["title"] = clean_title(title)
    return text, metadata, "markdown"


def _parse_front_matter(block: str) -> dict[str, Any] | None:
    """Its scalars and lists of scalars; None where it is no YAML mapping (a page may well begin with a rule)."""
    import yaml

    try:
        values = yaml.safe_load(block)
    except (yaml.YAMLError, *_DAMAGE):  # a date such as 2026-13-45, !!timestamp foo, !!bool foo
        return None
    if not isinstance(values, dict):
        return None
    # No deeper: nested aliases of some lines unfold to gigabytes.
    flat = {key: value for key, value in values.items() if _is_scalar(value) or _is_flat_list(value)}
    # A key may be a number of more digits than Python writes.
    return {str(to_json_value(key)): to_json_value(value) for key, value in flat.items()}


def _is_scalar(value: object) -> bool:
    return not isinstance(value, dict | list | set | tuple)


def _is_flat_list(value: object) -> bool:
    return isinstance(value, list) and all(_is_scalar(item) for item in value)


def _find_heading(text: str) -> str | None:
    fence = ""
    for line in io.StringIO(text):
        mark = _FENCE.match(line)
        if mark and (not fence or mark.group(1).startswith(fence)):
            fence = "" if fence else mark.group(1)
        elif not fence and (heading := _HEADING.match(line)):
            return heading.group(1)
    return None


# ---------------------------------------------------------------------------------------------- HTML


def _parse_html(data: bytes, settings: SourceSettings) -> Parsed:
    """Markdown of the page's content, so that headings stay headings; title: <title>, else the first h1."""
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
    from bs4.exceptions import ParserRejectedMarkup
    from markdownify import MarkdownConverter

    text = decode_text(data, _find_charset(data) or settings.encoding)
    try:
        with warnings.catch_warnings():
            # XHTML is read as HTML on purpose, and a page that consists of one URL is still a page.
            warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
            warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
            soup = BeautifulSoup(text, "lxml")
        title = soup.title or soup.h1
        metadata = {"title": clean_title(title.get_text(" "))} if title and title.get_text(strip=True) else {}
        for tag in soup(_DROPPED_TAGS):
            tag.decompose()
        for tag in soup(["td", "th", "ol"]):
            _drop_odd_numbers(tag)
        # Links and pictures as their text: an address in a node is noise to the embedding. Nothing is escaped, since a
        # reader of the passage sees the Markdown as it is.
        body = MarkdownConverter(
            heading_style="atx",
            bullets="-",
            strip=["a", "img"],
            escape_asterisks=False,
            escape_underscores=False,
            table_infer_header=True,
        ).convert_soup(soup)
    except RecursionError as error:
        raise Unusable("HTML nested too deep to be read") from error
    except (ParserRejectedMarkup, *_DAMAGE) as error:
        raise Unusable(f"not readable as HTML: {type(error).__name__} {error}") from error
    return re.sub(r"\n{3,}", "\n\n", body).strip(), metadata, "markdown"


def _drop_odd_numbers(tag: Any) -> None:
    """markdownify asks isdigit() or isnumeric() and calls int(): a superscript 2 raises then, and so do 5,000 digits."""
    for name in _NUMBERS:
        value = str(tag.get(name, ""))
        if value and not (value.isdecimal() and len(value) < 10):
            del tag[name]


def _find_charset(data: bytes) -> str | None:
    """The charset that the page declares, if Python has it; browsers read latin-1 as cp1252, and so do we."""
    from bs4.dammit import EncodingDetector

    if find_byte_order_mark(data):
        return None
    declared: str | None = EncodingDetector.find_declared_encoding(data, is_html=True)
    if declared is None or declared.startswith("utf-16"):  # read as single bytes, so it can't be UTF-16
        return None
    if declared in ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii"):
        return "cp1252"
    return declared if is_encoding(declared) else None


# ---------------------------------------------------------------------------------------------- PDF and docx


def _parse_pdf(data: bytes, settings: SourceSettings) -> Parsed:
    """The pages' text, joined with blank lines."""
    import pypdf
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    # It also logs what it raises, from a worker process, without the document's name; the rejection has both.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)

    try:
        pdf = pypdf.PdfReader(io.BytesIO(data))
        if pdf.is_encrypted and not pdf.decrypt(""):
            raise Unusable("encrypted: it needs a password. Save it without one")
        pages: list[str] = []
        text_chars = 0
        for page in pdf.pages:
            pages.append(page.extract_text().strip())
            text_chars += len(pages[-1])
            if text_chars > settings.max_text_bytes:  # far too much: don't go on for minutes to say by how much
                check_text_size("\n\n".join(pages), settings.max_text_bytes)
        title = pdf.metadata.title if pdf.metadata else None
    except (DependencyError, FileNotDecryptedError) as error:
        raise Unusable(f"encrypted: {error}. Save it without a password") from error
    except (PyPdfError, *_DAMAGE) as error:
        raise Unusable(f"damaged PDF: {type(error).__name__} {error}") from error
    without_text = sum(is_blank(page) for page in pages)
    if without_text == len(pages):
        raise Unusable(
            f"no text layer on any of its pages ({len(pages)}): a scan, or drawings. Run OCR on it first (ocrmypdf)"
        )
    metadata: dict[str, Any] = {"pages": len(pages)}
    if without_text:
        # A scan among pages of text is read as far as it goes, and says so where it is stored.
        metadata["pages_without_text"] = without_text
        logger.warning("PDF with pages without a text layer: pages=%d without_text=%d", len(pages), without_text)
    if isinstance(title, str) and not is_blank(title):
        metadata["title"] = clean_title(title)
    text = "\n\n".join(page for page in pages if page)
    check_text_size(text, settings.max_text_bytes)
    return text, metadata, "text"


_DOCX_DAMAGE = (zipfile.BadZipFile, zipfile.LargeZipFile, ElementTree.ParseError, OSError, RuntimeError, *_DAMAGE)


def _parse_docx(data: bytes, settings: SourceSettings) -> Parsed:
    """The text of headers, body and footers, as docx2txt (which LlamaIndex's DocxReader calls) finds it."""
    import docx2txt

    if data.startswith(_OLE_MAGIC):
        raise Unusable("an old .doc, or a .docx with a password. Save it as a .docx without one")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            # Some kilobytes of zip can unpack to gigabytes; zipfile does not go beyond the sizes declared here.
            unpacked = sum(member.file_size for member in archive.infolist() if member.filename.endswith(".xml"))
            max_unpacked = _XML_BYTES_PER_TEXT * settings.max_text_bytes
            if unpacked > max_unpacked:
                raise Unusable(f"unpacked, {describe_too_large(unpacked, max_unpacked, 'max_text_bytes')}")
            title = _find_docx_title(archive)
        text = docx2txt.process(io.BytesIO(data))
    except _DOCX_DAMAGE as error:
        raise Unusable(f"damaged docx: {type(error).__name__} {error}") from error
    check_text_size(text, settings.max_text_bytes)
    metadata = {"title": clean_title(title)} if title and not is_blank(title) else {}
    return re.sub(r"\n{3,}", "\n\n", text), metadata, "text"


def _find_docx_title(archive: zipfile.ZipFile) -> str | None:
    if "docProps/core.xml" not in archive.namelist():
        return None
    core = archive.read("docProps/core.xml")
    return ElementTree.fromstring(core).findtext(_CORE_TITLE)  # noqa: S314  expat stops entities that unfold without end


_PARSERS: dict[str, Callable[[bytes, SourceSettings], Parsed]] = {
    "md": _parse_markdown,
    "txt": _parse_text,
    "html": _parse_html,
    "pdf": _parse_pdf,
    "docx": _parse_docx,
}
