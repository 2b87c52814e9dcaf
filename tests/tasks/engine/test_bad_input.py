"""One real run over a folder with everything that is wrong with files and rows: none of it stops the rest or gets lost.

Each case is a row of the README's table "Bad input": test_the_readmes_table_is_these_cases compares them.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pypdf
import pytest
from reportlab.pdfgen.canvas import Canvas

from tasks.backends.qdrant import open_store
from tasks.config import IngestSettings
from tasks.engine.open_run import open_run
from tasks.records import Rejection, RunSummary, SearchHit

ROOT = Path(__file__).resolve().parents[3]
LINE_BYTES = 100_000_000


def make_pdf(text: str) -> bytes:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=1)
    if text:
        canvas.drawString(72, 720, text)
    else:
        canvas.rect(72, 72, 200, 200)
    canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def encrypt_pdf(data: bytes) -> bytes:
    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(io.BytesIO(data)))
    writer.encrypt("password", "owner", algorithm="AES-256")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def make_broken_docx() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<w:document><w:body>torn")
    return buffer.getvalue()


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def write_rows(name: str, *rows: str | dict[str, Any]) -> Callable[[Path], None]:
    return write(name, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def write_long_lines(folder: Path) -> None:
    block = b"0123456789abcdef" * 62_500
    with (folder / "long.txt").open("wb") as file:
        for _ in range(LINE_BYTES // len(block)):
            file.write(block)
    with (folder / "long.jsonl").open("wb") as file:
        file.write(b'{"id": "before", "text": "the row before"}\n{"id": "long", "text": "')
        for _ in range(LINE_BYTES // len(block)):
            file.write(block)
        file.write(b'"}\n{"id": "after", "text": "the row after"}\n')


def write_loop(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / "itself.md").symlink_to("itself.md")


def write_twins(folder: Path) -> None:
    for name in ("twin-1.md", "twin-2.md"):
        (folder / name).write_text("Both say the same.")


def link_to_unreadable(folder: Path) -> None:
    # Permissions don't stop root, and tests often run as root: a file that nobody can read from its beginning.
    (folder / "unreadable.txt").symlink_to("/proc/self/mem")


STORED = "stored"
EMPTY = "nothing to store; what it held before counts as deleted"


@dataclass(frozen=True)
class Case:
    """`outcomes`: status of each document, and for rejected ones a part of their reason. `seen`, `way_out`: the README's."""

    name: str
    write: Callable[[Path], Any]
    outcomes: dict[str, tuple[str, str]]
    seen: str
    way_out: str
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def counted_as(self) -> str:
        return ", ".join(dict.fromkeys(status for status, _ in self.outcomes.values()))

    def to_row(self) -> str:
        return f"| {self.name} | {self.counted_as} | {self.seen} | {self.way_out} |"


def rejected(name: str, make: Callable[[Path], Any], doc_id: str, status: str, reason: str, way_out: str) -> Case:
    return Case(name, make, {doc_id: (status, reason)}, f"`{reason}`", way_out)


DEEP = json.loads('{"a":' * 70 + "1" + "}" * 70)

CASES = [
    rejected("an empty file", write("empty.md", b""), "empty.md", "skipped", "empty file", EMPTY),
    rejected(
        "only white space",
        write("blank.txt", " \n\t\ufeff\u200b\n"),
        "blank.txt",
        "skipped",
        "no text in it",
        EMPTY,
    ),
    rejected(
        "binary content",
        write("binary.txt", b"\x7fELF\x02\x01\x00\x00 text"),
        "binary.txt",
        "failed",
        "binary content: a NUL at offset 6",
        "give it its true suffix, or take it out of the source",
    ),
    rejected(
        "invalid UTF-8",
        write("latin1.txt", "Grüße".encode("latin-1")),
        "latin1.txt",
        "failed",
        "not valid utf-8: byte 0xfc at offset 2",
        "save it as UTF-8, or set `source.encoding`",
    ),
    Case(
        "UTF-16 or UTF-32 with a byte order mark",
        write("utf16.txt", codecs.BOM_UTF16_LE + "Grüße aus Norrhaven".encode("utf-16-le")),
        {"utf16.txt": (STORED, "")},
        "read by its mark, whatever `source.encoding` says",
        "nothing to do",
        {"utf16.txt": "Grüße aus Norrhaven"},
    ),
    rejected(
        "UTF-16 without a mark",
        write("utf16-unmarked.txt", "Norrhaven".encode("utf-16-le")),
        "utf16-unmarked.txt",
        "failed",
        "UTF-16 without a byte order mark needs source.encoding=utf-16-le",
        "set `source.encoding`, or save it as UTF-8",
    ),
    Case(
        "a single line of 100 MB",
        write_long_lines,
        {
            "long.txt": ("failed", "the limit is 16,777,216"),
            "long.jsonl:2": ("failed", "line 2 has 100,000,027 bytes; the limit is 16,777,216"),
            "long.jsonl#before": (STORED, ""),
            "long.jsonl#after": (STORED, ""),
        },
        "`the limit is 16,777,216`; it is not read, and the other rows of a jsonl are",
        "split it, or raise `source.max_text_bytes`",
    ),
    rejected(
        "a PDF without text",
        write("scan.pdf", make_pdf("")),
        "scan.pdf",
        "failed",
        "no text layer on any of its pages",
        "run OCR on it first: `ocrmypdf scan.pdf scan.pdf`",
    ),
    rejected(
        "an encrypted PDF",
        write("secret.pdf", encrypt_pdf(make_pdf("Secret."))),
        "secret.pdf",
        "failed",
        "encrypted: it needs a password",
        "save it without one",
    ),
    rejected(
        "a broken PDF", write("torn.pdf", make_pdf("Page")[:200]), "torn.pdf", "failed", "damaged PDF", "get it anew"
    ),
    rejected(
        "a broken docx", write("torn.docx", make_broken_docx()), "torn.docx", "failed", "damaged docx", "get it anew"
    ),
    Case(
        "a symlink loop",
        write_loop,
        {
            "loop": ("skipped", "a folder that is listed under another name already (symbolic links)"),
            "itself.md": ("failed", "a broken symbolic link: can't be read: Too many levels of symbolic links"),
        },
        "`a folder that is listed under another name already`, `a broken symbolic link`",
        "a loop of folders does no harm; remove the link that leads to itself",
    ),
    rejected(
        "a FIFO, a socket, a device",
        lambda folder: os.mkfifo(folder / "pipe.md"),
        "pipe.md",
        "skipped",
        "not a regular file (a pipe, a socket or a device)",
        "nothing to do",
    ),
    rejected(
        "an unreadable file",
        link_to_unreadable,
        "unreadable.txt",
        "failed",
        "can't be read: Input/output error",
        "`permission denied`: let this user read it; else mend the disk or the share",
    ),
    rejected(
        "a link to what is not there",
        lambda folder: (folder / "share").symlink_to("/no/such/disk"),
        "share",
        "failed",
        "a broken symbolic link: its target is not there",
        "mount the disk, or remove the link; nothing below it counts as deleted meanwhile",
    ),
    Case(
        "a name with a newline",
        write("two\nlines.md", "A name of two lines."),
        {"two\nlines.md": (STORED, "")},
        "stored under that name",
        "nothing to do",
        {"two\nlines.md": "A name of two lines."},
    ),
    Case(
        "a name with an emoji",
        write("🚢 lanes.md", "A ship in the name."),
        {"🚢 lanes.md": (STORED, "")},
        "stored under that name",
        "nothing to do",
        {"🚢 lanes.md": "A ship in the name."},
    ),
    rejected(
        "a name that is not UTF-8",
        lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/gr\xfc\xdfe.md")).write_text("Text."),
        "gr\\udcfc\\udcdfe.md",
        "failed",
        "a file name that is not valid UTF-8",
        "rename it",
    ),
    Case(
        "two files with equal content",
        write_twins,
        {"twin-1.md": (STORED, ""), "twin-2.md": (STORED, "")},
        "two documents, each with points of its own",
        "nothing to do",
        {"twin-1.md": "Both say the same.", "twin-2.md": "Both say the same."},
    ),
    Case(
        "an id twice in a table",
        write_rows("twice.jsonl", {"id": "a", "text": "the first"}, {"id": "a", "text": "the second"}),
        {
            "twice.jsonl#a": (STORED, ""),
            "twice.jsonl:2": ("failed", "id 'a' occurs more than once in this file; the first one counts"),
        },
        "`occurs more than once in this file; the first one counts`",
        "give each row an id of its own",
        {"twice.jsonl#a": "the first"},
    ),
    Case(
        "a row without an id",
        write_rows("nameless.jsonl", {"id": 1, "text": "named"}, {"id": None, "text": "nameless"}),
        {
            "nameless.jsonl#1": (STORED, ""),
            "nameless.jsonl:2": ("failed", "no id: id is None; every row needs one that stays the same"),
        },
        "`every row needs one that stays the same`; no row of this table counts as deleted meanwhile",
        "fill it in, or name the right column in `source.id_field`",
    ),
    Case(
        "a broken line in a jsonl",
        write_rows("broken.jsonl", {"id": 1, "text": "before"}, '{"id": 2, "text": "cut', {"id": 3, "text": "after"}),
        {
            "broken.jsonl#1": (STORED, ""),
            "broken.jsonl:2": ("failed", "line 2 is not JSON: Unterminated string"),
            "broken.jsonl#3": (STORED, ""),
        },
        "`line 2 is not JSON`; no row of this table counts as deleted meanwhile",
        "mend the line",
    ),
    Case(
        "metadata with NaN or infinity",
        write_rows("nan.jsonl", '{"id": 1, "text": "not a number", "score": NaN, "far": -Infinity, "depth": 5.5}'),
        {"nan.jsonl#1": (STORED, "")},
        "stored as null: JSON has neither",
        "nothing to do",
    ),
    Case(
        "metadata with huge integers",
        write_rows("huge.jsonl", {"id": 1, "text": "huge", "big": 10**30, "largest": 2**63 - 1}),
        {"huge.jsonl#1": (STORED, "")},
        "above 64 bits, stored as text",
        "nothing to do",
    ),
    Case(
        "nested metadata",
        write_rows(
            "nested.jsonl",
            {"id": 1, "text": "nested", "berth": {"quay": [4, {"bollards": [12, None]}]}},
            {"id": 2, "text": "nested too deep", "deep": DEEP},
        ),
        {
            "nested.jsonl#1": (STORED, ""),
            "nested.jsonl#2": ("failed", "metadata nested deeper than 64 levels"),
        },
        "stored as it is; `metadata nested deeper than 64 levels`",
        "name the wanted fields in `source.metadata_fields`",
    ),
    Case(
        "metadata with reserved keys",
        write_rows(
            "reserved.jsonl",
            '{"id": 1, "text": "reserved", "doc_id": "theirs", "generation": "theirs", "_node_content": "theirs",'
            ' "ballast_source": "theirs", "ballast_nodes": 99, "ballast_content": "theirs", "source": "a book"}',
        ),
        {"reserved.jsonl#1": (STORED, "")},
        "stored as `source_doc_id`, `source_generation`, `source_ballast_nodes`, ...",
        "nothing to do",
    ),
    Case(
        "lone surrogates",
        write_rows("surrogates.jsonl", r'{"id": "a\ud800", "text": "half \udc00 a pair", "k\ud801": "v\udfff"}'),
        {"surrogates.jsonl#a\ufffd": (STORED, "")},
        "stored with U+FFFD in their place: UTF-8 can't hold them",
        "nothing to do",
        {"surrogates.jsonl#a\ufffd": "half \ufffd a pair"},
    ),
    rejected(
        "a format that is not read",
        write("picture.png", b"\x89PNG"),
        "picture.png",
        "skipped",
        "format .png is not read",
        "convert it, or take it out of the source",
    ),
]
GOOD = {"good.md": "A document with nothing wrong.", "zzz.md": "The last one."}


@dataclass(frozen=True)
class Ran:
    summary: RunSummary
    off: tuple[str, ...]
    hits: dict[str, SearchHit]  # every point, by document: they have one each

    @property
    def rejections(self) -> dict[str, Rejection]:
        return {rejection.doc_id: rejection for rejection in self.summary.rejections}


def run_ingest(source: Path, data: Path, model: str) -> Ran:
    settings = IngestSettings.model_validate(
        {
            "source": {"uri": str(source)},
            "embedding": {"model": model, "device": "cpu", "cpu_workers": 1},
            "chunking": {"workers": 1},
            "partition": {"max_tokens": 20_000},
            "data_folder": str(data),
            "qdrant": {"collection": "port"},
        }
    )
    run = open_run(settings, {})
    devices = threading.Thread(target=run.start_devices)
    devices.start()
    try:
        while (partition := run.spool_next_partition()) is not None:
            devices.join()
            run.embed_partition(partition)
            run.upsert_partition(partition)
        run.settle()
        summary, off = run.close_books()
    finally:
        run.close()
        devices.join()
    with closing(open_store(settings.qdrant, str(data), environment={})) as store:
        anything = np.full(384, 384**-0.5, np.float32)
        hits = store.search("port", anything, limit=1000)
    assert len({hit.doc_id for hit in hits}) == len(hits)
    return Ran(summary, off, {hit.doc_id: hit for hit in hits})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, text in GOOD.items():
        (folder / name).write_text(text)
    for case in CASES:
        case.write(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def first(folder: Path, data: Path, minilm: str) -> Ran:
    return run_ingest(folder, data, minilm)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(first: Ran, case: Case) -> None:
    for doc_id, (status, reason) in case.outcomes.items():
        if status == STORED:
            assert doc_id in first.hits
            assert doc_id not in first.rejections
        else:
            rejection = first.rejections[doc_id]
            assert (rejection.status, rejection.stage) == (status, "read")
            assert reason in rejection.reason
            assert doc_id not in first.hits
    for doc_id, text in case.texts.items():
        assert first.hits[doc_id].text == text


def test_the_others_are_stored_and_the_books_close(first: Ran) -> None:
    assert first.off == ()
    assert {name: first.hits[name].text for name in GOOD} == GOOD
    expected = {doc_id: status for case in CASES for doc_id, (status, _) in case.outcomes.items()}
    assert first.rejections.keys() == {doc_id for doc_id, status in expected.items() if status != STORED}
    assert first.hits.keys() == GOOD.keys() | {doc_id for doc_id, status in expected.items() if status == STORED}
    books = first.summary.books
    assert books.documents_seen == len(GOOD) + len(expected)
    assert books.documents_written == len(first.hits)


def test_metadata_is_stored_as_json_can_hold_it(first: Ran) -> None:
    metadata = {name: first.hits[f"{name}.jsonl#1"].metadata for name in ("nan", "huge", "nested", "reserved")}
    assert (metadata["nan"]["score"], metadata["nan"]["far"], metadata["nan"]["depth"]) == (None, None, 5.5)
    assert (metadata["huge"]["big"], metadata["huge"]["largest"]) == (str(10**30), 2**63 - 1)
    assert metadata["nested"]["berth"] == {"quay": [4, {"bollards": [12, None]}]}
    theirs = ("doc_id", "generation", "_node_content", "ballast_source", "ballast_content")
    assert {metadata["reserved"][f"source_{key}"] for key in theirs} == {"theirs"}
    assert metadata["reserved"]["source_ballast_nodes"] == 99
    assert metadata["reserved"]["source"] == "a book"
    assert first.hits["surrogates.jsonl#a\ufffd"].metadata["k\ufffd"] == "v\ufffd"


def test_run_again_it_is_the_same_and_ends_with_the_hopeless_ones_parked(
    first: Ran, folder: Path, data: Path, minilm: str
) -> None:
    second = run_ingest(folder, data, minilm)
    assert second.off == ()
    assert second.hits == first.hits
    assert second.rejections == first.rejections
    assert (second.summary.tokens, second.summary.books.documents_unchanged) == (0, len(first.hits))
    run_ingest(folder, data, minilm)
    last = run_ingest(folder, data, minilm)
    assert last.off == ()
    assert last.hits == first.hits
    for doc_id, rejection in first.rejections.items():
        # What may hide other documents fails for ever: a run that looks fine would say that nothing is missing.
        if rejection.status == "failed" and rejection.covers is None:
            assert last.rejections[doc_id].status == "skipped"
            assert last.rejections[doc_id].reason == f"parked after 3 attempts: {rejection.reason}"
        else:
            assert last.rejections[doc_id] == rejection


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_readme_quotes_what_is_said(first: Ran, case: Case) -> None:
    reasons = [first.rejections[doc_id].reason for doc_id, (status, _) in case.outcomes.items() if status != STORED]
    if reasons:
        for quoted in re.findall(r"`([^`]+)`", case.seen):
            assert any(quoted in reason for reason in reasons)


def test_the_readmes_table_is_these_cases() -> None:
    rows = "\n".join(case.to_row() for case in CASES)
    table = f"| bad input | counted as | you see | do |\n| --- | --- | --- | --- |\n{rows}\n"
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), f"Put this into the README:\n{table}"
