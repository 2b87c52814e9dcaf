"""The stages of an ingest in the order of flows/ingest.py, side by side, without Prefect."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from tasks.engine.ingest_run import IngestRun
from tasks.records import Partition


def run_stages(run: IngestRun) -> list[str]:
    """Up to the last partition; returns the ids of the nodes that went to the encoder, as often as they did."""
    embedded: list[str] = []

    def embed(partition: Partition) -> Partition:
        embedded.extend(node.node_id for node in run.spool.read_partition(partition))
        run.embed_partition(partition)
        return partition

    def store(partition: Future[Partition]) -> None:
        run.upsert_partition(partition.result())

    with ThreadPoolExecutor(1) as loading, ThreadPoolExecutor(1) as embedding, ThreadPoolExecutor(1) as storing:
        devices = loading.submit(run.start_devices)
        stored = []
        while (partition := run.spool_next_partition()) is not None:
            devices.result()
            stored.append(storing.submit(store, embedding.submit(embed, partition)))
        for each in stored:
            each.result()
        devices.result()
    return embedded
