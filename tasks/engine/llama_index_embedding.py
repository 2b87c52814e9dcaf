"""A drop-in for LlamaIndex: `Settings.embed_model = BallastEmbedding(model_name=...)` plans by memory instead of by count.

The same encoder, memory model and ladder as the flow's, in the caller's own process: no calibration, the closed form is
refined by every micro-batch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Literal

import numpy as np
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.embeddings.huggingface.utils import DEFAULT_HUGGINGFACE_EMBEDDING_MODEL

from tasks.backends.encoder import Encoder
from tasks.backends.torch_encoder import TorchEncoder
from tasks.backends.torch_model import check_prompt_pooling, copy_to_host, resolve_device
from tasks.config import BudgetSettings
from tasks.engine.calibrate import derive_encoder_prior
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import UNWATCHED, Embedded, Watch
from tasks.engine.measure_device import to_embed_settings
from tasks.errors import ConfigError, DeviceError
from tasks.policy.failures import classify_failure
from tasks.policy.memory_fit import start_fit
from tasks.policy.micro_batches import LAUNCH_TOKENS
from tasks.records import TokenIds

logger = logging.getLogger(__name__)

PLANNED_TEXTS = 8192
"""Texts that are planned together unless embed_batch_size is given: PartitionSettings.max_nodes, for the same reason."""

TOKENIZED_TEXTS = 256  # tokenized together: padded to the longest of them for a moment


class BallastEmbedding(HuggingFaceEmbedding):  # type: ignore[misc]
    """A HuggingFaceEmbedding that never runs out of device memory; takes the same arguments, gives the same vectors.

    What differs: a list of texts is sorted by length and packed by bytes; half precision on CUDA; out of memory makes
    the batch smaller instead of failing three times at the same size; a text that does not fit alone goes to the CPU;
    a truncated text is told of. An `embed_batch_size` that is given still bounds how many texts go together. Calls
    from several threads take turns. Raises ConfigError for arguments that ask for what it does not do.
    """

    embed_batch_size: int = Field(default=PLANNED_TEXTS, description="Texts that are planned together.", gt=0)
    spill_to_cpu: bool = Field(
        default=True, description="A text that does not fit the GPU alone is embedded on the CPU; off: a DeviceError."
    )
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto", description="auto: fp16 on CUDA, fp32 on the CPU."
    )
    budget: BudgetSettings = Field(
        default_factory=BudgetSettings, description="How much memory a micro-batch may take."
    )

    _running: _Running = PrivateAttr(default_factory=lambda: _Running())

    def __init__(
        self,
        model_name: str = DEFAULT_HUGGINGFACE_EMBEDDING_MODEL,
        *args: Any,
        embed_batch_size: int = PLANNED_TEXTS,
        device: str | None = None,
        normalize: bool = True,
        parallel_process: bool = False,
        spill_to_cpu: bool = True,
        precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto",
        budget: BudgetSettings | None = None,
        **kwargs: Any,
    ) -> None:
        if not normalize:
            raise ConfigError(
                "normalize=False was asked for; BallastEmbedding's vectors are of unit length, that is how it finds bad "
                "ones. Leave it out, or use HuggingFaceEmbedding."
            )
        if parallel_process:
            raise ConfigError(
                "parallel_process=True was asked for; its processes share a device and know nothing of each other's "
                "memory. Leave it out, or use HuggingFaceEmbedding."
            )
        resolved = resolve_device(device or _find_device())
        # On the host until the first call: there it is cast before it moves, so the device never holds it twice.
        super().__init__(model_name, *args, embed_batch_size=embed_batch_size, device="cpu", **kwargs)
        check_prompt_pooling(self._model)
        self._device = resolved
        self.spill_to_cpu = spill_to_cpu
        self.precision = precision
        self.budget = budget or BudgetSettings()

    @classmethod
    def class_name(cls) -> str:
        return "BallastEmbedding"

    @property
    def truncated_texts(self) -> int:
        """Texts so far of which the model saw only the first `max_length` tokens."""
        return self._running.truncated

    def _embed(self, inputs: list[str | BytesIO], prompt_name: str | None = None) -> list[list[float]]:
        """Every input's vector, in order. Raises DeviceError where some can't be had."""
        if prompt_name is None:  # images come without a prompt's name: the base class's business
            self._model.to(self._device)
            return super()._embed(inputs, prompt_name)  # type: ignore[no-any-return]
        with self._running.lock:
            embedder = self._running.embedder = self._running.embedder or self._start()
            token_ids = self._tokenize([str(text) for text in inputs], prompt_name, embedder.info.max_tokens)
            with self._watch(len(inputs)) as watch:
                embedded = embedder.embed(token_ids, watch).collect_spilled()
        if embedded.failed:
            row, reason = next(iter(embedded.failed.items()))
            raise DeviceError(
                f"{len(embedded.failed)} of {len(inputs)} texts could not be embedded. Text {row} with "
                f"{token_ids[row].shape[0]} tokens: {reason} Here: spill_to_cpu=True, or a smaller max_length."
            )
        return embedded.vectors.tolist()  # type: ignore[no-any-return]

    def _make_encoder(self) -> Encoder:
        """The model on its device; loads when it is first asked."""
        return TorchEncoder.from_model(
            self._model,
            device=self._device,
            classify=classify_failure,
            precision=self.precision,
            fraction=self.budget.fraction,
        )

    def _start(self) -> NodeEmbedder:
        encoder = self._make_encoder()
        info = encoder.describe()
        if (self._model.max_seq_length or info.max_tokens + 1) > info.max_tokens:
            self._model.max_seq_length = info.max_tokens
        spill = _HostSpill(self._model, self.budget) if self.spill_to_cpu and info.device != "cpu" else None
        return _make_embedder(encoder, self.budget, spill)

    def _tokenize(self, texts: Sequence[str], prompt_name: str, max_tokens: int) -> list[TokenIds]:
        """The model's own token ids, prompt and special tokens included, truncated at the model's limit."""
        prompt = self._model.prompts.get(prompt_name) or None
        token_ids: list[TokenIds] = []
        for first in range(0, len(texts), TOKENIZED_TEXTS):
            token_ids.extend(self._tokenize_some(texts[first : first + TOKENIZED_TEXTS], prompt))
        limit = min(self._model.max_seq_length or max_tokens, max_tokens)
        full = [text for text, ids in zip(texts, token_ids, strict=True) if ids.shape[0] >= limit]
        # One token more tells whether a text ends at the limit or was cut there.
        longer = self._tokenize_some(full, prompt, processing_kwargs={"text": {"max_length": limit + 1}})
        self._tell_truncated(sum(ids.shape[0] > limit for ids in longer), len(texts), limit)
        return token_ids

    def _tokenize_some(self, texts: Sequence[str], prompt: str | None, **options: Any) -> Iterator[TokenIds]:
        if not texts:
            return
        features = self._model.preprocess(list(texts), prompt=prompt, **options)
        masks = features["attention_mask"].numpy().astype(bool)
        for ids, mask in zip(features["input_ids"].numpy(), masks, strict=True):
            yield ids[mask].astype(np.int32)

    def _tell_truncated(self, truncated: int, texts: int, limit: int) -> None:
        running = self._running
        running.truncated += truncated
        # Again only when there are twice as many as were told of: a long ingestion does not flood the log.
        if truncated and running.truncated >= 2 * running.truncated_told:
            running.truncated_told = running.truncated
            logger.warning(
                "truncated_texts=%d of=%d max_tokens=%d so_far=%d model=%s: their ends are not in their vectors. "
                "Chunk smaller, with the model's own tokenizer, and count the metadata that is embedded with the text.",
                *(truncated, texts, limit, running.truncated, self.model_name),
            )

    @contextmanager
    def _watch(self, texts: int) -> Iterator[Watch]:
        if not self.show_progress_bar:
            yield UNWATCHED
            return
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with tqdm(total=texts, desc="Texts", leave=False) as bar:

            def show(nodes: int, *_tokens_and_memory: int) -> None:
                bar.update(nodes)

            yield Watch(on_batch=show)


@dataclass
class _Running:
    """What a first call starts. A copy of the embedding, in another process or here, starts its own."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    embedder: NodeEmbedder | None = None
    truncated: int = 0
    truncated_told: int = 0

    def __reduce__(self) -> tuple[type[_Running], tuple[()]]:
        return _Running, ()


class _HostSpill:
    """The CPU pool's part in the caller's process: an fp32 copy of the model on the host, made when first needed."""

    def __init__(self, model: Any, budget: BudgetSettings) -> None:
        self._model = model
        self._budget = budget
        self._embedder: NodeEmbedder | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spill")  # starts its thread with the first task

    def submit(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Future[Embedded]:
        """Raises DeviceError where the device is lost and the weights with it."""
        if self._embedder is None:
            logger.info("spill nodes=%d: loading the model in fp32 on the host", len(token_ids))
            # Here and not in the thread: the device is not computing now.
            encoder = TorchEncoder.from_model(self._copy_weights(), device="cpu", classify=classify_failure)
            self._embedder = _make_embedder(encoder, self._budget, None)
        return self._thread.submit(self._embedder.embed, token_ids, watch)

    def _copy_weights(self) -> Any:
        try:
            return copy_to_host(self._model)
        except RuntimeError as error:
            lost = str(error).strip().splitlines()[0]
        raise DeviceError(f"The device is lost ({lost}), and this process can't use it again. Start a new process.")


def _make_embedder(encoder: Encoder, budget: BudgetSettings, spill: _HostSpill | None) -> NodeEmbedder:
    info = encoder.describe()
    settings = to_embed_settings(budget, info, LAUNCH_TOKENS)
    return NodeEmbedder(encoder, start_fit(derive_encoder_prior(info)), settings, spill=spill)


def _find_device() -> str:
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"
