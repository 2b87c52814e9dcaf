"""Every fault at every request: a run through the real client against a server's double always ends in the right state.

The run is the engine's own selection, commit, deletes and switch; its nodes are ready made, since nothing is embedded here.
A fault is outlived within the run, or ends it; then the next run goes on, as a user's would. The end state is all that Qdrant
holds, compared point for point with that of an undisturbed run. A reader looks before each request is answered.
"""

from __future__ import annotations

import copy
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from tasks.backends.fake_qdrant_grpc import LoopbackQdrantGrpc, RpcFault
from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.points import DENSE_VECTOR
from tasks.backends.qdrant import QdrantStore
from tasks.backends.qdrant_calls import RetryPolicy
from tasks.backends.qdrant_collections import MARKS_SOURCE
from tasks.config import DeleteSettings, QdrantSettings
from tasks.engine.collection import RunCollection
from tasks.engine.commit import Committer
from tasks.engine.fill_partitions import Progress, select_new_nodes
from tasks.engine.select_changed import ChangeSelector
from tasks.errors import StoreUnavailable
from tasks.policy.books import Ledgerbook
from tasks.policy.identity import compute_generation, compute_node_id, compute_nodes_digest
from tasks.records import ChunkedDocument, Document, ModelFiles, ModelShape, Node, Rejection

DIMENSION = 16  # components of 1/4 or -1/4: the length is exactly 1, and no double changes a bit to normalise it
SOURCE = "harbour"
FILES = ModelFiles("mini", "", "r" * 12, ModelShape(1, 4, 1, 4, 10, 16), DIMENSION, 16, "mean")
PRINT_A, PRINT_B = "a" * 32, "b" * 32
REPLACED = "guide.md"

Texts = Mapping[str, Sequence[str]]
BEFORE: Texts = {
    REPLACED: ["moor", "at the", "outer", "quay", "mind the gap"],
    "gone.md": ["closed", "since spring"],
    "same.md": ["tide", "table"],
}
# Two of five nodes stay, three are new, one more than before: reuse, payloads refreshed, and upserts in several batches.
AFTER: Texts = {
    REPLACED: ["moor", "at the", "inner", "pier", "mind the step", "bring a rope"],
    "same.md": ["tide", "table"],
}


# ---------------------------------------------------------------------------------------------- a run


def chunk(doc_id: str, texts: Sequence[str], fingerprint: str) -> ChunkedDocument:
    content = json.dumps(texts)
    generation = compute_generation(fingerprint, SOURCE, doc_id, content, {})
    nodes = tuple(
        Node(
            compute_node_id(SOURCE, doc_id, text, 0),
            doc_id,
            generation,
            np.zeros(3, dtype=np.int32),
            {
                "doc_id": doc_id,
                "generation": generation,
                "ballast_source": SOURCE,
                "ballast_nodes": len(texts),
                "ballast_content": content,
                "_node_content": json.dumps({"text": text}),
            },
        )
        for text in texts
    )
    return ChunkedDocument(doc_id, generation, nodes, content_hash=content)


def embed(nodes: Sequence[Node], fingerprint: str) -> Any:
    seeds = [int(node.node_id[:8], 16) + ord(fingerprint[0]) for node in nodes]
    return np.array([np.random.default_rng(seed).choice([-0.25, 0.25], DIMENSION) for seed in seeds], dtype=np.float32)


def ingest(store: QdrantStore, source: Texts, fingerprint: str) -> None:
    """What a run does with Qdrant, from the first look at the ledger to the switch of the alias."""
    settings = QdrantSettings(collection="docs", outage_s=0)  # the waits within the store are enough, or the run ends
    collection = RunCollection(store, settings, FILES, fingerprint, SOURCE)
    books, lock, seen = Ledgerbook(), threading.Lock(), Progress(0)
    committer = Committer(collection, books, lock, max_attempts=3)
    selector = ChangeSelector(collection, lambda _: "", books, lock, seen, max_attempts=3)
    items = (Document(doc_id, "", content_hash=json.dumps(texts)) for doc_id, texts in source.items())
    chunked: Iterator[ChunkedDocument | Rejection] = (
        chunk(item.doc_id, source[item.doc_id], fingerprint) for item in selector.select(items)
    )
    nodes = list(select_new_nodes(chunked, collection, committer, selector.take, books, lock, seen))
    if nodes:
        committer.begin(node.doc_id for node in nodes)
        collection.upsert([node.node_id for node in nodes], embed(nodes, fingerprint), [node.payload for node in nodes])
        books.store_nodes(node.doc_id for node in nodes)
        books.nodes_cpu += len(nodes)
    committer.commit_whole()
    settled = committer.settle(DeleteSettings())
    _, off = books.close(settled.points_counted, settled.points_expected, pending=settled.pending)
    assert off == ()
    collection.finish("2026-11-22T12:00:00.000+00:00", documents_failed=0)


# ---------------------------------------------------------------------------------------------- the wire


State = dict[str, Any]


def read_state(memory: QdrantClient) -> State:
    """All that a Qdrant holds: aliases, and every point of every collection with its payload and vector."""
    state: State = {"aliases": {each.alias_name: each.collection_name for each in memory.get_aliases().aliases}}
    for collection in memory.get_collections().collections:
        records, following = memory.scroll(collection.name, limit=1_000, with_vectors=True)
        assert following is None
        points = {}
        for record in records:
            payload = {key: value for key, value in (record.payload or {}).items() if key != "updated_at"}
            vectors = record.vector if isinstance(record.vector, dict) else {}
            points[record.id] = (payload, {name: tuple(vector) for name, vector in vectors.items()})  # type: ignore[arg-type]
        state[collection.name] = (points, memory.get_collection(collection.name).config.metadata)
    return state


@dataclass(frozen=True)
class Snapshot:
    """All that a double holds, to start from again; making a new one each time takes longer than the run."""

    collections: Any
    aliases: dict[str, str]
    indexes: dict[str, Any]


Plan = Callable[[str], Any | None]
"""The fault that a request meets, asked once a request; None for none."""


class Wire(Protocol):
    """A client and the double behind it; `holes`: requests at which a reader found nothing of the replaced document."""

    client: QdrantClient
    memory: QdrantClient
    indexes: dict[str, Any]
    plan: Plan
    is_live: bool
    holes: list[str]


def save(wire: Wire) -> Snapshot:
    local: Any = wire.memory._client
    return copy.deepcopy(Snapshot(local.collections, local.aliases, wire.indexes))


def load(wire: Wire, snapshot: Snapshot, plan: Plan) -> None:
    fresh = copy.deepcopy(snapshot)
    local: Any = wire.memory._client
    local.collections, local.aliases, wire.indexes = fresh.collections, fresh.aliases, fresh.indexes
    wire.plan, wire.is_live, wire.holes = plan, bool(fresh.aliases), []


def is_hole(memory: QdrantClient) -> bool:
    """Whether a reader of the collection finds nothing of the document that is being replaced."""
    of_it = models.Filter(must=[models.FieldCondition(key="doc_id", match=models.MatchValue(value=REPLACED))])
    return memory.count("docs", of_it).count == 0


class RestWire(LoopbackQdrant):
    def __init__(self) -> None:
        super().__init__()
        self.client = QdrantClient(url=self.url, timeout=20, check_compatibility=False)
        self.plan: Plan = lambda _: None
        self.is_live, self.holes = False, list[str]()

    def answer(self, request: str, size: int, headers: dict[str, str], body: dict[str, Any]) -> Any:
        if self.is_live and is_hole(self.memory):
            self.holes.append(request)
        fault = self.plan(request)
        self.faults = [fault] if fault else []
        return super().answer(request, size, headers, body)


class GrpcWire(LoopbackQdrantGrpc):
    def __init__(self) -> None:
        super().__init__()
        self.client = QdrantClient(
            url="http://127.0.0.1", grpc_port=self.port, prefer_grpc=True, timeout=20, check_compatibility=False
        )
        self.plan: Plan = lambda _: None
        self.is_live, self.holes = False, list[str]()
        self.before = self.meet

    def meet(self, request: str, _index: int) -> None:
        if self.is_live and is_hole(self.memory):
            self.holes.append(request)
        fault = self.plan(request)
        self.faults = [fault] if fault else []


@pytest.fixture(scope="module", params=["rest", "grpc"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    with RestWire() if request.param == "rest" else GrpcWire() as double, closing(double.client):
        yield double


# ---------------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class Stage:
    """Where a run starts from, what it ingests, the requests that it takes, and the one right end."""

    start: Snapshot
    source: Texts
    fingerprint: str
    requests: list[str]
    end: State


def open_store(wire: Wire, *, attempts: int, sleeps: list[float]) -> QdrantStore:
    return QdrantStore(
        wire.client,
        place="at the double",
        is_embedded=False,
        batch_points=2,
        retry=RetryPolicy(attempts=attempts),
        sleep=sleeps.append,
    )


@pytest.fixture(scope="module")
def stages(wire: Wire) -> list[Stage]:
    """A life of a collection, undisturbed: made, a document replaced and another deleted, rebuilt for another model."""
    found = []
    start = save(wire)
    for source, fingerprint in [(BEFORE, PRINT_A), (AFTER, PRINT_A), (AFTER, PRINT_B)]:
        requests: list[str] = []
        load(wire, start, requests.append)
        ingest(open_store(wire, attempts=1, sleeps=[]), source, fingerprint)
        assert wire.holes == []
        found.append(Stage(start, source, fingerprint, requests, read_state(wire.memory)))
        start = save(wire)
    return found


REST_FAULTS = {
    "503": Fault(status=503),
    "503 after": Fault(status=503, after_effect=True),
    "429": Fault(status=429, error="Too many requests"),
    "429 with a wait": Fault(status=429, headers={"Retry-After": "7"}),
    "408": Fault(status=408),
    "408 after": Fault(status=408, after_effect=True),
    "reset": Fault(reset=True),
    "reset after": Fault(reset=True, after_effect=True),
    "cut off": Fault(status=200, headers={"Content-Length": "99999"}, after_effect=True),
    "timeout after": Fault(hang_s=10, after_effect=True),
}
GRPC_FAULTS = {
    "UNAVAILABLE": RpcFault(),
    "UNAVAILABLE after": RpcFault(after_effect=True),
    "RESOURCE_EXHAUSTED": RpcFault(code="RESOURCE_EXHAUSTED"),
    "RESOURCE_EXHAUSTED with a wait": RpcFault(code="RESOURCE_EXHAUSTED", retry_after="7"),
    "DEADLINE_EXCEEDED after": RpcFault(code="DEADLINE_EXCEEDED", after_effect=True),
    "INTERNAL after": RpcFault(code="INTERNAL", after_effect=True),
    "CANCELLED": RpcFault(code="CANCELLED"),
    "drop": RpcFault(drop=True),
    "drop after": RpcFault(drop=True, after_effect=True),
    "cut off": RpcFault(truncate=True),
}
# What writes. A read's fault after its effect is one before it.
WRITES = re.compile(
    r"PUT .*|.*/(batch|delete|aliases)|Points/(Upsert|Delete|UpdateBatch|CreateFieldIndex)|.*/(Create|UpdateAliases)"
)
NAMES = ["made", "replaced", "rebuilt"]
# Faults that are outlived don't see each other: some of them in one run, a quarter of the requests each. 1000: one by one.
STRIDE = int(os.environ.get("BALLAST_FAULT_STRIDE", "4"))


class MeetSome:
    """Every `step`-th request from `first` on fails, once; the next one is its retry. `met`: which of an undisturbed run's."""

    def __init__(self, fault: Any, first: int, step: int) -> None:
        self.met: list[int] = []
        self._fault, self._first, self._step = fault, first, step
        self._passed = -1
        self._is_retry = False

    def __call__(self, request: str) -> Any | None:
        if self._is_retry:
            self._is_retry = False
            return None
        self._passed += 1
        if self._passed % self._step != self._first:
            return None
        self.met.append(self._passed)
        if getattr(self._fault, "hang_s", 0) and not WRITES.fullmatch(request):
            return None  # it takes a timeout each, and to a read it is a reset
        self._is_retry = True
        return copy.copy(self._fault)


class Disappear:
    """From the `first` request on, `last` of them fail, the first of these before or after its effect."""

    def __init__(self, fault: Any, first: int, last: int) -> None:
        self._fault, self._first, self._last = fault, first, last
        self._asked = -1

    def __call__(self, _request: str) -> Any | None:
        self._asked += 1
        return copy.copy(self._fault) if self._first <= self._asked < self._first + self._last else None


@pytest.mark.parametrize("number", range(3), ids=NAMES)
@pytest.mark.parametrize(
    "kind", range(len(REST_FAULTS)), ids=[f"{a} or {b}" for a, b in zip(REST_FAULTS, GRPC_FAULTS, strict=True)]
)
def test_a_fault_at_every_request_is_outlived(wire: Wire, stages: list[Stage], number: int, kind: int) -> None:
    stage = stages[number]
    name, fault = list((REST_FAULTS if isinstance(wire, RestWire) else GRPC_FAULTS).items())[kind]
    step = min(STRIDE, len(stage.requests))
    met: set[int] = set()
    for first in range(step):
        plan, sleeps = MeetSome(replace(fault, on=".*"), first, step), list[float]()
        load(wire, stage.start, plan)
        with impatient(wire, isinstance(fault, Fault) and fault.hang_s > 0):
            ingest(open_store(wire, attempts=8, sleeps=sleeps), stage.source, stage.fingerprint)
        assert read_state(wire.memory) == stage.end, (name, first)
        assert wire.holes == []
        if "with a wait" in name:
            assert 7 * len(plan.met) <= sum(sleeps) < 8 * len(plan.met)  # each was waited out, and none twice
        met.update(plan.met)
    assert met >= set(range(len(stage.requests)))


@contextmanager
def impatient(wire: Wire, is_asked: bool) -> Iterator[None]:
    """A second is the least that the client takes as its timeout: too long for this many."""
    http = wire.client.http.client._client
    before = http.timeout
    http.timeout = httpx.Timeout(20, read=0.15) if is_asked else before
    yield
    http.timeout = before


@pytest.mark.parametrize("number", range(3), ids=NAMES)
@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
def test_a_run_that_ends_at_any_request_is_gone_on_with(
    wire: Wire, stages: list[Stage], number: int, after_effect: bool
) -> None:
    """Qdrant answers nothing more to the first run; the next one finds all that it did."""
    stage = stages[number]
    fault: Any = (
        Fault(".*", reset=True, after_effect=after_effect)
        if isinstance(wire, RestWire)
        else RpcFault(".*", after_effect=after_effect)
    )
    wrong = []
    for index, request in enumerate(stage.requests):
        if after_effect and not WRITES.fullmatch(request):
            continue
        load(wire, stage.start, Disappear(fault, index, 2))
        with pytest.raises(StoreUnavailable):
            ingest(open_store(wire, attempts=2, sleeps=[]), stage.source, stage.fingerprint)
        ingest(open_store(wire, attempts=1, sleeps=[]), stage.source, stage.fingerprint)
        if read_state(wire.memory) != stage.end or wire.holes:
            wrong.append((index, request, wire.holes))
    assert wrong == []


def test_a_source_that_goes_back_after_a_run_that_ended_is_not_taken_for_unchanged(
    wire: Wire, stages: list[Stage]
) -> None:
    """The ledger's old record would fit the old content, but points have been touched: the document is pending since."""
    stage = stages[1]
    fault: Any = Fault(".*", reset=True) if isinstance(wire, RestWire) else RpcFault(".*")
    wrong = []
    for index, request in enumerate(stage.requests):
        load(wire, stage.start, Disappear(fault, index, 1))
        with pytest.raises(StoreUnavailable):
            ingest(open_store(wire, attempts=1, sleeps=[]), AFTER, PRINT_A)
        ingest(open_store(wire, attempts=1, sleeps=[]), BEFORE, PRINT_A)
        if read_state(wire.memory) != stages[0].end or wire.holes:
            wrong.append((index, request, wire.holes))
    assert wrong == []


def test_the_undisturbed_life_is_what_it_should_be(stages: list[Stage]) -> None:
    """What the matrix compares with: right by itself, or all of it would be right about nothing."""
    for stage, source in zip(stages, [BEFORE, AFTER, AFTER], strict=True):
        physical = stage.end["aliases"]["docs"]
        assert physical == f"docs--{stage.fingerprint[:12]}"
        points, _ = stage.end[physical]
        wanted = [
            (node.node_id, node.payload)
            for doc_id, texts in source.items()
            for node in chunk(doc_id, texts, stage.fingerprint).nodes
        ]
        assert {point_id: payload for point_id, (payload, _) in points.items()} == dict(wanted)
        assert all(len(vectors[DENSE_VECTOR]) == DIMENSION for _, vectors in points.values())
        everything, _ = stage.end[f"{physical}--ledger"]
        marks = [payload["doc_id"] for payload, _ in everything.values() if payload["source"] == MARKS_SOURCE]
        assert marks == [SOURCE]  # the source is whole here
        records = {key: each for key, each in everything.items() if each[0]["source"] != MARKS_SOURCE}
        assert {payload["doc_id"]: payload["status"] for payload, _ in records.values()} == dict.fromkeys(
            source, "done"
        )
        for payload, _ in records.values():
            document = chunk(payload["doc_id"], source[payload["doc_id"]], stage.fingerprint)
            assert payload["generation"] == document.generation
            assert payload["nodes_digest"] == compute_nodes_digest(node.node_id for node in document.nodes)
    assert len(stages[1].requests) > 15


def test_a_hole_would_be_seen(wire: Wire, stages: list[Stage]) -> None:
    load(wire, stages[1].start, lambda _: None)
    store = open_store(wire, attempts=1, sleeps=[])
    physical = stages[0].end["aliases"]["docs"]
    store.delete_documents(physical, SOURCE, [REPLACED])
    store.count(physical)
    assert wire.holes
