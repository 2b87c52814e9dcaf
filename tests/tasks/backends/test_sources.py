"""What a source lists: which files, under which names, in which order, and what it says of the rest."""

from __future__ import annotations

import http.server
import os
import socket
import tempfile
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tasks.backends.listing import FORMATS, TABLES, Listed
from tasks.backends.readers import read_file
from tasks.backends.sources import open_source
from tasks.config import SourceSettings
from tasks.errors import ConfigError, SourceError
from tasks.records import Document, FileRef, Rejection

Item = FileRef | Document | Rejection


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return root


def listing(uri: str | Path, **knobs: object) -> dict[str, Item]:
    source = open_source(SourceSettings(uri=str(uri), **knobs))
    items = list(source)
    assert len({item.doc_id for item in items}) == len(items)
    assert sum(item.source_bytes for item in items) == source.total_bytes()
    return {item.doc_id: item for item in items}


def rejections(items: dict[str, Item]) -> dict[str, tuple[str, str]]:
    return {name: (item.status, item.reason) for name, item in items.items() if isinstance(item, Rejection)}


# ---------------------------------------------------------------------------------------------- files, folders, globs


def test_a_folder_is_listed_with_all_below_it_in_a_fixed_order(tmp_path: Path) -> None:
    write(tmp_path, "b.md", "a/z.txt", "a/deep/er/x.html", "B.pdf", "a.docx", "ä.md")
    items = listing(tmp_path)
    assert list(items) == ["B.pdf", "a.docx", "a/deep/er/x.html", "a/z.txt", "b.md", "ä.md"]
    assert items["a/z.txt"] == FileRef("a/z.txt", str(tmp_path / "a/z.txt"), "txt", len("text of a/z.txt"))


def test_a_source_can_be_iterated_again_and_notices_nothing_new(tmp_path: Path) -> None:
    source = open_source(SourceSettings(uri=str(write(tmp_path, "a.md", "b.md"))))
    first = list(source)
    write(tmp_path, "c.md")
    assert list(source) == first


def test_relative_paths_and_trailing_slashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "docs/a.md", "docs/sub/b.md")
    monkeypatch.chdir(tmp_path)
    for uri in ("docs", "docs/", "./docs", "docs/**/*.md", "docs/**", f"file://{tmp_path}/docs", f"{tmp_path}/docs/"):
        items = listing(uri)
        assert list(items) == ["a.md", "sub/b.md"], uri
        for item in items.values():
            assert isinstance(item, FileRef)
            assert isinstance(read_file(item, SourceSettings(uri=uri)), Document)


def test_a_single_file_is_named_by_itself(tmp_path: Path) -> None:
    write(tmp_path, "guide.md", "other.md")
    assert list(listing(tmp_path / "guide.md")) == ["guide.md"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.md", ["a.md"]),
        ("**/*.md", ["2025/x/c.md", "2026/b.md", "2026/x/d.md", "a.md"]),
        ("2026/*.md", ["b.md"]),
        ("20*/x/*.md", ["2025/x/c.md", "2026/x/d.md"]),
        ("202[6]/**", ["2026/b.md", "2026/x/d.md"]),
        ("202?/x/d.md", ["2026/x/d.md"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    write(tmp_path, "a.md", "2025/x/c.md", "2026/b.md", "2026/x/d.md", "other/e.txt")
    assert list(listing(f"{tmp_path}/{pattern}")) == expected


def test_a_file_whose_name_looks_like_a_glob_or_a_url_is_a_file(tmp_path: Path) -> None:
    write(tmp_path, "a[1].md", "b::c.md", "d?.md", "e#1%20.md")
    assert list(listing(tmp_path / "a[1].md")) == ["a[1].md"]
    assert list(listing(tmp_path / "b::c.md")) == ["b::c.md"]
    for item in listing(tmp_path).values():
        assert isinstance(item, FileRef)
        assert isinstance(read_file(item, SourceSettings(uri=str(tmp_path))), Document)


def test_hidden_and_lock_files_are_not_listed_unless_named(tmp_path: Path) -> None:
    write(tmp_path, "a.md", ".hidden.md", ".git/b.md", "sub/.c/d.md", "~$a.docx")
    assert list(listing(tmp_path)) == ["a.md"]
    assert list(listing(tmp_path / ".git")) == ["b.md"]
    assert list(listing(f"{tmp_path}/.git/*.md")) == ["b.md"]


def test_the_runs_own_data_folder_is_no_part_of_the_source(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "data/spool/b.md", "other/data/c.md")
    source = open_source(SourceSettings(uri=str(tmp_path)), leave_out=[str(tmp_path / "data")])
    assert [item.doc_id for item in source] == ["a.md", "other/data/c.md"]


# ---------------------------------------------------------------------------------------------- formats


def test_only_a_table_has_rows_that_another_file_may_be_named_as(tmp_path: Path) -> None:
    write(tmp_path, "c", "c#.md", "pic.png", "pic.png#1.md")
    assert {name for name, item in listing(tmp_path).items() if isinstance(item, FileRef)} == {"c#.md", "pic.png#1.md"}


def test_every_format_and_its_other_suffixes(tmp_path: Path) -> None:
    write(tmp_path, "a.MD", "b.markdown", "c.text", "d.htm", "e.xhtml", "f.PDF", "g.docx", "h.txt")
    found = {name: item.format for name, item in listing(tmp_path).items() if isinstance(item, FileRef)}
    assert found == {
        "a.MD": "md",
        "b.markdown": "md",
        "c.text": "txt",
        "d.htm": "html",
        "e.xhtml": "html",
        "f.PDF": "pdf",
        "g.docx": "docx",
        "h.txt": "txt",
    }


def test_other_formats_are_skipped_by_name(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "photo.xyz", "LICENSE", "notes.txt")
    found = rejections(listing(tmp_path, formats=("md",)))
    assert {name: status for name, (status, _) in found.items()} == dict.fromkeys(
        ["photo.xyz", "LICENSE", "notes.txt"], "skipped"
    )
    assert "format .xyz is not read; source.formats has md" in found["photo.xyz"][1]


def test_tables_are_listed_as_their_rows(tmp_path: Path) -> None:
    write(tmp_path, "a.md")
    (tmp_path / "b.jsonl").write_text('{"id": 1, "text": "one"}\n{"id": 2, "text": "two", "lang": "en"}\n')
    (tmp_path / "c.tsv").write_text("id\ttext\nx\tthree, four\n")
    items = listing(tmp_path)
    assert list(items) == ["a.md", "b.jsonl#1", "b.jsonl#2", "c.tsv#x"]
    second = items["b.jsonl#2"]
    assert isinstance(second, Document)
    assert (second.text, second.metadata["lang"], second.metadata["file_path"]) == ("two", "en", "b.jsonl")


def test_formats_and_encodings_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.md")
    with pytest.raises(ConfigError, match="rst"):
        open_source(SourceSettings(uri=str(tmp_path), formats=("md", "rst")))
    for encoding in ("utf-99", "hex", "utf\x008"):
        with pytest.raises(ConfigError, match=r"source\.encoding"):
            open_source(SourceSettings(uri=str(tmp_path), encoding=encoding))


def test_the_formats_of_the_settings_are_those_that_can_be_read() -> None:
    assert SourceSettings(uri="x").formats == FORMATS
    assert set(TABLES) < set(FORMATS)


def _to_listed(names: Sequence[str]) -> list[FileRef | Rejection]:
    """Some of another prefix, as behind links and in archives, some that are not read."""
    entries: list[FileRef | Rejection] = []
    for number, name in enumerate(names):
        if name.startswith("r"):
            entries.append(Rejection(name, "failed", "read", f"reason {number}", number, covers=f"{name}/"))
        else:
            uri = f"/elsewhere/{number}" if name.startswith("e") else f"/root/{name}"
            entries.append(FileRef(name, uri, FORMATS[number % len(FORMATS)], number))
    return entries


@examples(deadline=None)
@given(st.lists(st.text("rea/.ü", min_size=1, max_size=8), unique=True))
def test_what_was_listed_comes_out_as_it_went_in_by_code_points(names: list[str]) -> None:
    entries = _to_listed(names)
    listed = Listed(iter(entries))
    assert list(listed) == entries
    listed.sort()
    assert list(listed) == sorted(entries, key=lambda entry: entry.doc_id)
    assert listed.total_bytes() == sum(entry.source_bytes for entry in entries)


def test_a_large_listing_takes_little_more_than_its_names() -> None:
    names = [f"section/document-{number:06}.md" for number in range(20_000)]
    tracemalloc.start()
    try:
        listed = Listed(FileRef(name, f"/a/long/way/to/the/root/{name}", "md", 10_000) for name in names)
        listed.sort()
        assert tracemalloc.get_traced_memory()[0] < 40 * len(names)  # without the names, which were there before
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- what is in the way


def test_pipes_sockets_and_links_that_lead_nowhere_or_round_never_block(tmp_path: Path) -> None:
    root = write(tmp_path / "root", "a.md", "sub/b.md")
    write(tmp_path / "outside", "c.md", "deep/d.md")
    os.mkfifo(root / "pipe.md")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s.md"))
        (root / "loop").symlink_to(root)
        (root / "up").symlink_to(tmp_path)
        (root / "sub/self.md").symlink_to("self.md")
        (root / "broken.md").symlink_to("nowhere.md")
        (root / "link.md").symlink_to(tmp_path / "outside/c.md")
        (root / "linked").symlink_to(tmp_path / "outside")
        (root / "again").symlink_to(root / "sub")
        items = listing(root)
    files = [name for name, item in items.items() if isinstance(item, FileRef)]
    assert files == ["a.md", "link.md", "linked/c.md", "linked/deep/d.md", "sub/b.md"]
    found = rejections(items)
    assert {name: status for name, (status, _) in found.items()} == {
        "again": "skipped",
        "broken.md": "failed",
        "loop": "skipped",
        "pipe.md": "skipped",
        "s.md": "skipped",
        "sub/self.md": "failed",
        "up": "skipped",
    }
    assert "broken symbolic link" in found["broken.md"][1]


def test_folders_that_link_to_each_other_are_listed_once(tmp_path: Path) -> None:
    write(tmp_path, "x/a.md", "y/b.md")
    (tmp_path / "x/to_y").symlink_to(tmp_path / "y")
    (tmp_path / "y/to_x").symlink_to(tmp_path / "x")
    items = listing(tmp_path)
    assert [name for name, item in items.items() if isinstance(item, FileRef)] == ["x/a.md", "y/b.md"]


def test_a_file_name_that_is_not_utf8_fails_by_a_name_that_can_be_printed(tmp_path: Path) -> None:
    write(tmp_path, "a.md")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.md")).write_text("text")
    found = rejections(listing(tmp_path))
    assert found["b\\udcff.md"][0] == "failed"
    assert "not valid UTF-8" in found["b\\udcff.md"][1]


@pytest.fixture
def ordinary_user() -> Iterator[Path]:
    """A folder of a user whom permissions stop; root reads everything."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "a.md", "open/b.md", "closed/c.md", "listed/d.md")
        if os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                os.chown(path, 65534, 65534)
            os.seteuid(65534)
            try:
                yield folder
            finally:
                os.seteuid(0)
        else:
            yield folder
            for path in folder.rglob("*"):
                path.chmod(0o700)


def test_folders_and_files_without_permission_are_reported(ordinary_user: Path) -> None:
    (ordinary_user / "a.md").chmod(0)
    (ordinary_user / "closed").chmod(0)
    (ordinary_user / "listed").chmod(0o400)  # its names can be read, its files can't
    items = listing(ordinary_user)
    found = rejections(items)
    assert {name: status for name, (status, _) in found.items()} == {"closed": "failed", "listed": "failed"}
    assert "permission denied" in found["closed"][1]
    assert isinstance(items["open/b.md"], FileRef)
    unreadable = items["a.md"]
    assert isinstance(unreadable, FileRef)
    result = read_file(unreadable, SourceSettings(uri=str(ordinary_user)))
    assert isinstance(result, Rejection)
    assert (result.status, "permission denied" in result.reason) == ("failed", True)


def test_a_source_that_may_not_be_listed_is_an_error(ordinary_user: Path) -> None:
    (ordinary_user / "closed").chmod(0)
    with pytest.raises(SourceError, match="permission denied"):
        open_source(SourceSettings(uri=str(ordinary_user / "closed")))


@pytest.mark.parametrize(
    "uri", ["nowhere", "nowhere/**/*.md", "/no/such/file.md", "memory://nowhere", "~nobody_at_all/x"]
)
def test_a_source_that_does_not_exist_is_an_error(uri: str) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        open_source(SourceSettings(uri=uri))


@pytest.mark.parametrize("uri", ["", " "])
def test_an_empty_source_is_not_the_working_folder(uri: str) -> None:
    with pytest.raises(ConfigError, match="source is empty"):
        open_source(SourceSettings(uri=uri))


def test_a_source_with_nothing_to_read_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no files at all"):
        open_source(SourceSettings(uri=str(tmp_path)))
    write(tmp_path, "a.png", "b.png", "c.gif")
    with pytest.raises(SourceError, match=r"2 \.png, 1 \.gif\. Formats read: md"):
        open_source(SourceSettings(uri=str(tmp_path)))
    with pytest.raises(SourceError, match="No document found"):
        open_source(SourceSettings(uri=f"{tmp_path}/*.md"))


def test_a_glob_that_can_not_be_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not a glob"):
        open_source(SourceSettings(uri=f"{tmp_path}/a**b/*.md"))


# ---------------------------------------------------------------------------------------------- elsewhere


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.pipe(
        {
            "/corpus/a.md": b"# A",
            "/corpus/sub/b.txt": b"text",
            "/corpus/t.csv": b"id,text\n1,one\n",
            "/corpus/.h.md": b"h",
        }
    )
    yield "memory://corpus"
    fs.rm("/corpus", recursive=True)


@pytest.mark.parametrize("tail", ["", "/", "/**"])
def test_an_fsspec_url(memory: str, tail: str) -> None:
    items = listing(memory + tail)
    assert list(items) == ["a.md", "sub/b.txt", "t.csv#1"]
    for item in items.values():
        if isinstance(item, FileRef):
            assert isinstance(read_file(item, SourceSettings(uri=memory + tail)), Document)


def test_a_file_inside_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("docs/a.md", "# In an archive")
    uri = f"zip://**/*.md::{tmp_path}/x.zip"
    [item] = listing(uri).values()
    assert isinstance(item, FileRef)
    assert item.doc_id == "docs/a.md"
    assert isinstance(read_file(item, SourceSettings(uri=uri)), Document)


def test_an_archive_that_is_not_there_or_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"no archive")
    for name in ("x.zip", "y.zip"):
        with pytest.raises(SourceError, match="can't be opened"):
            open_source(SourceSettings(uri=f"zip://*.md::{tmp_path}/{name}"))


def test_a_protocol_that_is_unknown_or_not_installed_is_an_error_without_the_password() -> None:
    for uri in ("nope://hunter2@host/x", "gs://hunter2@bucket/x"):
        with pytest.raises(SourceError) as caught:
            open_source(SourceSettings(uri=uri))
        assert "hunter2" not in str(caught.value)
        assert "***@" in str(caught.value)


class _Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(500 if "broken" in self.path else 404 if "gone" in self.path else 200)
        body = b"# A page"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Pages) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "userinfo", ["user:hunter2", "user:@hunter2", "user:hun@ter2", "user:hunter2 ", "user:x/hunter2", ":hunter2"]
)
@pytest.mark.parametrize("before", ["ftp://", "zip://*.md::ftp://"])
def test_a_password_in_the_uri_is_refused_and_not_shown(before: str, userinfo: str) -> None:
    with pytest.raises(ConfigError, match="password in it") as caught:
        open_source(SourceSettings(uri=f"{before}{userinfo}@host/x", name="a"))
    assert "ter2" not in str(caught.value)
    assert "FSSPEC_" in str(caught.value)


def test_a_file_that_is_named_like_a_url_with_a_password_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "ftp:/a:b@c/x.md")
    monkeypatch.chdir(tmp_path)
    assert listing("./ftp:/a:b@c").keys() == {"x.md"}


def test_a_web_page_is_named_without_its_query_and_its_secrets_stay_secret(web: str) -> None:
    settings = SourceSettings(uri=f"http://user@{web}/a.md?X-Amz-Signature=hunter2&page=1")
    source = open_source(settings)
    assert "hunter2" not in source.name
    assert "page=1" in source.name
    [item] = source
    assert isinstance(item, FileRef)
    assert item.doc_id == "a.md"
    assert isinstance(read_file(item, settings), Document)


def test_a_web_page_that_is_refused_is_an_error_that_says_so(web: str) -> None:
    with pytest.raises(SourceError, match="500"):
        open_source(SourceSettings(uri=f"http://{web}/broken/a.md"))
    with pytest.raises(SourceError, match="does not exist"):
        open_source(SourceSettings(uri=f"http://{web}/gone/a.md"))


def test_a_web_server_that_does_not_listen_is_not_a_page_that_does_not_exist() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SourceError, match="Connection refused"):
        open_source(SourceSettings(uri=f"http://127.0.0.1:{port}/a.md"))


def test_a_web_page_that_fails_later_is_a_rejection_without_secrets(web: str) -> None:
    settings = SourceSettings(uri=f"http://user@{web}/a.md?token=hunter2")
    ref = FileRef("a.md", f"http://user:hunter2@{web}/broken/a.md?token=hunter2", "md", 8)
    result = read_file(ref, settings)
    assert isinstance(result, Rejection)
    assert result.status == "failed"
    assert "500" in result.reason
    assert "hunter2" not in result.reason


# ---------------------------------------------------------------------------------------------- what the ledger needs


def test_what_is_hidden_in_folders_and_behind_links(ordinary_user: Path) -> None:
    (ordinary_user / "closed").chmod(0)
    (ordinary_user / "listed").chmod(0o400)
    (ordinary_user / "share").symlink_to("/no/such/disk")
    (ordinary_user / "t.csv").symlink_to("/no/such/file.csv")
    (ordinary_user / "up").symlink_to(ordinary_user)
    (ordinary_user / "notes.xyz").write_text("x")
    found = {name: item.covers for name, item in listing(ordinary_user).items() if isinstance(item, Rejection)}
    assert found == {
        "closed": "closed/",
        "listed": "listed/",
        "share": "share/",  # a disk that is not mounted: its documents are not deleted
        "t.csv": "t.csv#",
        "up": None,
        "notes.xyz": None,
    }


def test_a_broken_link_that_a_glob_would_look_into_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "a/x.md", "b/y.txt")
    (tmp_path / "share").symlink_to("/no/such/disk")
    assert rejections(listing(f"{tmp_path}/*/*.md")).keys() == {"share"}
    assert not rejections(listing(f"{tmp_path}/a/*.md"))


def key(uri: str | Path, **knobs: object) -> str:
    return open_source(SourceSettings(uri=str(uri), **knobs)).key


def test_a_local_source_has_one_key_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "docs/a.md", "docs/sub/b.md")
    (tmp_path / "current").symlink_to("docs")
    monkeypatch.chdir(tmp_path)
    docs = f"{tmp_path}/docs"
    spellings = ("docs", "docs/", "./docs", "docs/sub/..", f"file://{docs}", docs, f"{docs}//")
    assert {key(spelling) for spelling in spellings} == {docs}
    assert key("docs/*.md") == f"{docs}/*.md"
    assert key("docs/a.md") == f"{docs}/a.md"
    assert key("current") == f"{tmp_path}/current"  # it may lead to another release tomorrow


def test_a_source_with_a_name_is_known_by_it_wherever_it_lies(tmp_path: Path) -> None:
    write(tmp_path, "one/a.md", "two/a.md")
    assert key(tmp_path / "one", name="handbook") == key(tmp_path / "two", name="handbook") == "handbook"


def test_a_remote_source_has_one_key(memory: str) -> None:
    assert key(memory) == key(f"{memory}/") == "memory://corpus"


def test_an_archive_is_known_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.writestr("docs/a.md", "# In an archive")
    assert key("zip://**/*.md::x.zip") == key(f"zip://**/*.md::{tmp_path}/x.zip") == f"zip://**/*.md::{tmp_path}/x.zip"


def test_a_key_holds_no_credentials_and_another_signature_is_the_same_source(web: str) -> None:
    with_token = key(f"http://{web}/guide.md?token=s3cret")
    assert "s3cret" not in with_token
    assert with_token == key(f"http://{web}/guide.md?token=s3cret") != key(f"http://{web}/guide.md?token=another")
    signed = f"http://{web}/guide.md?X-Amz-Expires=9&X-Amz-Date=2026{{0}}&X-Amz-Signature={{0}}"
    assert key(signed.format(11)) == key(signed.format(12)) == f"http://{web}/guide.md"


# ---------------------------------------------------------------------------------------------- names of rows


def test_no_file_has_the_id_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,text\n1.md,a row\n,no id\n")
    write(tmp_path, "t.csv#1.md", "t.csv#more/2.md", "t.csv:3", "t.csv#old", "notes#1.md", "t.csv:3.md")
    source = open_source(SourceSettings(uri=str(tmp_path)))
    items = {item.doc_id: item for item in source}
    assert len(list(source)) == len(items) == 8
    assert isinstance(items["t.csv#1.md"], Document)
    assert "no id" in rejections(items)["t.csv:3"][1]
    for name in ("t.csv#1.md", "t.csv#more/2.md"):
        status, reason = rejections(items)[f"./{name}"]
        assert (status, "row of the table t.csv" in reason, "Rename it" in reason) == ("failed", True, True)
        found = items[f"./{name}"]
        assert isinstance(found, Rejection)
        assert found.covers == name  # what was stored before the table came stays
    assert {name for name, (status, _) in rejections(items).items() if status == "skipped"} == {
        "./t.csv:3",
        "./t.csv#old",
    }
    assert isinstance(items["notes#1.md"], FileRef)
    assert isinstance(items["t.csv:3.md"], FileRef)
    assert sum(item.source_bytes for item in items.values()) == source.total_bytes()
