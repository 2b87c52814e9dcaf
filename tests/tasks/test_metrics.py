"""The metrics as Prometheus sees them: scraped over HTTP, read by its own parser."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tasks.errors import ConfigError
from tasks.metrics import MetricsObserver, start_metrics
from tasks.observe import SilentObserver, current_observer, observing
from tasks.records import Books, LadderStep, MemoryReading, PartitionReport, RunSummary

GIB = 1024**3
ANY_PORT = {"BALLAST_METRICS_PORT": "0"}

STEP = LadderStep("oom", "CUDA out of memory", 64, 32, 512, 8 * GIB, 4 * GIB, GIB)
REPORT = PartitionReport(
    index=1, nodes=100, tokens=20_000, gpu_nodes=95, cpu_nodes=4, failed_nodes={"a": "no place"}, micro_batches=4,
    batch_min=8, batch_max=64, peak_bytes=3 * GIB, budget_bytes=8 * GIB, seconds=12.0, padding_tokens=0, redone_fp32=0,
    steps=(STEP,), device="cuda:0",
)  # fmt: skip
SUMMARY = RunSummary(
    collection="docs", physical_collection="docs__1a", model="m", fingerprint="1a", device="cuda:0", device_note="",
    books=Books(5, 1, 2, 1, 1, 100, 95, 4, 0, 1, 99), rejections=[], partitions=[REPORT], memory_series=[], tokens=20_000,
    seconds={"total": 20.0},
)  # fmt: skip


def scrape(url: str) -> dict[str, float]:
    """Each sample as `name{label=value,...}`."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("ballast_"), family.name
        assert family.documentation, family.name
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def tell_all() -> None:
    observer = current_observer.get()
    observer.micro_batch_done(1, 64, 100, 15_000, "cuda:0")
    observer.micro_batch_measured(64, 8 * GIB, 4 * GIB, 3 * GIB)
    observer.ladder_step(1, STEP)
    observer.micro_batch_done(1, 95, 100, 5_000, "cuda:0")
    observer.micro_batch_measured(31, 4 * GIB, 2 * GIB, None)
    observer.memory_read(MemoryReading(1.0, "GPU-1", 10 * GIB, 5 * GIB, 15 * GIB, 9 * GIB))
    observer.partition_done(REPORT)
    observer.points_stored(99, 0.2)
    observer.run_finished(SUMMARY, ())


def test_what_happened_can_be_scraped() -> None:
    with start_metrics(ANY_PORT, collection="docs", pool="gpu") as url:
        assert url is not None
        tell_all()
        seen = scrape(url)
    expected: Mapping[str, float] = {
        "ballast_run_info{collection=docs,pool=gpu}": 1,
        "ballast_nodes_total{device=cuda:0,pool=gpu}": 95,
        "ballast_nodes_total{device=cpu,pool=gpu}": 4,
        "ballast_tokens_total{device=cuda:0,pool=gpu}": 20_000,
        "ballast_ooms_total": 1,
        "ballast_ladder_steps_total{kind=oom}": 1,
        "ballast_ladder_steps_total{kind=spill}": 0,
        "ballast_spilled_nodes_total": 4,
        "ballast_failed_nodes_total": 1,
        "ballast_points_stored_total": 99,
        "ballast_documents_total{status=failed}": 1,
        "ballast_runs_total{outcome=red}": 1,
        "ballast_batch_nodes": 31,
        "ballast_budget_bytes": 4 * GIB,
        "ballast_peak_bytes": 3 * GIB,
        "ballast_device_memory_bytes{device=GPU-1,state=used}": 10 * GIB,
        "ballast_device_memory_bytes{device=GPU-1,state=free}": 5 * GIB,
        "ballast_device_memory_bytes{device=GPU-1,state=total}": 15 * GIB,
        "ballast_device_memory_bytes{device=GPU-1,state=this_run}": 9 * GIB,
        "ballast_micro_batch_nodes_count": 2,
        "ballast_micro_batch_nodes_bucket{le=32.0}": 1,
        "ballast_partition_seconds_sum": 12.0,
        "ballast_upsert_seconds_count": 1,
    }
    assert {name: seen.get(name) for name in expected} == expected
    assert seen["ballast_tokens_per_second"] == pytest.approx(20_000 / 30)


def test_the_rate_falls_to_nothing_when_nothing_is_embedded() -> None:
    now = [100.0]
    metrics = MetricsObserver(clock=lambda: now[0])
    metrics.micro_batch_done(0, 1, 2, 3000, "cpu")
    assert metrics.read_tokens_per_s() == 100
    now[0] += 31
    assert metrics.read_tokens_per_s() == 0


@pytest.mark.parametrize(
    ("pool", "device", "nodes", "spilled"),
    [
        ("", "cpu", {"ballast_nodes_total{device=cpu,pool=}": 99}, 0),
        ("gpu", "gpu-pool (cuda:1)", {"ballast_nodes_total{device=cuda:1,pool=gpu}": 95}, 4),
        # A CPU worker finishes what GPU workers left: their nodes are theirs.
        ("cpu", "cpu-pool (cpu)", {"ballast_nodes_total{device=cpu,pool=cpu}": 4}, 4),
    ],
)
def test_each_node_is_counted_where_it_was_embedded(
    pool: str, device: str, nodes: dict[str, float], spilled: int
) -> None:
    with start_metrics(ANY_PORT, pool=pool) as url:
        assert url is not None
        current_observer.get().partition_done(replace(REPORT, device=device))
        seen = scrape(url)
    assert nodes.items() <= seen.items()
    assert seen["ballast_spilled_nodes_total"] == spilled


def test_a_run_whose_workers_embed_counts_documents_and_no_node() -> None:
    with start_metrics(ANY_PORT, collection="docs", embeds=False) as url:
        assert url is not None
        current_observer.get().partition_done(replace(REPORT, device="gpu-pool (cuda:0)"))
        current_observer.get().run_finished(SUMMARY, ())
        seen = scrape(url)
    counted = {name for name, value in seen.items() if value and "_created" not in name}
    statuses = ("unchanged", "written", "failed", "skipped")
    assert counted == {
        "ballast_run_info{collection=docs,pool=}",
        "ballast_runs_total{outcome=red}",
        *(f"ballast_documents_total{{status={status}}}" for status in statuses),
    }


def test_whoever_watched_before_goes_on_watching() -> None:
    class Notes(SilentObserver):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def note(self, message: str) -> None:
            self.heard.append(message)

    notes = Notes()
    with observing(notes):
        with start_metrics(ANY_PORT):
            current_observer.get().note("during")
            tell_all()
        assert current_observer.get() is notes
    assert notes.heard == ["during"]


@pytest.mark.parametrize("port", ["", " "])
def test_unset_means_off(port: str) -> None:
    before = current_observer.get()
    with start_metrics({"BALLAST_METRICS_PORT": port}) as url:
        assert url is None
        assert current_observer.get() is before
    with start_metrics({}) as url:
        assert url is None


@pytest.mark.parametrize("port", ["http", "-1", "65536", "80.5"])
def test_what_is_no_port_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="BALLAST_METRICS_PORT"), start_metrics({"BALLAST_METRICS_PORT": port}):
        pass


def test_the_next_worker_takes_the_next_port_and_each_closes_its_own() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with start_metrics({"BALLAST_METRICS_PORT": str(port)}) as url:
            assert url is not None
            assert not url.startswith(f"http://127.0.0.1:{port}/")
            assert scrape(url)
    with pytest.raises(urllib.error.URLError):
        scrape(url)


def test_an_address_that_is_not_here_ends_no_run(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"BALLAST_METRICS_PORT": "9464", "BALLAST_METRICS_ADDRESS": "192.0.2.1"}
    with caplog.at_level("WARNING", logger="tasks.metrics"), start_metrics(environment) as url:
        assert url is None
    assert "192.0.2.1" in caplog.text
