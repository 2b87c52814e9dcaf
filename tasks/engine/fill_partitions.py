"""From chunked documents to spooled partitions: nodes that are stored already are set apart, the rest is cut and spooled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tasks.policy.books import Ledgerbook
from tasks.policy.partitions import PartitionBuilder
from tasks.records import ChunkedDocument, Node, Partition, Payload, Rejection

LOOKUP_NODES = (
    512  # ids of one look-up: Qdrant answers a thousand as fast as ten, a run that starts should not wait for more
)


class StoredNodes(Protocol):
    """What is in the collection already; tasks/backends/qdrant.py bound to a collection."""

    def existing_generations(self, ids: Sequence[str]) -> Mapping[str, str]: ...

    def refresh_payloads(self, ids: Sequence[str], payloads: Sequence[Payload]) -> None: ...


class PartitionSpool(Protocol):
    def write_partition(self, index: int, nodes: Sequence[Node], source_fraction: float) -> Partition: ...


@dataclass(slots=True)
class Progress:
    """How much of the source has been read; written by one thread."""

    total_bytes: int
    seen_bytes: int = 0

    @property
    def fraction(self) -> float:
        return min(1.0, self.seen_bytes / self.total_bytes) if self.total_bytes else 0.0


def select_new_nodes(
    chunked: Iterable[ChunkedDocument | Rejection],
    stored: StoredNodes,
    books: Ledgerbook,
    lock: threading.Lock,
    progress: Progress,
) -> Iterator[Node]:
    """The nodes to embed. A node whose id is stored keeps its vector; its payload is renewed where the document changed.

    Every document and rejection is entered in the books as it goes by; `lock` guards them against the other stages.
    """
    waiting: list[Node] = []
    for item in chunked:
        progress.seen_bytes += item.source_bytes
        with lock:
            if isinstance(item, Rejection):
                books.reject(item)
                continue
            books.plan_document(item.doc_id, len(item.nodes))
        waiting.extend(item.nodes)
        if len(waiting) >= LOOKUP_NODES:
            yield from _drop_stored(waiting, stored, books, lock)
            waiting = []
    yield from _drop_stored(waiting, stored, books, lock)


def _drop_stored(nodes: list[Node], stored: StoredNodes, books: Ledgerbook, lock: threading.Lock) -> list[Node]:
    if not nodes:
        return []
    generations = stored.existing_generations([node.node_id for node in nodes])
    known = [node for node in nodes if node.node_id in generations]
    outdated = [node for node in known if generations[node.node_id] != node.generation]
    if outdated:
        stored.refresh_payloads([node.node_id for node in outdated], [node.payload for node in outdated])
    with lock:
        for node in known:
            books.reuse_nodes([node.doc_id], unchanged=generations[node.node_id] == node.generation)
    return [node for node in nodes if node.node_id not in generations]


def fill_partitions(
    nodes: Iterable[Node],
    spool: PartitionSpool,
    progress: Progress,
    new_builder: Callable[[], PartitionBuilder],
    *,
    vector_bytes: int,
) -> Generator[Partition, None, None]:
    """Cut the stream into partitions and spool each one. `new_builder` is asked for the limits at the first node."""
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
        waiting.append(node)
    if waiting:
        yield spool.write_partition(index, waiting, 1.0)
