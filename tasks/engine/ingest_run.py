"""One ingest run: what its stages share, from the model's files to the books. The flow gives the order, this the means."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasks.backends.readers import hash_content
from tasks.backends.sampler import Sampler
from tasks.backends.sources import Source
from tasks.backends.spool import SpoolFolder
from tasks.config import IngestSettings
from tasks.engine.chunk import ChunkSpec, count_workers, iter_chunked
from tasks.engine.collection import RunCollection
from tasks.engine.commit import Committer, Settled, get_now
from tasks.engine.devices import Devices, start_devices, start_sampler
from tasks.engine.embedded import MISSING, ON_CPU, ON_DEVICE, Embedded
from tasks.engine.fill_partitions import Progress, fill_partitions, select_new_nodes
from tasks.engine.patience import STOPPED
from tasks.engine.select_changed import ChangeSelector
from tasks.engine.shared_partitions import PoolDevices, SharedPartitions
from tasks.errors import BooksDontClose, RunStopped, SpoolError, StoreRejected
from tasks.observe import Observer
from tasks.policy.books import Ledgerbook
from tasks.policy.partitions import MIN_PARTITION_TOKENS, PartitionBuilder, choose_partition_tokens
from tasks.records import (
    Books,
    MemoryReading,
    ModelFiles,
    Node,
    Partition,
    PartitionReport,
    RunSummary,
    Vectors,
)

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
StartDevices: TypeAlias = Callable[[IngestSettings, ModelFiles, Observer, threading.Event], Devices | PoolDevices]

# The task that stores a partition is repeated by Prefect, which shows it: see tasks/upsert.py.
UPSERT_PATIENCE_S = 20.0
NOTHING_TO_EMBED = "nothing new to embed: no model was loaded"


class IngestRun:
    """Made by open_run(). Its stages run in several threads: spooling, embedding and upserting overlap."""

    def __init__(
        self,
        settings: IngestSettings,
        files: ModelFiles,
        source: Source,
        collection: RunCollection,
        spec: ChunkSpec,
        observer: Observer,
        stop: threading.Event | None = None,
        *,
        chunk_workers: int | None = None,
        start: StartDevices = start_devices,
        started: float | None = None,
    ) -> None:
        """`stop`, once set, ends every stage at its next node, micro-batch or wait; close() sets it.

        chunk_workers: instead of what the settings say; 0 chunks in this process. `start`: where the run embeds.
        `started`: by time.monotonic(), when all this began to be opened: the first of the run's seconds.
        """
        self.settings = settings
        self.files = files
        self.source = source
        self.collection = collection
        self.store = collection.store
        self.physical = collection.physical
        self.fingerprint = spec.fingerprint
        self.observer = observer
        self.spool = open_spool(settings, collection)
        self.spool.lock(f"{settings.qdrant.collection!r} from {source.name}")
        self.books = Ledgerbook()
        self.notes: list[str] = []
        self.reports: dict[int, PartitionReport] = {}
        self._stored: set[int] = set()
        self.sampler: Sampler | None = None
        self.devices: Devices | PoolDevices | None = None
        self._books_lock = threading.Lock()
        self._devices_lock = threading.Lock()
        self._source_lock = threading.Lock()
        self._store_lock = threading.Lock()
        self.stop = stop or threading.Event()
        self._devices_wanted = threading.Event()
        self._devices_ready = threading.Event()
        self._exhausted = False
        self._settled: Settled | None = None
        self._points_before: int | None = None  # in the whole collection, before this run stored any
        self._started = time.monotonic() if started is None else started
        self._stage_seconds: defaultdict[str, float] = defaultdict(float)
        self._stage_seconds["prepare"] = time.monotonic() - self._started
        progress = Progress(source.total_bytes())
        self.committer = Committer(
            collection,
            self.books,
            self._books_lock,
            max_attempts=settings.source.max_attempts,
            changed=source.changed,
        )
        self.shared = SharedPartitions(
            settings,
            self.spool,
            collection,
            self.committer,
            self.books,
            self.reports,
            observer,
            fingerprint=self.fingerprint,
            books_lock=self._books_lock,
            store_lock=self._store_lock,
        )
        self._selector = ChangeSelector(
            collection,
            lambda ref: hash_content(ref, settings.source),
            self.books,
            self._books_lock,
            progress,
            max_attempts=settings.source.max_attempts,
        )
        self._selected = self._selector.select(self._watch_for_stop(iter(source)))
        workers = count_workers(settings.chunking.workers) if chunk_workers is None else chunk_workers
        self._chunked = iter_chunked(self._selected, spec, workers)
        self._start_devices = start
        # Documents are watched, not only nodes: a source with nothing new in it yields no node until its end.
        nodes = select_new_nodes(
            self._watch_for_stop(self._chunked),
            collection,
            self.committer,
            self._selector.take,
            self.books,
            self._books_lock,
            progress,
        )
        self._partitions = fill_partitions(
            self._watch_for_stop(nodes), self.spool, progress, self._new_builder, vector_bytes=4 * files.dimension
        )

    # ------------------------------------------------------------------------------------------ stages

    def start_devices(self) -> str:
        """Wait for the first node to embed, load the model and calibrate; returns what the run embeds on, and why.

        A run that finds nothing new loads no model.
        """
        self._devices_wanted.wait()
        if self._exhausted:
            return NOTHING_TO_EMBED
        with self._timed("devices"), self._devices_lock:
            self.refuse_if_stopped()
            try:
                self.devices = self._start_devices(self.settings, self.files, self.observer, self.stop)
            finally:
                self._devices_ready.set()
            if isinstance(self.devices, Devices):
                self.sampler = start_sampler(self.devices)
            self.devices.start_clock()
        with self._books_lock:
            self._stage_seconds["until_devices_ready"] = time.monotonic() - self._started
        self.observer.note(self.devices.note)
        return self.devices.note

    def spool_next_partition(self) -> Partition | None:
        """Read, chunk and compare until a partition is full; None at the end of the source. One caller at a time."""
        try:
            with self._timed("chunk"), self._source_lock:
                partition = next(self._partitions, None)
                if partition is not None:
                    self._refuse_without_room()
        except BaseException:
            self._end_of_source()
            raise
        if partition is None:
            self._end_of_source()
        else:
            self.observer.partition_spooled(partition)
        return partition

    def embed_partition(self, partition: Partition) -> PartitionReport:
        """Vectors for every node, in the spool before anything else happens to them."""
        devices = self._need_devices()
        nodes = self.spool.read_partition(partition)
        token_ids = [node.token_ids for node in nodes]
        if devices.embedder is None:
            embedded = devices.spread_over_pool(token_ids, partition.index, self.files.dimension)
        else:
            embedded = devices.embed(token_ids, partition.index)
        started = time.monotonic()
        embedded.collect_spilled()
        if devices.embedder is not None:
            embedded.seconds += time.monotonic() - started
        good = np.flatnonzero(embedded.placed != MISSING)
        self.spool.write_vectors(partition, good, embedded.vectors[good])
        if embedded.missing_rows().size:
            self.refuse_if_stopped()  # the next run stores what is in the spool now, and embeds the rest
        report = _to_report(partition, nodes, embedded)
        with self._books_lock:
            self.books.nodes_gpu += report.gpu_nodes
            self.books.nodes_cpu += report.cpu_nodes
            for row, reason in embedded.failed.items():
                self.books.fail_nodes([nodes[row].doc_id], reason)
            self._stage_seconds["embed"] += report.seconds
            self.reports[partition.index] = report
        logger.info(
            "partition index=%d nodes=%d tokens=%d device=%s gpu_nodes=%d cpu_nodes=%d failed_nodes=%d batch=%d-%d oom_steps=%d"
            " peak_bytes=%s tokens_per_s=%.0f",
            report.index, report.nodes, report.tokens, report.device, report.gpu_nodes, report.cpu_nodes,
            len(report.failed_nodes), report.batch_min, report.batch_max, sum(step.kind == "oom" for step in report.steps),
            report.peak_bytes, report.tokens_per_s,
        )  # fmt: skip
        self.observer.partition_done(report)
        return report

    def upsert_partition(self, partition: Partition) -> int:
        """Points into Qdrant, and every document committed that is whole with them; can be repeated. Returns the points."""
        with self._store_lock, self.collection.patient_for(UPSERT_PATIENCE_S):
            with self._timed("upsert"):
                nodes, rows, vectors = self._read_embedded(partition)
                self.committer.begin(node.doc_id for node in nodes)
                self._upsert(nodes, rows, vectors)
            with self._books_lock:
                # Once, also where the commit below fails and this is repeated.
                if partition.index not in self._stored:
                    self._stored.add(partition.index)
                    self.books.store_nodes(nodes[row].doc_id for row in rows)
            with self._timed("commit"):
                self.committer.commit_whole()
            self.spool.remove_partition(partition)
        return len(rows)

    def store_leftovers(self) -> int:
        """Store what an earlier run of this collection embedded and could not store; returns how many points.

        Device work is never lost because Qdrant was away: this run finds these nodes stored. What was not embedded goes.
        """
        points = 0
        for partition in self.spool.list_embedded():
            with self._timed("upsert"):
                nodes, rows, vectors = self._read_embedded(partition)
                self.collection.is_empty = False
                self.committer.begin_leftovers(nodes)
                try:
                    self._upsert(nodes, rows, vectors)
                except StoreRejected as error:
                    # Their documents are pending: this run does them again, if the source has them still.
                    self.tell(
                        f"{partition.nodes} nodes that an earlier run embedded are refused and embedded again: {error}"
                    )
                    continue
                points += len(rows)
        self.spool.clear()
        if points:
            self.observer.note(f"{points} points stored that an earlier run had embedded and could not store")
        return points

    def is_spool_full(self) -> bool:
        """Whether what waits for Qdrant takes all the room that it may; the device waits then."""
        return self.spool.measure() >= self.settings.spool_max_bytes

    def settle(self) -> Settled:
        """After the last partition: failures into the ledger, deletes propagated or withheld, points counted."""
        with self._timed("settle"):
            self._settled = settled = self.committer.settle(self.settings.deletes)
        if settled.decision.withheld:
            self.tell(f"deletes withheld: {settled.decision.reason}")
        return settled

    def tell(self, note: str) -> None:
        self.notes.append(note)
        self.observer.note(note)

    def _read_embedded(self, partition: Partition) -> tuple[list[Node], NDArray[np.int64], Vectors]:
        nodes = self.spool.read_partition(partition)
        embedded = self.spool.read_vectors(partition)
        if embedded is None:
            raise SpoolError(f"Partition {partition.index} has no vectors in the spool {self.spool.url}. Run again.")
        return nodes, *embedded

    def _upsert(self, nodes: Sequence[Node], rows: NDArray[np.int64], vectors: Vectors) -> None:
        stored = [nodes[row] for row in rows]
        started = time.monotonic()
        self.collection.upsert([node.node_id for node in stored], vectors, [node.payload for node in stored])
        self.observer.points_stored(len(stored), time.monotonic() - started)

    def close_books(self) -> tuple[RunSummary, tuple[str, ...]]:
        """The run's summary, and every line of its books that is off. Where none is, a rebuilt collection goes live."""
        settled = self._settled
        if settled is None:
            raise RuntimeError("close_books before settle")
        with self._books_lock:
            books, off = self.books.close(settled.points_counted, settled.points_expected, pending=settled.pending)
        lost = settled.lost.reason if settled.lost is not None and settled.lost.withheld else ""
        told = "" if off else self.collection.finish(get_now(), documents_failed=books.documents_failed, lost=lost)
        if told:
            self.tell(told)
        self._stage_seconds["total"] = time.monotonic() - self._started
        return self._summarise(books), off

    def close(self) -> None:
        """End every process and connection. What is under way stops at its next node or micro-batch, and is waited for."""
        self.stop.set()
        self._end_of_source()
        with self._devices_lock:
            if self.devices is not None:
                self.devices.close()
        self._devices_ready.set()
        with self._source_lock:
            self._partitions.close()
            # By hand: where an error ended a later stage, its traceback keeps this generator and its processes alive.
            self._chunked.close()
            self._selected.close()
        if self.sampler is not None:
            self.sampler.stop()
        with self._store_lock:  # what keeps the next run away must not end before this one's last write
            self.spool.unlock()
            self.store.close()

    # ------------------------------------------------------------------------------------------ parts

    def _watch_for_stop(self, items: Iterator[Item]) -> Iterator[Item]:
        for item in items:
            self.refuse_if_stopped()
            yield item

    def refuse_if_stopped(self) -> None:
        """Raises RunStopped."""
        if self.stop.is_set():
            raise RunStopped(STOPPED)

    def _refuse_without_room(self) -> None:
        if not self.store.is_embedded:
            return
        if self._points_before is None:
            self._points_before = self.collection.count()
        # Not the partition's nodes: those that an edited document had before go when it is committed.
        self.store.check_room(self.physical, self._points_before + self.committer.growth_points)

    def _need_devices(self) -> Devices:
        if not isinstance(self.devices, Devices):
            raise RuntimeError("embed_partition before start_devices, or where work pools embed")  # noqa: TRY004
        return self.devices

    def _end_of_source(self) -> None:
        self._exhausted = self._exhausted or not self._devices_wanted.is_set()
        self._devices_wanted.set()

    def _new_builder(self) -> PartitionBuilder:
        """The limits of the next partition. Its tokens follow from what the device embeds in a second, once that is known."""
        self._devices_wanted.set()
        limits = self.settings.partition
        if limits.max_tokens is not None:
            max_tokens = limits.max_tokens
        else:
            self._devices_ready.wait()
            self.refuse_if_stopped()
            speed = self.devices.tokens_per_s if self.devices else 0.0
            max_tokens = choose_partition_tokens(speed, limits.target_s) if speed else MIN_PARTITION_TOKENS
        return PartitionBuilder(
            max_nodes=limits.max_nodes, max_tokens=max_tokens, max_host_bytes=int(limits.max_host_bytes)
        )

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            with self._books_lock:
                self._stage_seconds[stage] += time.monotonic() - started

    def _read_memory_series(self) -> Sequence[MemoryReading]:
        if isinstance(self.devices, PoolDevices):
            return self.devices.memory_series
        return self.sampler.series() if self.sampler is not None else ()

    def _summarise(self, books: Books) -> RunSummary:
        reports = [self.reports[index] for index in sorted(self.reports)]
        return RunSummary(
            collection=self.settings.qdrant.collection,
            physical_collection=self.physical,
            model=self.files.name,
            fingerprint=self.fingerprint,
            device=self.devices.device if self.devices else "none",
            device_note=self.devices.note if self.devices else NOTHING_TO_EMBED,
            books=books,
            rejections=self.books.rejections(),
            partitions=reports,
            memory_series=self._read_memory_series(),
            budget_series=self.devices.budget_series if self.devices else (),
            tokens=sum(report.tokens for report in reports),
            seconds=dict(self._stage_seconds),
            notes=tuple(self.notes),
        )


def open_spool(settings: IngestSettings, collection: RunCollection) -> SpoolFolder:
    """A folder a source: another one may be ingested into the same collection at the same time."""
    source_part = hashlib.sha256(collection.source.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    spool = settings.spool or f"{settings.data_folder}/spool"
    return SpoolFolder(f"{spool}/{collection.physical}/{source_part}")


def refuse_open_books(off: Sequence[str]) -> None:
    """Raises BooksDontClose with the lines that are off."""
    if off:
        raise BooksDontClose(
            "The books of this run don't close: "
            + "; ".join(off)
            + ". Run the same command again, stored nodes are not embedded twice; `ballast verify --repair` finds what is "
            "wrong and mends it. If it persists, report it with the run's --json."
        )


def _to_report(partition: Partition, nodes: Sequence[Node], embedded: Embedded) -> PartitionReport:
    failed = {nodes[row].node_id: reason for row, reason in embedded.failed.items()}
    return PartitionReport(
        index=partition.index,
        nodes=partition.nodes,
        tokens=partition.tokens,
        gpu_nodes=int((embedded.placed == ON_DEVICE).sum()),
        cpu_nodes=int((embedded.placed == ON_CPU).sum()),
        failed_nodes=failed,
        micro_batches=len(embedded.batch_sizes),
        batch_min=min(embedded.batch_sizes, default=0),
        batch_max=max(embedded.batch_sizes, default=0),
        peak_bytes=embedded.peak_bytes,
        budget_bytes=embedded.budget_bytes,
        seconds=embedded.seconds,
        padding_tokens=embedded.padding_tokens,
        redone_fp32=embedded.redone_fp32,
        steps=tuple(embedded.steps),
        device=embedded.device,
    )
