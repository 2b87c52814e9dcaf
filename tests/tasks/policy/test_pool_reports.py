"""Reports of one partition from both pools close when they are one."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tasks.policy.pool_reports import list_stored_rows, merge_reports
from tasks.records import LadderStep, Partition, PartitionReport, PoolReport

SPILL = LadderStep("spill", "no room at batch size 1", 1, 1, 512, 0, 0, 0)
RESTART = LadderStep("restart", "the device process died", 4, 4, 512, 0, 0, 0)


def partition(nodes: int) -> Partition:
    return Partition(3, "partition-000003-0000000000000000.parquet", nodes, 10 * nodes, 10, 0.5)


def report(gpu: int = 0, cpu: int = 0, failed: tuple[str, ...] = ()) -> PartitionReport:
    nodes = gpu + cpu + len(failed)
    return PartitionReport(
        index=3, nodes=nodes, tokens=10 * nodes, gpu_nodes=gpu, cpu_nodes=cpu, failed_nodes=dict.fromkeys(failed, "NaN"),
        micro_batches=2, batch_min=1, batch_max=8, peak_bytes=77, budget_bytes=99, seconds=2.0, padding_tokens=5,
        redone_fp32=1, steps=(SPILL,), device="gpu-pool (cuda:0)",
    )  # fmt: skip


def test_a_first_report_stays_as_it_is() -> None:
    only = report(gpu=2)
    assert merge_reports(None, only, partition(2)) == only


@given(*[st.integers(0, 5)] * 5)
def test_merged_reports_close(gpu: int, gpu_failed: int, on_cpu: int, kept: int, cpu_failed: int) -> None:
    """`kept`: nodes that a GPU had embedded, and the CPU pool's run stored."""
    first = report(gpu=gpu, failed=tuple(f"g{number}" for number in range(gpu_failed)))
    second = report(gpu=kept, cpu=on_cpu, failed=tuple(f"c{number}" for number in range(cpu_failed)))
    nodes = first.nodes + second.nodes
    merged = merge_reports(first, second, partition(nodes))
    assert merged.nodes == nodes == merged.gpu_nodes + merged.cpu_nodes + len(merged.failed_nodes)
    assert merged.tokens == 10 * nodes
    assert merged.failed_nodes == {**first.failed_nodes, **second.failed_nodes}


def test_merged_reports_tell_of_the_gpu_s_memory_and_of_both_pools_work() -> None:
    second = replace(
        report(cpu=3),
        batch_min=2,
        batch_max=4,
        peak_bytes=None,
        budget_bytes=5,
        steps=(RESTART,),
        device="cpu-pool (cpu)",
    )
    merged = merge_reports(report(gpu=2), second, partition(5))
    assert (merged.device, merged.peak_bytes, merged.budget_bytes) == ("gpu-pool (cuda:0)", 77, 99)
    assert (merged.batch_min, merged.batch_max) == (1, 8)
    assert (merged.micro_batches, merged.seconds, merged.padding_tokens, merged.redone_fp32) == (4, 4.0, 10, 2)
    assert merged.steps == (SPILL, RESTART)
    assert merged.is_degraded


def test_a_gpu_that_placed_nothing_has_no_batches_and_the_cpu_pool_s_are_told() -> None:
    nothing = replace(report(), micro_batches=0, batch_min=0, batch_max=0)
    merged = merge_reports(nothing, replace(report(cpu=3), batch_min=2, batch_max=4), partition(3))
    assert (merged.batch_min, merged.batch_max) == (2, 4)


def test_stored_rows() -> None:
    assert list(list_stored_rows(PoolReport(report(gpu=3), "gpu", "", 0.0, None), 3)) == [0, 1, 2]
    assert list(list_stored_rows(PoolReport(report(gpu=3), "gpu", "", 0.0, [2, 0]), 3)) == [2, 0]
    assert list(list_stored_rows(PoolReport(report(gpu=3), "gpu", "", 0.0, []), 3)) == []
