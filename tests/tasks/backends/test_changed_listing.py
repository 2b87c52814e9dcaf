"""A look at some paths of a source: it must say what a whole listing says of them, without listing the rest."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tasks.backends.changed_listing import ChangedPaths
from tasks.backends.sources import open_source
from tasks.config import SourceSettings
from tasks.errors import SourceError
from tasks.records import Document, FileRef, Rejection

Item = FileRef | Document | Rejection

FOLDERS = ["a", "b.md", ".git", "t.csv#x", "data", "c"]
NAMES = ["x.md", "y.txt", "pic.png", "t.csv", "t.csv#1.md", "t.csv:7", "u.jsonl", "c", "c#.md", "~$z.docx", "é[1].md"]


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"id,text\n1,one of {name}\n2,two\n" if name.endswith(".csv") else f"text of {name}")
    return root


def listing(uri: str | Path, changed: list[str] | None = None, **knobs: Any) -> dict[str, Item]:
    leave_out = knobs.pop("leave_out", [])
    source = open_source(SourceSettings(uri=str(uri), **knobs), leave_out=leave_out, changed=changed)
    items = list(source)
    assert [item.doc_id for item in items if not isinstance(item, Document)] == sorted(
        item.doc_id for item in items if not isinstance(item, Document)
    )
    assert sum(item.source_bytes for item in items) == source.total_bytes()
    return {item.doc_id: item for item in items}


def is_row(name: str, table: str) -> bool:
    rest = name.removeprefix(table)
    is_named_so = rest[:1] == "#" or (rest[:1] == ":" and rest[1:].isdecimal())
    return table.endswith((".csv", ".jsonl")) and name != rest and is_named_so


def keep(items: dict[str, Item], changed: list[str]) -> dict[str, Item]:
    """By hand, in other words than the code's: the path, below it, its rows, and folders above that can't be read."""
    kept = {}
    for doc_id, item in items.items():
        name = doc_id.removeprefix("./")
        for path in changed:
            covers = item.covers if isinstance(item, Rejection) else None
            if (
                name == path
                or name.startswith(f"{path}/")
                or is_row(name, path)
                or (covers is not None and path.startswith(covers))
            ):
                kept[doc_id] = item
    return kept


# ---------------------------------------------------------------------------------------------- the same as a whole listing


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Places of a tree, and what is there: "" a file, else where a symbolic link leads."""
    parents = [""]
    for _ in range(draw(st.integers(0, 4))):
        parents.append(f"{draw(st.sampled_from(parents))}{draw(st.sampled_from(FOLDERS))}/")
    place = st.builds(lambda parent, name: parent + name, st.sampled_from(parents), st.sampled_from(NAMES + FOLDERS))
    links = st.sampled_from(["", "", "", "", "/outside", "/nowhere", "..", ".", "a", "x.md", "/outside/sub"])
    files = draw(st.lists(st.tuples(place, links), min_size=1, max_size=8, unique_by=lambda each: each[0]))
    return [("always.md", ""), *files]


def build(root: Path, outside: Path, tree: list[tuple[str, str]]) -> None:
    for name, link in tree:
        path = root / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if link:
                path.symlink_to(f"{outside}{link.removeprefix('/outside')}" if link.startswith("/outside") else link)
            else:
                write(root, name)
        except OSError:  # a file where a folder should be, or the other way round: the first one stays
            continue


@st.composite
def changes(draw: st.DrawFn, tree: list[tuple[str, str]]) -> list[str]:
    places = [name for name, _ in tree]
    below = ["x.md", "sub/o.md", "o.md", "a/x.md"]
    choices = places + [name.rpartition("/")[0] for name in places if "/" in name] + ["gone.md", "gone/x.md", "data"]
    path = st.one_of(
        st.sampled_from(choices), st.builds(lambda a, b: f"{a}/{b}", st.sampled_from(choices), st.sampled_from(below))
    )
    return draw(st.lists(path, min_size=1, max_size=4, unique=True))


@given(st.data(), trees(), st.sampled_from(["", "", "/**/*.md", "/a/*", "/*.md", "/**/t.*"]))
@examples(max_examples=300, deadline=None)
def test_it_is_what_a_whole_listing_has_of_these_paths(
    data: st.DataObject, tree: list[tuple[str, str]], pattern: str
) -> None:
    changed = data.draw(changes(tree))
    with tempfile.TemporaryDirectory() as folder:
        outside = write(Path(folder) / "outside", "o.md", "sub/p.md", "sub/t.csv")
        root = Path(folder) / "root"
        build(root, outside, tree)
        knobs = {"leave_out": [str(root / "data")]}
        uri = f"{root}{pattern}"
        try:
            whole = listing(uri, **knobs)
        except SourceError:
            with pytest.raises(SourceError):
                listing(uri, changed, **knobs)
            return
        # What may be the name of a row stands for its table.
        tables = {path[:place] for path in changed for place in range(len(path)) if is_row(path, path[:place])}
        assert listing(uri, changed, **knobs) == keep(whole, [*changed, *tables])


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield "memory://bucket/docs"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.mark.parametrize(
    "changed", [["a.md"], ["sub"], ["sub/b.md", "gone.md"], ["t.csv", "a.md"], ["sub/t.csv"], [".x/y.md"]]
)
def test_in_a_bucket_and_in_an_archive(tmp_path: Path, memory: str, changed: list[str]) -> None:
    names = ["a.md", "z.md", "sub/b.md", "sub/deep/c.md", "t.csv", "sub/t.csv", "sub/t.csv#1.md", ".x/y.md"]
    write(tmp_path / "docs", *names)
    fs = fsspec.filesystem("memory")
    fs.put(str(tmp_path / "docs"), "/bucket/", recursive=True)
    with zipfile.ZipFile(tmp_path / "docs.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / "docs" / name, name)
    for uri in (memory, f"{memory}/**/*.md", f"zip://::{tmp_path}/docs.zip"):
        whole = listing(uri)
        assert listing(uri, changed) == keep(whole, changed), uri


# ---------------------------------------------------------------------------------------------- one by one


def test_an_empty_list_looks_at_nothing(tmp_path: Path) -> None:
    assert listing(write(tmp_path, "a.md"), []) == {}


def test_a_source_that_is_one_file(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "b.md")
    assert list(listing(tmp_path / "a.md", ["a.md", "b.md"])) == ["a.md"]
    assert listing(tmp_path / "a.md", ["b.md"]) == {}


def test_the_rest_of_the_source_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    write(tmp_path, "a/x.md", "b/y.md", "c/z.md", "z.md")
    listed: list[str] = []
    ls = LocalFileSystem.ls

    def watched(self: LocalFileSystem, path: str, **options: Any) -> Any:
        listed.append(path)
        return ls(self, path, **options)

    monkeypatch.setattr(LocalFileSystem, "ls", watched)
    assert list(listing(tmp_path, ["a/x.md", "c", "z.md", "b/gone.md"])) == ["a/x.md", "c/z.md", "z.md"]
    assert listed == [f"{tmp_path}/c"]


def test_a_source_that_is_away_looks_like_no_deletion(tmp_path: Path) -> None:
    root = write(tmp_path / "mount", "a.md", "b.md")
    shutil.rmtree(root)
    with pytest.raises(SourceError, match="does not exist"):
        listing(root, ["a.md"])
    root.mkdir()  # the mount point without what was mounted
    with pytest.raises(SourceError, match="No document found"):
        listing(root, ["a.md"])


def test_a_folder_above_that_cant_be_listed_is_said_so(tmp_path: Path) -> None:
    write(tmp_path, "a.md", "b.md")
    (tmp_path / "sub").symlink_to("nowhere")
    items = listing(tmp_path, ["sub/deep/x.md"])
    assert [(item.doc_id, item.status, item.covers) for item in items.values() if isinstance(item, Rejection)] == [
        ("sub", "failed", "sub/")
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
@pytest.mark.parametrize("mode", [0o300, 0o400, 0o000])
def test_a_folder_that_this_user_may_not_list(tmp_path: Path, mode: int) -> None:
    write(tmp_path, "a.md", "sub/b.md")
    (tmp_path / "sub").chmod(mode)
    try:
        assert listing(tmp_path, ["sub/b.md"]) == keep(listing(tmp_path), ["sub/b.md"])
    finally:
        (tmp_path / "sub").chmod(0o700)


# ---------------------------------------------------------------------------------------------- which documents that means


@pytest.mark.parametrize(
    ("path", "doc_id", "expected"),
    [
        ("a.md", "a.md", True),
        ("a.md", "a.md.txt", False),
        ("sub", "sub/deep/x.md", True),
        ("sub", "subway.md", False),
        ("t.csv", "t.csv#7", True),
        ("t.csv", "t.csv#7/8", True),
        ("t.csv", "t.csv:12", True),
        ("t.csv", "t.csv:12x", False),
        ("t.tsv", "t.tsv#7", True),
        ("c", "c#.md", False),  # no table: another file
        ("a.md", "a.md:7", False),
        ("t.csv#1.md", "./t.csv#1.md", True),
        ("t.csv#7", "t.csv#8", True),  # a row can't be looked at without its table
        ("notes/t.csv:3", "notes/t.csv#8", True),
    ],
)
def test_which_documents_a_path_stands_for(path: str, doc_id: str, *, expected: bool) -> None:
    assert ChangedPaths.of([path]).has(doc_id) is expected
