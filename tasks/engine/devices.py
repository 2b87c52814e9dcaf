"""The devices of one process: the GPU in a process of its own if there is one, and the CPU pool beside it."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from tasks.backends.host_sampler import HostSampler
from tasks.backends.nvml import MemorySampler
from tasks.backends.process_encoder import EncoderSpec, ProcessEncoder
from tasks.backends.sampler import Sampler
from tasks.config import BudgetSettings, EmbeddingSettings, IngestSettings
from tasks.engine.cpu_pool import CpuPool
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import UNWATCHED, Embedded, Spill, Watch, start_embedding
from tasks.engine.measure_device import MeasuredDevice, measure_device, to_embed_settings
from tasks.errors import ConfigError, DeviceError
from tasks.observe import Observer
from tasks.policy.failures import classify_failure
from tasks.policy.marks import thin_marks
from tasks.records import BudgetMark, LadderStep, ModelFiles, Pool, StepKind, TokenIds

MAX_MARKS = 2000  # of the budget's series, as many as the sampler's
CORES_PER_CPU_WORKER = (
    4  # more threads on one model gain little; fewer, and each worker's copy of the weights costs more
)


def find_cuda(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> str | None:
    """Why there is no CUDA device to try, None where there seems to be one. Loads no torch: that takes seconds and memory."""
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every CUDA device"
    # /dev/dxg is the door of the Windows subsystem for Linux, nvgpu that of NVIDIA's boards with shared memory.
    if not any((devices / name).exists() for name in ("nvidia0", "nvidiactl", "dxg", "nvhost-gpu", "nvgpu")):
        return "no CUDA device on this machine"
    return None


def choose_device(asked: str) -> tuple[str, str]:
    """The device to try for embedding.device, and why it is the CPU where it is. Raises ConfigError for another name."""
    if asked == "cpu":
        return "cpu", "asked for by embedding.device"
    if asked == "auto":
        reason = find_cuda()
        return ("cuda:0", "") if reason is None else ("cpu", reason)
    if re.fullmatch(r"cuda(:\d+)?", asked) is None:
        raise ConfigError(f"embedding.device is {asked!r}. It can be auto, cpu, cuda or cuda:N.")
    return asked if ":" in asked else "cuda:0", ""


def make_spec(
    embedding: EmbeddingSettings, budget: BudgetSettings, files: ModelFiles, device: str, *, threads: int | None = None
) -> EncoderSpec:
    """How a device process builds its encoder."""
    # A CPU computes in fp32 also where the GPU was told fp16: half precision is 3-5 times slower there, and the vectors agree.
    precision = "fp32" if device == "cpu" else embedding.precision
    return EncoderSpec(
        files.path,
        device,
        classify_failure,
        precision=precision,
        fraction=budget.fraction,
        revision=files.revision,
        threads=threads,
    )


class Devices:
    """What a run embeds on. `embedder` is None where there is no GPU: the CPU pool does it all."""

    def __init__(
        self,
        embedder: NodeEmbedder | None,
        pool: CpuPool,
        *,
        device: str,
        note: str,
        tokens_per_s: float,
        observer: Observer,
        stop: threading.Event | None = None,
    ) -> None:
        self._stop = stop or threading.Event()
        self._lock = threading.Lock()
        self.embedder = embedder
        self.pool = pool
        self.device = device
        self.note = note
        self.tokens_per_s = tokens_per_s
        self.observer = observer
        self.budget_series: list[BudgetMark] = []
        self._marks_lock = threading.Lock()
        self._started = time.monotonic()

    def start_clock(self) -> None:
        """Count the budget's marks from now on, as the sampler counts its readings."""
        self._started = time.monotonic()

    def _mark(
        self,
        nodes: int,
        budget_bytes: int,
        predicted_bytes: int | None = None,
        peak_bytes: int | None = None,
        step: StepKind | None = None,
    ) -> None:
        with self._marks_lock:
            last = next((mark for mark in reversed(self.budget_series) if mark.step is None), None)
            if step is None and last is not None and (last.budget_bytes, last.batch_nodes) == (budget_bytes, nodes):
                return  # only where something changed: a long run has millions of micro-batches
            if step is not None and last is not None:
                budget_bytes = last.budget_bytes  # a spilled node's own need is no budget
            seconds = time.monotonic() - self._started
            mark = BudgetMark(seconds, budget_bytes, nodes, predicted_bytes, peak_bytes, step)
            self.budget_series = thin_marks([*self.budget_series, mark], MAX_MARKS)

    def _watch(self, partition_index: int, nodes: int) -> Watch:
        progress = _Progress(self.observer, partition_index, nodes, self.device)

        def on_step(step: LadderStep) -> None:
            self._mark(step.nodes_after, step.budget_after_bytes, step=step.kind)
            self.observer.ladder_step(partition_index, step)

        def on_memory(nodes: int, budget_bytes: int, predicted_bytes: int, peak_bytes: int | None) -> None:
            self._mark(nodes, budget_bytes, predicted_bytes, peak_bytes)
            self.observer.micro_batch_measured(nodes, budget_bytes, predicted_bytes, peak_bytes)

        return Watch(progress, on_step, on_memory)

    def embed(self, token_ids: Sequence[TokenIds], partition_index: int) -> Embedded:
        """On the GPU, what it can't place goes to the pool; one caller at a time."""
        if self.embedder is None:
            raise DeviceError("There is no GPU to embed on: use spread_over_pool().")
        watch = self._watch(partition_index, len(token_ids))
        with self._lock:
            return self.embedder.embed(token_ids, watch)

    def spread_over_pool(self, token_ids: Sequence[TokenIds], partition_index: int, dimension: int) -> Embedded:
        """A share for each worker of the pool, long and short nodes alike in each; collect_spilled() waits for them."""
        embedded = start_embedding(token_ids, dimension, "cpu")
        watch = self._watch(partition_index, len(token_ids))
        for first in range(min(self.pool.workers, len(token_ids))):
            rows = np.arange(first, len(token_ids), self.pool.workers)
            share = token_ids[first :: self.pool.workers]
            embedded.spilled.append((rows, self.pool.submit(share, watch)))
        return embedded

    def close(self) -> None:
        """End every process, at the latest after the micro-batches that are under way."""
        self._stop.set()
        if self.embedder is not None:
            with self._lock:
                self.embedder.encoder.close()
        self.pool.close()


def start_devices(
    settings: IngestSettings, files: ModelFiles, observer: Observer, stop: threading.Event | None = None
) -> Devices:
    """Load the model where the settings say, and calibrate. `auto` without a usable GPU goes to the CPU pool and says so.

    Raises DeviceError where a device was asked for by name and can't be had, ModelError where the model can't be loaded.
    `stop`, once set, ends all embedding before the next micro-batch.
    """
    embedding = settings.embedding
    stop = stop or threading.Event()
    pool = make_pool(settings, files, stop)
    device, reason = choose_device(embedding.device)
    if device != "cpu":
        observer.stage("device", f"loading {files.name} on {device}")
        try:
            spill = pool if embedding.spill_to_cpu else None
            return _start_gpu(settings, files, device, pool, observer, stop, spill=spill)
        except DeviceError as error:
            if embedding.device != "auto":
                pool.close()
                raise
            reason = f"CUDA can't be used: {error}"
    observer.stage("device", f"loading {files.name} on the CPU pool")
    try:
        measured = pool.start()
    except BaseException:
        pool.close()
        raise
    note = f"CPU pool, {pool.workers} process{'es' if pool.workers > 1 else ''}: {reason}"
    speed = measured.tokens_per_s * pool.workers
    return Devices(None, pool, device="cpu", note=note, tokens_per_s=speed, observer=observer, stop=stop)


def start_pool_devices(
    pool: Pool, settings: IngestSettings, files: ModelFiles, observer: Observer, stop: threading.Event
) -> Devices:
    """What a worker of a work pool embeds on: one device on gpu-pool, this machine's CPU processes on cpu-pool.

    On gpu-pool what the device can't place stays without a vector, and is left for cpu-pool. There the knobs of the GPU's
    memory say nothing. Raises DeviceError, ModelError.
    """
    embedding = settings.embedding
    if pool == "cpu":
        on_cpu = embedding.model_copy(update={"device": "cpu"})
        budget = settings.budget.model_copy(update={"max_bytes": None, "fraction": 1.0, "max_micro_batch_tokens": None})
        return start_devices(settings.model_copy(update={"embedding": on_cpu, "budget": budget}), files, observer, stop)
    asked = os.environ.get("BALLAST_DEVICE", "").strip() or embedding.device  # the machine knows best what it has
    device, reason = choose_device(asked)
    if device == "cpu" and asked == "auto":
        raise DeviceError(
            f"This worker serves gpu-pool, and there is {reason}. Mend its driver or its CUDA_VISIBLE_DEVICES, or let it "
            "serve cpu-pool. BALLAST_DEVICE=cpu lets this machine's CPU pass for the device."
        )
    observer.stage("device", f"loading {files.name} on {device}")
    spill = LeftForCpuPool(files.dimension) if embedding.spill_to_cpu else None
    return _start_gpu(settings, files, device, make_pool(settings, files, stop), observer, stop, spill=spill)


def start_sampler(devices: Devices) -> Sampler:
    """Reads the memory of what these devices embed on, from now on: the GPU's by NVML, else the host's."""
    gpu = devices.embedder
    uuid = gpu.info.device_uuid if gpu is not None else ""
    tell = devices.observer.memory_read
    sampler: Sampler = MemorySampler(device_uuids=[uuid], on_reading=tell) if uuid else HostSampler(on_reading=tell)
    sampler.start()
    return sampler


class LeftForCpuPool:
    """Takes nodes that the device can't place and gives back none: the ingest run hands them to cpu-pool."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension

    def submit(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Future[Embedded]:  # noqa: ARG002
        left: Future[Embedded] = Future()
        left.set_result(start_embedding(token_ids, self._dimension, "cpu"))
        return left


def _start_gpu(
    settings: IngestSettings,
    files: ModelFiles,
    device: str,
    pool: CpuPool,
    observer: Observer,
    stop: threading.Event,
    *,
    spill: Spill | None,
) -> Devices:
    spec = make_spec(settings.embedding, settings.budget, files, device)
    encoder = ProcessEncoder(spec, batch_timeout_s=settings.embedding.batch_timeout_s)
    try:
        info = encoder.describe()
        observer.stage("calibrate", info.key.device_name)
        measured = measure_device(encoder, settings.embedding, settings.budget, settings.data_folder)
    except BaseException:
        encoder.close()
        raise
    embed_settings = to_embed_settings(settings.budget, info, measured.launch_tokens)
    embedder = NodeEmbedder(encoder, measured.fit, embed_settings, spill=spill, stop=stop)
    note = f"{info.key.device_name} ({info.device}), {info.key.precision}; memory model: {measured.note}"
    return Devices(
        embedder,
        pool,
        device=info.device,
        note=note,
        tokens_per_s=measured.tokens_per_s,
        observer=observer,
        stop=stop,
    )


def make_pool(settings: IngestSettings, files: ModelFiles, stop: threading.Event) -> CpuPool:
    """Fresh processes that embed on the CPU; none is started yet."""
    cores = len(os.sched_getaffinity(0))
    workers = settings.embedding.cpu_workers or max(1, cores // CORES_PER_CPU_WORKER)
    spec = make_spec(settings.embedding, settings.budget, files, "cpu", threads=max(1, cores // workers))

    def make_worker() -> tuple[NodeEmbedder, MeasuredDevice]:
        encoder = ProcessEncoder(spec, batch_timeout_s=settings.embedding.batch_timeout_s)
        try:
            measured = measure_device(encoder, settings.embedding, settings.budget, settings.data_folder)
            embed_settings = to_embed_settings(settings.budget, encoder.describe(), measured.launch_tokens)
        except BaseException:
            encoder.close()
            raise
        return NodeEmbedder(encoder, measured.fit, embed_settings, stop=stop), measured

    return CpuPool(make_worker, workers)


class _Progress:
    """Counts a partition's nodes for the observer; called from several of the pool's threads."""

    def __init__(self, observer: Observer, partition_index: int, nodes: int, device: str) -> None:
        self._observer = observer
        self._partition_index = partition_index
        self._nodes = nodes
        self._device = device
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, nodes: int, tokens: int, _budget_bytes: int) -> None:
        with self._lock:
            self._done += nodes
            done = self._done
        self._observer.micro_batch_done(self._partition_index, done, self._nodes, tokens, self._device)
