"""Notes in the spool: reports, signs of life and revocations, read by another process than wrote them."""

from __future__ import annotations

import contextlib
import threading
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.backends import spool_reports
from tasks.backends.spool import SpoolFolder
from tasks.errors import SpoolError
from tasks.records import (
    BudgetMark,
    LadderStep,
    MemoryReading,
    Node,
    Partition,
    PartitionReport,
    PoolReport,
    SignOfLife,
)

RUN_ID = "01234567-89ab-4cde-8f01-23456789abcd"
REPORT = PoolReport(
    PartitionReport(
        index=1, nodes=3, tokens=30, gpu_nodes=2, cpu_nodes=0, failed_nodes={"n1": "слово is NaN"}, micro_batches=2,
        batch_min=1, batch_max=2, peak_bytes=None, budget_bytes=2**40, seconds=0.25, padding_tokens=0, redone_fp32=1,
        steps=[LadderStep("oom", "CUDA out of memory", 2, 1, 10, 2**40, 2**39, 0, 0.125)], device="gpu-pool (cuda:0)",
    ), "gpu", RUN_ID, 12.5, [0, 2], [3], {1: "слово is NaN"},
)  # fmt: skip
SIGN = SignOfLife(
    7,
    3,
    "embeds",
    [MemoryReading(0.5, "GPU-1", 1, 2, 3, None)],
    [BudgetMark(0.5, 2**40, 8, None, 5), BudgetMark(1.0, 2**39, 4, step="oom")],
    "cuda:0",
)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "spool") if request.param == "local" else f"memory://{uuid.uuid4().hex}/spool"


@pytest.fixture
def spool(url: str) -> SpoolFolder:
    return SpoolFolder(url)


def write_partition(spool: SpoolFolder, index: int = 1, nodes: int = 4) -> Partition:
    return spool.write_partition(
        index,
        [
            Node(str(uuid.UUID(int=row)), f"doc {row // 2}.md", "g1", np.arange(row + 1, dtype=np.int32), {})
            for row in range(nodes)
        ],
        1.0,
    )


def test_a_report_comes_back_as_it_was_written(spool: SpoolFolder, url: str) -> None:
    partition = write_partition(spool)
    assert spool_reports.read_report(spool, partition, "gpu") is None
    spool_reports.write_report(spool, partition, REPORT)
    there = SpoolFolder(url)
    assert spool_reports.read_report(there, partition, "gpu") == REPORT
    assert spool_reports.read_report(there, partition, "cpu") is None
    spool_reports.write_report(spool, partition, replace(REPORT, stored_rows=None, start_up_s=1.0))
    again = spool_reports.read_report(there, partition, "gpu")
    assert again is not None
    assert (again.stored_rows, again.start_up_s) == (None, 1.0)


def test_one_listing_tells_which_partitions_are_reported_and_by_which_pool(spool: SpoolFolder, url: str) -> None:
    partitions = [write_partition(spool, index) for index in range(3)]
    there = SpoolFolder(url)
    assert spool_reports.list_reports(there) == set()
    names = [each.path.rsplit("/", 1)[-1] for each in partitions]
    spool_reports.write_report(spool, partitions[0], REPORT)
    spool_reports.write_report(spool, partitions[0], replace(REPORT, pool="cpu"))
    spool_reports.write_report(spool, partitions[2], replace(REPORT, pool="cpu"))
    spool_reports.write_sign_of_life(spool, RUN_ID, SIGN)
    assert spool_reports.list_reports(there) == {(names[0], "gpu"), (names[0], "cpu"), (names[2], "cpu")}


def test_a_report_that_is_being_written_is_not_there_yet(spool: SpoolFolder) -> None:
    partition = write_partition(spool)
    name = partition.path.rsplit("/", 1)[-1].removesuffix(".parquet")
    spool._files.pipe_file(spool.place(f"{name}.gpu.json.{uuid.uuid4().hex}.tmp"), b"{")
    assert spool_reports.list_reports(spool) == set()
    assert spool_reports.read_report(spool, partition, "gpu") is None


def test_signs_of_life_and_revocations_are_a_run_s_own(spool: SpoolFolder, url: str) -> None:
    there, other = SpoolFolder(url), str(uuid.uuid4())
    assert spool_reports.read_sign_of_life(there, RUN_ID) is None
    spool_reports.write_sign_of_life(spool, RUN_ID, SIGN)
    assert spool_reports.read_sign_of_life(there, RUN_ID) == SIGN
    assert spool_reports.read_sign_of_life(there, other) is None
    assert not spool_reports.is_revoked(there, RUN_ID)
    spool_reports.revoke_run(spool, RUN_ID)
    spool_reports.revoke_run(spool, RUN_ID)
    assert spool_reports.is_revoked(there, RUN_ID)
    assert not spool_reports.is_revoked(there, other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"beat": "x"}', b"\xff"], ids=repr)
def test_what_is_no_note_is_named_with_the_likely_reason(spool: SpoolFolder, content: bytes) -> None:
    """Another version of Ballast: a report must not be half understood."""
    partition = write_partition(spool)
    name = partition.path.rsplit("/", 1)[-1].removesuffix(".parquet")
    spool.write_note(f"{name}.gpu.json", content)
    with pytest.raises(SpoolError, match=rf"{name}\.gpu\.json is not a PoolReport .* same version of Ballast"):
        spool_reports.read_report(spool, partition, "gpu")
    spool.write_note(f"run-{RUN_ID}.json", content)
    with pytest.raises(SpoolError, match="is not a SignOfLife"):
        spool_reports.read_sign_of_life(spool, RUN_ID)


# ---------------------------------------------------------------------------------------------- the folder


def test_documents_of_a_partition_in_the_file_s_order(spool: SpoolFolder) -> None:
    partition = write_partition(spool)
    assert spool.read_doc_ids(partition) == [node.doc_id for node in spool.read_partition(partition)]
    assert spool.read_doc_ids(partition) == ["doc 1.md", "doc 1.md", "doc 0.md", "doc 0.md"]
    spool.remove_partition(partition)
    with pytest.raises(SpoolError, match="is gone"):
        spool.read_doc_ids(partition)


def test_a_partition_leaves_with_its_vectors_and_reports_and_no_others(spool: SpoolFolder, url: str) -> None:
    going, staying = write_partition(spool, 1), write_partition(spool, 2)
    there = SpoolFolder(url)
    for each in (going, staying):
        spool.write_vectors(each, np.arange(2), np.ones((2, 3), np.float32))
        spool_reports.write_report(spool, each, REPORT)
        spool_reports.write_report(spool, each, replace(REPORT, pool="cpu"))
        assert there.has_partition(each)
    spool.remove_partition(going)
    spool.remove_partition(going)
    assert not there.has_partition(going)
    assert there.has_partition(staying)
    assert {name for name, _ in spool_reports.list_reports(there)} == {staying.path.rsplit("/", 1)[-1]}
    assert there.read_vectors(staying) is not None
    assert there.read_vectors(going) is None


def test_clearing_takes_notes_as_well_and_counts_them_into_the_size(spool: SpoolFolder) -> None:
    partition = write_partition(spool)
    without = spool.measure()
    spool_reports.write_report(spool, partition, REPORT)
    spool_reports.write_sign_of_life(spool, RUN_ID, SIGN)
    spool_reports.revoke_run(spool, RUN_ID)
    assert spool.measure() > without
    assert spool.clear() == 4
    assert spool.measure() == 0
    assert not spool_reports.is_revoked(spool, RUN_ID)


def test_a_spool_is_cleared_whole_while_a_worker_that_came_back_writes_into_it(tmp_path: Path) -> None:
    """A report that stayed would pass for one of the next run, whose partition may well have the same name."""
    spool, stop = SpoolFolder(str(tmp_path)), threading.Event()
    first = write_partition(spool, 0)

    def come_back() -> None:
        worker = SpoolFolder(str(tmp_path))
        while not stop.is_set():
            with contextlib.suppress(SpoolError):  # its unfinished note was cleared away
                spool_reports.write_report(worker, first, REPORT)

    thread = threading.Thread(target=come_back)
    thread.start()
    try:
        for _ in range(60):
            partition = write_partition(spool)
            spool_reports.write_report(spool, partition, REPORT)
            spool.clear()
            left = list(tmp_path.glob("partition-000001-*"))
            assert left == []
    finally:
        stop.set()
        thread.join()


def test_a_folder_that_went_away_is_a_spool_error(tmp_path: Path) -> None:
    """A share that is not mounted any more: workers and ingest run say what is wrong, and where."""
    spool = SpoolFolder(str(tmp_path / "share"))
    partition = write_partition(spool)
    (tmp_path / "share").rename(tmp_path / "elsewhere")
    for look in (
        lambda: spool_reports.list_reports(spool),
        lambda: spool.measure(),
        lambda: spool_reports.write_report(spool, partition, REPORT),
    ):
        with pytest.raises(SpoolError, match="share"):
            look()
    assert not spool.has_partition(partition)
