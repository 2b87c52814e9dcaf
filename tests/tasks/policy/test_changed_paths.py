"""What a trigger may name: every file of a source, and nothing outside it."""

from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tasks.errors import ConfigError
from tasks.policy.changed_paths import MAX_PATH_BYTES, check_changed_path, require_changed_paths, show_path

FILE_NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\\\0"), min_size=1, max_size=40
).filter(lambda name: name not in (".", ".."))


@pytest.mark.parametrize(
    "path",
    [
        "a.md",
        "guide/install.md",
        "with space/ü – 日本語.md",
        ".github/README.md",
        "..hidden.md",
        "a/...",
        "~/notes.md",
        "std::vector.md",
        "12:30 minutes.txt",
        "notes/C: drive.md",
        "table.csv#1",
        "what?.md",
        "100%2e.md",
        "line\nend.md",
        "x" * MAX_PATH_BYTES,
    ],
)
def test_any_file_of_a_source_can_be_named(path: str) -> None:
    assert check_changed_path(path) is None
    assert require_changed_paths([path]) == [path]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is absolute"),
        ("//host/share", "is absolute"),
        ("..", "has .. as a part"),
        ("../a.md", "has .. as a part"),
        ("a/../../b.md", "has .. as a part"),
        ("./a.md", "has . as a part"),
        ("a/.", "has . as a part"),
        ("a//b.md", "has an empty part"),
        ("folder/", "has an empty part"),
        ("s3://bucket/key.md", "is a URL"),
        ("file:/etc/passwd", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("simplecache::file:///etc/passwd", "has an empty part"),
        ("..\\a.md", "has a backslash"),
        ("C:\\Windows\\a.md", "has a backslash"),
        ("a\0.md", "has a NUL"),
        ("a\ud800.md", "has a lone surrogate"),
        ("x" * (MAX_PATH_BYTES + 1), "has 4,096 bytes; the limit is 4,095"),
        ("ü" * 2048, "has 4,096 bytes"),
    ],
)
def test_what_leads_elsewhere_is_refused_with_a_reason(path: str, reason: str) -> None:
    assert (check_changed_path(path) or "").startswith(reason)
    with pytest.raises(ConfigError, match="changed path") as caught:
        require_changed_paths(["a.md", path])
    str(caught.value).encode("ascii")


@settings(deadline=None)
@given(st.lists(FILE_NAMES, min_size=1, max_size=6))
@example(["c:", "x"])  # looks like a drive with a folder
def test_names_joined_by_slashes_are_allowed_unless_they_look_like_a_url(names: list[str]) -> None:
    reason = check_changed_path("/".join(names))
    assert reason is None or (reason.startswith("is a URL") and names[0].endswith(":"))


@settings(deadline=None)
@given(
    st.text(max_size=60) | st.lists(st.sampled_from(["..", ".", "", "a", "\\", "s3:", "~"]), max_size=6).map("/".join)
)
def test_an_allowed_path_stays_below_the_root(path: str) -> None:
    if check_changed_path(path) is None:
        root = PurePosixPath("/srv/docs")
        joined = root / path
        assert joined.is_relative_to(root)
        assert ".." not in joined.parts
        assert str(joined) == f"/srv/docs/{path}"  # nothing was taken out: what is named is what is opened


def test_paths_come_back_sorted_and_once() -> None:
    assert require_changed_paths(["b.md", "a.md", "b.md"]) == ["a.md", "b.md"]
    assert require_changed_paths([]) == []


def test_a_source_lists_what_can_be_named(tmp_path: Path) -> None:
    from tasks.backends.sources import open_source
    from tasks.config import SourceSettings

    for name in ("std::vector.md", "with space.md", "file:a.md", "ü/日.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    listed = [entry.doc_id for entry in open_source(SourceSettings(uri=str(tmp_path)))]
    assert len(listed) == 4
    assert require_changed_paths(listed) == sorted(listed)


def test_a_shown_path_is_one_short_line() -> None:
    assert show_path("a\nb\ud800") == r"'a\nb\ud800'"
    assert len(show_path("x" * 5000)) < 130
