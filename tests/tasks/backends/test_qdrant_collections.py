"""Names, physical collections and their ledgers: planned, made, switched and dropped, whatever is cut short."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.qdrant_calls import RetryPolicy
from tasks.config import QdrantSettings
from tasks.errors import (
    ConfigError,
    StoreError,
    StoreMismatch,
    StoreMissing,
    StoreRejected,
    StoreUnavailable,
)
from tasks.records import LedgerRecord

DIMENSION = 8
PRINT_A, PRINT_B = "a" * 32, "b" * 32
OLD, NEW = f"docs--{PRINT_A[:12]}", f"docs--{PRINT_B[:12]}"


def open_server(server: LoopbackQdrant, *, attempts: int = 6) -> QdrantStore:
    client = QdrantClient(url=server.url, timeout=5, check_compatibility=False)
    retry = RetryPolicy(attempts=attempts)
    return QdrantStore(client, place=f"at {server.url}", is_embedded=False, retry=retry, sleep=lambda _: None)


def open_folder(folder: Path) -> QdrantStore:
    return open_store(QdrantSettings(), str(folder), environment={})


def prepare(store: QdrantStore, name: str = "docs", *, dimension: int = DIMENSION, fingerprint: str = PRINT_A) -> str:
    return store.prepare_collection(name, dimension=dimension, fingerprint=fingerprint, model="mini")


def fill(store: QdrantStore, physical: str) -> None:
    """Two points of one document, and its record."""
    ids = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(2)]
    payloads: list[dict[str, Any]] = [{"doc_id": "a.md", "generation": "g", "ballast_source": "s"}] * 2
    store.upsert(physical, ids, np.eye(2, DIMENSION, dtype=np.float32), payloads)
    store.ledger(physical).write([LedgerRecord("s", "a.md", "done", "hash", "g", 2)])


# ---------------------------------------------------------------------------------------------- a new name


def test_a_collection_is_an_alias_with_our_metadata(store: QdrantStore) -> None:
    plan = store.plan_collection("docs", dimension=DIMENSION, fingerprint=PRINT_A)
    assert (plan.physical, plan.live, plan.exists, plan.is_rebuild) == (OLD, None, False, False)
    assert store.list_collections() == []  # asking changed nothing
    assert prepare(store) == OLD
    assert prepare(store) == OLD
    plan = store.plan_collection("docs", dimension=DIMENSION, fingerprint=PRINT_A, on_change="refuse")
    assert (plan.physical, plan.live, plan.exists, plan.is_rebuild) == (OLD, OLD, True, False)
    assert store.list_collections() == ["docs"]
    metadata = store.collection_model("docs")
    assert metadata == store.collection_model(OLD)
    assert (metadata["owner"], metadata["fingerprint"], metadata["model"]) == ("ballast", PRINT_A, "mini")
    assert (metadata["dimension"], metadata["schema_version"], metadata["collection"]) == (DIMENSION, 2, "docs")


def test_a_ledger_is_nothing_that_a_user_names(store: QdrantStore) -> None:
    physical = prepare(store)
    with pytest.raises(StoreMissing, match=r"no collection 'docs--a+--ledger'; it has docs\."):
        store.collection_model(f"{physical}--ledger")
    with pytest.raises(StoreMismatch, match=r"physical collection of Ballast.*Use --collection docs"):
        store.plan_collection(f"{physical}--ledger", dimension=DIMENSION, fingerprint=PRINT_A)
    with pytest.raises(StoreMissing, match="it has docs"):
        store.collection_model("nope")
    assert prepare(store, "my--ledger") == f"my--ledger--{PRINT_A[:12]}"
    assert store.list_collections() == ["docs", "my--ledger"]


def test_a_physical_collection_is_not_a_name(store: QdrantStore) -> None:
    physical = prepare(store)
    with pytest.raises(StoreMismatch, match="Use --collection docs"):
        store.plan_collection(physical, dimension=DIMENSION, fingerprint=PRINT_A)
    with pytest.raises(StoreMismatch, match="Use --collection docs"):
        prepare(store, physical)


@pytest.mark.parametrize("name", ["", "..", "a/b", "a:b", "x" * 234])
def test_a_name_that_qdrant_forbids_is_refused_first(store: QdrantStore, name: str) -> None:
    with pytest.raises(ConfigError, match="Collection name"):
        store.plan_collection(name, dimension=DIMENSION, fingerprint=PRINT_A)


def test_the_longest_name_has_a_ledger(tmp_path: Path) -> None:
    with closing(open_folder(tmp_path)) as store:
        physical = prepare(store, "x" * 233)
        fill(store, physical)
        assert store.ledger(physical).count() == 1


def test_a_missing_collection_names_those_there(store: QdrantStore) -> None:
    with pytest.raises(StoreError, match=r"has no collection 'nope'; it has none: run `ballast ingest` first"):
        store.collection_model("nope")
    prepare(store)
    vector = np.eye(1, DIMENSION, dtype=np.float32)[0]
    for ask in (store.collection_model, lambda name: store.search(name, vector, limit=1)):
        with pytest.raises(StoreError, match="has no collection 'nope'; it has docs"):
            ask("nope")


# ---------------------------------------------------------------------------------------------- another fingerprint


def test_another_fingerprint_or_dimension_can_be_refused(store: QdrantStore) -> None:
    prepare(store)
    with pytest.raises(StoreMismatch, match=rf"another --collection.*on_change=rebuild.*{PRINT_A[:12]}, now b+"):
        store.plan_collection("docs", dimension=DIMENSION, fingerprint=PRINT_B, on_change="refuse")
    with pytest.raises(StoreMismatch, match=r"dimension 8 \(model mini\); big gives 1024.*another --collection"):
        store.plan_collection("docs", dimension=1024, fingerprint=PRINT_B, model="big", on_change="refuse")
    # Not even a rebuild helps where the fingerprint says that nothing has changed.
    with pytest.raises(StoreMismatch, match=r"dimension 8 \(model mini\); this model gives 1024"):
        store.plan_collection("docs", dimension=1024, fingerprint=PRINT_A)
    assert store.list_collections() == ["docs"]
    assert prepare(store, "docs2", fingerprint=PRINT_B) == f"docs2--{PRINT_B[:12]}"


def test_another_fingerprint_is_built_beside_and_switched_to(store: QdrantStore) -> None:
    fill(store, prepare(store))
    plan = store.plan_collection("docs", dimension=16, fingerprint=PRINT_B, model="big")
    assert (plan.physical, plan.live, plan.exists, plan.is_rebuild) == (NEW, OLD, False, True)
    assert plan.reason == f"Collection 'docs' ({OLD}) was built with model mini; this run has big."
    assert store.list_collections() == ["docs"]

    assert prepare(store, dimension=16, fingerprint=PRINT_B) == NEW
    assert prepare(store, dimension=16, fingerprint=PRINT_B) == NEW  # interrupted half way: gone on with
    plan = store.plan_collection("docs", dimension=16, fingerprint=PRINT_B, model="big")
    assert (plan.live, plan.exists, plan.is_rebuild) == (OLD, True, True)
    assert store.count("docs") == 2  # the name stands for the old one, ledger included
    assert store.ledger(OLD).count() == 1
    assert store.ledger(NEW).count() == 0

    store.switch_alias("docs", NEW)
    store.switch_alias("docs", NEW)
    assert store.count("docs") == 0
    assert store.collection_model("docs")["fingerprint"] == PRINT_B
    states = store.list_physical("docs")
    assert [(state.physical, state.is_live, state.points, state.documents) for state in states] == [
        (NEW, True, 0, 0),
        (OLD, False, 2, 1),
    ]
    assert [(state.dimension, state.fingerprint, state.model) for state in states] == [
        (16, PRINT_B, "mini"),
        (DIMENSION, PRINT_A, "mini"),
    ]
    # And back: the settings of before find their collection as it was.
    plan = store.plan_collection("docs", dimension=DIMENSION, fingerprint=PRINT_A, model="mini")
    assert (plan.physical, plan.live, plan.exists, plan.is_rebuild) == (OLD, NEW, True, True)


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("mini", "1" * 64, "with this model (mini) but another chunking, precision, prompt"),
        ("moved/mini", "1" * 64, "with this model (moved/mini) but another chunking"),
        ("mini", "2" * 64, "with revision 111111111111 of mini; this run has 222222222222"),
        ("big", "2" * 64, "with model mini; this run has big"),
    ],
)
def test_another_fingerprint_says_what_differs(store: QdrantStore, model: str, revision: str, message: str) -> None:
    store.prepare_collection("docs", dimension=DIMENSION, fingerprint=PRINT_A, model="mini", revision="1" * 64)
    meant: dict[str, Any] = {"dimension": DIMENSION, "fingerprint": PRINT_B, "model": model, "revision": revision}
    assert message in store.plan_collection("docs", **meant).reason
    with pytest.raises(StoreMismatch) as caught:
        store.plan_collection("docs", on_change="refuse", **meant)
    assert message in str(caught.value)


def test_the_knobs_that_differ_are_named(store: QdrantStore) -> None:
    prompt = "Represent this passage of a document for searching: "
    before = {"precision": "auto", "prompt": prompt, "chunking": {"max_tokens": 256, "levels": (1, 2), "old": 1}}
    store.prepare_collection(
        "docs", dimension=DIMENSION, fingerprint=PRINT_A, model="mini", revision="r1", recipe=before
    )
    assert store.collection_model("docs")["recipe"]["chunking"]["max_tokens"] == 256
    now = {"precision": "auto", "prompt": prompt + "!", "chunking": {"max_tokens": 512, "levels": [1, 2]}}
    plan = store.plan_collection(
        "docs", dimension=DIMENSION, fingerprint=PRINT_B, model="mini", revision="r1", recipe=now
    )
    assert plan.reason == (
        f"Collection 'docs' ({OLD}) was built with this model (mini) but other settings: prompt Represent this passage of "
        "a document for... (now Represent this passage of a document for...), chunking.max_tokens 256 (now 512), "
        "chunking.old 1 (now unset)."
    )


def test_switching_to_what_is_not_there_is_refused(store: QdrantStore) -> None:
    physical = prepare(store)
    with pytest.raises(StoreRejected, match=f"could not name '{NEW}' 'docs'"):
        store.switch_alias("docs", NEW)
    assert store.collection_model("docs") == store.collection_model(physical)


# ---------------------------------------------------------------------------------------------- dropping


def test_dropping_an_old_collection_takes_its_ledger(store: QdrantStore) -> None:
    fill(store, prepare(store))
    prepare(store, fingerprint=PRINT_B)
    prepare(store, "docs--other")  # another name that begins alike
    with pytest.raises(StoreRejected, match=f"'{OLD}' is what 'docs' stands for now"):
        store.drop_physical("docs", OLD)
    store.switch_alias("docs", NEW)
    store.drop_physical("docs", OLD)
    assert [state.physical for state in store.list_physical("docs")] == [NEW]
    assert store.list_collections() == ["docs", "docs--other"]
    with pytest.raises(StoreMissing, match=f"no collection '{OLD}'"):
        store.drop_physical("docs", OLD)
    # Made again, it is empty: no point and no record has outlived it.
    assert prepare(store) == OLD
    assert store.count(OLD) == store.ledger(OLD).count() == 0
    assert store.collection_model("docs")["fingerprint"] == PRINT_B


def test_what_is_not_ours_is_not_dropped(store: QdrantStore) -> None:
    prepare(store)
    other = prepare(store, "other", fingerprint=PRINT_B)
    store.switch_alias("other", prepare(store, "other"))
    with pytest.raises(StoreRejected, match="is not one of 'docs'"):
        store.drop_physical("docs", other)
    with pytest.raises(StoreMissing, match="no collection 'docs'"):  # a name is no physical collection
        store.drop_physical("docs", "docs")
    with pytest.raises(StoreRejected, match="is not one of 'docs'"):
        store.drop_physical("docs", f"{OLD}--ledger")
    assert store.ledger(OLD).count() == 0
    assert [state.physical for state in store.list_physical("other")] == [f"other--{PRINT_A[:12]}", other]


def test_foreign_collections_are_refused_and_left_alone(tmp_path: Path) -> None:
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    cosine = models.VectorParams(size=DIMENSION, distance=models.Distance.COSINE)
    client.create_collection("theirs", vectors_config=cosine)
    client.create_collection("named", vectors_config={"text-dense": cosine}, metadata={"owner": "somebody"})
    client.create_collection(f"taken--{PRINT_A[:12]}", vectors_config=cosine)
    ours = {"owner": "ballast", "schema_version": 2, "fingerprint": PRINT_A, "model": "mini"}
    client.create_collection("unnamed--x", vectors_config=cosine, metadata=ours)
    client.create_collection("newer--x", vectors_config={"text-dense": cosine}, metadata={**ours, "schema_version": 3})
    alike = {**ours, "fingerprint": PRINT_A[:12] + "f" * 20}
    client.create_collection(f"alike--{PRINT_A[:12]}", vectors_config={"text-dense": cosine}, metadata=alike)
    dot = models.VectorParams(size=DIMENSION, distance=models.Distance.DOT)
    client.create_collection("dot--x", vectors_config={"text-dense": dot}, metadata=ours)
    for name in ("unnamed", "newer", "dot"):
        alias = models.CreateAlias(collection_name=f"{name}--x", alias_name=name)
        client.update_collection_aliases([models.CreateAliasOperation(create_alias=alias)])
    client.close()
    with closing(open_folder(tmp_path)) as store:
        before = store.list_collections()
        for name, message in [
            ("theirs", "was not made by Ballast: its owner is None"),
            ("named", "was not made by Ballast: its owner is 'somebody'"),
            ("taken", "was not made by Ballast: its owner is None"),
            ("unnamed", "no vector named 'text-dense' .it has: one unnamed vector"),
            ("newer", "schema version 3; this Ballast writes 2"),
            ("alike", "another chunking|other settings"),
            ("dot", "by Dot; Ballast's are made for Cosine"),
        ]:
            with pytest.raises(StoreMismatch, match=rf"(?s)({message}).*another --collection"):
                prepare(store, name)
        with pytest.raises(StoreMismatch, match="does not say which model"):
            store.collection_model("theirs")
        with pytest.raises(StoreRejected, match="is not one of 'taken'"):
            store.drop_physical("taken", f"taken--{PRINT_A[:12]}")
        assert store.list_physical("taken") == []
        assert store.list_collections() == before


# ---------------------------------------------------------------------------------------------- cut short


def test_embedded_collections_survive_a_reopening(tmp_path: Path) -> None:
    with closing(open_folder(tmp_path)) as store:
        fill(store, prepare(store))
        prepare(store, fingerprint=PRINT_B)
    with closing(open_folder(tmp_path)) as store:
        assert prepare(store) == OLD
        assert store.collection_model("docs")["fingerprint"] == PRINT_A
        assert store.count("docs") == 2
        assert store.ledger(OLD).read("s", ["a.md"])["a.md"].nodes == 2
        assert store.plan_collection("docs", dimension=DIMENSION, fingerprint=PRINT_B).exists
        store.switch_alias("docs", NEW)
        store.drop_physical("docs", OLD)
    assert sorted(path.name for path in (tmp_path / "qdrant" / "collection").iterdir()) == [NEW, f"{NEW}--ledger"]
    with closing(open_folder(tmp_path)) as store:
        assert [state.physical for state in store.list_physical("docs")] == [NEW]
        assert prepare(store) == OLD
        assert store.count(OLD) == store.ledger(OLD).count() == 0


def test_an_embedded_creation_cut_short_is_completed(tmp_path: Path) -> None:
    with closing(open_folder(tmp_path)) as store:
        physical = prepare(store)
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name="docs"))])
    client.delete_collection(f"{physical}--ledger")
    client.close()
    with closing(open_folder(tmp_path)) as store:
        assert store.list_collections() == [physical]
        assert prepare(store) == physical
        assert store.list_collections() == ["docs"]
        fill(store, physical)
        assert store.ledger(physical).count() == 1


def test_an_embedded_drop_cut_short_is_completed(tmp_path: Path) -> None:
    with closing(open_folder(tmp_path)) as store:
        fill(store, prepare(store))
        store.switch_alias("docs", prepare(store, fingerprint=PRINT_B))
    # Embedded Qdrant removes the files first and forgets the collection after: killed in between.
    shutil.rmtree(tmp_path / "qdrant" / "collection" / f"{OLD}--ledger")
    shutil.rmtree(tmp_path / "qdrant" / "collection" / OLD)
    with closing(open_folder(tmp_path)) as store:
        old = store.list_physical("docs")[1]
        assert (old.physical, old.points, old.documents) == (OLD, 0, 0)
        store.drop_physical("docs", OLD)
        assert [state.physical for state in store.list_physical("docs")] == [NEW]


def test_a_server_gets_payload_indexes_before_points(server: LoopbackQdrant) -> None:
    with closing(open_server(server)) as store:
        physical = prepare(store)
        prepare(store)
    assert server.indexes[physical].keys() == {"doc_id", "generation", "ballast_source"}
    assert server.indexes[f"{physical}--ledger"].keys() == {"source"}
    assert server.count_requests("PUT /collections/[^/]+/index") == 4
    order = [request.split("/")[-1] for request, _, _ in server.requests if not request.startswith("GET")]
    assert order == [physical, f"{physical}--ledger", "index", "index", "index", "index", "aliases"]


def test_a_switch_is_one_request(server: LoopbackQdrant) -> None:
    with closing(open_server(server)) as store:
        prepare(store)
        prepare(store, fingerprint=PRINT_B)
        server.requests.clear()
        store.switch_alias("docs", NEW)
        store.switch_alias("docs", NEW)
    changes = [body["actions"] for request, _, body in server.requests if request == "POST /collections/aliases"]
    assert [[next(iter(action)) for action in actions] for actions in changes] == [["delete_alias", "create_alias"]]


def test_creating_twice_at_once_is_no_error(server: LoopbackQdrant) -> None:
    with closing(open_server(server)) as store:
        # The answer to the creation is lost after its effect: the second attempt finds it there.
        server.faults = [Fault(on="PUT /collections/[^/]+", after_effect=True) for _ in range(2)]
        assert prepare(store) == OLD
        assert store.list_collections() == ["docs"]


def rebuild(store: QdrantStore) -> None:
    """All that a rebuild does to the collections, from nothing to the end."""
    fill(store, prepare(store))
    fill(store, prepare(store, fingerprint=PRINT_B))
    store.switch_alias("docs", NEW)
    if any(state.physical == OLD for state in store.list_physical("docs")):
        store.drop_physical("docs", OLD)


def read_end_state(server: LoopbackQdrant) -> Any:
    with closing(open_server(server)) as store:
        state = (store.list_collections(), store.list_physical("docs"), list(store.ledger(NEW).scroll()))
    return state, {name: sorted(fields) for name, fields in server.indexes.items()}


@pytest.mark.parametrize("after_effect", [False, True])
def test_cut_short_anywhere_and_done_again_ends_the_same(after_effect: bool) -> None:
    changes = "(PUT|POST|DELETE) .*"  # a question that fails leaves what the change before it left
    with LoopbackQdrant() as server, closing(open_server(server)) as store:
        rebuild(store)
        count = server.count_requests(changes)
        undisturbed = read_end_state(server)
    for index in range(count):
        with LoopbackQdrant() as server, closing(open_server(server, attempts=1)) as store:
            server.faults = [Fault(on=changes, reset=True, after_effect=after_effect, skip=index)]
            with pytest.raises(StoreUnavailable):
                rebuild(store)
            failed = server.requests[-1][0]
            rebuild(store)
            assert read_end_state(server) == undisturbed, failed


def test_an_alias_left_by_its_collection_is_taken_over(server: LoopbackQdrant) -> None:
    steps: list[Callable[[QdrantStore], Any]] = [prepare, lambda store: prepare(store, fingerprint=PRINT_B)]
    with closing(open_server(server)) as store:
        prepare(store)
        server.memory.delete_collection(OLD)
        server.memory.delete_collection(f"{OLD}--ledger")
        server.indexes.clear()
        for step in steps:
            step(store)
        assert store.collection_model("docs")["fingerprint"] == PRINT_A
