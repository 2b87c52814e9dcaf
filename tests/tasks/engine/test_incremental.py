"""Runs one after the other over a source that changes: only what changed is embedded, what left is deleted, nothing is mixed.

Real files, chunker, model, embedded Qdrant and ledger; chunked and embedded in this process, since starting workers is not
what is tested here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.backends.qdrant import QdrantStore
from tasks.backends.torch_encoder import TorchEncoder
from tasks.engine.ingest_run import IngestRun
from tasks.errors import StoreLocked, StoreMismatch, StoreUnavailable
from tasks.policy.failures import classify_failure
from tests.tasks.engine.ingest_again import Ballast, SharedEncoder, closed, write_document


@pytest.fixture(scope="module")
def encoder(minilm: str) -> Iterator[SharedEncoder]:
    built = SharedEncoder(minilm, device="cpu", classify=classify_failure)
    yield built
    TorchEncoder.close(built)


@pytest.fixture
def ballast(tmp_path: Path, minilm: str, encoder: SharedEncoder) -> Ballast:
    return Ballast(tmp_path, minilm, encoder)


# ------------------------------------------------------------------------------------------ nothing, a paragraph, a document


def test_an_unchanged_source_is_neither_chunked_nor_embedded_nor_written(ballast: Ballast) -> None:
    for number in range(5):
        write_document(ballast.docs, f"{number}.txt")
    first = closed(ballast.run())
    before = ballast.look()
    second = closed(ballast.run())
    assert ballast.embedded == 0
    assert second.device == "none"
    assert (second.books.documents_unchanged, second.books.nodes_planned) == (5, 0)
    assert second.books.points_counted == first.books.points_counted == len(before[0])
    assert ballast.look() == before  # the times of the ledger's records, too


def test_an_edited_paragraph_embeds_its_nodes_only_and_leaves_one_generation(ballast: Ballast) -> None:
    write_document(ballast.docs, "long.txt", 60)
    write_document(ballast.docs, "other.txt")
    closed(ballast.run())
    before, _ = ballast.look()
    write_document(ballast.docs, "long.txt", 60, p30="A paragraph that nobody has seen before: mind the gap.")
    summary = closed(ballast.run())
    after, records = ballast.look()
    assert 1 <= ballast.embedded <= 3
    assert (summary.books.documents_written, summary.books.documents_unchanged) == (1, 1)
    assert summary.books.nodes_reused == summary.books.nodes_planned - ballast.embedded
    generations = {generation for _, doc_id, generation in after.values() if doc_id == "long.txt"}
    assert generations == {records[str(ballast.docs), "long.txt"].generation}
    assert len(after.keys() - before.keys()) == ballast.embedded


def test_a_document_that_left_the_source_goes_with_its_points_and_its_record(ballast: Ballast) -> None:
    for name in ("stays.txt", "goes.txt", "is-emptied.txt"):
        write_document(ballast.docs, name)
    closed(ballast.run())
    (ballast.docs / "goes.txt").unlink()
    (ballast.docs / "is-emptied.txt").write_text("")
    summary = closed(ballast.run())
    points, records = ballast.look()
    assert {doc_id for _, doc_id, _ in points.values()} == {"stays.txt"}
    assert [doc_id for _, doc_id in records] == ["stays.txt"]
    assert (summary.books.documents_deleted, summary.books.documents_withheld) == (2, 0)


# ------------------------------------------------------------------------------------------ the delete guard


def test_a_short_listing_deletes_nothing_until_it_is_confirmed_while_additions_go_on(ballast: Ballast) -> None:
    for number in range(30):
        write_document(ballast.docs, f"{number:02}.txt", 1)
    closed(ballast.run())
    for number in range(12):
        (ballast.docs / f"{number:02}.txt").unlink()
    write_document(ballast.docs, "new.txt", 1)
    withheld = closed(ballast.run())
    assert (withheld.books.documents_deleted, withheld.books.documents_withheld) == (0, 12)
    assert withheld.books.documents_written == 1
    assert "12 documents of 31" in withheld.notes[0]
    assert "--confirm-deletes" in withheld.notes[0]
    assert len(ballast.documents()) == 31
    confirmed = closed(ballast.run(deletes={"confirmed": True}))
    assert (confirmed.books.documents_deleted, confirmed.books.documents_withheld) == (12, 0)
    assert len(ballast.documents()) == 19


def test_what_a_table_that_broke_off_may_still_hold_is_never_deleted(ballast: Ballast) -> None:
    ballast.docs.mkdir()
    rows = [f'{{"id": "{number}", "text": "Row {number} of the log of the harbour master."}}' for number in range(4)]
    table = ballast.docs / "log.jsonl"
    table.write_text("\n".join(rows))
    closed(ballast.run())
    table.write_text("\n".join([*rows[:2], '{"id": "2", "text": "Row 2 of the lo']))  # still being copied
    broken = closed(ballast.run(deletes={"confirmed": True}))
    assert (broken.books.documents_failed, broken.books.documents_deleted) == (1, 0)
    assert len(ballast.documents()) == 4
    table.write_text("\n".join(rows[:3]))
    mended = closed(ballast.run())
    assert (mended.books.documents_unchanged, mended.books.documents_deleted) == (3, 1)
    assert ballast.documents() == {"log.jsonl#0", "log.jsonl#1", "log.jsonl#2"}


# ------------------------------------------------------------------------------------------ several sources


def test_two_sources_with_the_same_names_and_texts_leave_each_other_alone(ballast: Ballast, tmp_path: Path) -> None:
    east, west = tmp_path / "east", tmp_path / "west"
    for folder in (east, west):
        for name in ("readme.txt", "more.txt"):
            write_document(folder, name)
    first = closed(ballast.run(east))
    closed(ballast.run(west))
    assert len(ballast.look()[0]) == 2 * first.books.points_counted
    (west / "readme.txt").unlink()
    summary = closed(ballast.run(west))
    assert summary.books.documents_deleted == 1
    _, records = ballast.look()
    assert set(records) == {(str(east), "readme.txt"), (str(east), "more.txt"), (str(west), "more.txt")}
    again = closed(ballast.run(east))
    assert again.books.documents_unchanged == 2


def test_a_source_with_a_name_of_its_own_may_move(ballast: Ballast, tmp_path: Path) -> None:
    write_document(tmp_path / "clone-1", "readme.txt")
    closed(ballast.run(tmp_path / "clone-1", source={"name": "handbook"}))
    (tmp_path / "clone-1").rename(tmp_path / "clone-2")
    summary = closed(ballast.run(tmp_path / "clone-2", source={"name": "handbook"}))
    assert (summary.books.documents_unchanged, ballast.embedded) == (1, 0)


def test_two_runs_of_one_source_at_once_are_refused(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")
    run = ballast.open(ballast.settings())
    with pytest.raises(StoreLocked):
        ballast.open(ballast.settings())
    run.close()
    closed(ballast.run())


# ------------------------------------------------------------------------------------------ another fingerprint


def test_other_settings_build_a_collection_beside_the_old_one_and_switch_when_the_books_close(ballast: Ballast) -> None:
    for number in range(6):
        write_document(ballast.docs, f"{number}.txt", 12)
    old = closed(ballast.run())

    def stop(run: IngestRun) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ballast.run(before_commit=stop, chunking={"max_tokens": 64}, partition={"max_tokens": 600})
    assert len(ballast.look()[0]) == old.books.points_counted  # readers see the old one, whole

    new = closed(ballast.run(chunking={"max_tokens": 64}, partition={"max_tokens": 600}))
    assert new.physical_collection != old.physical_collection
    assert "chunking.max_tokens" in new.notes[0]
    assert f"{old.physical_collection}, is kept" in new.notes[-1]
    assert len(ballast.look()[0]) == new.books.points_counted != old.books.points_counted
    store = ballast.open_store()
    states = {each.physical: (each.is_live, each.points) for each in store.list_physical("port")}
    store.close()
    assert states == {
        old.physical_collection: (False, old.books.points_counted),
        new.physical_collection: (True, new.books.points_counted),
    }
    back = closed(ballast.run())
    assert (back.physical_collection, ballast.embedded) == (old.physical_collection, 0)


def test_a_rebuilt_collection_waits_for_every_source_and_every_document(ballast: Ballast, tmp_path: Path) -> None:
    east, west = tmp_path / "east", tmp_path / "west"
    write_document(east, "a.txt")
    write_document(west, "b.txt")
    old = closed(ballast.run(east))
    closed(ballast.run(west))
    changed = {"chunking": {"max_tokens": 64}}
    first = closed(ballast.run(east, **changed))
    assert f"documents of {west}" in first.notes[-1]
    (west / "broken.pdf").write_bytes(b"no PDF")
    second, _ = ballast.run(west, **changed)
    assert "1 documents failed" in second.notes[-1]
    store = ballast.open_store()
    assert ballast.find_live(store) == old.physical_collection
    store.close()
    (west / "broken.pdf").unlink()
    third = closed(ballast.run(west, **changed))
    assert third.physical_collection in third.notes[-1]
    assert ballast.documents() == {"a.txt", "b.txt"}


def test_who_does_not_want_a_rebuild_can_refuse_it(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")
    closed(ballast.run())
    with pytest.raises(StoreMismatch):
        ballast.run(chunking={"max_tokens": 64}, qdrant={"on_change": "refuse"})


def test_a_source_that_is_not_whole_in_the_new_collection_holds_the_switch_back(
    ballast: Ballast, tmp_path: Path
) -> None:
    east, west = tmp_path / "east", tmp_path / "west"
    write_document(east, "a.txt")
    for number in range(4):
        write_document(west, f"{number}.txt", 30)
    old = closed(ballast.run(east))
    closed(ballast.run(west))
    changed = {"chunking": {"max_tokens": 64}, "partition": {"max_tokens": 600}}

    def stop_at_second(run: IngestRun) -> None:
        if len(run.reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ballast.run(west, before_commit=stop_at_second, **changed)
    held_back = closed(ballast.run(east, **changed))
    assert f"stays {old.physical_collection} for now: it has documents of {west}" in held_back.notes[-1]
    assert len(ballast.documents()) == 5
    switched = closed(ballast.run(west, **changed))
    assert f"is {switched.physical_collection} now" in switched.notes[-1]
    assert len(ballast.documents()) == 5


def test_going_back_to_old_settings_waits_until_the_old_collection_is_as_new(ballast: Ballast, tmp_path: Path) -> None:
    east, west = tmp_path / "east", tmp_path / "west"
    write_document(east, "a.txt")
    write_document(west, "b.txt")
    changed = {"chunking": {"max_tokens": 64}}
    for groups in ({}, changed):
        closed(ballast.run(east, **groups))
        new = closed(ballast.run(west, **groups))
    write_document(west, "new.txt")
    closed(ballast.run(west, **changed))
    back = closed(ballast.run(east))
    assert f"stays {new.physical_collection} for now: it has documents of {west}" in back.notes[-1]
    assert ballast.documents() == {"a.txt", "b.txt", "new.txt"}


def test_a_short_listing_does_not_empty_a_collection_by_way_of_a_rebuild(ballast: Ballast) -> None:
    for number in range(30):
        write_document(ballast.docs, f"{number:02}.txt", 1)
    old = closed(ballast.run())
    for number in range(12):
        (ballast.docs / f"{number:02}.txt").unlink()
    changed = {"chunking": {"max_tokens": 64}}
    withheld = closed(ballast.run(**changed))
    assert withheld.books.documents_withheld == 12
    assert f"stays {old.physical_collection} for now: 12 documents of 30" in withheld.notes[-1]
    assert len(ballast.documents()) == 30
    closed(ballast.run(**changed, deletes={"confirmed": True}))
    assert len(ballast.documents()) == 18


# ------------------------------------------------------------------------------------------ failures


def test_a_document_that_keeps_failing_is_parked_until_its_content_changes(ballast: Ballast) -> None:
    write_document(ballast.docs, "good.txt")
    (ballast.docs / "bad.pdf").write_bytes(b"no PDF at all")
    for attempt in (1, 2, 3):
        summary = closed(ballast.run())
        assert summary.books.documents_failed == 1
        record = ballast.look()[1][str(ballast.docs), "bad.pdf"]
        assert (record.attempts, record.stage, record.status) == (
            attempt,
            "read",
            "parked" if attempt == 3 else "failed",
        )
    parked = closed(ballast.run())
    assert (parked.books.documents_failed, parked.books.documents_skipped) == (0, 1)
    assert parked.rejections[0].reason.startswith("parked after 3 attempts: ")
    (ballast.docs / "bad.pdf").write_bytes(b"another thing that is no PDF")
    assert closed(ballast.run()).books.documents_failed == 1
    (ballast.docs / "bad.pdf").unlink()
    closed(ballast.run())
    assert set(ballast.look()[1]) == {(str(ballast.docs), "good.txt")}


def test_a_document_that_can_not_be_read_any_more_keeps_the_points_it_had(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")
    closed(ballast.run())
    before, _ = ballast.look()
    text = (ballast.docs / "a.txt").read_bytes()
    (ballast.docs / "a.txt").write_bytes(b"PK\x03\x04\x00\x00 binary now")
    assert closed(ballast.run()).books.documents_failed == 1
    after, records = ballast.look()
    assert after == before
    record = records[str(ballast.docs), "a.txt"]
    assert (record.status, record.is_partial, record.nodes) == ("failed", False, len(before))
    (ballast.docs / "a.txt").write_bytes(text)
    assert closed(ballast.run()).books.nodes_reused == len(before)
    assert ballast.look()[1][str(ballast.docs), "a.txt"].status == "done"


# ------------------------------------------------------------------------------------------ interrupted


def test_a_change_taken_back_while_it_was_half_written_leaves_what_was_there_first(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt", 40)
    closed(ballast.run())
    before = ballast.look()[0]
    text = (ballast.docs / "a.txt").read_text()
    write_document(ballast.docs, "a.txt", 40, p3="Another third paragraph, about tugs and their lines.")

    def stop(run: IngestRun) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ballast.run(before_commit=stop)
    record = ballast.look()[1][str(ballast.docs), "a.txt"]
    assert (record.status, record.is_partial) == ("pending", True)
    (ballast.docs / "a.txt").write_text(text)
    closed(ballast.run())
    assert ballast.look()[0] == before


@pytest.mark.parametrize("step", ["count_generations", "delete_other_generations", "ledger"])
def test_a_commit_that_an_outage_cuts_off_is_taken_up_again(
    ballast: Ballast, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Longer than the task waits: Prefect repeats the task, and whatever the outage left out must still be done."""
    monkeypatch.setattr("tasks.engine.ingest_run.UPSERT_PATIENCE_S", 0.0)
    write_document(ballast.docs, "a.txt", 40)
    closed(ballast.run())
    write_document(ballast.docs, "a.txt", 40, p3="Another third paragraph, about tugs and their lines.")

    def fail_once(run: IngestRun) -> None:
        owner: Any = run.collection.ledger if step == "ledger" else run.collection.store
        name = "write" if step == "ledger" else step
        request, failed = getattr(owner, name), []

        def send(*arguments: Any) -> Any:
            is_commit = step != "ledger" or arguments[0][0].status == "done"
            if is_commit and not failed:
                failed.append(step)
                raise StoreUnavailable("Qdrant is away")
            return request(*arguments)

        setattr(owner, name, send)

    closed(ballast.run(before_commit=fail_once))
    points, records = ballast.look()
    record = records[str(ballast.docs), "a.txt"]
    assert (record.status, record.is_partial) == ("done", False)
    assert {generation for _, _, generation in points.values()} == {record.generation}
    assert len(points) == record.nodes


def test_an_outage_at_the_end_is_waited_for(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt")

    def fail_once(run: IngestRun) -> None:
        ledger: Any = run.collection.ledger
        scroll, failed = ledger.scroll, []

        def send(source: str | None = None) -> Any:
            if not failed:
                failed.append(source)
                raise StoreUnavailable("Qdrant is away")
            return scroll(source)

        ledger.scroll = send

    assert closed(ballast.run(before_commit=fail_once)).books.points_counted == 3


def test_a_document_that_left_while_it_was_half_written_leaves_no_point(ballast: Ballast) -> None:
    write_document(ballast.docs, "stays.txt")
    write_document(ballast.docs, "zz.txt", 120)

    def stop_late(run: IngestRun) -> None:
        if len(run.reports) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ballast.run(before_commit=stop_late)
    assert "zz.txt" in ballast.documents()
    (ballast.docs / "zz.txt").unlink()
    summary = closed(ballast.run())
    assert summary.books.documents_deleted == 1
    assert ballast.documents() == {"stays.txt"}
    assert set(ballast.look()[1]) == {(str(ballast.docs), "stays.txt")}


def test_a_lost_ledger_is_written_again_without_embedding_anything(ballast: Ballast) -> None:
    for number in range(3):
        write_document(ballast.docs, f"{number}.txt")
    closed(ballast.run())
    before = ballast.look()[0]
    store = ballast.open_store()
    records = [each for page in store.ledger(ballast.find_live(store)).scroll() for each in page]
    store.ledger(ballast.find_live(store)).remove(str(ballast.docs), [each.doc_id for each in records])
    store.close()
    summary = closed(ballast.run())
    assert (summary.books.documents_unchanged, ballast.embedded) == (3, 0)
    assert ballast.look()[0] == before
    assert {each.status for each in ballast.look()[1].values()} == {"done"}


def test_edits_in_a_collection_above_half_of_its_limit_find_room(
    ballast: Ballast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        write_document(ballast.docs, f"{number:02}.txt", 3)
    closed(ballast.run(partition={"max_tokens": 400}))
    monkeypatch.setattr("tasks.backends.qdrant.EMBEDDED_MAX_POINTS", 90)  # of 60 points
    for number in range(20):
        texts = {f"p{place}": f"Other text {place} of ship {number}, which waits for the tide." for place in range(3)}
        write_document(ballast.docs, f"{number:02}.txt", 3, **texts)
    assert closed(ballast.run(partition={"max_tokens": 400})).books.documents_written == 20


def test_points_deleted_by_hand_open_the_books_of_a_run_that_had_nothing_to_do(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt", 20)
    closed(ballast.run())
    store = ballast.open_store()
    store.delete_points(ballast.find_live(store), sorted(ballast_ids := {*_ids(store, ballast)})[:2])
    store.close()
    summary, off = ballast.run()
    assert summary.books.documents_unchanged == 1
    assert f"Qdrant counts {len(ballast_ids) - 2} of this source's committed documents" in off[0]
    assert "ballast verify --repair" in off[0]


def _ids(store: QdrantStore, ballast: Ballast) -> Iterator[str]:
    for page in store.scroll_points(ballast.find_live(store), with_vectors=False):
        yield from page.ids


def test_stored_vectors_of_reused_nodes_are_not_touched(ballast: Ballast) -> None:
    write_document(ballast.docs, "a.txt", 20)
    closed(ballast.run())

    def read() -> dict[str, Any]:
        store = ballast.open_store()
        found: dict[str, Any] = {}
        for page in store.scroll_points(ballast.find_live(store), with_vectors=True):
            assert page.vectors is not None
            found.update(zip(page.ids, page.vectors, strict=True))
        store.close()
        return found

    before = read()
    write_document(ballast.docs, "a.txt", 20, p0="A new first paragraph moves all that follows.")
    closed(ballast.run())
    after = read()
    common = before.keys() & after.keys()
    assert len(common) >= 15
    for point_id in common:
        np.testing.assert_array_equal(before[point_id], after[point_id])
