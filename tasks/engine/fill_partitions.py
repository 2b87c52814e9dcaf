"""From chunked documents to spooled partitions: nodes that are stored already are set apart, the rest is cut and spooled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.policy.books import Ledgerbook
from tasks.policy.partitions import PartitionBuilder
from tasks.records import ChunkedDocument, LedgerRecord, Node, Partition, Payload, Rejection

COMMIT_REUSED = 1024
LOOKUP_NODES = (
    512  # ids of one look-up: Qdrant answers a thousand as fast as ten, a run that starts should not wait for more
)


class StoredNodes(Protocol):
    """What is in the collection already; engine/collection.py."""

    def existing_generations(self, ids: Sequence[str]) -> Mapping[str, str]: ...

    def refresh_payloads(self, ids: Sequence[str], payloads: Sequence[Payload]) -> None: ...


class OpenDocuments(Protocol):
    """Follows documents from here to their commit; engine/commit.py."""

    def open_documents(self, documents: Iterable[ChunkedDocument], records: Mapping[str, LedgerRecord]) -> None: ...

    def begin(self, doc_ids: Iterable[str]) -> None: ...

    def commit_whole(self, *, at_least: int) -> None: ...

    def judge(self, rejection: Rejection, record: LedgerRecord | None) -> tuple[Rejection, bool]: ...


class PartitionSpool(Protocol):
    def write_partition(self, index: int, nodes: Sequence[Node], source_fraction: float) -> Partition: ...


@dataclass(slots=True)
class Progress:
    """How much of the source has been read; written by one thread."""

    total_bytes: int
    seen_bytes: int = 0

    def add(self, source_bytes: int) -> None:
        self.seen_bytes += source_bytes

    @property
    def fraction(self) -> float:
        return min(1.0, self.seen_bytes / self.total_bytes) if self.total_bytes else 0.0


def select_new_nodes(
    chunked: Iterable[ChunkedDocument | Rejection],
    stored: StoredNodes,
    committer: OpenDocuments,
    take_record: Callable[[str], LedgerRecord | None],
    books: Ledgerbook,
    lock: threading.Lock,
    progress: Progress,
) -> Iterator[Node]:
    """The nodes to embed. A node whose id is stored keeps its vector; its payload is renewed where the document changed.

    Every document and rejection is entered in the books as it goes by; `lock` guards them against the other stages.
    `take_record`: what the ledger had of a document when the run looked.
    """
    waiting: list[ChunkedDocument] = []
    nodes = 0
    for item in chunked:
        progress.add(item.source_bytes)
        record = take_record(item.doc_id)
        if isinstance(item, Rejection):
            rejection, is_parked = committer.judge(item, record)
            with lock:
                books.reject(rejection, is_parked=is_parked)
            continue
        with lock:
            books.plan_document(item.doc_id, len(item.nodes))
        committer.open_documents([item], {} if record is None else {item.doc_id: record})
        waiting.append(item)
        nodes += len(item.nodes)
        if nodes >= LOOKUP_NODES:
            yield from _drop_stored(waiting, stored, committer, books, lock)
            waiting, nodes = [], 0
    yield from _drop_stored(waiting, stored, committer, books, lock)


def _drop_stored(
    documents: list[ChunkedDocument],
    stored: StoredNodes,
    committer: OpenDocuments,
    books: Ledgerbook,
    lock: threading.Lock,
) -> list[Node]:
    nodes = [node for document in documents for node in document.nodes]
    if not nodes:
        return []
    generations = stored.existing_generations([node.node_id for node in nodes])
    known = [node for node in nodes if node.node_id in generations]
    outdated = [node for node in known if generations[node.node_id] != node.generation]
    if outdated:
        committer.begin(node.doc_id for node in outdated)
        stored.refresh_payloads([node.node_id for node in outdated], [node.payload for node in outdated])
    with lock:
        for node in known:
            books.reuse_nodes([node.doc_id], unchanged=generations[node.node_id] == node.generation)
    # Where everything is there already, no partition comes by to commit with: a ledger is lost, or the parsers are new.
    committer.commit_whole(at_least=COMMIT_REUSED)
    return [node for node in nodes if node.node_id not in generations]


def fill_partitions(
    nodes: Iterable[Node],
    spool: PartitionSpool,
    progress: Progress,
    new_builder: Callable[[], PartitionBuilder],
    *,
    vector_bytes: int,
) -> Generator[Partition, None, None]:
    """Cut the stream into partitions and spool each one. `new_builder` is asked for the limits of each."""
    waiting: list[Node] = []
    builder: PartitionBuilder | None = None
    index = 0
    for node in nodes:
        builder = builder or new_builder()
        # Token ids as int32, the payload's text, twice for Python's own objects around it, and the vector to come.
        host_bytes = 4 * node.tokens + 2 * len(node.payload["_node_content"]) + vector_bytes
        if builder.add(node.tokens, host_bytes):
            yield spool.write_partition(index, waiting, progress.fraction)
            waiting, index = [], index + 1
            builder = new_builder()  # what workers elsewhere report may have changed the limits
            builder.add(node.tokens, host_bytes)
        waiting.append(node)
    if waiting:
        yield spool.write_partition(index, waiting, 1.0)
