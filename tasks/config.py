"""Every knob: its name with unit, its default, and why. Used as the flow's parameters and by the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from tasks.errors import ConfigError
from tasks.url_secrets import has_password, has_secret_parameter

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0)]

STORED = "A knob is a parameter of the run: stored and shown in clear."
WAY_OUT = (
    "Take it out. Credentials come from the environment of whoever runs it: the driver's variables "
    '(AWS_SECRET_ACCESS_KEY, ...) or fsspec\'s (FSSPEC_FTP=\'{"username": "...", "password": "..."}\', or a file in '
    "~/.config/fsspec); QDRANT_API_KEY for Qdrant."
)
# For the deployments' parameter schema: Prefect's server refuses such a run before it is stored. It knows the usual
# spelling only; the validators below know all of them.
_NO_PASSWORD: JsonDict = {"pattern": r"^(?!.*://[^/:]*:[^/]+@)"}
_BARE_ADDRESS: JsonDict = {"pattern": r"^[^@?#]*$"}


class Settings(BaseModel):
    """A group of knobs: an unknown name is an error, never ignored. A URL with a password raises ConfigError, not a ValueError:
    pydantic would put the value into its own message, and Prefect that into the run's state.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_passwords(cls, values: Any) -> Any:
        for path, text in _find_texts(values):
            if has_password(text):
                raise ConfigError(f"{path or 'The settings'}: it has a password in it. {STORED} {WAY_OUT}")
        return values


def _find_texts(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a tree as it came, before anything of it is known to be right. What is validated already is left out."""
    match values:
        case str():
            yield path, values
        case dict():
            for name, value in values.items():
                yield from _find_texts(value, f"{path}.{name}" if path else str(name))
        case list() | tuple() | set():
            for value in values:
                yield from _find_texts(value, path)


def _check_spool(uri: str | None) -> str | None:
    if uri is not None and has_secret_parameter(uri):
        raise ConfigError(f"spool: it has a signature or a token in it. {STORED} {WAY_OUT}")
    return uri


def _check_qdrant_url(url: str | None) -> str | None:
    # Also without a scheme: user:password@host:6333. What Qdrant takes has neither.
    if url is not None and re.search(r"[@?#]", url):
        raise ConfigError(
            f"qdrant.url: it holds a user or password, a query or a fragment, which Qdrant does not use. {STORED} Give its "
            "address alone, https://host:6333, and the key in QDRANT_API_KEY."
        )
    return url


class SourceSettings(Settings):
    """Where the documents are."""

    uri: str = Field(
        description="A file, a folder, a glob, or an fsspec URL (s3://..., memory://...). One with a password is refused, and "
        "so is a signed one where pools.enabled is set; else it is kept, signature and all, in the run's parameters.",
        json_schema_extra=_NO_PASSWORD,
    )
    name: str | None = Field(
        None,
        description="What tells this source's documents from those of other sources in the collection; unset: the URI, made "
        "absolute. Name a source that moves (a fresh clone each time), or its documents are new ones after each move.",
    )
    max_attempts: Positive = Field(
        3, description="Runs that try a failing document; then it is parked until its content changes."
    )
    formats: tuple[str, ...] = Field(
        default=("md", "txt", "html", "pdf", "docx", "csv", "jsonl", "parquet"),
        description="File formats to read, by extension; others are reported as skipped.",
    )
    id_field: str = Field("id", description="Column or key that holds a row's id in csv, jsonl and parquet.")
    text_fields: tuple[str, ...] = Field(
        ("text",),
        description="Columns or keys whose values, joined by a blank line, are a row's text in csv, jsonl and parquet.",
    )
    metadata_fields: tuple[str, ...] | None = Field(
        None, description="Columns or keys kept as metadata in csv, jsonl and parquet; unset keeps all the others."
    )
    encoding: str = Field("utf-8", description="Encoding of text files without a byte order mark.")
    max_file_bytes: ByteSize = Field(
        ByteSize(512 * 1024**2),
        description="A larger md, txt, html, pdf or docx file is reported as failed: it is read whole.",
    )
    max_text_bytes: ByteSize = Field(
        ByteSize(16 * 1024**2),
        description="A document with more text fails, and so does a longer line of csv or jsonl: all its nodes are held at "
        "once, in about 20 times the text. 16 MiB are some 25,000 nodes.",
    )


class ChunkingSettings(Settings):
    """How documents become nodes. Every knob here is part of the fingerprint."""

    splitter: Literal["auto", "sentence", "markdown"] = Field(
        "auto", description="auto: Markdown-aware for Markdown, by sentences for the rest."
    )
    max_tokens: Positive | None = Field(
        None,
        description="Tokens of a node, prompt, embedded metadata and special tokens included; unset: the smaller of 512 and "
        "the model's limit.",
    )
    overlap_tokens: Annotated[int, Field(ge=0)] = Field(
        32, description="Tokens that a node repeats of the one before it."
    )
    embedded_metadata_keys: tuple[str, ...] = Field(
        ("title", "header_path"),
        description="Metadata that is embedded with the text; all other metadata is only stored.",
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes that chunk; 0: one a CPU core less one, at most 8. One alone starves a fast GPU."
    )


def _check_device(name: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ValueError("it can be auto, cpu, cuda or cuda:N")
    return name


class EmbeddingSettings(Settings):
    """The model and the device."""

    model: str = Field("BAAI/bge-m3", description="A model id on the hub, or a folder with a SentenceTransformer.")
    revision: str | None = Field(None, description="The hub's commit, branch or tag; unset: the default branch.")
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto", description="auto, cuda:N or cpu; auto is the first CUDA device, else the CPU pool."
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        "auto", description="auto: fp16 on CUDA, fp32 on the CPU (their vectors agree, cosine >= 0.999)."
    )
    spill_to_cpu: bool = Field(True, description="What the GPU can't place goes to the CPU pool; off: such nodes fail.")
    cpu_workers: Annotated[int, Field(ge=0)] = Field(
        0, description="Processes of the CPU pool; 0: one for each 4 cores."
    )
    calibrate: bool = Field(True, description="Probe an unknown device for some seconds before the first partition.")
    batch_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="A micro-batch that takes longer is a hung device: its process is replaced."
    )


class BudgetSettings(Settings):
    """How much device memory a micro-batch may take."""

    fraction: Fraction = Field(
        1.0, description="Share of the device this process may use in all; enforced by PyTorch's allocator on CUDA."
    )
    margin_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.06, description="Head-room kept of what is available: fragmentation, and a neighbour's small moves."
    )
    max_bytes: ByteSize | None = Field(
        None, description="Never plan a micro-batch above this; unset: what the device has."
    )
    grow_after: Positive = Field(8, description="Micro-batches without trouble before the budget grows back a step.")
    max_micro_batch_tokens: Positive | None = Field(
        None, description="Tokens of a micro-batch at most; unset: 32768 on CUDA, 2048 on a CPU."
    )


class PartitionSettings(Settings):
    """The unit of scheduling, retry and durability."""

    max_nodes: Positive = Field(
        32_768, description="Nodes of a partition at most; a slow device gets fewer, see target_s."
    )
    max_tokens: Positive | None = Field(
        None, description="Tokens of a partition at most; unset: what the device embeds in target_s, measured."
    )
    target_s: Annotated[float, Field(gt=0)] = Field(
        20.0,
        description="Work a partition should hold: below 5 s orchestration shows, above a minute a retry costs too much.",
    )
    max_host_bytes: ByteSize = Field(
        ByteSize(512 * 1024**2), description="Host memory a partition may take while it is built."
    )


class DeleteSettings(Settings):
    """What becomes of the points of documents that have left the source."""

    propagate: bool = Field(True, description="Delete them; off: they stay, and count as withheld.")
    max_documents: Annotated[int, Field(ge=0)] = Field(
        10, description="A run that would delete more documents than this, and more than max_fraction, deletes none."
    )
    max_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Share of the source's known documents; see max_documents."
    )
    confirmed: bool = Field(False, description="Delete whatever has left the source, however much: --confirm-deletes.")


class QdrantSettings(Settings):
    """Where the points go. The API key comes from QDRANT_API_KEY only, never from a parameter."""

    url: Annotated[str | None, AfterValidator(_check_qdrant_url)] = Field(
        None,
        description="A Qdrant server; unset: QDRANT_URL, else an embedded Qdrant in the data folder. Refused with a user, a "
        "password or a query in it.",
        json_schema_extra=_BARE_ADDRESS,
    )
    collection: str = Field("documents", description="Collection name; it becomes an alias of the physical collection.")
    batch_points: Annotated[int, Field(gt=0, le=4096)] = Field(256, description="Points of one upsert at most.")
    batch_bytes: ByteSize = Field(
        ByteSize(8 * 1024**2), description="Bytes of one upsert at most; Qdrant refuses 32 MiB."
    )
    timeout_s: Positive = Field(60, description="One request; the client's default of 5 s fails under load.")
    transport: Literal["auto", "grpc", "rest"] = Field(
        "auto", description="auto: gRPC where the server answers on grpc_port, else REST."
    )
    grpc_port: Annotated[int, Field(gt=0, le=65_535)] = Field(6334, description="The server's gRPC port.")
    outage_s: Annotated[float, Field(ge=0)] = Field(
        3600.0,
        description="How long a run waits for a Qdrant that is away before it ends red; what is chunked is embedded meanwhile.",
    )
    on_change: Literal["rebuild", "refuse"] = Field(
        "rebuild",
        description="Another model, chunking or prompt than the collection's: rebuild makes a new collection beside it and "
        "switches when its books close; refuse ends the run before any work.",
    )
    switch_incomplete: bool = Field(
        False, description="Switch to a rebuilt collection though other sources of the old one are not in it yet."
    )
    allow_plain_http: bool = Field(
        False, description="Send an API key over plain http to another host. Refused unless set."
    )


class PoolSettings(Settings):
    """Embedding on Prefect's work pools, on any number of machines, instead of in the run's own process."""

    enabled: bool = Field(
        False,
        description="Hand partitions to the two deployments below. Needs a Qdrant server, and a spool that every worker sees.",
    )
    gpu_deployment: str = Field("embed-partitions/gpu", description="Flow and deployment that embed on gpu-pool.")
    cpu_deployment: str = Field(
        "embed-partitions/cpu", description="The same on cpu-pool: takes what the GPU could not place."
    )
    gpu_runs: Positive = Field(4, description="Groups of partitions handed to gpu-pool at a time: one a GPU, or more.")
    cpu_runs: Positive = Field(2, description="The same for cpu-pool.")
    startup_fraction: Fraction = Field(
        0.05,
        description="Share of a group's time that process start and model load may take; sets how large a group is.",
    )
    group_tokens: Positive | None = Field(
        None, description="Tokens of a group at least; unset: what keeps startup_fraction, from what workers report."
    )
    max_attempts: Positive = Field(
        3,
        description="Runs of gpu-pool that may die over a partition; then it goes to cpu-pool, as often; then its nodes fail.",
    )
    silent_s: Annotated[float, Field(ge=5)] = Field(
        120.0,
        description="A worker that gives no sign of life in the spool for this long is dead; its partitions run elsewhere.",
    )
    pending_s: Annotated[float, Field(gt=0)] = Field(
        900.0,
        description="How long a worker may take from taking a run to starting it (a container's image is pulled).",
    )
    worker_wait_s: Annotated[float, Field(gt=0)] = Field(
        6 * 3600.0, description="How long a group waits for a worker to take it before the run ends red."
    )
    server_outage_s: Annotated[float, Field(ge=0)] = Field(
        900.0, description="How long a run waits for a Prefect server that is away; workers go on embedding meanwhile."
    )
    poll_s: Annotated[float, Field(gt=0)] = Field(2.0, description="Seconds between two looks at spool and server.")


class IngestSettings(Settings):
    """One ingest run."""

    source: SourceSettings
    chunking: ChunkingSettings = ChunkingSettings()
    embedding: EmbeddingSettings = EmbeddingSettings()
    budget: BudgetSettings = BudgetSettings()
    partition: PartitionSettings = PartitionSettings()
    deletes: DeleteSettings = DeleteSettings()
    qdrant: QdrantSettings = QdrantSettings()
    pools: PoolSettings = PoolSettings()
    collection_wait_s: Annotated[float, Field(ge=0)] = Field(
        86_400.0, description="How long a run waits for another run of its collection to end."
    )
    alert_spilled_fraction: Fraction = Field(
        0.1, description="A run that spills a larger share of its nodes to the CPU emits ballast.run.spilled."
    )
    data_folder: str = Field(
        ".ballast", description="Embedded Qdrant, spool, fitted memory models and the embedded Prefect API's database."
    )
    spool: Annotated[str | None, AfterValidator(_check_spool)] = Field(
        None,
        description="Working folder for partitions and vectors; unset: `spool` in the data folder. Refused with a password or "
        "a token in it.",
        json_schema_extra=_NO_PASSWORD,
    )
    spool_max_bytes: ByteSize = Field(
        ByteSize(4 * 1024**3),
        description="Embedded partitions that wait for Qdrant take this much at most; then the device waits.",
    )

    @property
    def own_folders(self) -> list[str]:
        """What Ballast writes: never part of a source that contains it."""
        return [self.data_folder, *([self.spool] if self.spool else [])]

    @model_validator(mode="before")
    @classmethod
    def _source_from_uri(cls, values: Any) -> Any:
        # `source: docs/` is short for `source: {uri: docs/}`: what a webhook or a hurried user writes.
        if isinstance(values, dict) and isinstance(values.get("source"), str):
            return {**values, "source": {"uri": values["source"]}}
        return values

    @model_validator(mode="after")
    def _refuse_signed_source(self) -> Self:
        # With pools the Prefect server is shared, and a signature is a key to the documents for whoever reads it there.
        if self.pools.enabled and has_secret_parameter(self.source.uri):
            raise ConfigError(
                f"source.uri: it has a signature or a token in it, and pools.enabled is set. {STORED} Everybody on the Prefect "
                "server could read it. Give the URL without it, s3://bucket/folder, and the credentials in the environment of "
                "ingest-pool's worker (AWS_SECRET_ACCESS_KEY, ...)."
            )
        return self


class GroupedPartition(Settings):
    """A partition in the spool, as records.Partition says it; `name` is its file's, in the run's folder."""

    index: Annotated[int, Field(ge=0)]
    name: str = Field(pattern=r"^partition-\d{6}-[0-9a-f]{16}\.parquet$")
    nodes: Positive
    tokens: Positive
    longest_tokens: Positive


class EmbedGroup(Settings):
    """What one run of embed-partitions works on: its other parameter, beside the ingest's own settings."""

    pool: Literal["gpu", "cpu"]
    spool: str = Field(description="The ingest run's folder in the shared spool.")
    collection: str = Field(description="The physical collection, which exists.")
    fingerprint: str = Field(description="Of the ingest: a worker with another model or revision refuses the work.")
    number: Annotated[int, Field(ge=0)] = Field(description="Groups of an ingest are numbered in the order they start.")
    partitions: Annotated[tuple[GroupedPartition, ...], Field(min_length=1)]
