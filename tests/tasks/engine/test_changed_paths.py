"""Runs over some changed paths: only these are looked at, what is gone of them is deleted, and all else stays as it was."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tasks.backends.torch_encoder import TorchEncoder
from tasks.engine.ingest_run import IngestRun
from tasks.errors import ConfigError, SourceError
from tasks.policy.failures import classify_failure
from tasks.records import LedgerRecord, RunSummary
from tests.tasks.engine.ingest_again import Ballast, SharedEncoder, closed, write_document

OTHER = {"chunking": {"max_tokens": 64}}


@pytest.fixture(scope="module")
def encoder(minilm: str) -> Iterator[SharedEncoder]:
    built = SharedEncoder(minilm, device="cpu", classify=classify_failure)
    yield built
    TorchEncoder.close(built)


@pytest.fixture
def ballast(tmp_path: Path, minilm: str, encoder: SharedEncoder) -> Ballast:
    return Ballast(tmp_path, minilm, encoder)


def write_table(path: Path, rows: Sequence[int], text: str = "Row") -> None:
    lines = [f'{{"id": "{number}", "text": "{text} {number} of the log of the harbour master."}}' for number in rows]
    path.write_text("\n".join(lines))


def read_mark(ballast: Ballast, folder: Path | None = None) -> LedgerRecord | None:
    store = ballast.open_store()
    try:
        return store.ledger(ballast.find_live(store)).read_mark(str(folder or ballast.docs))
    finally:
        store.close()


def is_whole_run(summary: RunSummary) -> bool:
    return any("the whole source is ingested" in note for note in summary.notes)


# ------------------------------------------------------------------------------------------ only these


def test_only_the_changed_paths_are_looked_at(ballast: Ballast) -> None:
    for number in range(5):
        write_document(ballast.docs, f"{number}.txt")
    closed(ballast.run())
    _, before = ballast.look()
    write_document(ballast.docs, "1.txt", 6)
    write_document(ballast.docs, "2.txt", 6)
    write_document(ballast.docs, "new.txt")
    (ballast.docs / "3.txt").unlink()
    (ballast.docs / "4.txt").unlink()
    summary = closed(ballast.run(changed=["1.txt", "new.txt", "3.txt", "3.txt", "never.txt", "0.txt"]))
    points, records = ballast.look()
    books = summary.books
    assert (books.documents_seen, books.documents_written, books.documents_unchanged) == (3, 2, 1)
    assert (books.documents_deleted, books.documents_withheld, summary.rejections) == (1, 0, ())
    source = str(ballast.docs)
    assert {doc_id for _, doc_id in records} == {"0.txt", "1.txt", "2.txt", "4.txt", "new.txt"}
    assert {doc_id for _, doc_id, _ in points.values()} == {"0.txt", "1.txt", "2.txt", "4.txt", "new.txt"}
    for untouched in ("0.txt", "2.txt", "4.txt"):
        assert records[source, untouched] == before[source, untouched]
    assert books.points_counted == sum(records[source, name].nodes for name in ("0.txt", "1.txt", "new.txt"))
    assert summary.notes == ("5 changed paths looked at, not the whole source.",)

    whole = closed(ballast.run())
    assert (whole.books.documents_written, whole.books.documents_deleted) == (1, 1)


def test_nothing_to_look_at_is_a_green_run_that_leaves_everything_as_it_is(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")
    closed(ballast.run())
    before, mark = ballast.look(), read_mark(ballast)
    (ballast.docs / "a.txt").unlink()
    summary = closed(ballast.run(changed=[]))
    assert summary.books.documents_seen == summary.books.documents_deleted == 0
    assert (ballast.look(), read_mark(ballast)) == (before, mark)
    # Nor does it ingest anything where there is no collection, or begin to build one.
    closed(ballast.run(changed=[], **OTHER))
    assert (ballast.look(), read_mark(ballast)) == (before, mark)


def test_a_changed_table_is_compared_row_by_row_and_other_tables_stay(ballast: Ballast) -> None:
    ballast.docs.mkdir()
    write_table(ballast.docs / "log.jsonl", range(6))
    write_table(ballast.docs / "log.jsonl.old.jsonl", range(3))
    closed(ballast.run())
    write_table(ballast.docs / "log.jsonl", [0, 1, 6])
    (ballast.docs / "log.jsonl.old.jsonl").unlink()
    summary = closed(ballast.run(changed=["log.jsonl"]))
    assert (summary.books.documents_unchanged, summary.books.documents_written) == (2, 1)
    assert summary.books.documents_deleted == 4
    old = {f"log.jsonl.old.jsonl#{number}" for number in range(3)}
    assert ballast.documents() == {"log.jsonl#0", "log.jsonl#1", "log.jsonl#6"} | old
    closed(ballast.run(changed=["log.jsonl.old.jsonl"]))
    assert ballast.documents() == {"log.jsonl#0", "log.jsonl#1", "log.jsonl#6"}


def test_a_row_stands_for_its_table(ballast: Ballast) -> None:
    ballast.docs.mkdir()
    write_document(ballast.docs, "a.txt")
    write_table(ballast.docs / "log.jsonl", range(3))
    closed(ballast.run())
    write_table(ballast.docs / "log.jsonl", range(2))
    summary = closed(ballast.run(changed=["log.jsonl#0"]))
    assert (summary.books.documents_unchanged, summary.books.documents_deleted) == (2, 1)


def test_what_a_table_that_broke_off_may_still_hold_is_kept(ballast: Ballast) -> None:
    ballast.docs.mkdir()
    write_table(ballast.docs / "log.jsonl", range(4))
    closed(ballast.run())
    text = (ballast.docs / "log.jsonl").read_text()
    (ballast.docs / "log.jsonl").write_text(text[:-10])  # still being copied
    summary, off = ballast.run(changed=["log.jsonl"], deletes={"confirmed": True})
    assert (off, summary.books.documents_failed, summary.books.documents_deleted) == ((), 1, 0)
    assert len(ballast.documents()) == 4


def test_a_folder_stands_for_all_that_was_in_it_and_is(ballast: Ballast) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/deep/c.txt", "subway.txt"):
        (ballast.docs / name).parent.mkdir(parents=True, exist_ok=True)
        write_document(ballast.docs, name)
    closed(ballast.run())
    shutil.rmtree(ballast.docs / "sub" / "deep")
    write_document(ballast.docs, "sub/d.txt")
    summary = closed(ballast.run(changed=["sub"]))
    assert (summary.books.documents_unchanged, summary.books.documents_written) == (1, 1)
    assert summary.books.documents_deleted == 1
    shutil.rmtree(ballast.docs / "sub")
    assert closed(ballast.run(changed=["sub"])).books.documents_deleted == 2
    assert ballast.documents() == {"a.txt", "subway.txt"}


def test_another_source_with_the_same_paths_is_left_alone(ballast: Ballast, tmp_path: Path) -> None:
    east, west = tmp_path / "east", tmp_path / "west"
    for folder in (east, west):
        for name in ("a.txt", "b.txt"):
            write_document(folder, name)
        closed(ballast.run(folder))
    (west / "a.txt").unlink()
    assert closed(ballast.run(west, changed=["a.txt"])).books.documents_deleted == 1
    assert set(ballast.look()[1]) == {(str(east), "a.txt"), (str(east), "b.txt"), (str(west), "b.txt")}


# ------------------------------------------------------------------------------------------ guards


def test_many_deletions_at_once_wait_for_confirmation(ballast: Ballast) -> None:
    for number in range(30):
        write_document(ballast.docs, f"{number:02}.txt", 1)
    closed(ballast.run())
    names = [f"{number:02}.txt" for number in range(12)]
    for name in names:
        (ballast.docs / name).unlink()
    withheld = closed(ballast.run(changed=names))
    assert (withheld.books.documents_deleted, withheld.books.documents_withheld) == (0, 12)
    assert "12 documents of 30" in withheld.notes[-1]
    assert len(ballast.documents()) == 30
    confirmed = closed(ballast.run(changed=names, deletes={"confirmed": True}))
    assert (confirmed.books.documents_deleted, len(ballast.documents())) == (12, 18)


@pytest.mark.parametrize("path", ["../a.txt", "/etc/passwd", "s3://bucket/a.txt", "", "sub/../../a.txt"])
def test_a_path_that_leads_out_of_the_source_is_refused_before_anything_is_read(ballast: Ballast, path: str) -> None:
    write_document(ballast.docs, "a.txt")
    with pytest.raises(ConfigError, match="changed path"):
        ballast.run(changed=["a.txt", path])
    assert not (ballast.data / "qdrant").exists()


def test_a_source_that_is_away_deletes_nothing(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")
    closed(ballast.run())
    (ballast.docs / "a.txt").unlink()  # as an empty mount point looks
    with pytest.raises(SourceError):
        ballast.run(changed=["a.txt"])
    assert ballast.documents() == {"a.txt"}


def test_points_that_are_missing_keep_the_books_open(ballast: Ballast) -> None:
    for name in ("a.txt", "b.txt"):
        write_document(ballast.docs, name)
    closed(ballast.run())
    lost = next(point_id for point_id, (_, doc_id, _) in ballast.look()[0].items() if doc_id == "a.txt")
    store = ballast.open_store()
    store.delete_points(ballast.find_live(store), [lost])
    store.close()
    assert closed(ballast.run(changed=["b.txt"])).books.documents_unchanged == 1
    _, off = ballast.run(changed=["a.txt"])
    assert any(line.startswith("points: Qdrant counts") for line in off)


# ------------------------------------------------------------------------------------------ when it takes the whole source


def test_the_first_run_of_a_source_takes_all_of_it(ballast: Ballast) -> None:
    for name in ("a.txt", "b.txt"):
        write_document(ballast.docs, name)
    summary = closed(ballast.run(changed=["a.txt"]))
    assert (summary.books.documents_written, is_whole_run(summary)) == (2, True)
    assert not is_whole_run(closed(ballast.run(changed=["a.txt"])))


def test_other_settings_rebuild_from_the_whole_source(ballast: Ballast) -> None:
    for name in ("a.txt", "b.txt"):
        write_document(ballast.docs, name)
    old = closed(ballast.run())
    new = closed(ballast.run(changed=["a.txt"], **OTHER))
    assert (new.books.documents_written, is_whole_run(new)) == (2, True)
    assert "chunking.max_tokens" in new.notes[0]
    assert f"{old.physical_collection}, is kept" in new.notes[-1]
    assert not is_whole_run(closed(ballast.run(changed=["a.txt"], **OTHER)))


@pytest.mark.parametrize("changed", [None, ["a.txt"]])
def test_after_a_run_that_was_cut_off_the_next_one_takes_the_whole_source(
    ballast: Ballast, changed: list[str] | None
) -> None:
    for name in ("a.txt", "b.txt"):
        write_document(ballast.docs, name)
    closed(ballast.run())

    def stop(run: IngestRun) -> None:
        run.spool.clear()
        if changed is None:
            run.committer.begin(["a.txt"])
        raise KeyboardInterrupt

    write_document(ballast.docs, "a.txt", 6)
    with pytest.raises(KeyboardInterrupt):
        ballast.run(before_commit=stop, changed=changed)
    summary = closed(ballast.run(changed=["b.txt"]))
    assert (summary.books.documents_written, is_whole_run(summary)) == (1, True)
    assert not is_whole_run(closed(ballast.run(changed=["b.txt"])))


def test_what_an_earlier_run_embedded_and_could_not_store_is_finished_by_a_whole_run(ballast: Ballast) -> None:
    for name in ("a.txt", "b.txt"):
        write_document(ballast.docs, name)
    closed(ballast.run())

    def lose_qdrant(_: IngestRun) -> None:
        raise KeyboardInterrupt

    write_document(ballast.docs, "a.txt", 6)
    with pytest.raises(KeyboardInterrupt):
        ballast.run(before_commit=lose_qdrant)
    summary = closed(ballast.run(changed=["b.txt"]))
    assert (is_whole_run(summary), ballast.embedded, summary.books.documents_seen) == (True, 0, 2)


# ------------------------------------------------------------------------------------------ failures and marks


def test_failed_documents_elsewhere_are_left_alone_and_the_source_is_not_whole(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")
    (ballast.docs / "bad.pdf").write_bytes(b"no PDF")
    ballast.run()
    _, before = ballast.look()
    source = str(ballast.docs)
    write_document(ballast.docs, "a.txt", 6)
    summary = closed(ballast.run(changed=["a.txt"]))
    assert (is_whole_run(summary), summary.books.documents_written, summary.books.documents_failed) == (False, 1, 0)
    assert ballast.look()[1][source, "bad.pdf"] == before[source, "bad.pdf"]
    mark = read_mark(ballast)
    assert mark is not None
    assert (mark.status, mark.updated_at) == ("failed", "")

    again, _ = ballast.run(changed=["bad.pdf"])
    assert (again.books.documents_failed, ballast.look()[1][source, "bad.pdf"].attempts) == (1, 2)
    (ballast.docs / "bad.pdf").unlink()
    closed(ballast.run(changed=["bad.pdf"]))
    assert (source, "bad.pdf") not in ballast.look()[1]


def test_the_mark_is_as_new_as_what_was_written(ballast: Ballast) -> None:
    for name in ("a.txt", "b.txt"):
        write_document(ballast.docs, name)
    closed(ballast.run())
    whole = read_mark(ballast)
    closed(ballast.run(changed=["a.txt"]))
    assert read_mark(ballast) == whole  # nothing was written
    write_document(ballast.docs, "a.txt", 6)
    closed(ballast.run(changed=["a.txt"]))
    newer = read_mark(ballast)
    assert whole is not None
    assert newer is not None
    assert (newer.status, newer.updated_at > whole.updated_at) == ("done", True)
    (ballast.docs / "bad.pdf").write_bytes(b"no PDF")
    ballast.run(changed=["bad.pdf"])
    failed = read_mark(ballast)
    assert failed is not None
    assert (failed.status, failed.updated_at) == ("failed", "")


def test_a_rebuild_waits_for_a_source_that_changed_paths_made_newer(ballast: Ballast, tmp_path: Path) -> None:
    east, west = tmp_path / "east", tmp_path / "west"
    for folder in (east, west):
        write_document(folder, "a.txt")
        closed(ballast.run(folder))
    closed(ballast.run(east, **OTHER))  # waits for west
    write_document(east, "a.txt", 6)
    closed(ballast.run(east, changed=["a.txt"]))  # into the old one: readers have it now, the new one has not
    waiting = closed(ballast.run(west, **OTHER))
    assert f"documents of {east}" in waiting.notes[-1]
    switched = closed(ballast.run(east, changed=["a.txt"], **OTHER))
    assert is_whole_run(switched)
    assert "is kept" in switched.notes[-1]


# ------------------------------------------------------------------------------------------ all together


def test_a_source_kept_up_by_its_changed_paths_ends_as_one_that_is_ingested_anew(
    ballast: Ballast, tmp_path: Path, minilm: str, encoder: SharedEncoder
) -> None:
    chance = random.Random(7)
    for number in range(12):
        write_document(ballast.docs, f"{number}.txt")
    write_table(ballast.docs / "t.jsonl", range(8))
    closed(ballast.run())
    for turn in range(6):
        changed = set()
        for _ in range(4):
            name = f"{chance.randrange(16)}.txt"
            changed.add(name)
            if chance.random() < 0.4:
                (ballast.docs / name).unlink(missing_ok=True)
            else:
                write_document(ballast.docs, name, chance.randrange(1, 6))
        if turn % 2:
            write_table(ballast.docs / "t.jsonl", chance.sample(range(12), 7), f"Turn {turn}, row")
            changed.add("t.jsonl")
        assert not is_whole_run(closed(ballast.run(changed=sorted(changed))))
    anew = Ballast(tmp_path / "anew", minilm, encoder)
    anew.docs = ballast.docs
    closed(anew.run())
    assert ballast.look()[0] == anew.look()[0]
    kept_up, fresh = (
        {key: (each.status, each.generation, each.nodes, each.nodes_digest) for key, each in one.look()[1].items()}
        for one in (ballast, anew)
    )
    assert kept_up == fresh
