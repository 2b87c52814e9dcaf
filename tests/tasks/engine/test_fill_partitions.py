"""From chunked documents to partitions: what is stored is set apart, the rest is cut; every node goes one way, once."""

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.engine.fill_partitions import LOOKUP_NODES, Progress, fill_partitions, select_new_nodes
from tasks.policy.books import Ledgerbook
from tasks.policy.partitions import PartitionBuilder
from tasks.records import ChunkedDocument, LedgerRecord, Node, Partition, Payload, Rejection


def make_node(doc_id: str, number: int, generation: str = "g1", tokens: int = 10) -> Node:
    return Node(f"{doc_id}#{number}", doc_id, generation, np.zeros(tokens, np.int32), {"_node_content": "text"})


class Collection:
    """What is stored, by id; remembers what it was asked."""

    def __init__(self, stored: Mapping[str, str]) -> None:
        self.stored = dict(stored)
        self.refreshed: list[str] = []
        self.look_ups: list[int] = []

    def existing_generations(self, ids: Sequence[str]) -> Mapping[str, str]:
        self.look_ups.append(len(ids))
        return {node_id: self.stored[node_id] for node_id in ids if node_id in self.stored}

    def refresh_payloads(self, ids: Sequence[str], payloads: Sequence[Payload]) -> None:
        assert len(ids) == len(payloads)
        self.refreshed.extend(ids)


class Spool:
    def __init__(self) -> None:
        self.written: list[list[Node]] = []

    def write_partition(self, index: int, nodes: Sequence[Node], source_fraction: float) -> Partition:
        assert index == len(self.written)
        self.written.append(list(nodes))
        tokens = [node.tokens for node in nodes]
        return Partition(index, f"{index}", len(nodes), sum(tokens), max(tokens), source_fraction)


class Committer:
    """Parks what is called hopeless; remembers what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.opened: dict[str, LedgerRecord | None] = {}

    def open_documents(self, documents: Iterable[ChunkedDocument], records: Mapping[str, LedgerRecord]) -> None:
        self.opened.update({document.doc_id: records.get(document.doc_id) for document in documents})

    def begin(self, doc_ids: Iterable[str]) -> None:
        self.begun.extend(doc_ids)

    def commit_whole(self, *, at_least: int) -> None:
        pass

    def judge(self, rejection: Rejection, record: LedgerRecord | None) -> tuple[Rejection, bool]:
        return rejection, record is not None


def select(
    chunked: Sequence[ChunkedDocument | Rejection], collection: Collection, committer: Committer | None = None
) -> tuple[list[Node], Ledgerbook]:
    books = Ledgerbook()
    records = {"edited": LedgerRecord("s", "edited", "done", "h")}
    new = select_new_nodes(
        chunked, collection, committer or Committer(), records.get, books, threading.Lock(), Progress(100)
    )
    return list(new), books


def test_stored_nodes_keep_their_vectors_and_changed_documents_their_payloads_renewed() -> None:
    same = ChunkedDocument("same", "g1", (make_node("same", 0), make_node("same", 1)))
    edited = ChunkedDocument("edited", "g2", (make_node("edited", 0, "g2"), make_node("edited", 1, "g2")))
    collection = Collection({"same#0": "g1", "same#1": "g1", "edited#0": "g1"})
    committer = Committer()
    new, books = select([same, Rejection("gone", "failed", "read", "vanished"), edited], collection, committer)
    assert [node.node_id for node in new] == ["edited#1"]
    assert collection.refreshed == ["edited#0"]
    assert committer.begun == ["edited"]  # the ledger knows before a payload changes
    assert [committer.opened["same"], committer.opened["edited"]] == [None, LedgerRecord("s", "edited", "done", "h")]
    books.store_nodes(["edited"])
    books.nodes_cpu = 1
    books.commit_documents(books.list_whole(10))
    closed, off = books.close(4, 4)
    assert off == ()
    assert (closed.documents_unchanged, closed.documents_written, closed.documents_failed) == (1, 1, 1)
    assert closed.nodes_reused == 3


def test_look_ups_are_batched() -> None:
    documents = [ChunkedDocument(f"d{n}", "g1", (make_node(f"d{n}", 0),)) for n in range(2 * LOOKUP_NODES + 5)]
    collection = Collection({})
    new, _ = select(documents, collection)
    assert len(new) == len(documents)
    assert collection.look_ups == [LOOKUP_NODES, LOOKUP_NODES, 5]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), max_size=80),
    max_nodes=st.integers(1, 20),
    max_tokens=st.integers(1, 1000),
)
def test_every_node_is_in_one_partition_in_its_order(lengths: list[int], max_nodes: int, max_tokens: int) -> None:
    nodes = [make_node("d", number, tokens=length) for number, length in enumerate(lengths)]
    spool = Spool()
    partitions = list(
        fill_partitions(
            iter(nodes), spool, Progress(0), lambda: PartitionBuilder(max_nodes, max_tokens, 10**9), vector_bytes=16
        )
    )
    assert [node for part in spool.written for node in part] == nodes
    assert [partition.index for partition in partitions] == list(range(len(partitions)))
    for part in spool.written:
        assert len(part) <= max_nodes
        assert len(part) == 1 or sum(node.tokens for node in part) <= max_tokens
    if partitions:
        assert partitions[-1].source_fraction == 1.0


def test_the_vectors_to_come_count_as_host_memory() -> None:
    nodes = [make_node("d", number) for number in range(10)]
    spool = Spool()
    list(
        fill_partitions(
            iter(nodes), spool, Progress(0), lambda: PartitionBuilder(100, 10**6, 5_000), vector_bytes=2_400
        )
    )
    assert [len(part) for part in spool.written] == [2] * 5


def test_nothing_to_embed_asks_for_no_limits() -> None:
    def refuse() -> PartitionBuilder:
        raise AssertionError("a device would be started for nothing")

    assert list(fill_partitions(iter(()), Spool(), Progress(0), refuse, vector_bytes=16)) == []
