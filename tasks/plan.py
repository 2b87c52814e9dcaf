"""`ballast plan`: what an ingest would do and need. Nothing is embedded, nothing is written, no GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from tasks.backends.model_files import resolve_model
from tasks.backends.nvml import read_total_bytes
from tasks.backends.sources import open_source
from tasks.backends.tokenizer import export_tokenizer, name_export
from tasks.config import IngestSettings
from tasks.engine.chunk import count_workers, iter_chunked
from tasks.engine.fingerprint import make_chunk_spec
from tasks.engine.measure_device import GPU_BATCH_TOKENS
from tasks.observe import current_observer
from tasks.policy.catalog import compare_models, weights_bytes
from tasks.policy.memory import MemoryModel, derive_prior
from tasks.policy.micro_batches import MicroBatchPlan, plan_micro_batches, summarise_plan
from tasks.policy.partitions import MIN_PARTITION_TOKENS, plan_partitions
from tasks.records import ModelFiles, PlanReport, Precision, Rejection

T4_BYTES = 15 * 1024**3  # what a T4 has left of its 16 GB under ECC; the card this project is for
CONTEXT_BYTES = 512 * 1024**2  # CUDA's own: context, kernels, libraries; 300-600 MiB on the cards at hand


def plan_source(settings: IngestSettings, gpu_memory_bytes: int | None = None) -> PlanReport:
    """Read and chunk the source and plan every micro-batch within the device memory given, by the closed-form prior.

    `gpu_memory_bytes`: the card's memory; None: this machine's, else a T4's. Raises SourceError, ModelError.
    """
    total_bytes, whose = _find_memory(gpu_memory_bytes)
    files = resolve_model(settings.embedding.model, settings.embedding.revision)
    precision: Precision = "fp16" if settings.embedding.precision == "auto" else settings.embedding.precision
    rejections: list[Rejection] = []
    documents = 0

    current_observer.get().stage("read and chunk", settings.source.uri)

    def read_lengths() -> Iterator[int]:
        nonlocal documents
        source = open_source(settings.source, leave_out=settings.own_folders)
        with TemporaryDirectory(prefix="ballast-plan-") as scratch:
            spec = make_chunk_spec(settings, files, _borrow_tokenizer(files, settings.data_folder, scratch))
            for item in iter_chunked(iter(source), spec, count_workers(settings.chunking.workers)):
                documents += 1
                if isinstance(item, Rejection):
                    rejections.append(item)
                else:
                    yield from (node.tokens for node in item.nodes)

    lengths = np.fromiter(read_lengths(), np.int64)
    model = derive_prior(files.shape, precision, "sdpa", "sdpa")
    weights = weights_bytes(files.shape, precision)
    usable = int((total_bytes * settings.budget.fraction - CONTEXT_BYTES) * (1 - settings.budget.margin_fraction))
    budget = max(0, usable - weights)
    if settings.budget.max_bytes is not None:
        budget = min(budget, int(settings.budget.max_bytes))
    # Without a device there is no measured speed: partitions are cut at their number of nodes, as on a fast one.
    boundaries = plan_partitions(
        lengths, settings.partition.max_nodes, settings.partition.max_tokens or MIN_PARTITION_TOKENS * 40
    )
    plans = _plan_partitions(
        lengths, boundaries, model, budget, settings.budget.max_micro_batch_tokens or GPU_BATCH_TOKENS
    )
    summaries = [summarise_plan(plan, part) for plan, part in plans]
    tokens = sum(one.tokens for one in summaries)
    return PlanReport(
        model=files.name,
        documents=documents,
        rejections=rejections,
        nodes=int(lengths.size),
        tokens=int(lengths.sum()),
        longest_tokens=int(lengths.max(initial=0)),
        partitions=max(0, len(boundaries) - 1),
        micro_batches=sum(one.micro_batches for one in summaries),
        unmasked_token_fraction=sum(one.unmasked_token_fraction * one.tokens for one in summaries) / tokens
        if tokens
        else 1.0,
        padding_fraction=1 - tokens / padded if (padded := sum(_count_padded(plan) for plan, _ in plans)) else 0.0,
        budget_bytes=budget,
        weights_bytes=weights,
        predicted_peak_bytes=max((one.peak_bytes for one in summaries), default=0),
        spilled_nodes=sum(int(plan.oversized.size) for plan, _ in plans),
        memory_model=f"closed-form prior, {precision}, for {whose}",
        models=compare_models(lengths, usable, precision, chosen=files.shape),
    )


def _borrow_tokenizer(files: ModelFiles, data_folder: str, scratch: str) -> str:
    """The tokenizer's file: an ingest's where there was one, else one of our own that goes when the plan is made."""
    kept = name_export(files.revision, f"{data_folder}/tokenizers")
    return str(kept) if kept.is_file() else export_tokenizer(files.path, files.revision, scratch)


def _find_memory(gpu_memory_bytes: int | None) -> tuple[int, str]:
    if gpu_memory_bytes is not None:
        return gpu_memory_bytes, "the memory given"
    here = read_total_bytes()
    if here is not None:
        return here, "this machine's GPU"
    return T4_BYTES, "a T4, as no GPU is here and no --gpu-memory was given"


def _plan_partitions(
    lengths: NDArray[np.int64], boundaries: NDArray[np.int64], model: MemoryModel, budget: int, max_tokens: int
) -> list[tuple[MicroBatchPlan, NDArray[np.int64]]]:
    parts = [lengths[first:last] for first, last in pairwise(boundaries)]
    return [(plan_micro_batches(part, model, budget, max_tokens=max_tokens), part) for part in parts]


def _count_padded(plan: MicroBatchPlan) -> int:
    return sum(batch.nodes * batch.padded_tokens for batch in plan.batches)
