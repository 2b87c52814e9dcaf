"""Prometheus metrics of a worker: what the observers are told, as counters, gauges and histograms over HTTP.

Served on BALLAST_METRICS_PORT while a flow runs, and no longer: runs that are shorter than the scrape interval may never be
seen. Their figures are in the run's report and in the event `ballast.run.finished`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from tasks.errors import ConfigError
from tasks.observe import BothObservers, SilentObserver, current_observer, observing
from tasks.records import LadderStep, MemoryReading, PartitionReport, RunSummary

logger = logging.getLogger(__name__)

PORTS = 10  # workers of one host, each with the next port
RATE_WINDOW_S = 30.0
UPSERT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PARTITION_BUCKETS_S = (1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


class MetricsObserver(SilentObserver):
    """Counts what it is told into a registry of its own."""

    def __init__(
        self,
        *,
        collection: str = "",
        pool: str = "",
        embeds: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pool`: the work pool whose worker this is; empty where a run embeds in its own process.

        `embeds`: False where workers elsewhere do it, who count what they embed: the sum over all processes is right.
        """
        self.registry = registry = CollectorRegistry()
        self._pool = pool
        self._embeds = embeds
        self._clock = clock
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, int]] = deque()
        Info("ballast_run", "What this process works on.", registry=registry).info(
            {"collection": collection, "pool": pool}
        )
        labels = ("device", "pool")
        self._nodes = Counter("ballast_nodes", "Nodes embedded.", labels, registry=registry)
        self._tokens = Counter("ballast_tokens", "Tokens embedded.", labels, registry=registry)
        self._partitions = Counter("ballast_partitions", "Partitions embedded.", labels, registry=registry)
        self._ooms = Counter("ballast_ooms", "Micro-batches that ran out of memory.", registry=registry)
        self._steps = Counter("ballast_ladder_steps", "Steps of the ladder.", ("kind",), registry=registry)
        self._spilled = Counter(
            "ballast_spilled_nodes", "Nodes that left a GPU and were embedded on a CPU.", registry=registry
        )
        self._failed = Counter("ballast_failed_nodes", "Nodes without a vector.", registry=registry)
        self._points = Counter("ballast_points_stored", "Points that Qdrant has applied.", registry=registry)
        self._documents = Counter(
            "ballast_documents", "Documents, by what became of them.", ("status",), registry=registry
        )
        self._runs = Counter("ballast_runs", "Ingest runs that came to their books.", ("outcome",), registry=registry)
        speed = Gauge("ballast_tokens_per_second", f"Over the last {RATE_WINDOW_S:g} seconds.", registry=registry)
        speed.set_function(self.read_tokens_per_s)
        self._batch_nodes = Gauge("ballast_batch_nodes", "Nodes of the last micro-batch.", registry=registry)
        self._budget = Gauge(
            "ballast_budget_bytes", "What a micro-batch may take on top of the weights.", registry=registry
        )
        self._predicted = Gauge("ballast_predicted_bytes", "What the last one was to take.", registry=registry)
        self._peak = Gauge("ballast_peak_bytes", "What it took, where the device tells.", registry=registry)
        self._memory = Gauge(
            "ballast_device_memory_bytes", "A device's memory.", ("device", "state"), registry=registry
        )
        self._upsert_s = Histogram(
            "ballast_upsert_seconds", "A partition's points into Qdrant.", buckets=UPSERT_BUCKETS_S, registry=registry
        )
        self._partition_s = Histogram(
            "ballast_partition_seconds", "A partition on its device.", buckets=PARTITION_BUCKETS_S, registry=registry
        )
        self._micro_batch_nodes = Histogram(
            "ballast_micro_batch_nodes", "Nodes that went through the model together.", buckets=BATCH_BUCKETS,
            registry=registry,
        )  # fmt: skip
        # From the start on at 0: an alert on the increase of a series that begins at 1 never fires.
        for kind in ("oom", "shrink", "grow", "spill", "restart", "exhausted", "redo_fp32"):
            self._steps.labels(kind)

    def read_tokens_per_s(self) -> float:
        """Of the last RATE_WINDOW_S; 0 where nothing is embedded any more."""
        now = self._clock()
        with self._lock:
            while self._recent and self._recent[0][0] < now - RATE_WINDOW_S:
                self._recent.popleft()
            return sum(tokens for _, tokens in self._recent) / RATE_WINDOW_S

    # ------------------------------------------------------------------------------------------ what happens

    def micro_batch_done(
        self, partition_index: int, nodes_done: int, nodes_total: int, tokens: int, device: str
    ) -> None:
        del partition_index, nodes_done, nodes_total
        self._tokens.labels(device, self._pool).inc(tokens)
        with self._lock:
            self._recent.append((self._clock(), tokens))

    def micro_batch_measured(self, nodes: int, budget_bytes: int, predicted_bytes: int, peak_bytes: int | None) -> None:
        self._batch_nodes.set(nodes)
        self._micro_batch_nodes.observe(nodes)
        self._budget.set(budget_bytes)
        self._predicted.set(predicted_bytes)
        if peak_bytes is not None:
            self._peak.set(peak_bytes)

    def memory_read(self, reading: MemoryReading) -> None:
        for state, value in (
            ("used", reading.used_bytes),
            ("free", reading.free_bytes),
            ("total", reading.total_bytes),
            ("this_run", reading.process_bytes),
        ):
            if value is not None:
                self._memory.labels(reading.device_uuid, state).set(value)

    def ladder_step(self, partition_index: int, step: LadderStep) -> None:
        del partition_index
        self._steps.labels(step.kind).inc()
        if step.kind == "oom":
            self._ooms.inc()

    def partition_done(self, report: PartitionReport) -> None:
        if not self._embeds:
            return
        device = name_device(report.device)
        self._partitions.labels(device, self._pool).inc()
        if self._pool != "cpu":  # there they are the GPU worker's, which has counted them
            self._nodes.labels(device, self._pool).inc(report.gpu_nodes)
        self._nodes.labels("cpu", self._pool).inc(report.cpu_nodes)
        if report.device != "cpu":
            self._spilled.inc(report.cpu_nodes)
        self._failed.inc(len(report.failed_nodes))
        self._partition_s.observe(report.seconds)

    def points_stored(self, points: int, seconds: float) -> None:
        self._points.inc(points)
        self._upsert_s.observe(seconds)

    def run_finished(self, summary: RunSummary, off: Sequence[str]) -> None:
        books = summary.books
        for status in ("unchanged", "written", "failed", "skipped", "deleted", "withheld"):
            self._documents.labels(status).inc(getattr(books, f"documents_{status}"))
        self._runs.labels("red" if off or books.documents_failed or books.nodes_failed else "green").inc()


def name_device(device: str) -> str:
    """ "cuda:0" of "cuda:0" and of "gpu-pool (cuda:0)": the pool has a label of its own."""
    return device.partition("(")[2].rstrip(")") or device


@contextmanager
def start_metrics(
    environment: Mapping[str, str], *, collection: str = "", pool: str = "", embeds: bool = True
) -> Iterator[str | None]:
    """Serve the metrics of what runs inside, at the URL that this yields; None where BALLAST_METRICS_PORT is unset or empty.

    On BALLAST_METRICS_ADDRESS, 127.0.0.1 unless set. A port that another worker has gives the next of ten; no free one is
    logged and ends no run. Raises ConfigError for what is no port.
    """
    asked = environment.get("BALLAST_METRICS_PORT", "").strip()
    if not asked:
        yield None
        return
    if not asked.isdecimal() or int(asked) > 65_535:
        raise ConfigError(
            f"BALLAST_METRICS_PORT is {asked!r}. It can be a port, 1 to 65535; 0 takes any; unset: no metrics."
        )
    address = environment.get("BALLAST_METRICS_ADDRESS", "").strip() or "127.0.0.1"
    metrics = MetricsObserver(collection=collection, pool=pool, embeds=embeds)
    with observing(BothObservers(current_observer.get(), metrics)):
        first = int(asked)
        for port in range(first, min(first + (PORTS if first else 1), 65_536)):
            try:
                server, thread = start_http_server(port, address, metrics.registry)
            except OSError as error:
                logger.info("metrics port=%d address=%s reason=%r: the next one is tried", port, address, str(error))
                continue
            url = f"http://{address}:{server.server_port}/metrics"
            logger.info("metrics url=%s", url)
            try:
                yield url
            finally:
                server.shutdown()
                server.server_close()
                thread.join()
            return
        logger.warning("metrics=off: no free port among %d to %d on %s", first, first + PORTS - 1, address)
        yield None
