"""One worker's run: a group of partitions, each embedded on this worker's device, stored, and reported in the spool."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tasks.backends.model_files import resolve_model
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.sampler import Sampler
from tasks.backends.spool import SpoolFolder
from tasks.backends.spool_reports import is_revoked, read_report, write_report
from tasks.config import EmbedGroup, IngestSettings
from tasks.engine.devices import Devices, start_pool_devices, start_sampler
from tasks.engine.embedded import MISSING, ON_DEVICE, Embedded, start_embedding
from tasks.engine.fingerprint import describe_recipe, find_tokenizer
from tasks.engine.patience import STOPPED, Patience
from tasks.engine.signs_of_life import SignsOfLife
from tasks.errors import ConfigError, ModelError, RunStopped, StoreRejected
from tasks.observe import Observer, current_observer
from tasks.policy.identity import compute_fingerprint
from tasks.records import (
    Books,
    MemoryReading,
    ModelFiles,
    Node,
    Partition,
    PartitionReport,
    PoolReport,
    RunSummary,
    SignOfLife,
    Vectors,
)

logger = logging.getLogger(__name__)

UPSERT_PATIENCE_S = 20.0  # the task that stores a partition is repeated by Prefect, which shows it
READINGS = 200  # of the device's memory, told to the ingest run: a picture has no more pixels to spare


@dataclass(frozen=True, slots=True)
class _Embedded:
    """A partition between its embedding and its points; rows are those of the partition's file."""

    rows: NDArray[np.int64]  # this run's to store
    left_rows: NDArray[np.int64]
    failed_rows: Mapping[int, str]


class EmbedRun:
    """Made by open_group(). Embedding and upserting overlap, in two threads."""

    def __init__(
        self,
        settings: IngestSettings,
        group: EmbedGroup,
        files: ModelFiles,
        store: QdrantStore,
        spool: SpoolFolder,
        signs: SignsOfLife,
        observer: Observer,
        *,
        start_up_s: float = 0.0,
    ) -> None:
        """`signs` beat already; `start_up_s`: how old the process is, the model not loaded yet."""
        self.settings = settings
        self.group = group
        self.files = files
        self.store = store
        self.spool = spool
        self.observer = observer
        self.reports: dict[int, PartitionReport] = {}
        self.notes: list[str] = []
        self.start_up_s = start_up_s
        self._age_s = start_up_s
        self.sampler: Sampler | None = None
        self.devices: Devices | None = None
        self._embedded: dict[int, _Embedded] = {}
        self._stop = threading.Event()
        self._patience = Patience(settings.qdrant.outage_s, self._stop, self.tell)
        self._started = time.monotonic()
        self._current: int | None = None
        self._signs = signs
        signs.describe = self._describe_life

    def partitions(self) -> Sequence[Partition]:
        """In the group's order; `source_fraction` is of the group."""
        return [
            Partition(
                index=each.index,
                path=self.spool.place(each.name),
                nodes=each.nodes,
                tokens=each.tokens,
                longest_tokens=each.longest_tokens,
                source_fraction=position / len(self.group.partitions),
            )
            for position, each in enumerate(self.group.partitions, start=1)
        ]

    def start_devices(self) -> str:
        """Load the model and calibrate; returns what this worker embeds on, and why. Raises DeviceError, ModelError."""
        self.devices = start_pool_devices(self.group.pool, self.settings, self.files, self.observer, self._stop)
        self.sampler = start_sampler(self.devices)
        self.devices.start_clock()
        self.start_up_s += time.monotonic() - self._started
        self.observer.note(self.devices.note)
        return self.devices.note

    def embed_partition(self, partition: Partition) -> PartitionReport:
        """Vectors for every node that has none yet, in the spool before anything else happens to them."""
        devices = self._need_devices()
        self._current = partition.index
        self._signs.beat()
        nodes = self.spool.read_partition(partition)
        kept_rows, kept_vectors = self.spool.read_vectors(partition) or _nothing(self.files.dimension)
        before = read_report(self.spool, partition, "gpu") if self.group.pool == "cpu" else None
        failed_before = before.failed_rows if before is not None else {}
        todo = np.setdiff1d(np.arange(partition.nodes), [*kept_rows, *failed_before]).astype(np.int64)
        embedded = self._embed(devices, [nodes[row].token_ids for row in todo], partition.index)
        good = np.flatnonzero(embedded.placed != MISSING)
        rows = np.concatenate([kept_rows, todo[good]])
        if good.size:
            vectors = np.concatenate([kept_vectors, embedded.vectors[good]])
            self.spool.write_vectors(partition, rows, vectors)
        left = todo[embedded.missing_rows()]
        if left.size:
            self._refuse_if_stopped()
        # What the GPU's report says is stored, is. Vectors without a report are of a run that died before it stored them.
        # Vectors of rows that it says Qdrant refused are kept as well, and are in the books as failed already.
        own = np.setdiff1d(rows, [*_list_stored(before, partition), *failed_before]) if before is not None else rows
        failed = {int(todo[row]): reason for row, reason in embedded.failed.items()}
        report = self._to_report(partition, nodes, embedded, own.size - good.size, todo, left, failed)
        self._embedded[partition.index] = _Embedded(own, left, failed)
        self.reports[partition.index] = report
        logger.info(
            "partition index=%d pool=%s nodes=%d tokens=%d device=%s gpu_nodes=%d cpu_nodes=%d left_nodes=%d failed_nodes=%d"
            " tokens_per_s=%.0f",
            report.index, self.group.pool, report.nodes, report.tokens, report.device, report.gpu_nodes, report.cpu_nodes,
            left.size, len(failed), report.tokens_per_s,
        )  # fmt: skip
        self.observer.partition_done(report)
        return report

    def upsert_partition(self, partition: Partition) -> int:
        """Points into Qdrant, then the report that says so; can be repeated. Returns the points.

        Raises StoreUnavailable; RunStopped where the partition is another run's by now.
        """
        embedded = self._embedded[partition.index]
        stored, failed = embedded.rows, dict(embedded.failed_rows)
        if embedded.rows.size:
            nodes, vectors = self._read_rows(partition, embedded.rows)
            self._refuse_if_not_ours(partition)
            try:
                with self._patience.patient_for(UPSERT_PATIENCE_S):
                    self._upsert(nodes, vectors)
            except StoreRejected as error:
                # The same for every run that tries: its documents fail by name, the other partitions go on.
                stored = stored[:0]
                reason = f"Qdrant refuses its partition's points: {error}"
                failed |= {int(row): reason for row in embedded.rows}
                refused = {**self.reports[partition.index].failed_nodes, **{node.node_id: reason for node in nodes}}
                self.reports[partition.index] = replace(
                    self.reports[partition.index], gpu_nodes=0, cpu_nodes=0, failed_nodes=refused
                )
                self.tell(f"partition {partition.index}: {error}")
        is_all = stored.size == partition.nodes
        report = PoolReport(
            partition=self.reports[partition.index],
            pool=self.group.pool,
            run_id=self._signs.run_id,
            start_up_s=self.start_up_s,
            stored_rows=None if is_all else [int(row) for row in stored],
            left_rows=[int(row) for row in embedded.left_rows],
            failed_rows=failed,
        )
        self._refuse_if_not_ours(partition)
        write_report(self.spool, partition, report)
        return int(stored.size)

    def summarise(self) -> RunSummary:
        """For the run's page: its partitions and its memory. Documents are counted by the ingest run only."""
        reports = [self.reports[index] for index in sorted(self.reports)]
        gpu, cpu = sum(each.gpu_nodes for each in reports), sum(each.cpu_nodes for each in reports)
        failed = sum(len(each.failed_nodes) for each in reports)
        books = Books(0, 0, 0, 0, 0, gpu + cpu + failed, gpu, cpu, 0, failed, 0)
        return RunSummary(
            collection=self.settings.qdrant.collection,
            physical_collection=self.group.collection,
            model=self.files.name,
            fingerprint=self.group.fingerprint,
            device=self.devices.device if self.devices else "none",
            device_note=self.devices.note if self.devices else "",
            books=books,
            rejections=(),
            partitions=reports,
            memory_series=self._read_memory_series(),
            tokens=sum(each.tokens for each in reports),
            seconds={"total": time.monotonic() - self._started, "start-up": self.start_up_s},
            budget_series=self.devices.budget_series if self.devices else (),
            notes=tuple(self.notes),
        )

    def describe(self) -> str:
        """For people: what was done, and how much of the time went into starting."""
        reports = list(self.reports.values())
        seconds = self._age_s + time.monotonic() - self._started
        share = self.start_up_s / seconds if seconds else 0.0
        left = sum(each.left_rows.size for each in self._embedded.values())
        told = f"{len(reports)} partitions, {sum(each.nodes for each in reports)} nodes stored"
        told += f", {left} left for cpu-pool" if left else ""
        return f"{told}; start-up {self.start_up_s:.1f} s, {share:.0%} of the run"

    def is_spool_full(self) -> bool:
        """Never: the ingest run looks after the spool's size."""
        return False

    def tell(self, note: str) -> None:
        self.notes.append(note)
        self.observer.note(note)

    def close(self) -> None:
        """End every process and connection. What is under way stops at its next micro-batch, and is waited for."""
        self._stop.set()
        if self.devices is not None:
            self.devices.close()
        if self.sampler is not None:
            self.sampler.stop()
        self._signs.stop()
        self.store.close()

    # ------------------------------------------------------------------------------------------ parts

    def _embed(self, devices: Devices, token_ids: list[NDArray[np.int32]], index: int) -> Embedded:
        if not token_ids:
            return start_embedding(token_ids, self.files.dimension, devices.device)
        if devices.embedder is None:
            return devices.spread_over_pool(token_ids, index, self.files.dimension).collect_spilled()
        return devices.embed(token_ids, index).collect_spilled()

    def _read_rows(self, partition: Partition, rows: NDArray[np.int64]) -> tuple[list[Node], Vectors]:
        nodes = self.spool.read_partition(partition)
        kept_rows, vectors = self.spool.read_vectors(partition) or _nothing(self.files.dimension)
        order = np.argsort(kept_rows)
        positions = order[np.searchsorted(kept_rows, rows, sorter=order)]
        return [nodes[row] for row in rows], vectors[positions]

    def _upsert(self, nodes: Sequence[Node], vectors: Vectors) -> None:
        ids, payloads = [node.node_id for node in nodes], [node.payload for node in nodes]
        started = time.monotonic()
        self._patience.wait_for(lambda: self.store.upsert(self.group.collection, ids, vectors, payloads))
        self.observer.points_stored(len(ids), time.monotonic() - started)

    def _refuse_if_not_ours(self, partition: Partition) -> None:
        """Points of a partition that has been taken away could be older by now than what is stored."""
        self._refuse_if_stopped()
        if is_revoked(self.spool, self._signs.run_id) or not self.spool.has_partition(partition):
            self._stop.set()
            raise RunStopped(
                f"Partition {partition.index} is not this run's any more: the ingest run has ended, or took it for dead. "
                "Nothing is lost: others embed it."
            )

    def _refuse_if_stopped(self) -> None:
        if self._stop.is_set():
            raise RunStopped(STOPPED)

    def _need_devices(self) -> Devices:
        if self.devices is None:
            raise RuntimeError("embed_partition before start_devices")
        return self.devices

    def _read_memory_series(self) -> tuple[MemoryReading, ...]:
        return _thin(self.sampler.series(), READINGS) if self.sampler is not None else ()

    def _describe_life(self) -> SignOfLife:
        devices = self.devices
        return SignOfLife(
            beat=0,
            partition=self._current,
            readings=self._read_memory_series(),
            marks=tuple(devices.budget_series[-READINGS:]) if devices is not None else (),
            device=devices.device if devices is not None else "",
        )

    def _to_report(
        self,
        partition: Partition,
        nodes: Sequence[Node],
        embedded: Embedded,
        kept: int,
        todo: NDArray[np.int64],
        left: NDArray[np.int64],
        failed: Mapping[int, str],
    ) -> PartitionReport:
        made = int((embedded.placed != MISSING).sum())
        on_device = int((embedded.placed == ON_DEVICE).sum()) if self.group.pool == "gpu" else 0
        gone = set(left.tolist())
        return PartitionReport(
            index=partition.index,
            nodes=kept + int(todo.size) - int(left.size),
            tokens=sum(nodes[row].tokens for row in todo if int(row) not in gone),
            gpu_nodes=kept + on_device,
            cpu_nodes=made - on_device,
            failed_nodes={nodes[row].node_id: reason for row, reason in failed.items()},
            micro_batches=len(embedded.batch_sizes),
            batch_min=min(embedded.batch_sizes, default=0),
            batch_max=max(embedded.batch_sizes, default=0),
            peak_bytes=embedded.peak_bytes,
            budget_bytes=embedded.budget_bytes,
            seconds=embedded.seconds,
            padding_tokens=embedded.padding_tokens,
            redone_fp32=embedded.redone_fp32,
            steps=tuple(embedded.steps),
            device=f"{self.group.pool}-pool ({embedded.device})",
        )


def open_group(
    settings: IngestSettings,
    group: EmbedGroup,
    read_environment: Callable[[], Mapping[str, str]] = lambda: os.environ,
    *,
    run_id: str,
    age_s: float = 0.0,
) -> EmbedRun:
    """Refuses what this worker must not do: another model, no shared Qdrant. Raises ModelError, ConfigError, StoreError."""
    started = time.monotonic()
    observer = current_observer.get()
    spool = SpoolFolder(group.spool)
    # Before the model is looked for: a hub can take minutes, and who is silent counts as dead.
    signs = SignsOfLife(spool, run_id)
    signs.start()
    try:
        observer.stage("model", settings.embedding.model)
        files = resolve_model(settings.embedding.model, settings.embedding.revision)
        tokenizer_file = find_tokenizer(files, settings.data_folder)
        _refuse_other_model(files, compute_fingerprint(describe_recipe(settings, files, tokenizer_file)), group)
        store = _open_shared_store(settings, read_environment())
    except BaseException:
        signs.stop()
        raise
    start_up_s = age_s + time.monotonic() - started
    return EmbedRun(settings, group, files, store, spool, signs, observer, start_up_s=start_up_s)


def _open_shared_store(settings: IngestSettings, environment: Mapping[str, str]) -> QdrantStore:
    store = open_store(settings.qdrant, settings.data_folder, environment=environment)
    if store.is_embedded:
        store.close()
        raise ConfigError(
            "Workers need a Qdrant server, an embedded one belongs to one process. Set qdrant.url, or QDRANT_URL where "
            "the worker runs."
        )
    return store


def _refuse_other_model(files: ModelFiles, fingerprint: str, group: EmbedGroup) -> None:
    if fingerprint != group.fingerprint:
        raise ModelError(
            f"This worker's {files.name}, revision {files.revision}, or one of its parsers, is not the ingest run's: its "
            f"fingerprint is {fingerprint}, the run's {group.fingerprint}. Install the same Ballast and the same model "
            "revision on both; embedding.revision pins it."
        )


def _nothing(dimension: int) -> tuple[NDArray[np.int64], Vectors]:
    return np.zeros(0, np.int64), np.zeros((0, dimension), np.float32)


def _list_stored(report: PoolReport, partition: Partition) -> NDArray[np.int64]:
    return np.arange(partition.nodes) if report.stored_rows is None else np.asarray(report.stored_rows, np.int64)


def _thin(readings: Sequence[MemoryReading], limit: int) -> tuple[MemoryReading, ...]:
    """At most about `limit`; of each span the fullest, so that no peak is averaged away."""
    span = max(1, -(-len(readings) // limit))
    spans = (readings[start : start + span] for start in range(0, len(readings), span))
    return tuple(max(each, key=lambda reading: reading.used_bytes) for each in spans)
