"""Failed documents and physical collections, listed from a real embedded Qdrant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from qdrant_client import QdrantClient
from qdrant_client.models import DeleteAlias, DeleteAliasOperation

from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.spool import SpoolFolder
from tasks.config import QdrantSettings
from tasks.engine.stored_state import drop_old_collections, list_collections, list_failures
from tasks.errors import StoreMissing
from tasks.policy.changes import decide_document
from tasks.records import LedgerRecord, Node

DONE = LedgerRecord("docs", "good.md", "done", "h", "g", 2, "0" * 32)
FAILED = LedgerRecord("docs", "bad.pdf", "failed", "h", attempts=1, stage="read", reason="damaged PDF")
PARKED = replace(FAILED, doc_id="worse.pdf", status="parked", attempts=3)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Two builds of `port`, the second not live yet, and one collection of another name."""
    store = open_store(QdrantSettings(), str(tmp_path), environment={})
    for name, fingerprint in (("port", "a" * 64), ("port", "b" * 64), ("depot", "c" * 64)):
        store.prepare_collection(name, dimension=4, fingerprint=fingerprint, model="m")
    live, other = list_live(store, "port")
    store.ledger(live).write([DONE, FAILED, PARKED])
    store.ledger(other).write([DONE, replace(FAILED, doc_id="only-here.pdf")])
    store.close()
    return str(tmp_path)


def list_live(store: QdrantStore, name: str) -> list[str]:
    return [state.physical for state in store.list_physical(name)]


def settings(collection: str = "port") -> QdrantSettings:
    return QdrantSettings(collection=collection)


def test_failures_are_listed_by_collection_the_live_one_first(data: str) -> None:
    failures = list_failures(settings(), data, environment={})
    assert list(failures) == [f"port--{'a' * 12}", f"port--{'b' * 12}"]
    assert [[record.doc_id for record in records] for records in failures.values()] == [
        ["bad.pdf", "worse.pdf"],
        ["only-here.pdf"],
    ]
    assert list_failures(settings("depot"), data, environment={}) == {}


def test_parked_documents_are_tried_again_when_told_to(data: str) -> None:
    list_failures(settings(), data, retry=True, environment={})
    released = list_failures(settings(), data, environment={})[f"port--{'a' * 12}"]
    assert [(record.doc_id, record.status, record.attempts) for record in released] == [
        ("bad.pdf", "failed", 1),
        ("worse.pdf", "failed", 0),
    ]
    assert all(decide_document(record, record.content_hash, max_attempts=3) == "retry" for record in released)
    assert all(record.reason == "damaged PDF" for record in released)


def test_every_collection_is_listed_and_only_the_live_one_stays(data: str) -> None:
    states = list_collections(settings(), data, environment={})
    assert [(state.physical, state.is_live, state.documents) for state in states if state.documents] == [
        (f"port--{'a' * 12}", True, 3),
        (f"port--{'b' * 12}", False, 2),
    ]
    assert len(states) == 3
    left = drop_old_collections(settings(), data, "port", environment={})
    assert [state.physical for state in left] == [f"port--{'a' * 12}"]
    assert [state.physical for state in list_collections(settings(), data, "port", environment={})] == [
        f"port--{'a' * 12}"
    ]
    assert len(list_collections(settings(), data, environment={})) == 2


def test_a_collection_whose_run_was_killed_before_its_alias_is_listed_and_can_be_dropped(data: str) -> None:
    live, built, killed = f"port--{'a' * 12}", f"port--{'b' * 12}", f"depot--{'c' * 12}"
    client = QdrantClient(path=f"{data}/qdrant")
    client.update_collection_aliases([DeleteAliasOperation(delete_alias=DeleteAlias(alias_name="depot"))])
    client.close()

    def list_all(name: str | None = None) -> list[tuple[str, bool]]:
        return [(state.physical, state.is_live) for state in list_collections(settings(), data, name, environment={})]

    assert list_all() == [(killed, False), (live, True), (built, False)]
    assert list_all("depot") == list_all(killed) == [(killed, False)]
    assert list_all(built) == [(built, False)]
    assert [state.physical for state in drop_old_collections(settings(), data, live, environment={})] == [live]
    for name in (killed, built):
        assert drop_old_collections(settings(), data, name, environment={}) == []
    assert list_all() == [(live, True)]


@pytest.mark.parametrize("is_set", [False, True])
def test_the_spools_of_what_is_dropped_are_cleared(data: str, tmp_path: Path, is_set: bool) -> None:
    spool = str(tmp_path / "elsewhere") if is_set else None
    parts = [SpoolFolder(f"{spool or f'{data}/spool'}/port--{letter * 12}/source") for letter in "ab"]
    for part in parts:
        part.write_partition(
            1, [Node("7d444840-9dc0-51d1-b245-5ffdce74fad2", "a.md", "g", np.zeros(3, np.int32), {})], 1
        )
    drop_old_collections(settings(), data, "port", spool=spool, environment={})
    assert [part.measure() > 0 for part in parts] == [True, False]


def test_a_name_that_is_not_there_is_an_error(data: str, tmp_path: Path) -> None:
    for ask in (
        lambda: list_failures(settings("none"), data, environment={}),
        lambda: list_collections(settings(), data, "none", environment={}),
        lambda: drop_old_collections(settings(), data, "none", environment={}),
        lambda: list_collections(settings(), str(tmp_path / "elsewhere"), environment={}),
    ):
        with pytest.raises(StoreMissing):
            ask()
    assert not (tmp_path / "elsewhere").exists()
