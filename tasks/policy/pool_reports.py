"""What several pools' reports of one partition say together."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.records import Partition, PartitionReport, PoolReport


def list_stored_rows(report: PoolReport, nodes: int) -> Sequence[int]:
    """Rows whose points this report's run has stored."""
    return range(nodes) if report.stored_rows is None else report.stored_rows


def merge_reports(before: PartitionReport | None, report: PartitionReport, partition: Partition) -> PartitionReport:
    """One report of a partition that the GPU pool has left some nodes of, and the CPU pool embedded those.

    Closes as nodes == gpu + cpu + failed once the last pool has reported. The device, the batches and the memory are the GPU's.
    """
    if before is None:
        return report
    return PartitionReport(
        index=partition.index,
        nodes=before.nodes + report.nodes,
        tokens=before.tokens + report.tokens,
        gpu_nodes=before.gpu_nodes + report.gpu_nodes,
        cpu_nodes=before.cpu_nodes + report.cpu_nodes,
        failed_nodes={**before.failed_nodes, **report.failed_nodes},
        micro_batches=before.micro_batches + report.micro_batches,
        batch_min=before.batch_min or report.batch_min,
        batch_max=before.batch_max or report.batch_max,
        peak_bytes=before.peak_bytes,
        budget_bytes=before.budget_bytes,
        seconds=before.seconds + report.seconds,
        padding_tokens=before.padding_tokens + report.padding_tokens,
        redone_fp32=before.redone_fp32 + report.redone_fp32,
        steps=(*before.steps, *report.steps),
        device=before.device,
    )
