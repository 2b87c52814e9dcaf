"""Handing partitions out and taking them back: the books close, whatever workers reported, and however late.

The workers are real EmbedRuns over the same spool and the same Qdrant; only their device is a double.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tasks.backends.fake_encoder import SMALL_SHAPE
from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.qdrant import open_store
from tasks.backends.spool import SpoolFolder
from tasks.backends.spool_reports import revoke_run
from tasks.config import EmbedGroup, IngestSettings
from tasks.engine.collection import RunCollection
from tasks.engine.commit import Committer
from tasks.engine.embed_run import EmbedRun
from tasks.engine.embedded import ON_CPU, ON_DEVICE, Embedded, start_embedding
from tasks.engine.shared_partitions import (
    PoolDevices,
    SharedPartitions,
    check_shared,
    put_on_one_clock,
)
from tasks.engine.signs_of_life import SignsOfLife
from tasks.errors import ConfigError, RunStopped, SpoolError, StoreUnavailable
from tasks.observe import SilentObserver
from tasks.policy.books import Ledgerbook
from tasks.policy.groups import Group
from tasks.records import (
    Books,
    BudgetMark,
    ChunkedDocument,
    MemoryReading,
    ModelFiles,
    Node,
    Partition,
    PartitionReport,
    Pool,
    PoolReport,
    SignOfLife,
    TokenIds,
)

FILES = ModelFiles("small", "/nowhere", "r1", SMALL_SHAPE, 4, 512, "mean")


class Device:
    """Leaves nodes with `left` tokens without a place, and has no vector for those with `failed`; `embedded` are the others."""

    embedder = object()
    device = "cuda:0"
    note = ""
    budget_series: Sequence[BudgetMark] = ()

    def __init__(self, pool: Pool, left: Sequence[int] = (), failed: Sequence[int] = ()) -> None:
        self.placed = ON_DEVICE if pool == "gpu" else ON_CPU
        self.left = left
        self.failed = failed
        self.embedded: list[int] = []

    def embed(self, token_ids: Sequence[TokenIds], _index: int) -> Embedded:
        embedded = start_embedding(token_ids, FILES.dimension, self.device)
        embedded.seconds = 1.0
        for row, ids in enumerate(token_ids):
            if len(ids) in self.failed:
                embedded.failed[row] = "NaN in fp32, too"
            elif len(ids) not in self.left:
                embedded.vectors[row] = np.eye(FILES.dimension, dtype=np.float32)[len(ids) % FILES.dimension]
                embedded.placed[row] = self.placed
                self.embedded.append(len(ids))
        return embedded

    def close(self) -> None: ...


class Ingest:
    """The ingest run's side, without a source: documents are planned by hand, a partition of some of their nodes each."""

    def __init__(self, settings: IngestSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.spool = SpoolFolder(f"{folder}/spool")
        self.store = open_store(settings.qdrant, str(folder), environment={})
        self.collection = RunCollection(self.store, settings.qdrant, FILES, "f" * 64, "docs")
        self.books = Ledgerbook()
        self.reports: dict[int, PartitionReport] = {}
        lock = threading.Lock()
        self.committer = Committer(self.collection, self.books, lock, max_attempts=3)
        self.shared = SharedPartitions(
            settings, self.spool, self.collection, self.committer, self.books, self.reports, SilentObserver(),
            fingerprint="f" * 64, books_lock=lock, store_lock=threading.Lock(),
        )  # fmt: skip
        self.groups = 0

    def spool_documents(self, *, documents: int = 3, nodes: int = 4) -> Partition:
        """One partition of documents of as many nodes; their nodes have 1, 2, 3 ... tokens in all."""
        chunked = []
        tokens = 0
        for document in range(documents):
            own = []
            for _ in range(nodes):
                tokens += 1
                payload = {"ballast_source": "docs", "doc_id": f"{document}.md", "generation": f"g{document}"}
                ids = np.arange(tokens, dtype=np.int32)
                own.append(Node(str(uuid.UUID(int=tokens)), f"{document}.md", f"g{document}", ids, payload))
            chunked.append(ChunkedDocument(f"{document}.md", f"g{document}", tuple(own), 1, f"h{document}"))
        for each in chunked:
            self.books.plan_document(each.doc_id, len(each.nodes))
        self.committer.open_documents(chunked, {})
        return self.spool.write_partition(0, [node for each in chunked for node in each.nodes], 1.0)

    def begin(self, pool: Pool, *partitions: Partition) -> EmbedGroup:
        self.groups += 1
        return self.shared.begin(Group(self.groups - 1, pool, partitions))

    def open_worker(self, group: EmbedGroup, device: Device) -> EmbedRun:
        store = open_store(self.settings.qdrant, str(self.folder), environment={})
        spool = SpoolFolder(group.spool)
        run_id = str(uuid.uuid4())
        worker = EmbedRun(
            self.settings, group, FILES, store, spool, SignsOfLife(spool, run_id), SilentObserver(), start_up_s=1.0
        )
        worker.devices = device  # type: ignore[assignment]
        return worker

    def work(self, pool: Pool, device: Device, partition: Partition, *, until: str = "reported") -> None:
        """A worker's run, or the part of it before it is killed."""
        with closing(self.open_worker(self.begin(pool, partition), device)) as worker:
            (there,) = worker.partitions()
            worker.embed_partition(there)
            if until == "reported":
                worker.upsert_partition(there)

    def take(self, partition: Partition, pool: Pool) -> PoolReport:
        report = self.shared.read_report(partition, pool)
        assert report is not None
        self.shared.take(partition, report)
        assert self.shared.is_taken(partition, pool)
        return report

    def end(self) -> tuple[Books, tuple[str, ...]]:
        settled = self.committer.settle(self.settings.deletes)
        return self.books.close(settled.points_counted, settled.points_expected, pending=settled.pending)


@pytest.fixture
def qdrant() -> Iterator[LoopbackQdrant]:
    with LoopbackQdrant() as double:
        yield double


@pytest.fixture
def make_ingest(qdrant: LoopbackQdrant, tmp_path: Path) -> Iterator[Callable[..., Ingest]]:
    opened: list[Ingest] = []

    def make(**changes: object) -> Ingest:
        settings = IngestSettings.model_validate(
            {
                "source": "docs/",
                "qdrant": {"url": qdrant.url, "transport": "rest", "collection": "port", **changes},
                "pools": {"enabled": True},
                "spool": str(tmp_path / "spool"),
            }
        )
        opened.append(Ingest(settings, tmp_path))
        return opened[-1]

    yield make
    for each in opened:
        each.store.close()


@pytest.fixture
def ingest(make_ingest: Callable[..., Ingest]) -> Ingest:
    return make_ingest()


def test_a_partition_that_the_gpu_pool_embeds_whole(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu"), partition)
    assert ingest.shared.list_reported() == {(partition.path.rsplit("/", 1)[-1], "gpu")}
    report = ingest.take(partition, "gpu")
    assert (report.stored_rows, list(report.left_rows), report.failed_rows) == (None, [], {})
    assert not ingest.spool.has_partition(partition)
    assert ingest.shared.list_reported() == set()
    books, off = ingest.end()
    assert off == ()
    assert (books.documents_written, books.nodes_gpu, books.nodes_cpu, books.points_counted) == (3, 12, 0, 12)


def test_documents_are_begun_in_the_ledger_before_a_worker_has_them(ingest: Ingest) -> None:
    """A run that is killed now is known to the next one to have touched them."""
    partition = ingest.spool_documents()
    group = ingest.begin("gpu", partition)
    records = ingest.collection.read_written_records(["0.md", "1.md", "2.md"])
    assert {each.status for each in records.values()} == {"pending"}
    assert group.collection == ingest.collection.physical
    assert [each.name for each in group.partitions] == [partition.path.rsplit("/", 1)[-1]]
    assert EmbedGroup.model_validate_json(group.model_dump_json()) == group


def test_what_the_gpu_leaves_the_cpu_pool_embeds_and_both_are_one_report(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu", left=[10, 11, 12], failed=[1]), partition)
    first = ingest.take(partition, "gpu")
    assert list(first.left_rows) == [0, 1, 2]
    assert ingest.spool.has_partition(partition)
    cpu = Device("cpu")
    ingest.work("cpu", cpu, partition)
    assert sorted(cpu.embedded) == [10, 11, 12]
    ingest.take(partition, "cpu")
    assert not ingest.spool.has_partition(partition)
    merged = ingest.reports[0]
    assert (merged.nodes, merged.gpu_nodes, merged.cpu_nodes, len(merged.failed_nodes)) == (12, 8, 3, 1)
    assert merged.tokens == sum(range(1, 13))
    books, off = ingest.end()
    assert off == ()
    assert (books.nodes_gpu, books.nodes_cpu, books.nodes_failed) == (8, 3, 1)
    assert (books.documents_written, books.documents_failed) == (2, 1)


def test_a_report_is_booked_once_though_it_is_taken_again(ingest: Ingest, qdrant: LoopbackQdrant) -> None:
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu"), partition)
    report = ingest.shared.read_report(partition, "gpu")
    assert report is not None
    ingest.shared.take(partition, report)
    ingest.shared.take(partition, report)
    books, off = ingest.end()
    assert off == ()
    assert books.nodes_gpu == 12


def test_a_qdrant_that_is_away_between_booking_and_commit_costs_nothing(
    make_ingest: Callable[..., Ingest], qdrant: LoopbackQdrant
) -> None:
    ingest = make_ingest(outage_s=0)
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu"), partition)
    report = ingest.shared.read_report(partition, "gpu")
    assert report is not None
    ingest.store.calls.should_stop = lambda: True  # no waits between attempts
    qdrant.is_down = True
    with pytest.raises((StoreUnavailable, RunStopped)):
        ingest.shared.take(partition, report)
    assert not ingest.shared.is_taken(partition, "gpu")
    assert ingest.spool.has_partition(partition)
    qdrant.is_down = False
    ingest.store.calls.should_stop = lambda: False
    ingest.shared.take(partition, report)
    books, off = ingest.end()
    assert off == ()
    assert books.nodes_gpu == 12


def test_points_that_qdrant_refuses_fail_by_name_and_the_books_close(ingest: Ingest, qdrant: LoopbackQdrant) -> None:
    partition = ingest.spool_documents()
    qdrant.faults.append(
        Fault(on="PUT /collections/port--f+/points", status=400, error="Wrong input: a payload that it can't take")
    )
    ingest.work("gpu", Device("gpu", left=[12], failed=[1]), partition)
    report = ingest.take(partition, "gpu")
    assert report.stored_rows == []
    part = report.partition
    assert part.nodes == part.gpu_nodes + part.cpu_nodes + len(part.failed_nodes) == 11
    cpu = Device("cpu")
    ingest.work("cpu", cpu, partition)
    assert cpu.embedded == [12]
    ingest.take(partition, "cpu")
    books, off = ingest.end()
    assert off == ()
    assert (books.nodes_gpu, books.nodes_cpu, books.nodes_failed) == (0, 1, 11)
    assert books.documents_failed == 3
    assert any("can't take" in each.reason for each in ingest.books.rejections())


# ---------------------------------------------------------------------------------------------- workers that die


def test_vectors_of_a_worker_that_died_before_it_stored_them_are_not_made_again(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu", left=[12]), partition, until="embedded")
    second = Device("gpu", left=[12])
    ingest.work("gpu", second, partition)
    assert second.embedded == []
    ingest.take(partition, "gpu")
    ingest.work("cpu", Device("cpu"), partition)
    ingest.take(partition, "cpu")
    books, off = ingest.end()
    assert off == ()
    assert (books.nodes_gpu, books.nodes_cpu) == (11, 1)


def test_the_cpu_pool_takes_over_what_gpu_workers_died_over(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu", left=[11, 12]), partition, until="embedded")
    cpu = Device("cpu")
    ingest.work("cpu", cpu, partition)
    assert sorted(cpu.embedded) == [11, 12]
    ingest.take(partition, "cpu")
    books, off = ingest.end()
    assert off == ()
    assert (books.nodes_gpu, books.nodes_cpu, books.points_counted) == (10, 2, 12)


@pytest.mark.parametrize("is_late", [False, True], ids=["before the CPU pool begins", "after it has begun"])
def test_a_report_of_a_gpu_worker_that_counted_as_dead_is_neither_lost_nor_booked_twice(
    ingest: Ingest, is_late: bool
) -> None:
    """It was written between the last look at the spool and the revocation; nobody has taken it."""
    partition = ingest.spool_documents()
    cpu = ingest.open_worker(ingest.begin("cpu", partition), Device("cpu"))
    with closing(cpu):
        (there,) = cpu.partitions()
        if is_late:
            cpu.embed_partition(there)
        ingest.work("gpu", Device("gpu", left=[12]), partition)
        if not is_late:
            cpu.embed_partition(there)
        cpu.upsert_partition(there)
    ingest.take(partition, "cpu")
    merged = ingest.reports[0]
    assert merged.nodes == merged.gpu_nodes + merged.cpu_nodes == 12
    books, off = ingest.end()
    assert off == ()
    assert books.points_counted == 12


def test_a_worker_that_was_taken_for_dead_stores_nothing(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    with closing(ingest.open_worker(ingest.begin("gpu", partition), Device("gpu"))) as worker:
        (there,) = worker.partitions()
        worker.embed_partition(there)
        revoke_run(ingest.spool, worker._signs.run_id)
        with pytest.raises(RunStopped, match="not this run's any more"):
            worker.upsert_partition(there)
    assert ingest.collection.count() == 0
    assert ingest.shared.list_reported() == set()


def test_a_worker_that_finds_its_partition_gone_stores_nothing(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    with closing(ingest.open_worker(ingest.begin("gpu", partition), Device("gpu"))) as worker:
        (there,) = worker.partitions()
        worker.embed_partition(there)
        ingest.spool.remove_partition(partition)
        with pytest.raises((RunStopped, SpoolError), match=r"not this run's any more|is gone"):
            worker.upsert_partition(there)
    assert ingest.collection.count() == 0


# ---------------------------------------------------------------------------------------------- what is lost


def test_what_no_pool_embeds_fails_by_name(ingest: Ingest) -> None:
    partition = ingest.spool_documents()
    ingest.begin("gpu", partition)
    ingest.shared.fail(partition, "gpu", "gpu-pool could not embed it: killed")
    assert not ingest.spool.has_partition(partition)
    books, off = ingest.end()
    assert off == ()
    assert (books.nodes_failed, books.documents_failed) == (12, 3)
    assert {each.reason for each in ingest.books.rejections()} == {"gpu-pool could not embed it: killed"}
    assert len(ingest.reports[0].failed_nodes) == 12


@pytest.mark.parametrize("is_taken", [True, False], ids=["its report is booked", "its report is not booked yet"])
def test_what_the_cpu_pool_loses_is_only_what_the_gpu_had_left(ingest: Ingest, is_taken: bool) -> None:
    partition = ingest.spool_documents()
    ingest.work("gpu", Device("gpu", left=[12], failed=[1]), partition)
    if is_taken:
        ingest.take(partition, "gpu")
    ingest.shared.fail(partition, "cpu", "killed")
    merged = ingest.reports[0]
    assert (merged.nodes, merged.gpu_nodes, len(merged.failed_nodes)) == (12, 10, 2)
    books, off = ingest.end()
    assert off == ()
    assert (books.nodes_gpu, books.nodes_failed, books.documents_written) == (10, 2, 1)
    assert books.documents_failed == 2


def test_failing_a_partition_needs_no_qdrant(ingest: Ingest, qdrant: LoopbackQdrant) -> None:
    """It happens in the thread that watches the workers: it must not wait there for an hour."""
    partition = ingest.spool_documents()
    ingest.begin("gpu", partition)
    qdrant.is_down = True
    ingest.shared.fail(partition, "gpu", "killed")
    qdrant.is_down = False
    assert ingest.end()[1] == ()


# ---------------------------------------------------------------------------------------------- the rest


def test_pools_need_a_server_and_a_spool_for_all() -> None:
    settings = IngestSettings.model_validate({"source": "docs/", "pools": {"enabled": True}, "spool": "/srv/spool"})
    check_shared(settings, is_embedded=False)
    with pytest.raises(ConfigError, match="needs a Qdrant server"):
        check_shared(settings, is_embedded=True)
    check_shared(settings.model_copy(update={"spool": "s3://bucket/spool"}), is_embedded=False)
    with pytest.raises(ConfigError, match="absolute `spool`, not 'spool'"):
        check_shared(settings.model_copy(update={"spool": "spool"}), is_embedded=False)
    with pytest.raises(ConfigError, match="needs `spool`"):
        check_shared(settings.model_copy(update={"spool": None}), is_embedded=False)


def test_signs_of_several_workers_are_put_on_one_clock() -> None:
    def sign(*seconds: float) -> SignOfLife:
        return SignOfLife(
            1, None, "", [MemoryReading(each, "GPU-1", 1, 1, 2, None) for each in seconds], [BudgetMark(0.0, 5, 1)]
        )

    readings, marks = put_on_one_clock([(10.0, sign(0.0, 30.0)), (5.0, sign(1.0))])
    assert [(each.seconds, each.worker) for each in readings] == [(6.0, 1), (10.0, 0), (40.0, 0)]
    assert [(each.seconds, each.worker) for each in marks] == [(5.0, 1), (10.0, 0)]
    assert put_on_one_clock([]) == ([], [])
    assert PoolDevices("").memory_series == ()
