"""The data model: what moves between the stages. Frozen and slotted; arrays are numpy; sizes are bytes, times seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
"""One node's token ids, special tokens and prompt included; shape (tokens,)."""

Vectors = NDArray[np.float32]
"""L2-normalised embeddings, one row a node; shape (nodes, dimension)."""

Payload = dict[str, Any]
"""JSON-ready; LlamaIndex's node payload plus doc_id and generation."""


# ---------------------------------------------------------------------------------------------- documents and nodes


@dataclass(frozen=True, slots=True)
class Document:
    """One unit of the source. `doc_id` is stable: path or URI relative to the source, `file#id` for a row of a table."""

    doc_id: str
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    format: Literal["text", "markdown"] = "text"
    source_bytes: int = 0  # how much of the source this document took: drives the progress bar
    content_hash: str = ""  # of what was read, before it was parsed: equal means unchanged


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file that holds one document and has not been read yet: a worker process reads and chunks it."""

    doc_id: str
    uri: str
    format: str  # "md", "txt", "html", "pdf", "docx"
    source_bytes: int


@dataclass(frozen=True, slots=True)
class Rejection:
    """A document that did not make it, for the dead-letter list. `failed` ends a run red; `skipped` does not.

    `covers`: what begins like this may be in the source all the same, and went unseen: "sub/" for a folder that can't be
    listed, "table.csv#" for a table that broke off or has a row without a usable id. None of it counts as deleted.
    """

    doc_id: str
    status: Literal["failed", "skipped"]
    stage: Literal["read", "chunk", "embed", "upsert"]
    reason: str
    source_bytes: int = 0
    covers: str | None = None
    content_hash: str = ""  # of what could not be used; empty where it could not even be read


@dataclass(frozen=True, slots=True)
class Node:
    """One chunk, ready to embed and to store: `node_id` is the Qdrant point id."""

    node_id: str
    doc_id: str
    generation: str
    token_ids: TokenIds
    payload: Payload

    @property
    def tokens(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, slots=True)
class ChunkedDocument:
    """A document's nodes in document order; never empty (a document without text is a Rejection)."""

    doc_id: str
    generation: str
    nodes: tuple[Node, ...]
    source_bytes: int = 0
    content_hash: str = ""


@dataclass(frozen=True, slots=True)
class Partition:
    """A spooled file of nodes, sorted by token count, longest first: the unit of scheduling, retry and durability."""

    index: int
    path: str
    nodes: int
    tokens: int
    longest_tokens: int
    source_fraction: float  # how much of the source is in this partition and those before it, 0..1


# ---------------------------------------------------------------------------------------------- the ledger

LedgerStatus = Literal["pending", "done", "failed", "parked"]


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """What the ledger says of one document of one source. A document without a record has never been begun.

    done: committed, as `generation`. pending: a run has begun to write its points and has not committed it. failed: the last
    run could not use this content; the next ones try again. parked: they don't any more, until the content changes.
    """

    source: str  # which source it belongs to: source.name, or the normalised URI
    doc_id: str
    status: LedgerStatus
    content_hash: str  # of the content that `status` is about; empty where it could not be read
    generation: str = ""  # committed last; empty where none ever was
    nodes: int = 0  # its points
    nodes_digest: str = ""  # of their ids, whatever their order: policy.identity.compute_nodes_digest
    is_partial: bool = False  # points of a generation that was not committed may be there
    attempts: int = 0  # runs that failed on this content, one after the other
    stage: str = ""  # where it failed
    reason: str = ""
    updated_at: str = ""  # ISO 8601, UTC

    @property
    def has_points(self) -> bool:
        return self.nodes > 0 or self.is_partial


@dataclass(frozen=True, slots=True)
class StoredPoints:
    """A page of a collection's points, as they are: row i of each field is one point."""

    ids: Sequence[str]
    sources: Sequence[str]
    doc_ids: Sequence[str]
    generations: Sequence[str]
    document_nodes: Sequence[int]  # how many points its document has in this generation, as the payload says; 0: unsaid
    content_hashes: Sequence[str]
    vectors: Sequence[NDArray[np.float32] | None] | None  # None: not asked for; a None in it: no vector of our name


@dataclass(frozen=True, slots=True)
class CollectionState:
    """One physical collection of a name."""

    physical: str
    is_live: bool  # the alias points to it
    fingerprint: str
    model: str
    revision: str
    dimension: int
    points: int
    documents: int  # in its ledger


# ---------------------------------------------------------------------------------------------- model and device


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the closed-form memory prior needs to know of a transformer encoder."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    max_tokens: int

    @property
    def parameters(self) -> int:
        """Weights without the pooler: token and position tables, then per layer 4 h^2 attention and 2 h i feed-forward."""
        tables = (self.vocabulary + self.max_tokens) * self.hidden
        layer = (
            4 * self.hidden * self.hidden + 2 * self.hidden * self.intermediate + 9 * self.hidden + self.intermediate
        )
        return tables + self.layers * layer


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk: `revision` is the hub's commit, or a hash of the files' contents for a plain folder."""

    name: str
    path: str
    revision: str
    shape: ModelShape
    dimension: int
    max_tokens: int  # the limit of one sequence, special tokens included
    pooling: str  # e.g. "cls", "mean": part of the fingerprint
    document_prompt: str = ""
    query_prompt: str = ""


Precision = Literal["fp32", "fp16", "bf16"]
Attention = Literal["sdpa", "math", "flash_attention_2", "eager"]


@dataclass(frozen=True, slots=True)
class MemoryKey:
    """What a fitted memory model depends on; a fit is never used under another key."""

    model_revision: str
    precision: str
    attention: str
    torch_version: str
    device_name: str
    device_total_bytes: int


@dataclass(frozen=True, slots=True)
class EncoderInfo:
    """What an encoder says of itself once its model is loaded."""

    key: MemoryKey
    device: str  # "cuda:0", "cpu"
    dimension: int
    max_tokens: int
    shape: ModelShape
    weights_bytes: int
    kernel_masked: Attention  # which attention a padded batch gets: "math" materialises heads x s x s scores
    kernel_unmasked: Attention
    device_uuid: str = ""  # as CUDA tells it, for the NVML sampler; empty on the CPU


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One reading. `limit_bytes`: what this process may take in all (a cap, a cgroup, an rlimit), total if nothing caps it."""

    total_bytes: int
    free_bytes: int
    limit_bytes: int
    reserved_bytes: int = 0  # held by this process's allocator
    allocated_bytes: int = 0  # of it, in use by tensors, weights included


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What a probe or a micro-batch of `nodes` x `padded_tokens` really took on top of the weights."""

    nodes: int
    padded_tokens: int
    masked: bool
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """One row of a memory sampler's series: a device's by NVML, the host's by the kernel."""

    seconds: float  # since the sampler started
    device_uuid: str  # or "host"
    used_bytes: int
    free_bytes: int
    total_bytes: int
    process_bytes: int | None  # by this process and its children; None where the driver does not say
    worker: int = 0  # which run's, where those of several workers are shown together


@dataclass(frozen=True, slots=True)
class BudgetMark:
    """From here on, this budget and this batch were in force; on the same clock as MemoryReading.

    Or, where `step` says so, a step of the ladder, at the budget that was in force.
    """

    seconds: float
    budget_bytes: int
    batch_nodes: int
    predicted_bytes: int | None = None  # of one of its micro-batches, the first, on top of the weights
    peak_bytes: int | None = None  # what that took; None where the device does not tell (CPU)
    step: StepKind | None = None
    worker: int = 0


# ---------------------------------------------------------------------------------------------- embedding


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of a partition that go through the model together; `rows` index the partition's nodes."""

    rows: NDArray[np.int64]
    padded_tokens: int  # the longest row's tokens: every row is padded to it
    masked: bool  # False where all rows are equally long: no padding, no attention mask
    predicted_bytes: int

    @property
    def nodes(self) -> int:
        return int(self.rows.shape[0])


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What came of one micro-batch. Failures are returned, not raised: a raised one would pin the failed frame's tensors.

    done: `vectors` has a row a node; rows in `bad_rows` were not finite or not unit length even in fp32.
    oom: out of memory, shrink and go on. ambiguous: one retry after a clean-up, then a new process.
    sticky: the process is lost (illegal access, device-side assert, killed); only a new one helps.
    """

    kind: Literal["done", "oom", "ambiguous", "sticky"]
    vectors: Vectors | None = None
    bad_rows: tuple[int, ...] = ()
    redone_fp32: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None  # on top of the weights; None where the device does not tell (CPU)
    reserved_peak_bytes: int | None = None
    message: str = ""


StepKind = Literal["oom", "shrink", "grow", "spill", "restart", "exhausted", "redo_fp32"]


@dataclass(frozen=True, slots=True)
class LadderStep:
    """One visible step of the ladder: what happened, from what batch to what, and what the memory looked like."""

    kind: StepKind
    reason: str
    nodes_before: int
    nodes_after: int
    padded_tokens: int
    budget_before_bytes: int
    budget_after_bytes: int
    free_bytes: int
    at_s: float = 0.0  # since the partition started


@dataclass(frozen=True, slots=True)
class PartitionReport:
    """What became of one partition: closes as nodes == gpu + cpu + failed."""

    index: int
    nodes: int
    tokens: int
    gpu_nodes: int
    cpu_nodes: int
    failed_nodes: Mapping[str, str]  # node_id -> reason
    micro_batches: int
    batch_min: int
    batch_max: int
    peak_bytes: int | None
    budget_bytes: int
    seconds: float
    padding_tokens: int
    redone_fp32: int
    steps: Sequence[LadderStep]
    device: str

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def is_degraded(self) -> bool:
        return any(step.kind in ("oom", "spill", "restart", "exhausted") for step in self.steps)


# ---------------------------------------------------------------------------------------------- work pools

Pool = Literal["gpu", "cpu"]


@dataclass(frozen=True, slots=True)
class PoolReport:
    """What a worker's run says of one partition once its points are in Qdrant; rows are those of the partition's file.

    Every row is stored, failed or left, or was dealt with by the report of another pool.
    """

    partition: PartitionReport
    pool: Pool
    run_id: str
    start_up_s: float  # of the run's process and its model, before its first partition
    stored_rows: Sequence[int] | None  # None: all of them
    left_rows: Sequence[int] = ()  # found no place on this pool's device: for the CPU pool
    failed_rows: Mapping[int, str] = field(default_factory=dict)  # row -> reason


@dataclass(frozen=True, slots=True)
class SignOfLife:
    """Written by a worker's run every few seconds; a beat that stands still is a worker that is gone."""

    beat: int
    partition: int | None = None  # under way; None while it starts
    note: str = ""
    readings: Sequence[MemoryReading] = ()
    marks: Sequence[BudgetMark] = ()
    device: str = ""


# ---------------------------------------------------------------------------------------------- the run's books


@dataclass(frozen=True, slots=True)
class Books:
    """Closed when seen = unchanged + written + failed + skipped and planned = gpu + cpu + reused + failed nodes."""

    documents_seen: int
    documents_unchanged: int
    documents_written: int
    documents_failed: int
    documents_skipped: int
    nodes_planned: int
    nodes_gpu: int
    nodes_cpu: int
    nodes_reused: int
    nodes_failed: int
    points_counted: int  # as Qdrant counts them, exactly, when their documents are committed
    documents_deleted: int = 0  # apart from the others: they are not in the source any more
    documents_withheld: int = 0  # would be deleted; kept until confirmed


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What `ballast ingest` prints, what `--json` gives, and what the run's artifacts show."""

    collection: str
    physical_collection: str
    model: str
    fingerprint: str
    device: str
    device_note: str  # why this device: "no CUDA device: embedding on the CPU pool"
    books: Books
    rejections: Sequence[Rejection]
    partitions: Sequence[PartitionReport]
    memory_series: Sequence[MemoryReading]
    tokens: int
    seconds: Mapping[str, float]  # by stage: total, prepare, chunk, embed, upsert, orchestration
    budget_series: Sequence[BudgetMark] = ()  # shown next to memory_series
    notes: Sequence[str] = ()  # what a person should read: deletes withheld, a collection rebuilt or switched

    @property
    def spilled_fraction(self) -> float:
        """Share of the embedded nodes that left the GPU for the CPU pool; 0 where no GPU took part."""
        spilled = sum(report.cpu_nodes for report in self.partitions if report.device != "cpu")
        embedded = sum(report.gpu_nodes + report.cpu_nodes for report in self.partitions)
        return spilled / embedded if embedded else 0.0


# ---------------------------------------------------------------------------------------------- plan, search, calibrate


@dataclass(frozen=True, slots=True)
class ModelFit:
    """Whether one model fits the budget for these documents, by its public shape."""

    model: str
    parameters: int
    weights_bytes: int
    fits: bool
    max_tokens: int
    largest_batch: int  # nodes of the longest length that fit at once; 0: not even one
    spilled_nodes: int
    relative_cost: float  # floating point operations against the chosen model's


@dataclass(frozen=True, slots=True)
class PlanReport:
    """What `ballast plan` prints: nothing was embedded or written."""

    model: str
    documents: int
    rejections: Sequence[Rejection]
    nodes: int
    tokens: int
    longest_tokens: int
    partitions: int
    micro_batches: int
    unmasked_token_fraction: float
    padding_fraction: float
    budget_bytes: int
    weights_bytes: int
    predicted_peak_bytes: int
    spilled_nodes: int
    memory_model: str  # "fitted on NVIDIA T4 (...)" or "closed-form prior"
    models: Sequence[ModelFit]


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What `ballast calibrate` prints: coefficients of peak = c0 + c1 b s + c2 b s^2, and the error on held-back probes."""

    key: MemoryKey
    coefficients: Mapping[str, float]
    samples: Sequence[MemorySample]
    held_back: Sequence[MemorySample]
    held_back_predictions: Sequence[int]
    median_error: float  # of the held-back probes, relative
    worst_under: float  # how far the worst prediction lies below the measured peak, relative; 0: never under
    tokens_per_s: float
    seconds: float


@dataclass(frozen=True, slots=True)
class SearchHit:
    """One passage found."""

    score: float
    doc_id: str
    node_id: str
    text: str
    start_char: int | None
    end_char: int | None
    metadata: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------- verify

FindingKind = Literal[
    "missing_document",
    "surplus_document",  # it left the source
    "stale_document",
    "half_written",
    "missing_points",
    "surplus_points",
    "other_generation",
    "orphan_points",  # no ledger record, or nothing in them that says whose they are
    "wrong_dimension",
    "bad_vector",  # not finite, or not of unit length
    "unreadable",
]
Repair = Literal["ingest", "delete_points", "delete_document", "write_ledger", "nothing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is off with one document, and what mends it (an ingest follows every repair that needs one)."""

    kind: FindingKind
    source: str
    doc_id: str
    expected: str
    found: str
    repair: Repair


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `ballast verify` prints. Nothing is left where source, ledger and points agree."""

    collection: str
    physical_collection: str
    source: str  # empty where only ledger and points were compared
    documents: int
    points: int
    parked: int  # documents that are not tried any more; no finding while their content stays
    found: Sequence[Finding]
    repaired: Sequence[Finding]
    left: Sequence[Finding]  # all that was found, where nothing was to be repaired
    notes: Sequence[str] = ()  # what was withheld and why, and which source was not known
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        return not self.left
