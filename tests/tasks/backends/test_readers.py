"""What becomes of one file: a document with its text and metadata, or a Rejection with its reason. Real files throughout."""

from __future__ import annotations

import codecs
import io
import os
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import docx
import fsspec
import pypdf
import pytest
from reportlab.pdfgen.canvas import Canvas

from tasks.backends import readers
from tasks.backends.processes import spawn_pool
from tasks.backends.readers import hash_content, read_file
from tasks.config import SourceSettings
from tasks.records import Document, FileRef, Rejection


def read(path: Path, **knobs: object) -> Document | Rejection:
    settings = SourceSettings(uri=str(path.parent), **knobs)
    size = path.stat().st_size if path.exists() else 0
    return read_file(FileRef(path.name, str(path), path.suffix[1:], size), settings)


def read_bytes(tmp_path: Path, name: str, data: bytes, **knobs: object) -> Document | Rejection:
    path = tmp_path / name
    path.write_bytes(data)
    return read(path, **knobs)


def make_pdf(*pages: str, title: str = "") -> bytes:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, invariant=1)
    if title:
        canvas.setTitle(title)
    for page in pages:
        if page:
            canvas.drawString(72, 720, page)
        else:
            canvas.rect(72, 72, 200, 200)
        canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def encrypt_pdf(data: bytes, password: str, algorithm: str = "AES-256") -> bytes:
    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(io.BytesIO(data)))
    writer.encrypt(password, "owner", algorithm=algorithm)
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def make_docx(*paragraphs: str, title: str = "") -> bytes:
    document = docx.Document()
    document.core_properties.title = title
    for paragraph in paragraphs:
        document.add_paragraph(paragraph)
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def document(result: Document | Rejection) -> Document:
    assert isinstance(result, Document), result
    return result


def rejection(result: Document | Rejection, status: str = "failed") -> Rejection:
    assert isinstance(result, Rejection), result
    assert (result.status, result.stage) == (status, "read")
    return result


# ---------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    "data",
    [
        "Grüße".encode(),
        codecs.BOM_UTF8 + "Grüße".encode(),
        codecs.BOM_UTF16_LE + "Grüße".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "Grüße".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "Grüße".encode("utf-32-le"),
        codecs.BOM_UTF32_BE + "Grüße".encode("utf-32-be"),
    ],
)
def test_text_is_decoded_by_its_byte_order_mark(tmp_path: Path, data: bytes) -> None:
    result = document(read_bytes(tmp_path, "a.txt", data))
    assert (result.text, result.format, result.source_bytes) == ("Grüße", "text", len(data))
    assert result.metadata == {"file_name": "a.txt", "file_path": "a.txt", "format": "txt"}


def test_text_is_decoded_by_the_encoding_that_is_set(tmp_path: Path) -> None:
    assert document(read_bytes(tmp_path, "a.txt", "Grüße".encode("cp1252"), encoding="cp1252")).text == "Grüße"
    assert document(read_bytes(tmp_path, "a.txt", "Grüße".encode("utf-16-le"), encoding="utf-16-le")).text == "Grüße"


def test_line_ends_become_newlines(tmp_path: Path) -> None:
    assert document(read_bytes(tmp_path, "a.txt", b"one\r\ntwo\rthree\n")).text == "one\ntwo\nthree\n"


def test_mis_encoded_text_fails_with_the_byte_its_offset_and_the_way_out(tmp_path: Path) -> None:
    reason = rejection(read_bytes(tmp_path, "a.txt", b"Gr\xfc\xdfe")).reason
    assert "not valid utf-8" in reason
    assert "0xfc at offset 2" in reason
    assert "source.encoding" in reason


@pytest.mark.parametrize("data", [b"PK\x03\x04\x00\x00\xff\xfe", b"plain\x00text", bytes(range(256)) * 4])
def test_binary_content_fails(tmp_path: Path, data: bytes) -> None:
    assert "binary content: a NUL at offset" in rejection(read_bytes(tmp_path, "a.txt", data)).reason


@pytest.mark.parametrize("data", [b"", b" \n\t\r\n ", codecs.BOM_UTF8, "\u200b\n\ufeff \u00a0".encode()])
@pytest.mark.parametrize("suffix", ["txt", "md", "html"])
def test_an_empty_file_is_skipped(tmp_path: Path, data: bytes, suffix: str) -> None:
    rejection(read_bytes(tmp_path, f"a.{suffix}", data), "skipped")


def test_a_file_that_is_too_large_fails_unread(tmp_path: Path) -> None:
    reason = rejection(read_bytes(tmp_path, "a.txt", b"x" * 1001, max_file_bytes=1000)).reason
    assert "1,001 bytes" in reason
    assert "source.max_file_bytes" in reason


def test_a_file_that_grew_since_it_was_listed_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 2000)
    result = read_file(FileRef("a.txt", str(path), "txt", 10), SourceSettings(uri=str(tmp_path), max_file_bytes=1000))
    assert "more than 1,000 bytes" in rejection(result).reason


def test_a_file_that_vanished_fails(tmp_path: Path) -> None:
    assert "vanished" in rejection(read(tmp_path / "gone.txt")).reason


def test_a_pipe_that_took_the_files_place_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    assert "not a regular file" in rejection(read(tmp_path / "a.txt"), "skipped").reason


def test_a_worker_process_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("# Title\n\nText.")
    with spawn_pool(1) as pool:
        ref = FileRef("a.md", str(path), "md", 15)
        result = pool.submit(read_file, ref, SourceSettings(uri=str(tmp_path))).result(timeout=120)
    assert document(result).metadata["title"] == "Title"


def test_a_remote_file_is_read_through_fsspec() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/readers/a.txt", b"text")
    result = read_file(FileRef("a.txt", "memory:///readers/a.txt", "txt", 4), SourceSettings(uri="memory://readers"))
    assert document(result).text == "text"


# ---------------------------------------------------------------------------------------------- Markdown and HTML


def test_markdown_keeps_its_text_and_takes_its_first_heading_as_title(tmp_path: Path) -> None:
    text = "Intro\n\n```sh\n# not a heading\n```\n\n# Anchor *watch* #\n\nSee [here](x.md).\n"
    result = document(read_bytes(tmp_path, "a.md", text.encode()))
    assert (result.text, result.format) == (text, "markdown")
    assert result.metadata["title"] == "Anchor *watch*"


def test_front_matter_becomes_metadata_and_leaves_the_text(tmp_path: Path) -> None:
    head = '---\ntitle: "Pumps: an overview"\ndate: 2026-03-01\ntags: [pump, 7]\nformat: odd\nnested: {a: 1}\n---\n'
    result = document(read_bytes(tmp_path, "a.md", (head + "\n# Other\n\nText.\n").encode()))
    assert result.text == "# Other\n\nText.\n"
    assert result.metadata == {
        "title": "Pumps: an overview",
        "date": "2026-03-01",
        "tags": ["pump", 7],
        "source_format": "odd",
        "file_name": "a.md",
        "file_path": "a.md",
        "format": "md",
    }


@pytest.mark.parametrize(
    "head", ["---\nno: [mapping\n---\n", "---\njust a rule\n---\n", "---\ndate: 2026-13-45\n---\n"]
)
def test_what_only_looks_like_front_matter_stays_text(tmp_path: Path, head: str) -> None:
    assert document(read_bytes(tmp_path, "a.md", (head + "Text.").encode())).text == head + "Text."


def test_front_matter_whose_aliases_unfold_without_end_is_harmless(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    result = document(read_bytes(tmp_path, "a.md", ("---\n" + "\n".join(lines) + "\n---\nText.").encode()))
    assert set(result.metadata) == {"a0", "file_name", "file_path", "format"}


def test_a_long_title_is_cut(tmp_path: Path) -> None:
    title = document(read_bytes(tmp_path, "a.md", b"# " + b"word " * 500)).metadata["title"]
    assert len(title) <= 200
    assert title.endswith("...")


PAGE = """<!doctype html><html><head><title> Ballast
 log </title><style>p {color: red}</style><script>var hidden_script = 1</script></head>
<body><nav><a href="/">hidden_nav</a></nav><h1>Log</h1><p>First <b>bold</b> snake_case 2*3 <a href="u">link</a>.</p>
<h2>Table</h2><table><tr><th>Tank</th><th>m³</th></tr><tr><td>3P</td><td>410</td></tr></table>
<ul><li>one<li>two</ul><pre>x = 1
y = 2</pre></body></html>"""


def test_html_becomes_markdown_with_title_headings_and_tables(tmp_path: Path) -> None:
    result = document(read_bytes(tmp_path, "a.html", PAGE.encode()))
    assert result.format == "markdown"
    assert result.metadata["title"] == "Ballast log"
    assert "# Log\n\nFirst **bold** snake_case 2*3 link.\n\n## Table" in result.text
    assert "| 3P | 410 |" in result.text
    assert "- one\n- two" in result.text
    assert "x = 1\ny = 2" in result.text
    for hidden in ("hidden_script", "hidden_nav", "color: red", "href"):
        assert hidden not in result.text


@pytest.mark.parametrize(
    ("declared", "codec"), [("iso-8859-1", "cp1252"), ("windows-1251", "cp1251"), ("shift_jis", "shift_jis")]
)
def test_html_is_decoded_by_the_charset_it_declares(tmp_path: Path, declared: str, codec: str) -> None:
    word = {"cp1252": "Größe – 5", "cp1251": "Балласт", "shift_jis": "日本語"}[codec]
    page = f'<html><head><meta charset="{declared}"></head><body>{word}</body></html>'
    assert document(read_bytes(tmp_path, "a.html", page.encode(codec))).text == word


def test_html_with_bad_bytes_fails_rather_than_guess(tmp_path: Path) -> None:
    assert "offset 3" in rejection(read_bytes(tmp_path, "a.html", b"<p>\xff\xfe\xfd</p>")).reason


@pytest.mark.parametrize(
    "page", ["https://example.org/page", "<?xml version='1.0' encoding='utf-8'?><html><p>x</p></html>", "b.md"]
)
def test_html_that_beautifulsoup_warns_of_is_read(tmp_path: Path, page: str) -> None:
    assert document(read_bytes(tmp_path, "a.html", page.encode())).text


def test_html_nested_too_deep_fails_and_html_of_scripts_only_is_skipped(tmp_path: Path) -> None:
    deep = b"<div>" * 5000 + b"x" + b"</div>" * 5000
    assert "nested too deep" in rejection(read_bytes(tmp_path, "a.html", deep)).reason
    rejection(read_bytes(tmp_path, "b.html", b"<html><title>t</title><script>x()</script></html>"), "skipped")


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    result = document(read_bytes(tmp_path, "a.md", b'---\ntitle: "a\\uD800b"\n---\nText.'))
    result.metadata["title"].encode()
    assert "\ufffd" in result.metadata["title"]


# ---------------------------------------------------------------------------------------------- PDF


def test_pdf_pages_are_joined_with_blank_lines(tmp_path: Path) -> None:
    result = document(read_bytes(tmp_path, "a.pdf", make_pdf("First page.", "Second page.", title="Stability\nbook")))
    assert (result.text, result.format) == ("First page.\n\nSecond page.", "text")
    assert result.metadata["pages"] == 2
    assert result.metadata["title"] == "Stability book"
    assert "pages_without_text" not in result.metadata


def test_a_pdf_without_a_text_layer_fails(tmp_path: Path) -> None:
    reason = rejection(read_bytes(tmp_path, "a.pdf", make_pdf("", ""))).reason
    assert "no text layer on any of its pages (2)" in reason
    assert "OCR" in reason


def test_a_pdf_with_a_scan_among_its_pages_says_so(tmp_path: Path) -> None:
    result = document(read_bytes(tmp_path, "a.pdf", make_pdf("First page.", "", "Third page.")))
    assert (result.text, result.metadata["pages_without_text"]) == ("First page.\n\nThird page.", 1)


@pytest.mark.parametrize("algorithm", ["RC4-128", "AES-256"])
def test_an_encrypted_pdf_fails_unless_its_password_is_empty(tmp_path: Path, algorithm: str) -> None:
    plain = make_pdf("Secret page.")
    reason = rejection(read_bytes(tmp_path, "a.pdf", encrypt_pdf(plain, "password", algorithm))).reason
    assert "encrypted" in reason
    assert document(read_bytes(tmp_path, "b.pdf", encrypt_pdf(plain, "", algorithm))).text == "Secret page."


@pytest.mark.parametrize(
    "data", [b"not a pdf at all", b"%PDF-1.4\n%%EOF", make_pdf("page")[:200], b"%PDF-1.7\n" + b"\x00" * 500]
)
def test_a_damaged_pdf_fails(tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert "damaged PDF" in rejection(read_bytes(tmp_path, "a.pdf", data)).reason
    assert not caplog.records


# ---------------------------------------------------------------------------------------------- docx


def test_docx_text_and_title(tmp_path: Path) -> None:
    data = make_docx("Erster Absatz.", "Zweiter Absatz.", title="Handbuch")
    result = document(read_bytes(tmp_path, "a.docx", data))
    assert result.text == "Erster Absatz.\n\nZweiter Absatz."
    assert result.metadata["title"] == "Handbuch"


def test_a_docx_without_text_is_skipped(tmp_path: Path) -> None:
    rejection(read_bytes(tmp_path, "a.docx", make_docx("", "  ")), "skipped")


def make_zip(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/") + ".xml", data)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [b"plain text", make_docx("x")[:-40], make_zip(other=b"<a/>"), make_zip(word__document=b"<a><b></a>")],
    ids=["no zip", "cut", "no document in it", "broken xml"],
)
def test_a_damaged_docx_fails(tmp_path: Path, data: bytes) -> None:
    assert "damaged docx" in rejection(read_bytes(tmp_path, "a.docx", data)).reason


def test_a_docx_with_a_password_fails(tmp_path: Path) -> None:
    data = bytes.fromhex("d0cf11e0a1b11ae1") + b"\x00" * 600  # what an office program writes: an OLE container
    assert "password" in rejection(read_bytes(tmp_path, "a.docx", data)).reason


def test_a_docx_that_unpacks_to_more_than_the_limit_fails_unpacked(tmp_path: Path) -> None:
    data = make_zip(word__document=b"<a>" + b" " * 5_000_000 + b"</a>")
    assert len(data) < 10_000
    assert "unpacked, 5,000,007 bytes" in rejection(read_bytes(tmp_path, "a.docx", data, max_text_bytes=500_000)).reason


# ---------------------------------------------------------------------------------------------- what tells a change


def hash_file(path: Path, **knobs: object) -> str | Rejection:
    settings = SourceSettings(uri=str(path.parent), **knobs)
    size = path.stat().st_size if path.exists() else 0
    return hash_content(FileRef(path.name, str(path), path.suffix[1:], size), settings)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.txt", lambda: b"Text."),
        ("a.md", lambda: b"---\ntitle: x\n---\n# Text"),
        ("a.html", lambda: b"<p>Text</p>"),
        ("a.pdf", lambda: make_pdf("Page.")),
        ("a.docx", lambda: make_docx("Text.")),
        ("empty.md", lambda: b""),
        ("blank.txt", lambda: b"  \n"),
        ("binary.txt", lambda: b"a\x00b"),
        ("scan.pdf", lambda: make_pdf("")),
        ("damaged.docx", lambda: b"PK"),
        ("long.txt", lambda: b"0123456789abcdef\n" * 100_000),  # several blocks
    ],
)
def test_what_was_read_has_the_hash_that_is_made_without_parsing(
    tmp_path: Path, name: str, make: Callable[[], bytes]
) -> None:
    content_hash = read_bytes(tmp_path, name, make()).content_hash
    assert len(content_hash) == 64
    assert content_hash == hash_file(tmp_path / name)


def test_bytes_format_and_encoding_decide_the_hash_and_the_name_does_not(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "a.md"):
        (tmp_path / name).write_bytes(b"Text.")
    (tmp_path / "c.txt").write_bytes(b"Text!")
    same = hash_file(tmp_path / "a.txt")
    assert hash_file(tmp_path / "b.txt") == same
    assert hash_file(tmp_path / "a.txt", encoding="UTF8") == same
    others = {
        hash_file(tmp_path / "a.md"),
        hash_file(tmp_path / "c.txt"),
        hash_file(tmp_path / "a.txt", encoding="cp1252"),
    }
    assert len({same, *others}) == 4


def test_the_encoding_does_not_decide_the_hash_of_a_pdf(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf("Page."))
    assert hash_file(tmp_path / "a.pdf", encoding="cp1252") == hash_file(tmp_path / "a.pdf")


def test_what_can_not_be_read_has_no_hash_and_the_same_reason(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_bytes(b"x" * 2000)
    (tmp_path / "folder.md").mkdir()
    for name in ("large.txt", "folder.md", "nowhere.md"):
        path = tmp_path / name
        found = read(path, max_file_bytes=1000)
        assert isinstance(found, Rejection), name
        assert found.content_hash == ""
        assert hash_file(path, max_file_bytes=1000) == found
    assert isinstance(hash_file(tmp_path / "large.txt"), str)


def test_a_file_that_grew_beyond_the_limit_has_no_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 2000)
    ref = FileRef("a.txt", str(path), "txt", 10)
    found = hash_content(ref, SourceSettings(uri=str(tmp_path), max_file_bytes=1000))
    assert isinstance(found, Rejection)
    assert "more than 1,000 bytes" in found.reason


@pytest.mark.parametrize("name", ["a.pdf", "a.docx"])
def test_a_raised_limit_makes_another_hash_so_that_the_file_is_tried_again(tmp_path: Path, name: str) -> None:
    data = make_pdf("word " * 300) if name == "a.pdf" else make_docx("word " * 300)
    found = rejection(read_bytes(tmp_path, name, data, max_text_bytes=1000))
    assert "bytes of text in one document; the limit is 1,000" in found.reason or "unpacked" in found.reason
    assert "source.max_text_bytes" in found.reason
    assert found.content_hash == hash_file(tmp_path / name, max_text_bytes=1000)
    assert document(read_bytes(tmp_path, name, data, max_text_bytes=1_000_000)).content_hash != found.content_hash


def test_a_large_file_is_hashed_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 16_000_000)
    tracemalloc.start()
    try:
        assert isinstance(hash_file(path), str)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_remote_file_has_the_hash_of_a_local_one(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/hashed/a.md", b"# Text")
    (tmp_path / "a.md").write_bytes(b"# Text")
    try:
        ref = FileRef("a.md", "memory:///hashed/a.md", "md", 6)
        assert hash_content(ref, SourceSettings(uri="memory://hashed")) == hash_file(tmp_path / "a.md")
    finally:
        fs.rm("/hashed", recursive=True)


# ---------------------------------------------------------------------------------------------- what parsers raise


@pytest.mark.parametrize(
    "value",
    [
        "!!timestamp foo",
        "!!int ''",
        "!!bool foo",
        "!!float ''",
        "!!binary é",
        "2026-13-45",
        "0001-01-01 00:00:00+10:00",
    ],
)
def test_front_matter_that_yaml_stumbles_over_stays_text(tmp_path: Path, value: str) -> None:
    result = document(read_bytes(tmp_path, "a.md", f"---\ntitle: T\nx: {value}\n---\n# Guide\n\nText.".encode()))
    assert result.text.endswith("# Guide\n\nText.")


def test_front_matter_may_have_a_number_for_a_key_that_python_does_not_write(tmp_path: Path) -> None:
    data = b"---\n? 0x" + b"f" * 5000 + b"\n: 1\n---\nText."
    assert document(read_bytes(tmp_path, "a.md", data)).text == "Text."


@pytest.mark.parametrize("number", ["²", "9" * 5000, "½", "-1", ""])
def test_html_with_numbers_that_are_none_keeps_its_text(tmp_path: Path, number: str) -> None:
    page = f"<ol start='{number}'><li>one</ol><table><tr><th colspan='{number}'>two<tr><td colspan='{number}'>three</table>"
    text = document(read_bytes(tmp_path, "a.html", page.encode())).text
    assert all(word in text for word in ("one", "two", "three"))


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "base64", "unicode_escape"])
def test_html_may_declare_any_charset(tmp_path: Path, charset: str) -> None:
    page = f"<meta charset='{charset}'><p>xn--a \\x and -é".encode()
    assert isinstance(read_bytes(tmp_path, "a.html", page), Document | Rejection)


def test_a_file_for_which_memory_does_not_do_is_a_rejection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(data: bytes, settings: SourceSettings) -> None:
        bytearray(sys.maxsize)

    monkeypatch.setitem(readers._PARSERS, "txt", parse)
    result = rejection(read_bytes(tmp_path, "a.txt", b"text"))
    assert "memory" in result.reason
    assert result.content_hash


_MARKDOWN = (
    b"---\ntitle: a\nd: !!timestamp 2001-01-01 00:00:00\nx: !!int 3\ny: !!bool yes\nl: [1, ~]\n&a k: *a\n---\n# H\n\nT"
)
_PAGE = (
    b"<html><head><meta charset='utf-8'><title>T</title></head><body><h1>H</h1><ol start='3'><li>a</ol><table><tr>"
    b"<th colspan='2'>h</th></tr><tr><td colspan='3'>x</td></tr></table><pre><code class='l'>x</code></pre></body></html>"
)
_WORDS = {
    "md": ["!!timestamp ", "!!int ", "!!bool ", "!!float ", "!!binary ", "!!set ", "''", "*a", "<<: ", "? ", "0x", "²"],
    "html": ["²", "9" * 5000, "<table>", "<td colspan=²>", "<ol start=²>", "<h99>", "<![CDATA[", "<!--", "&#x110000;", "</"],
    "txt": ["\x00", "\ufeff"],
    "pdf": ["<<", ">>", "[", "9" * 30, "-1", "null", "/Kids", "endobj", "/Filter/FlateDecode"],
    "docx": ["<w:p>", "</w:p>", "&x;", "<!DOCTYPE x [", "]]>", "²"],
}  # fmt: skip


def damage(data: bytes, words: list[str], random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        start = random.randrange(len(changed) + 1)
        end = start + random.randint(0, 20)
        word = random.choice(words).encode()
        changed[start:end] = random.choice([b"", word, changed[start:end] * 2, bytes([random.randrange(256)])])
    return bytes(changed)


def damage_docx(data: bytes, random: Random) -> bytes:
    """Half of them as a file, half of them as what is packed in it."""
    if random.random() < 0.5:
        return damage(data, _WORDS["docx"], random)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(buffer, "w") as archive:
        for name in whole.namelist():
            is_changed = name in ("word/document.xml", "docProps/core.xml") and random.random() < 0.7
            content = whole.read(name)
            archive.writestr(name, damage(content, _WORDS["docx"], random) if is_changed else content)
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", ["md", "txt", "html", "pdf", "docx"])
def test_nothing_that_a_file_can_hold_is_raised(tmp_path: Path, suffix: str) -> None:
    random = Random(suffix)
    whole = {"html": _PAGE, "pdf": make_pdf("One.", "Two.", title="T"), "docx": make_docx("One.", title="T")}
    data = whole.get(suffix, _MARKDOWN)
    for _ in range(300):
        changed = damage_docx(data, random) if suffix == "docx" else damage(data, _WORDS[suffix], random)
        result = read_bytes(tmp_path, f"a.{suffix}", changed)
        assert isinstance(result, Document | Rejection)
        assert result.content_hash or not isinstance(result, Document)
