"""Where a knob's value comes from, and what is said about one that can't be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import ConfigError
from tasks.settings import build_settings, parse_bytes

CONFIG = """
source = "from-file"
[chunking]
max_tokens = 100
overlap_tokens = 10
[embedding]
model = "file/model"
[budget]
max_bytes = "8GiB"
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "ballast.toml"
    path.write_text(CONFIG)
    return path


def test_flags_win_over_set_over_file_over_defaults(config_file: Path) -> None:
    settings = build_settings(
        config_file=config_file,
        overrides=["chunking.overlap_tokens=20", "embedding.model=set/model", "source.encoding=latin-1"],
        flags={"embedding.model": "flag/model", "qdrant.collection": None},
    )
    assert settings.embedding.model == "flag/model"
    assert settings.chunking.overlap_tokens == 20
    assert settings.chunking.max_tokens == 100
    assert (settings.source.uri, settings.source.encoding) == ("from-file", "latin-1")
    assert settings.budget.max_bytes == 8 * 1024**3
    assert settings.qdrant.collection == "documents"
    # `search` takes the collection's own model unless one was named: a default must not look as if it was.
    assert "collection" not in settings.qdrant.model_fields_set


@pytest.mark.parametrize(
    ("override", "group", "name", "value"),
    [
        ("chunking.max_tokens=none", "chunking", "max_tokens", None),
        ("embedding.revision=123456", "embedding", "revision", "123456"),
        ("embedding.calibrate=false", "embedding", "calibrate", False),
        ("budget.max_bytes=15GiB", "budget", "max_bytes", 15 * 1024**3),
        ('source.formats=["md", "txt"]', "source", "formats", ("md", "txt")),
        ("embedding.model=models/?a=b", "embedding", "model", "models/?a=b"),
    ],
)
def test_set_reaches_every_kind_of_knob(override: str, group: str, name: str, value: object) -> None:
    settings = build_settings(overrides=[override], flags={"source.uri": "docs"})
    assert getattr(getattr(settings, group), name) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["chunking.max_token=3"], r"^chunking\.max_token: no such knob; did you mean max_tokens\?$"),
        (["chunk.max_tokens=3"], r"^chunk: no such knob; did you mean chunking\?$"),
        (["chunking.max_tokens=-3"], r"^chunking\.max_tokens: input should be greater than 0; it is '-3'\.$"),
        (["embedding.precision=fp8"], r"^embedding\.precision: input should be 'auto', 'fp32'.*it is 'fp8'\.$"),
        (["budget.max_bytes=15XB"], r"^budget\.max_bytes: could not interpret byte unit"),
        (["chunking"], r"--set chunking: expected key\.path=value"),
        (["data_folder=x", "data_folder.y=1"], r"data_folder\.y: data_folder is a value, 'x', not a group"),
        (["source.formats=[1"], "is not TOML"),
        (["chunking.max_tokens=x", "chunking.overlap_tokens=y"], r"(?s)max_tokens: .*\nchunking\.overlap_tokens: "),
    ],
)
def test_what_cannot_be_used_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(overrides=overrides, flags={"source.uri": "docs"})


def test_a_missing_source_is_an_error_only_where_one_is_read() -> None:
    with pytest.raises(ConfigError, match=r"source: missing\. Give SOURCE"):
        build_settings()
    assert build_settings(needs_source=False).embedding.model


def test_an_unreadable_config_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("a = [")
    with pytest.raises(ConfigError, match=r"bad\.toml is not TOML"):
        build_settings(config_file=tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="No such file"):
        build_settings(config_file=tmp_path / "none.toml")


def test_sizes() -> None:
    assert parse_bytes("--gpu-memory", "15GiB") == 15 * 1024**3
    with pytest.raises(ConfigError, match="--gpu-memory big: not a size; write it as 15GiB"):
        parse_bytes("--gpu-memory", "big")
    with pytest.raises(ConfigError, match="more than nothing"):
        parse_bytes("--gpu-memory", "0")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.formats=md", "must be a list; it is 'md'.*'source.formats=[\"md\"]'"),
        ("embedding.device=gpu", "^embedding.device: it can be auto, cpu, cuda or cuda:N; it is 'gpu'"),
        ("embedding.device=cuda:x", "it can be auto"),
    ],
)
def test_what_is_refused_says_how_to_write_it(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        build_settings(overrides=[override], flags={"source.uri": "docs"})


def test_a_data_folder_in_the_home_folder_is_no_folder_named_tilde() -> None:
    settings = build_settings(overrides=["data_folder=~/ballast"], flags={"source.uri": "docs"})
    assert settings.data_folder == str(Path.home() / "ballast")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("source.uri=ftp://user:hunter2@host/x", "source.uri: it has a password"),
        ("source=zip://*.md::ftp://user:hunter2@host/x", "source.uri: it has a password"),
        ("spool=sftp://user:hunter2@host/x", "spool: it has a password"),
        ("spool=https://host/x?sig=hunter2", "spool: it has a signature"),
        ("qdrant.url=https://user:hunter2@host", "qdrant.url: it has a password"),
        ("qdrant.url=user:hunter2@host:6333", "qdrant.url: it holds a user or password"),
        ("qdrant.url=https://host?api-key=hunter2", "qdrant.url: it holds a user or password"),
        ("qdrant=https://user:hunter2@host", "qdrant: it has a password"),
        ("no_such_knob=https://user:hunter2@host", "no_such_knob: it has a password"),
    ],
)
def test_a_secret_in_a_knob_is_refused_and_not_repeated(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build_settings(overrides=["source=docs", override, "chunking.max_tokens=wrong"])
    assert str(refused.value).startswith(named)
    assert "hunter2" not in str(refused.value)


def test_a_signed_source_is_for_a_server_of_ones_own() -> None:
    signed = "source.uri=https://host/docs.zip?X-Amz-Signature=hunter2&page=1"
    assert build_settings(overrides=[signed]).source.uri == signed.partition("=")[2]
    with pytest.raises(ConfigError, match="ingest-pool's worker") as refused:
        build_settings(overrides=[signed, "pools.enabled=true"])
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"source\.formats: must be a list") as refused:
        build_settings(overrides=[signed, "source.formats=https://host/?sig=hunter2"])
    assert "hunter2" not in str(refused.value)
