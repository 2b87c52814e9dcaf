"""Reads and chunks documents in worker processes: lazily, in source order, within a bounded amount of memory."""

from __future__ import annotations

import json
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal

from tasks.backends.processes import spawn_pool
from tasks.backends.readers import hash_content
from tasks.config import ChunkingSettings, QdrantSettings, SourceSettings
from tasks.errors import BallastError
from tasks.policy.identity import compute_generation, compute_node_id
from tasks.records import ChunkedDocument, Document, FileRef, Rejection

if TYPE_CHECKING:
    from tasks.backends.chunker import Chunker

Item = FileRef | Document | Rejection
Chunked = ChunkedDocument | Rejection

# A call to a worker costs about half a millisecond, a short document's chunking as much: so many go together.
BATCH_ITEMS = 64
BATCH_BYTES = 512 * 1024
# Nodes take about ten times their text in memory (ids, payload twice): what is in flight is bounded by source bytes.
IN_FLIGHT_BYTES = 64 * 1024**2
IN_FLIGHT_BATCHES_PER_WORKER = 3

# A point's payload has the document's metadata as fields, in its node, and in the node's link to the document.
_METADATA_COPIES = 3

_BATCH_BYTES: int = QdrantSettings.model_fields["batch_bytes"].default

# Each worker is one core: threads of the tokenizer's own would fight with the other workers.
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class ChunkSpec:
    """All a worker needs to turn an item into nodes. It is pickled: `read_file` must be a function of a module."""

    read_file: Callable[[FileRef, SourceSettings], Document | Rejection]
    source: SourceSettings
    chunking: ChunkingSettings
    model_path: str
    max_tokens: int  # the model's limit
    document_prompt: str
    fingerprint: str
    source_name: str = ""  # part of every id: see records.LedgerRecord.source
    tokenizer_file: str | None = None  # from export_tokenizer; None: the model's own tokenizer.json
    max_payload_bytes: int = _BATCH_BYTES  # of one point, as JSON: Qdrant refuses what no request holds


def count_workers(setting: int) -> int:
    """`chunking.workers`, where 0 is one a CPU core less one, at least 1 and at most 8."""
    return setting or max(1, min(8, len(os.sched_getaffinity(0)) - 1))


def iter_chunked(items: Iterable[Item], spec: ChunkSpec, workers: int) -> Generator[Chunked, None, None]:
    """Each item's nodes, or why it has none, in the order of the items; `workers` processes, 0: in this one.

    An item whose worker dies (killed for its memory) comes back as failed; the others that were under way are done
    again. Raises ModelError for a model or a limit that can't be used.
    """
    batches = _batch(items)
    if workers == 0:
        for batch, _ in batches:
            yield from chunk_batch(batch, spec)
        return
    pool = _WorkerPool(spec, workers)
    try:
        yield from _run_batches(batches, pool, workers)
    finally:
        pool.close()


def _run_batches(batches: Iterator[tuple[list[Item], int]], pool: _WorkerPool, workers: int) -> Iterator[Chunked]:
    under_way: deque[tuple[list[Item], int, Future[list[Chunked]]]] = deque()
    in_flight_bytes = 0
    exhausted = False
    while True:
        while not exhausted and len(under_way) < workers * IN_FLIGHT_BATCHES_PER_WORKER:
            if under_way and in_flight_bytes >= IN_FLIGHT_BYTES:
                break
            following = next(batches, None)
            if following is None:
                exhausted = True
                break
            under_way.append((*following, pool.submit(following[0])))
            in_flight_bytes += following[1]
        if not under_way:
            return
        batch, batch_bytes, future = under_way.popleft()
        try:
            results = future.result()
        except BrokenProcessPool:
            # All futures of the pool are broken with it, and nothing tells whose fault it was.
            pool.replace()
            suspects = [(batch, future), *((waiting, other) for waiting, _, other in under_way)]
            under_way.clear()
            in_flight_bytes = 0
            for suspect, other in suspects:
                yield from other.result() if _is_done(other) else _chunk_alone(suspect, pool)
            continue
        in_flight_bytes -= batch_bytes
        yield from results


def _is_done(future: Future[list[Chunked]]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _chunk_alone(batch: list[Item], pool: _WorkerPool) -> list[Chunked]:
    """Chunk a batch with nothing beside it, and if its worker dies again, item by item."""
    try:
        return pool.submit(batch).result()
    except BrokenProcessPool:
        pool.replace()
    results: list[Chunked] = []
    for item in batch:
        try:
            results.extend(pool.submit([item]).result())
        except BrokenProcessPool:
            pool.replace()
            size = _count_bytes(item)
            results.append(
                Rejection(
                    item.doc_id,
                    "failed",
                    "chunk",
                    f"The worker process died on this document of {size} bytes, most likely for want of memory. "
                    "Split the document, or lower chunking.workers.",
                    size,
                    content_hash=_hash(item, pool.spec.source),
                )
            )
    return results


def _hash(item: Item, settings: SourceSettings) -> str:
    """So that the ledger knows this content again, and parks it after some runs. Streamed: it kills no process."""
    found = hash_content(item, settings) if isinstance(item, FileRef) else item.content_hash
    return found if isinstance(found, str) else found.content_hash


class _WorkerPool:
    """A pool that can be replaced after one of its processes died."""

    def __init__(self, spec: ChunkSpec, workers: int) -> None:
        self.spec = spec
        self._workers = workers
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        return spawn_pool(self._workers, environment=_ENVIRONMENT, initializer=_ignore_interrupt)

    def submit(self, batch: list[Item]) -> Future[list[Chunked]]:
        try:
            return self._pool.submit(chunk_batch, batch, self.spec)
        except BrokenProcessPool:
            # It broke since the last result: the batches under way will tell, this one was never begun.
            self.replace()
            return self._pool.submit(chunk_batch, batch, self.spec)

    def replace(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = self._start()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _batch(items: Iterable[Item]) -> Iterator[tuple[list[Item], int]]:
    """Lists of consecutive items with their bytes; a large item goes alone, so that the others need not wait for it."""
    batch: list[Item] = []
    size = 0
    for item in items:
        item_bytes = _count_bytes(item)
        if batch and (len(batch) >= BATCH_ITEMS or size + item_bytes > BATCH_BYTES):
            yield batch, size
            batch, size = [], 0
        batch.append(item)
        size += item_bytes
    if batch:
        yield batch, size


def _count_bytes(item: Item) -> int:
    return max(item.source_bytes, len(item.text)) if isinstance(item, Document) else item.source_bytes


# ------------------------------------------------------------------------------------------ in a worker


def _ignore_interrupt() -> None:
    # Ctrl-C reaches every process of the terminal; the parent closes the pool, and a traceback a worker helps nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def chunk_batch(items: list[Item], spec: ChunkSpec) -> list[Chunked]:
    """Read and chunk items, in the process that calls. Raises ModelError for a model or limit that can't be used."""
    chunker = _get_chunker(
        spec.chunking, spec.model_path, spec.max_tokens, spec.document_prompt, spec.tokenizer_file, spec.source_name
    )
    return [item if isinstance(item, Rejection) else _chunk_item(item, spec, chunker) for item in items]


@lru_cache(maxsize=1)
def _get_chunker(
    settings: ChunkingSettings,
    model_path: str,
    max_tokens: int,
    document_prompt: str,
    tokenizer_file: str | None,
    source_name: str,
) -> Chunker:
    from tasks.backends.chunker import Chunker
    from tasks.backends.tokenizer import NodeTokenizer

    tokenizer = NodeTokenizer(model_path, document_prompt=document_prompt, tokenizer_file=tokenizer_file)
    return Chunker(settings, tokenizer, max_tokens, partial(compute_node_id, source_name))


def _chunk_item(item: FileRef | Document, spec: ChunkSpec, chunker: Chunker) -> Chunked:
    stage: Literal["read", "chunk"] = "read"
    document: Document | Rejection | None = None
    try:
        document = spec.read_file(item, spec.source) if isinstance(item, FileRef) else item
        if isinstance(document, Rejection):
            return document
        stage = "chunk"
        generation = compute_generation(
            spec.fingerprint, spec.source_name, document.doc_id, document.text, document.metadata
        )
        at_least = _METADATA_COPIES * _measure_json(document.metadata)
        if at_least > spec.max_payload_bytes:  # before it is chunked: each node would get its copies
            return _reject_payload(document, item.source_bytes, at_least, spec.max_payload_bytes)
        nodes = chunker.chunk(document, generation)
    except (BallastError, ValueError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        content_hash = document.content_hash if isinstance(document, Document) else ""
        return Rejection(item.doc_id, "failed", stage, reason, item.source_bytes, content_hash=content_hash)
    content_hash = document.content_hash
    if not nodes:
        reason = "There is no text in it."
        return Rejection(item.doc_id, "skipped", "chunk", reason, item.source_bytes, content_hash=content_hash)
    for node in nodes:
        # With doc_id and generation they are what the ledger can be rebuilt from.
        node.payload["ballast_source"] = spec.source_name
        node.payload["ballast_nodes"] = len(nodes)
        node.payload["ballast_content"] = content_hash
        # No payload was found to take more than 2.2 times its node's content: few are so large that they must be measured.
        if 4 * len(node.payload["_node_content"]) > spec.max_payload_bytes:
            size = _measure_json(node.payload)
            if size > spec.max_payload_bytes:
                return _reject_payload(document, item.source_bytes, size, spec.max_payload_bytes)
    return ChunkedDocument(nodes[0].doc_id, generation, nodes, item.source_bytes, content_hash)


def _measure_json(value: object) -> int:
    """Bytes as UTF-8 JSON."""
    return len(json.dumps(value, ensure_ascii=False, default=str).encode(errors="surrogatepass"))


def _reject_payload(document: Document, source_bytes: int, payload_bytes: int, limit_bytes: int) -> Rejection:
    reason = (
        f"A point of it would carry at least {payload_bytes:,} bytes of text and metadata, its metadata several times; the "
        f"limit is {limit_bytes:,} (qdrant.batch_bytes; a server refuses 32 MiB). Name the metadata that is wanted in "
        "source.metadata_fields, or shorten it."
    )
    content_hash = document.content_hash
    return Rejection(document.doc_id, "failed", "chunk", reason, source_bytes, content_hash=content_hash)
