"""Partitions that workers elsewhere embed and store: begun in the ledger before they are handed out, booked when reported."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.backends.spool import SpoolFolder
from tasks.backends.spool_reports import list_reports, read_report, read_sign_of_life, revoke_run
from tasks.config import EmbedGroup, GroupedPartition, IngestSettings
from tasks.engine.collection import RunCollection
from tasks.engine.commit import Committer
from tasks.errors import ConfigError
from tasks.observe import Observer
from tasks.policy.books import Ledgerbook
from tasks.policy.groups import ASSUMED_TOKENS_PER_S, Group
from tasks.policy.pool_reports import list_stored_rows, merge_reports
from tasks.records import (
    BudgetMark,
    MemoryReading,
    ModelFiles,
    Partition,
    PartitionReport,
    Pool,
    PoolReport,
    SignOfLife,
)

logger = logging.getLogger(__name__)

TASK_PATIENCE_S = 20.0  # the tasks that begin and take partitions are repeated by Prefect, which shows it


@dataclass(slots=True)
class PoolDevices:
    """Stands for the devices of an ingest run that embeds nothing itself."""

    note: str
    tokens_per_s: float = ASSUMED_TOKENS_PER_S["gpu"]
    device: str = "gpu-pool"
    budget_series: Sequence[BudgetMark] = ()
    memory_series: Sequence[MemoryReading] = ()

    def start_clock(self) -> None:
        """No device here whose memory has a course."""

    def close(self) -> None:
        """Workers end by themselves, or are ended by flows/pool_stages.py."""


class SharedPartitions:
    """The ingest run's side of the spool. Safe to call from several threads."""

    def __init__(
        self,
        settings: IngestSettings,
        spool: SpoolFolder,
        collection: RunCollection,
        committer: Committer,
        books: Ledgerbook,
        reports: dict[int, PartitionReport],
        observer: Observer,
        *,
        fingerprint: str,
        books_lock: threading.Lock,
        store_lock: threading.Lock,
    ) -> None:
        """`reports` and `books` are the run's own: what workers report is entered there."""
        self._settings = settings
        self._spool = spool
        self._collection = collection
        self._committer = committer
        self._books = books
        self._reports = reports
        self._observer = observer
        self._fingerprint = fingerprint
        self._books_lock = books_lock
        self._store_lock = store_lock
        # Not the flow run's id: run again from the UI, it is the same one, and its groups would be the ended ones of before.
        self.token = uuid.uuid4().hex
        self._booked: set[tuple[int, Pool]] = set()
        self._taken: set[tuple[int, Pool]] = set()
        self._pool_reports: dict[int, PoolReport] = {}

    # ------------------------------------------------------------------------------------------ handing out

    def begin(self, group: Group) -> EmbedGroup:
        """Make the collection, say in the ledger that the group's documents are begun; returns the worker's order."""
        with self._store_lock, self._collection.patient_for(TASK_PATIENCE_S):
            self._collection.make()
            for partition in group.partitions:
                self._committer.begin(self._spool.read_doc_ids(partition))
        return EmbedGroup(
            pool=group.pool,
            spool=self._spool.url,
            collection=self._collection.physical,
            fingerprint=self._fingerprint,
            number=group.number,
            partitions=tuple(
                GroupedPartition(
                    index=each.index,
                    name=each.path.rsplit("/", 1)[-1],
                    nodes=each.nodes,
                    tokens=each.tokens,
                    longest_tokens=each.longest_tokens,
                )
                for each in group.partitions
            ),
        )

    # ------------------------------------------------------------------------------------------ looking

    def list_reported(self) -> set[tuple[str, Pool]]:
        """File names of the partitions that are reported, and by which pool."""
        return list_reports(self._spool)

    def read_report(self, partition: Partition, pool: Pool) -> PoolReport | None:
        return read_report(self._spool, partition, pool)

    def read_sign_of_life(self, run_id: str) -> SignOfLife | None:
        return read_sign_of_life(self._spool, run_id)

    def revoke(self, run_id: str) -> None:
        """Should this run be alive after all, it must not write any more."""
        revoke_run(self._spool, run_id)

    # ------------------------------------------------------------------------------------------ taking back

    def take(self, partition: Partition, report: PoolReport) -> None:
        """Enter a report in the books, once; commit what is whole; with its last report the partition leaves the spool.

        Can be repeated after StoreUnavailable.
        """
        with self._store_lock, self._collection.patient_for(TASK_PATIENCE_S):
            if (partition.index, report.pool) not in self._booked:
                if report.pool == "cpu" and not _covers(report, partition):
                    self._book_late(partition)
                self._book(partition, report)
            self._committer.commit_whole()
            if not report.left_rows:
                self._spool.remove_partition(partition)
            self._taken.add((partition.index, report.pool))

    def is_taken(self, partition: Partition, pool: Pool) -> bool:
        """Whether take() came to its end with this pool's report."""
        return (partition.index, pool) in self._taken

    def fail(self, partition: Partition, pool: Pool, reason: str) -> None:
        """No pool can embed it: its nodes that are not stored fail, each document by name. Asks nothing of Qdrant."""
        with self._store_lock:
            self._book_late(partition)
            self._book(partition, self._to_lost(partition, pool, reason))
            self._spool.remove_partition(partition)

    def _book_late(self, partition: Partition) -> None:
        """A report that a run of gpu-pool wrote while it was taken for dead: cpu-pool's leaves out what that has stored."""
        if (partition.index, "gpu") in self._booked:
            return
        late = read_report(self._spool, partition, "gpu")
        if late is not None:
            self._book(partition, late)

    def _to_lost(self, partition: Partition, pool: Pool, reason: str) -> PoolReport:
        before = self._pool_reports.get(partition.index)
        stored = set() if before is None else set(list_stored_rows(before, partition.nodes))
        known = set(before.failed_rows) if before is not None else set()
        rows = [row for row in range(partition.nodes) if row not in stored and row not in known]
        doc_ids = self._spool.read_doc_ids(partition)
        failed = {f"{doc_ids[row]}#{row}": reason for row in rows}
        lost = PartitionReport(
            index=partition.index, nodes=len(rows), tokens=0, gpu_nodes=0, cpu_nodes=0, failed_nodes=failed,
            micro_batches=0, batch_min=0, batch_max=0, peak_bytes=None, budget_bytes=0, seconds=0.0, padding_tokens=0,
            redone_fp32=0, steps=(), device=f"{pool}-pool",
        )  # fmt: skip
        # Under "cpu" whatever the pool: nothing comes after it.
        return PoolReport(lost, "cpu", "", 0.0, (), failed_rows=dict.fromkeys(rows, reason))

    def _book(self, partition: Partition, report: PoolReport) -> None:
        doc_ids = self._spool.read_doc_ids(partition)
        stored = list_stored_rows(report, partition.nodes)
        with self._books_lock:
            self._books.nodes_gpu += report.partition.gpu_nodes
            self._books.nodes_cpu += report.partition.cpu_nodes
            self._books.store_nodes(doc_ids[row] for row in stored)
            for row, reason in report.failed_rows.items():
                self._books.fail_nodes([doc_ids[row]], reason)
            self._booked.add((partition.index, report.pool))
            before = self._pool_reports.get(partition.index)
            self._pool_reports.setdefault(partition.index, report)
            merged = merge_reports(before.partition if before is not None else None, report.partition, partition)
            self._reports[partition.index] = merged
        logger.info(
            "collected partition=%d pool=%s stored=%d left=%d failed=%d run=%s",
            partition.index, report.pool, len(stored), len(report.left_rows), len(report.failed_rows), report.run_id,
        )  # fmt: skip
        self._observer.partition_done(merged)


def _covers(report: PoolReport, partition: Partition) -> bool:
    dealt_with = len(list_stored_rows(report, partition.nodes)) + len(report.failed_rows) + len(report.left_rows)
    return dealt_with == partition.nodes


def check_shared(settings: IngestSettings, *, is_embedded: bool) -> None:
    """What work pools need that a single process does not. Raises ConfigError."""
    if is_embedded:
        raise ConfigError(
            "pools.enabled needs a Qdrant server: an embedded Qdrant belongs to one process. Set qdrant.url or QDRANT_URL."
        )
    if settings.spool is None:
        raise ConfigError(
            "pools.enabled needs `spool`: a folder or an fsspec URL that this run and every worker see under the same name."
        )
    if "://" not in settings.spool and not Path(settings.spool).is_absolute():
        raise ConfigError(
            f"pools.enabled needs an absolute `spool`, not {settings.spool!r}: a worker runs in another folder than this run."
        )


def start_pools(
    settings: IngestSettings,
    files: ModelFiles,  # noqa: ARG001
    observer: Observer,
    stop: threading.Event,  # noqa: ARG001
) -> PoolDevices:
    """In the place of engine.devices.start_devices(): workers load the model, not this process."""
    pools = settings.pools
    observer.stage("device", f"{pools.gpu_deployment} and {pools.cpu_deployment}")
    return PoolDevices(f"{pools.gpu_deployment}; what it can't place: {pools.cpu_deployment}")


def put_on_one_clock(
    signs: Sequence[tuple[float, SignOfLife]],
) -> tuple[Sequence[MemoryReading], Sequence[BudgetMark]]:
    """The readings and marks of several workers' runs, each given with the second at which it began."""
    readings = [
        replace(each, seconds=each.seconds + start, worker=number)
        for number, (start, sign) in enumerate(signs)
        for each in sign.readings
    ]
    marks = [
        replace(each, seconds=each.seconds + start, worker=number)
        for number, (start, sign) in enumerate(signs)
        for each in sign.marks
    ]
    return sorted(readings, key=lambda each: each.seconds), sorted(marks, key=lambda each: each.seconds)
