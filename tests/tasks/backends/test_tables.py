"""Rows of csv, jsonl and parquet: the good ones become documents, each bad one a Rejection that says where it is."""

from __future__ import annotations

import codecs
import itertools
import json
import random
import tracemalloc
from collections.abc import Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.sources import open_source
from tasks.backends.tables import SeenIds
from tasks.config import SourceSettings
from tasks.records import Document, Rejection

Rows = list[Document | Rejection]


def read(path: Path, **knobs: Any) -> Rows:
    source = open_source(SourceSettings(uri=str(path), **knobs))
    rows = list(source)
    assert sum(row.source_bytes for row in rows) == source.total_bytes() == path.stat().st_size
    return [row for row in rows if isinstance(row, Document | Rejection)]


def read_text(tmp_path: Path, name: str, content: str | bytes, **knobs: Any) -> Rows:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path, **knobs)


def read_parquet(tmp_path: Path, columns: dict[str, Any], **knobs: Any) -> Rows:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table(columns), path)
    return read(path, **knobs)


def texts(rows: Rows) -> dict[str, str]:
    return {row.doc_id: row.text for row in rows if isinstance(row, Document)}


def problems(rows: Rows) -> dict[str, tuple[str, str]]:
    return {row.doc_id: (row.status, row.reason) for row in rows if isinstance(row, Rejection)}


# ---------------------------------------------------------------------------------------------- what every format does


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0])] + [",".join(str(value or "") for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(params=["csv", "jsonl", "parquet"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"t.{request.param}"


def test_rows_become_documents_in_order(table: Path) -> None:
    rows = read(
        write_rows(table, [{"id": "b", "text": "two", "port": "Kiel"}, {"id": "a", "text": "one", "port": "Oslo"}])
    )
    assert list(texts(rows).items()) == [(f"{table.name}#b", "two"), (f"{table.name}#a", "one")]
    assert isinstance(rows[0], Document)
    assert rows[0].metadata == {
        "port": "Kiel",
        "file_name": table.name,
        "file_path": table.name,
        "format": table.suffix[1:],
    }
    assert rows[0].format == "text"


def test_fields_are_taken_as_the_settings_name_them(table: Path) -> None:
    write_rows(table, [{"key": "7", "head": "Title", "body": "Text.", "lang": "en", "junk": "x"}])
    rows = read(table, id_field="key", text_fields=("head", "body"), metadata_fields=("lang",))
    assert texts(rows) == {f"{table.name}#7": "Title\n\nText."}
    assert isinstance(rows[0], Document)
    assert rows[0].metadata["lang"] == "en"
    assert "junk" not in rows[0].metadata


def test_a_row_without_text_is_skipped(table: Path) -> None:
    rows = read(write_rows(table, [{"id": "a", "text": " "}, {"id": "b", "text": None}, {"id": "c", "text": "three"}]))
    assert texts(rows) == {f"{table.name}#c": "three"}
    assert problems(rows) == {f"{table.name}#{row_id}": ("skipped", "no text in it") for row_id in "ab"}


def test_a_row_without_an_id_fails_with_the_way_out(table: Path) -> None:
    rows = read(write_rows(table, [{"id": "a", "text": "one"}, {"id": None, "text": "two"}]))
    assert list(texts(rows)) == [f"{table.name}#a"]
    [(name, (status, reason))] = problems(rows).items()
    assert name == f"{table.name}:{3 if table.suffix == '.csv' else 2}"
    assert status == "failed"
    assert "source.id_field" in reason


def test_a_repeated_id_fails_and_the_first_row_counts(table: Path) -> None:
    rows = read(
        write_rows(table, [{"id": "a", "text": "one"}, {"id": "a", "text": "two"}, {"id": "b", "text": "three"}])
    )
    assert texts(rows) == {f"{table.name}#a": "one", f"{table.name}#b": "three"}
    [(status, reason)] = problems(rows).values()
    assert (status, "'a' occurs more than once" in reason) == ("failed", True)


def test_reserved_names_among_the_metadata_get_a_prefix(table: Path) -> None:
    [row] = read(write_rows(table, [{"id": "a", "text": "one", "doc_id": "theirs", "_node_type": "x", "format": "y"}]))
    assert isinstance(row, Document)
    assert (row.metadata["source_doc_id"], row.metadata["source__node_type"], row.metadata["source_format"]) == (
        "theirs",
        "x",
        "y",
    )


def test_a_text_field_that_is_not_there_fails(table: Path) -> None:
    rows = read(write_rows(table, [{"id": "a", "content": "one"}, {"id": "b", "content": "two"}]))
    assert not texts(rows)
    assert len(rows) == (2 if table.suffix == ".jsonl" else 1)  # where there is a header, the file fails once
    for status, reason in problems(rows).values():
        assert status == "failed"
        assert "source.text_fields" in reason
        assert "content" in reason


def test_an_empty_file_is_skipped_or_failed_but_never_unnoticed(table: Path) -> None:
    table.write_bytes(b"")
    [(status, _)] = problems(read(table)).values()
    assert status == ("failed" if table.suffix == ".parquet" else "skipped")


def test_a_file_that_vanished_or_is_a_folder_by_now_fails(table: Path) -> None:
    write_rows(table, [{"id": "a", "text": "one"}])
    source = open_source(SourceSettings(uri=str(table)))
    table.unlink()
    [row] = source
    assert isinstance(row, Rejection)
    assert (row.doc_id, row.status, "vanished" in row.reason) == (table.name, "failed", True)


def test_a_large_table_is_never_held_as_a_whole(table: Path) -> None:
    filler = "x" * 8000
    write_rows(table, [{"id": str(number), "text": f"{number} {filler}"} for number in range(3000)])
    source = open_source(SourceSettings(uri=str(table)))
    next(iter(source))  # imports are not what is measured
    tracemalloc.start()
    count = sum(1 for row in source if isinstance(row, Document))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000
    assert peak < 8 * 1024**2  # of 24 MB of text


# ---------------------------------------------------------------------------------------------- jsonl


def test_jsonl_lines_that_are_broken_fail_one_by_one(tmp_path: Path) -> None:
    lines = [
        b'{"id": 1, "text": "one"}',
        b'{"id": 2, "text": ',
        b"",
        b"[1, 2]",
        b'{"id": 3, "text": "\xff"}',
        b'{"id": 4, "text": ["a"]}',
        b'{"id": 5, "text": "' + b'x"}',
        b"[" * 100_000,
        b'{"id": ' + b"9" * 5000 + b', "text": "x"}',
        b'{"id": null, "text": "x"}',
        b'{"id": true, "text": "x"}',
        b'{"id": {"a": 1}, "text": "x"}',
        b'{"id": 6.0, "text": "six", "score": NaN, "big": 123456789012345678901234567890, "nested": {"a": [1]}}',
    ]
    rows = read_text(tmp_path, "t.jsonl", b"\n".join(lines))
    assert texts(rows) == {"t.jsonl#1": "one", "t.jsonl#5": "x", "t.jsonl#6": "six"}
    found = problems(rows)
    assert set(found) == {*(f"t.jsonl:{line}" for line in (2, 4, 5, 8, 9, 10, 11, 12)), "t.jsonl#4"}
    assert {status for status, _ in found.values()} == {"failed"}
    assert "line 2 is not JSON" in found["t.jsonl:2"][1]
    assert "line 4 is a list" in found["t.jsonl:4"][1]
    assert "0xff at offset 19" in found["t.jsonl:5"][1]
    assert "text is a list" in found["t.jsonl#4"][1]
    last = rows[-1]
    assert isinstance(last, Document)
    assert (last.metadata["score"], last.metadata["nested"]) == (None, {"a": [1]})
    assert last.metadata["big"] == "123456789012345678901234567890"


def test_surrogates_and_nuls_in_jsonl_are_replaced(tmp_path: Path) -> None:
    [row] = read_text(
        tmp_path, "t.jsonl", '{"id": "a\\ud800", "text": "\\udfffx\\u0000 \\ud83d\\ude00", "k\\udc00": "\\udc00"}'
    )
    assert isinstance(row, Document)
    assert row.text == "\ufffdx\ufffd 😀"
    json.dumps([row.doc_id, dict(row.metadata)], ensure_ascii=False).encode()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_byte_order_marks(tmp_path: Path, encoding: str, name: str) -> None:
    content = (
        '{"id": "a", "text": "Ā ü Ċ"}\n{"id": "b", "text": "zwei"}\n'
        if name == "t.jsonl"
        else "id,text\na,Ā ü Ċ\nb,zwei\n"
    )
    rows = read_text(tmp_path, name, content.encode(encoding))
    assert texts(rows) == {f"{name}#a": "Ā ü Ċ", f"{name}#b": "zwei"}


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_utf16_that_breaks_off_in_a_character_fails_after_its_good_rows(tmp_path: Path, name: str) -> None:
    content = '{"id": "a", "text": "one"}\n' if name == "t.jsonl" else "id,text\na,one\n"
    rows = read_text(tmp_path, name, codecs.BOM_UTF16_LE + content.encode("utf-16-le") + b"\x00\xd8\x00")
    assert any(status == "failed" for status, _ in problems(rows).values())


def test_a_line_of_jsonl_above_the_limit_fails_and_the_next_ones_are_read(tmp_path: Path) -> None:
    lines = ['{"id": "a", "text": "one"}', f'{{"id": "b", "text": "{"x" * 300_000}"}}', '{"id": "c", "text": "three"}']
    for content in ("\n".join(lines).encode(), "\n".join(lines).encode("utf-16")):
        rows = read_text(tmp_path, "t.jsonl", content, max_text_bytes=1000)
        assert texts(rows) == {"t.jsonl#a": "one", "t.jsonl#c": "three"}
        [(name, (status, reason))] = problems(rows).items()
        assert (name, status) == ("t.jsonl:2", "failed")
        assert "the limit is 1,000" in reason


def test_a_row_with_more_text_than_a_document_may_have_fails(table: Path) -> None:
    rows = [{"id": "a", "text": "x" * 600, "more": "y" * 600}, {"id": "b", "text": "two", "more": ""}]
    found = read(write_rows(table, rows), text_fields=("text", "more"), max_text_bytes=1000)
    assert "source.max_text_bytes" in next(iter(problems(found).values()))[1]
    if table.suffix != ".csv":  # there, quotes in the long line may have begun anything
        assert texts(found) == {f"{table.name}#b": "two"}


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_a_line_longer_than_a_file_may_be_fails_without_being_read(tmp_path: Path, name: str) -> None:
    first = '{"id": "a", "text": "one"}\n' if name == "t.jsonl" else "id,text\na,one\n"
    rows = read_text(tmp_path, name, first + "x" * 5000, max_text_bytes=1000)
    assert texts(rows) == {f"{name}#a": "one"}
    [(status, reason)] = problems(rows).values()
    assert (status, "source.max_text_bytes" in reason) == ("failed", True)


def test_a_file_of_the_wrong_shape_is_given_up_after_a_hundred_rows(tmp_path: Path) -> None:
    rows = read_text(tmp_path, "t.jsonl", "[\n" + "1,\n" * 1000 + "1]\n")
    assert len(rows) == 101
    assert "given up" in problems(rows)["t.jsonl"][1]
    rows = read_text(tmp_path, "t.jsonl", '{"id": 0, "text": "x"}\n' + "1,\n" * 1000)
    assert len(rows) == 1001  # the shape is right, so each row is told


# ---------------------------------------------------------------------------------------------- csv


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_usual_delimiter_quotes_and_line_ends(tmp_path: Path, delimiter: str) -> None:
    content = f'id{delimiter}text\r\n1{delimiter}"a ""quoted"" {delimiter}\r\nrow"\r\n\r\n2{delimiter}two\r\n'
    assert texts(read_text(tmp_path, "t.csv", content)) == {"t.csv#1": f'a "quoted" {delimiter}\nrow', "t.csv#2": "two"}


def test_csv_cells_longer_than_pythons_limit(tmp_path: Path) -> None:
    rows = read_text(tmp_path, "t.csv", "id,text\n1," + "word " * 50_000)
    assert len(texts(rows)["t.csv#1"]) == 250_000


def test_csv_rows_that_are_broken_fail_one_by_one(tmp_path: Path) -> None:
    content = b'id,text\n1,one\n2,a,b\n3\n4,"x"y\n5,\xff\n6,nul\x00\n7,seven\n'
    rows = read_text(tmp_path, "t.csv", content)
    assert texts(rows) == {"t.csv#1": "one", "t.csv#7": "seven"}
    found = problems(rows)
    assert list(found) == [f"t.csv:{line}" for line in (3, 4, 5, 6, 7)]
    assert "3 cells in a table of 2 columns" in found["t.csv:3"][1]
    assert "not csv" in found["t.csv:5"][1]
    assert "mis-encoded: byte 0xff" in found["t.csv:6"][1]
    assert "binary" in found["t.csv:7"][1]


def test_a_quote_that_is_never_closed_fails_with_the_lines_it_swallowed(tmp_path: Path) -> None:
    rows = read_text(tmp_path, "t.csv", 'id,text\n1,one\n2,"open\n3,three\n4,four\n')
    assert texts(rows) == {"t.csv#1": "one"}
    assert "lines 3 to 5" in problems(rows)["t.csv:3"][1]


def test_csv_headers_that_can_not_be_used_fail_the_file(tmp_path: Path) -> None:
    for header, word in [
        ("nr,text", "source.id_field"),
        ("id,text,text", "more than once"),
        ('id,"te"xt', "source.text_fields"),
        ("", "no rows"),
    ]:
        [(_, reason)] = problems(read_text(tmp_path, "t.csv", header + "\n1,one\n" if header else "\n")).values()
        assert word in reason
    [(status, _)] = problems(read_text(tmp_path, "t.csv", "id,text\n")).values()
    assert status == "skipped"


def test_csv_in_the_encoding_that_is_set(tmp_path: Path) -> None:
    rows = read_text(tmp_path, "t.csv", "id;text\n1;Grüße\n".encode("cp1252"), encoding="cp1252")
    assert texts(rows) == {"t.csv#1": "Grüße"}


# ---------------------------------------------------------------------------------------------- parquet


def test_parquet_values_become_json_ready(tmp_path: Path) -> None:
    columns = {
        "id": [1, 2],
        "text": ["one", "two"],
        "when": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", tz="UTC")),
        "day": [date(2026, 1, 2), None],
        "price": [Decimal("1.50"), None],
        "score": [float("nan"), 1.0],
        "raw": [b"\xff", b"ok"],
        "tags": [["a", "b"], []],
        "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        "struct": [{"a": 1}, {"a": 2}],
        "huge": pa.array([2**64 - 1, 0], pa.uint64()),
    }
    rows = read_parquet(tmp_path, columns)
    assert list(texts(rows)) == ["t.parquet#1", "t.parquet#2"]
    for row in rows:
        assert isinstance(row, Document)
        json.dumps(dict(row.metadata), allow_nan=False)
    assert isinstance(rows[0], Document)
    assert rows[0].metadata["price"] == 1.5
    assert rows[0].metadata["day"] == "2026-01-02"
    assert rows[0].metadata["huge"] == str(2**64 - 1)
    assert rows[0].metadata["score"] is None


def test_parquet_text_that_is_not_utf8_or_is_binary_fails_by_row(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xffbad"]).buffers())
    found = problems(read_parquet(tmp_path, {"id": ["a", "b"], "text": broken}))
    assert list(found) == ["t.parquet:2"]
    assert "UnicodeDecodeError" in found["t.parquet:2"][1]
    found = problems(read_parquet(tmp_path, {"id": ["a"], "text": [b"bytes"]}))
    assert "text is binary" in found["t.parquet#a"][1]


def test_damaged_parquet_fails_with_what_was_read_before(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    words = random.Random(1)
    table = pa.table({"id": [str(n) for n in range(3000)], "text": [f"{words.random()}" for _ in range(3000)]})
    pq.write_table(table, path, row_group_size=1000)
    data = path.read_bytes()
    found = problems(read_text(tmp_path, "cut.parquet", data[: len(data) // 2]))
    assert "damaged parquet after row 0" in found["cut.parquet"][1]
    middle = len(data) // 2
    rows = read_text(tmp_path, "torn.parquet", data[: middle - 2000] + bytes(4000) + data[middle + 2000 :])
    assert 0 < len(texts(rows)) < 3000
    assert "damaged parquet after row" in problems(rows)["torn.parquet"][1]


def test_parquet_of_no_rows_is_skipped(tmp_path: Path) -> None:
    [(status, reason)] = problems(
        read_parquet(tmp_path, {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    ).values()
    assert (status, reason) == ("skipped", "no rows in it")


# ---------------------------------------------------------------------------------------------- ids seen


@settings(deadline=None)
@given(st.lists(st.text(max_size=3)), st.integers(1, 5))
def test_seen_ids_tells_what_a_set_would(ids: list[str], buffer_ids: int) -> None:
    seen = SeenIds(buffer_ids)
    told = [seen.add(row_id) for row_id in ids]
    assert told == [row_id not in ids[:place] for place, row_id in enumerate(ids)]


def test_seen_ids_stays_small() -> None:
    seen = SeenIds(buffer_ids=1024)
    seen.add("first")
    tracemalloc.start()
    assert all(seen.add(str(number)) for number in range(30_000))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 20 * 30_000
    assert not any(seen.add(str(number)) for number in itertools.chain(range(0, 30_000, 97), [29_999]))


# ---------------------------------------------------------------------------------------------- what the ledger needs


def hashes(rows: Rows) -> dict[str, str]:
    return {row.doc_id: row.content_hash for row in rows}


def hidden(rows: Rows) -> dict[str, str | None]:
    return {row.doc_id: row.covers for row in rows if isinstance(row, Rejection)}


def test_a_rows_hash_is_that_of_its_text_and_metadata(table: Path) -> None:
    first = hashes(
        read(write_rows(table, [{"id": "a", "text": "one", "n": "1"}, {"id": "b", "text": "two", "n": "1"}]))
    )
    changed = [{"id": "b", "text": "two", "n": "2"}, {"id": "a", "text": "one", "n": "1"}]
    second = hashes(read(write_rows(table, changed)))
    assert first[f"{table.name}#a"] == second[f"{table.name}#a"]
    assert first[f"{table.name}#b"] != second[f"{table.name}#b"]
    assert all(len(value) == 64 for value in first.values())


def test_the_order_of_a_rows_columns_does_not_change_its_hash(tmp_path: Path) -> None:
    one = read_text(tmp_path, "t.jsonl", '{"id": "a", "text": "x", "k": {"a": 1, "b": 2}, "l": 3}')
    other = read_text(tmp_path, "t.jsonl", '{"l": 3, "k": {"b": 2, "a": 1}, "text": "x", "id": "a"}')
    assert hashes(one) == hashes(other)


def test_values_that_look_alike_have_hashes_of_their_own(tmp_path: Path) -> None:
    values = ("1", '"1"', "1.5", "true", "null", '"null"', "[]", "{}", '[["a", 1]]', '{"a": 1}')
    found = [hashes(read_text(tmp_path, "t.jsonl", f'{{"id": "a", "text": "x", "k": {value}}}')) for value in values]
    assert len({row["t.jsonl#a"] for row in found}) == len(values)


def test_a_row_that_can_not_be_used_is_known_again(table: Path) -> None:
    rows = [{"id": "a", "text": "one"}, {"id": "a", "text": "two"}, {"id": "b", "text": " "}]
    first = hashes(read(write_rows(table, rows)))
    assert all(len(value) == 64 for value in first.values())
    assert first == hashes(read(table))
    rows[1]["text"] = "three"
    second = hashes(read(write_rows(table, rows)))
    assert sorted(name for name, value in first.items() if value != second[name]) == [
        name for name in first if "#" not in name
    ]


def test_a_row_without_an_id_may_be_any(table: Path) -> None:
    rows = [{"id": "a", "text": "one"}, {"id": None, "text": "two"}, {"id": "a", "text": "x"}, {"id": "b", "text": " "}]
    found = hidden(read(write_rows(table, rows)))
    place = 3 if table.suffix == ".csv" else 2
    assert found == {
        f"{table.name}:{place}": f"{table.name}#",
        f"{table.name}:{place + 1}": None,  # the id is known, and so is whose row it is
        f"{table.name}#b": None,
    }


def test_a_table_that_can_not_be_read_may_hold_any_row(table: Path) -> None:
    write_rows(table, [{"id": "a", "text": "one"}])
    source = open_source(SourceSettings(uri=str(table)))
    table.unlink()
    assert [row.covers for row in source if isinstance(row, Rejection)] == [f"{table.name}#"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": "a", "text": "x"}\n{"id": "b", "te',  # a broken line
        b'{"id": "a", "text": "x"}\n{"id": "b", "text": "\xff"}',  # mis-encoded
        codecs.BOM_UTF16_LE + '{"id": "a", "text": "x"}\n'.encode("utf-16-le") + b"\x00\xd8\x00",  # breaks off
        b'{"id": "a", "text": "x"}\n' + b"x" * 5000,  # too long a line
    ],
)
def test_what_is_hidden_behind_a_broken_jsonl(tmp_path: Path, content: bytes) -> None:
    assert "t.jsonl#" in hidden(read_text(tmp_path, "t.jsonl", content, max_text_bytes=1000)).values()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_a_hopeless_table_that_also_breaks_off_is_rejected_once(tmp_path: Path, encoding: str) -> None:
    rows = "id,text\n" + "a\n" * 99
    found = read_text(tmp_path, "t.csv", rows.encode(encoding) + ("x" * 5000).encode(encoding), encoding=encoding,
                      max_text_bytes=1000)  # fmt: skip
    assert [row.doc_id for row in found].count("t.csv") == 1
    assert len(found) == len({row.doc_id for row in found}) == 100


def test_what_is_hidden_behind_a_hopeless_table(tmp_path: Path) -> None:
    found = hidden(read_text(tmp_path, "t.jsonl", "".join(f'{{"id": {n}}}\n' for n in range(200))))
    assert found["t.jsonl#99"] is None
    assert found["t.jsonl"] == "t.jsonl#"


def test_what_is_hidden_behind_a_broken_csv(tmp_path: Path) -> None:
    assert hidden(read_text(tmp_path, "t.csv", 'id,text\na,one\nb,"two\nc,three\n')) == {"t.csv:3": "t.csv#"}
    assert hidden(read_text(tmp_path, "t.csv", "id,text\na,one,two\n")) == {"t.csv:2": "t.csv#"}
    assert hidden(read_text(tmp_path, "t.csv", "key,text\na,one\n")) == {"t.csv": "t.csv#"}
