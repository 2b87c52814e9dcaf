"""The real encoder: a SentenceTransformer on one device. Pooling, prompts and normalisation are the model's own."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.backends.allocator import check_allocator_settings
from tasks.backends.device_memory import HeapTrimmer, read_cuda_memory, read_host_memory, read_processor_name
from tasks.backends.torch_model import (
    copy_to_host,
    count_weights_bytes,
    find_kernels,
    load_model,
    place_model,
    read_config,
    read_max_tokens,
    read_pad_id,
    read_shape,
    resolve_device,
    resolve_precision,
    wrap_transformer,
)
from tasks.errors import DeviceError, ModelError
from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, MemoryKey, Precision, TokenIds, Vectors

logger = logging.getLogger(__name__)

Classify = Callable[[Sequence[tuple[tuple[str, ...], str]]], Any]
"""policy.failures.classify_failure: (type names, message) of an exception and its causes -> a failure kind or None."""

NORM_TOLERANCE = 1e-3


class TorchEncoder:
    """One SentenceTransformer on one device, loaded at the first call. The contract is in tasks/backends/encoder.py."""

    def __init__(
        self,
        model_path: str,
        *,
        device: str,
        classify: Classify,
        precision: str = "auto",
        fraction: float = 1.0,
        revision: str = "",
        threads: int | None = None,
        profiles_memory: bool = False,
    ) -> None:
        """`fraction` of the device is what the process may take in all; `threads` of the CPU, all of them if None.

        A CPU's allocator keeps no peak: with `profiles_memory` torch's profiler tells it, for probes, at some cost of time.
        """
        self._model_path = model_path
        self._asked_device = device
        self._asked_precision = precision
        self._classify = classify
        self._fraction = fraction
        self._revision = revision
        self._threads = threads
        self._profiles_memory = profiles_memory
        self._trimmer: HeapTrimmer | None = None
        self._lanes: ThreadPoolExecutor | None = None
        self._given: Any = None
        self._model: Any = None
        self._reference: Any = None
        self._info: EncoderInfo | None = None
        self._device = ""
        self._pad_id = 0
        self._closed = False

    @classmethod
    def from_model(
        cls,
        model: Any,
        *,
        device: str,
        classify: Classify,
        precision: str = "auto",
        fraction: float = 1.0,
        revision: str = "in-memory",
        pooling: str = "cls",
    ) -> TorchEncoder:
        """An encoder over a model that is built already: a SentenceTransformer, or a transformers model with `pooling`.

        The model is moved and cast in place.
        """
        encoder = cls("", device=device, classify=classify, precision=precision, fraction=fraction, revision=revision)
        encoder._given = model if hasattr(model, "get_embedding_dimension") else wrap_transformer(model, pooling)
        return encoder

    def describe(self) -> EncoderInfo:
        """Load the model if it is not loaded. Raises ModelError or DeviceError."""
        if self._closed:
            raise DeviceError("This encoder is closed. Build a new one.")
        if self._info is None:
            self._load()
        assert self._info is not None
        return self._info

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        """Embed one micro-batch. Raises ModelError for token ids that are not this model's."""
        info = self.describe()
        self._check_token_ids(token_ids, info)
        started = time.perf_counter()
        try:
            outcome = self._embed(token_ids)
        except (RuntimeError, MemoryError, OSError) as error:
            kind = self._classify(to_failure_chain(error))
            if kind is None:
                raise
            message = f"{type(error).__name__}: {_first_line(error)}"
            _forget_frames(error)
        else:
            return replace(outcome, seconds=time.perf_counter() - started)
        # Here, outside `except`, nothing refers to the failed frames and their tensors any more.
        return BatchOutcome(kind=kind, message=message, seconds=time.perf_counter() - started)

    def read_memory(self) -> DeviceMemory:
        """The device's memory now, with the weights on it. Raises DeviceError where the device does not answer."""
        self.describe()
        if self._device == "cpu":
            return read_host_memory(self._fraction)
        try:
            return read_cuda_memory(self._device, self._fraction)
        except RuntimeError as error:
            raise DeviceError(
                f"{self._device} does not tell its memory: {_first_line(error)}. Replace the process."
            ) from error

    def release_memory(self) -> None:
        """Collect garbage and give cached blocks back. It synchronises: after an OOM, never per batch."""
        gc.collect()
        if self._device.startswith("cuda"):
            import torch

            try:
                torch.cuda.empty_cache()
            except RuntimeError as error:
                # It synchronises, so a fault of the failed batch may surface only here; the next encode reports it.
                logger.warning("empty_cache=failed device=%s reason=%r", self._device, _first_line(error))

    def restart(self) -> None:
        """Raises DeviceError: this encoder lives in the caller's process."""
        raise DeviceError(
            "This encoder runs in the caller's own process. Use a ProcessEncoder, which can replace its own."
        )

    def close(self) -> None:
        """Free the model and the device memory it took."""
        self._closed = True
        if self._lanes is not None:
            self._lanes.shutdown()
        self._given = self._model = self._reference = None
        self.release_memory()

    # ------------------------------------------------------------------------------------------ one micro-batch

    def _embed(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        if not token_ids:
            return BatchOutcome("done", vectors=np.empty((0, self.describe().dimension), np.float32))
        peak_bytes: int | None = None
        reserved_peak_bytes: int | None = None
        if self._device == "cpu" and self._profiles_memory:
            vectors, peak_bytes = self._forward_profiled(token_ids)
        elif self._device == "cpu":
            vectors = self._forward_in_lanes(token_ids)
            if self._trimmer is not None:
                self._trimmer.trim_if_grown()
        else:
            vectors, peak_bytes, reserved_peak_bytes = self._forward_measured(token_ids)
        bad = np.flatnonzero(~is_unit(vectors))
        redone = 0
        if bad.size and self.describe().key.precision != "fp32":
            vectors, redone = self._redo(vectors, token_ids, bad)
            bad = np.flatnonzero(~is_unit(vectors))
        return BatchOutcome(
            "done",
            vectors=vectors,
            bad_rows=tuple(int(row) for row in bad),
            redone_fp32=redone,
            peak_bytes=peak_bytes,
            reserved_peak_bytes=reserved_peak_bytes,
        )

    def _forward_measured(self, token_ids: Sequence[TokenIds]) -> tuple[Vectors, int, int]:
        """Vectors, and the peaks of allocated and of reserved bytes above what was allocated before."""
        import torch

        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        vectors = self._forward(self._model, self._device, token_ids)
        # Faults are reported asynchronously: only after this is the micro-batch done.
        torch.cuda.synchronize(self._device)
        peak_bytes = torch.cuda.max_memory_allocated(self._device) - before
        return vectors, peak_bytes, torch.cuda.max_memory_reserved(self._device) - before

    def _forward_profiled(self, token_ids: Sequence[TokenIds]) -> tuple[Vectors, int]:
        """Vectors, and the peak of what torch's CPU allocator handed out, from the profiler's allocation events."""
        import torch

        cpu = torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
            vectors = self._forward(self._model, "cpu", token_ids)
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        in_time = sorted(events, key=lambda event: event.start_ns())
        return vectors, int(np.cumsum([event.nbytes() for event in in_time]).max(initial=0))

    def _forward_in_lanes(self, token_ids: Sequence[TokenIds]) -> Vectors:
        """The rows shared out among threads that compute alone, where there is a row for each.

        A small model's operators are too short to be shared out one by one: 1.09 to 1.16 times the tokens/s of MiniLM on
        two cores. The peak is that of the whole batch: the parts together hold what it would hold. A caller's own model is
        left in one thread: its hooks may not be made for two.
        """
        import torch

        count = self._threads or 1
        if not self._model_path or count < 2 or len(token_ids) < count:
            return self._forward(self._model, "cpu", token_ids)
        if self._lanes is None:
            # In torch the number of threads is each calling thread's own.
            self._lanes = ThreadPoolExecutor(count, "lane", initializer=torch.set_num_threads, initargs=(1,))
        bounds = np.linspace(0, len(token_ids), count + 1).astype(int)
        parts = [token_ids[start:end] for start, end in pairwise(bounds)]
        futures = [self._lanes.submit(self._forward, self._model, "cpu", part) for part in parts]
        wait(futures)  # all of them, a failed one too: what comes after an OOM finds the memory free
        return np.concatenate([future.result() for future in futures])

    def _forward(self, model: Any, device: str, token_ids: Sequence[TokenIds]) -> Vectors:
        """Unit vectors, shape (nodes, dimension); a row that overflowed comes out as NaN."""
        import torch

        lengths = np.fromiter((len(ids) for ids in token_ids), np.int64, len(token_ids))
        padded_tokens = int(lengths.max())
        padded = np.full((len(token_ids), padded_tokens), self._pad_id, np.int64)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = ids
        with torch.inference_mode():
            features = {"input_ids": torch.from_numpy(padded).to(device)}
            # Equal lengths need no mask at all. Given one of ones, transformers looks at every value of it to find that
            # out, and so waits for the device; pooling takes a missing mask for all ones.
            if int(lengths.min()) != padded_tokens:
                mask = np.arange(padded_tokens) < lengths[:, None]
                features["attention_mask"] = torch.from_numpy(mask.astype(np.int64)).to(device)
            # fp32 before the norm: the sum of squares of an fp16 vector overflows from 65,504 on.
            embeddings = model(features)["sentence_embedding"].to(torch.float32)
            # Matryoshka: get_embedding_dimension() is the truncated one, and only SentenceTransformer.encode truncates.
            embeddings = embeddings[:, : getattr(model, "truncate_dim", None)]
            vectors = embeddings / torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
            result: Vectors = vectors.cpu().numpy()
        return result

    def _redo(self, vectors: Vectors, token_ids: Sequence[TokenIds], bad: NDArray[np.int64]) -> tuple[Vectors, int]:
        """The `bad` rows once more in fp32 on the host, one at a time: a full device has no room for a second model."""
        if self._reference is None:
            logger.warning(
                "redo_fp32=%d device=%s precision=%s: vectors overflowed; loading the model in fp32 on the host to "
                "redo them. If this happens often, set embedding.precision=fp32.",
                bad.size,
                self._device,
                self.describe().key.precision,
            )
            self._reference = load_model(self._model_path, "fp32") if self._model_path else copy_to_host(self._model)
            self._reference.eval()
        vectors = vectors.copy()
        for row in bad:
            vectors[row] = self._forward(self._reference, "cpu", [token_ids[row]])[0]
        return vectors, int(is_unit(vectors[bad]).sum())

    def _check_token_ids(self, token_ids: Sequence[TokenIds], info: EncoderInfo) -> None:
        """On a GPU a wrong id is a device-side assert that costs the process: find it here."""
        for row, ids in enumerate(token_ids):
            if not 0 < len(ids) <= info.max_tokens:
                raise ModelError(
                    f"Row {row} has {len(ids)} tokens; this model takes 1 to {info.max_tokens}. Chunk again."
                )
            if int(ids.max()) >= info.shape.vocabulary or int(ids.min()) < 0:
                raise ModelError(
                    f"Row {row} has the token id {int(ids.max())}; this model's vocabulary ends at "
                    f"{info.shape.vocabulary - 1}. The text was chunked for another model: chunk it again."
                )

    # ------------------------------------------------------------------------------------------ loading

    def _load(self) -> None:
        import torch

        if self._threads is None:
            self._threads = torch.get_num_threads()
        else:
            torch.set_num_threads(self._threads)
        device = resolve_device(self._asked_device)
        precision = resolve_precision(self._asked_precision, device)
        if device != "cpu":
            if self._given is None:
                # Else a context of some hundred MB appears on cuda:0, too. A caller's own model leaves the choice to it.
                torch.cuda.set_device(device)
            if self._fraction < 1:
                torch.cuda.set_per_process_memory_fraction(self._fraction, device)
        model = self._given if self._given is not None else load_model(self._model_path, precision)
        weights_bytes = count_weights_bytes(model)
        refusal = ""
        try:
            self._model = place_model(model, device, precision)
        except (RuntimeError, MemoryError) as error:
            if self._classify(to_failure_chain(error)) is None:
                raise
            refusal = f"{type(error).__name__}: {_first_line(error)}"
            _forget_frames(error)
        if refusal:
            model.to("cpu")  # what was moved before the refusal must not stay on a full device
            raise DeviceError(
                f"The model's weights ({weights_bytes:,} bytes) could not be put on {device}: {refusal}. "
                "Free memory on the device, raise budget.fraction, or choose a smaller model (see ballast plan)."
            )
        self._given = None
        self._device = device
        self._pad_id = read_pad_id(self._model)
        self._info = self._read_info(device, precision)
        if device == "cpu":
            self._trimmer = HeapTrimmer()
        else:
            check_allocator_settings()

    def _read_info(self, device: str, precision: Precision) -> EncoderInfo:
        import torch

        unmasked, masked = find_kernels(self._model, device, precision)
        if device == "cpu":
            name, total_bytes, uuid = read_processor_name(), read_host_memory().total_bytes, ""
        else:
            properties = torch.cuda.get_device_properties(device)
            name, total_bytes, uuid = properties.name, properties.total_memory, str(getattr(properties, "uuid", ""))
        return EncoderInfo(
            key=MemoryKey(
                model_revision=self._revision,
                precision=precision,
                attention=str(getattr(read_config(self._model), "_attn_implementation", "sdpa")),
                torch_version=str(torch.__version__),
                device_name=name,
                device_total_bytes=total_bytes,
            ),
            device=device,
            dimension=int(self._model.get_embedding_dimension()),
            max_tokens=read_max_tokens(self._model),
            shape=read_shape(self._model),
            weights_bytes=count_weights_bytes(self._model),
            kernel_masked=masked,
            kernel_unmasked=unmasked,
            device_uuid=uuid,
        )


def is_unit(vectors: Vectors) -> NDArray[np.bool_]:
    """Which rows are finite and of length 1; shape (nodes,)."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
        unit: NDArray[np.bool_] = np.isfinite(vectors).all(axis=1) & (np.abs(norms - 1) < NORM_TOLERANCE)
    return unit


def to_failure_chain(error: BaseException) -> list[tuple[tuple[str, ...], str]]:
    """Type names (base classes too) and message of an exception and of what it was raised from, outermost first."""
    chain: list[tuple[tuple[str, ...], str]] = []
    for one in _walk_causes(error):
        names = tuple(base.__name__ for base in type(one).__mro__ if base is not object)
        chain.append((names, str(one)))
    return chain


def _walk_causes(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def _forget_frames(error: BaseException) -> None:
    for one in _walk_causes(error):
        traceback.clear_frames(one.__traceback__)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"
