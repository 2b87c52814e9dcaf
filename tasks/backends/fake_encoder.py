"""An encoder without a model: deterministic vectors, a device with a hidden memory law, faults on demand."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tasks.errors import DeviceError, ModelError
from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, MemoryKey, ModelShape, TokenIds, Vectors

GIB = 1024**3
SMALL_SHAPE = ModelShape(layers=2, hidden=64, heads=4, intermediate=256, vocabulary=30_522, max_tokens=8192)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another program that holds `taken_bytes` of the device from encode call `from_call` on, until `until_call`."""

    from_call: int
    until_call: int
    taken_bytes: int


@dataclass(frozen=True, slots=True)
class FakeCall:
    """One encode call as it arrived, and what came of it. Rows are named by hash_row of their token ids."""

    rows: tuple[str, ...]
    padded_tokens: int
    masked: bool
    peak_bytes: int
    kind: Literal["done", "oom", "ambiguous", "sticky"]


@dataclass
class FakeEncoder:
    """Peak of a batch of b rows of s tokens: c0 + c1 b s, and c2 b s^2 more where it is masked.

    A batch whose peak exceeds the free memory is out of memory. Faults go by encode call, counted from 0 on through
    restarts.
    """

    total_bytes: int = 16 * GIB
    weights_bytes: int = GIB
    c0: float = 16 * 1024**2
    c1: float = 64 * 1024
    c2: float = 64.0
    dimension: int = 32
    max_tokens: int = 8192
    device: str = "cuda:0"
    fraction: float = 1.0
    oom_calls: Collection[int] = ()
    ambiguous_calls: Collection[int] = ()
    sticky_calls: Collection[int] = ()
    always: Literal["oom", "ambiguous", "sticky"] | None = None
    fault: Callable[[Sequence[TokenIds]], Literal["oom", "ambiguous", "sticky"] | None] | None = (
        None  # by what is in it
    )
    neighbours: Sequence[Neighbour] = ()
    overflowing: Collection[str] = ()  # rows that are NaN in fp16 and right in fp32
    hopeless: Collection[str] = ()  # rows that are NaN in fp32, too
    restarts_left: int | None = None  # a device that can't be had again after so many restarts
    calls: list[FakeCall] = field(default_factory=list)
    released: int = 0
    restarts: int = 0

    def __post_init__(self) -> None:
        self._lost = False
        self._closed = False

    @property
    def finished(self) -> Counter[str]:
        """How often each row was embedded: all ones where no finished node was embedded twice."""
        return Counter(row for call in self.calls if call.kind == "done" for row in call.rows)

    def predict_peak(self, nodes: int, padded_tokens: int, masked: bool) -> int:
        """The hidden law, for a test that wants to know better than the memory model."""
        attention = self.c2 * nodes * padded_tokens**2 if masked else 0.0
        return int(self.c0 + self.c1 * nodes * padded_tokens + attention)

    def describe(self) -> EncoderInfo:
        self._require_open()
        return EncoderInfo(
            key=MemoryKey("fake", "fp16", "sdpa", "0", "fake device", self.total_bytes),
            device=self.device,
            dimension=self.dimension,
            max_tokens=self.max_tokens,
            shape=SMALL_SHAPE,
            weights_bytes=self.weights_bytes,
            kernel_masked="math",
            kernel_unmasked="sdpa",
        )

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        self._require_open()
        lengths = [len(ids) for ids in token_ids]
        if not lengths:
            return BatchOutcome("done", vectors=np.empty((0, self.dimension), np.float32))
        if min(lengths) < 1 or max(lengths) > self.max_tokens:
            raise ModelError(f"A row has {max(lengths)} tokens; this model takes 1 to {self.max_tokens}.")
        masked = min(lengths) != max(lengths)
        peak_bytes = self.predict_peak(len(lengths), max(lengths), masked)
        kind = self._decide(len(self.calls), token_ids, peak_bytes)
        self._lost = self._lost or kind == "sticky"
        rows = tuple(hash_row(ids) for ids in token_ids)
        self.calls.append(FakeCall(rows, max(lengths), masked, peak_bytes, kind))
        if kind != "done":
            return BatchOutcome(kind, message=f"injected: {kind} in call {len(self.calls) - 1}")
        vectors = np.stack([to_unit_vector(ids, self.dimension) for ids in token_ids])
        bad = [index for index, row in enumerate(rows) if row in self.hopeless]
        vectors[bad] = np.nan
        return BatchOutcome(
            "done",
            vectors=vectors,
            bad_rows=tuple(bad),
            redone_fp32=sum(row in self.overflowing and row not in self.hopeless for row in rows),
            seconds=1e-6 * sum(lengths),
            peak_bytes=peak_bytes if self.device != "cpu" else None,
            reserved_peak_bytes=peak_bytes if self.device != "cpu" else None,
        )

    def read_memory(self) -> DeviceMemory:
        self._require_open()
        if self._lost:
            raise DeviceError("The fake device is lost. restart() the encoder.")
        return DeviceMemory(
            total_bytes=self.total_bytes,
            free_bytes=max(0, self.total_bytes - self.weights_bytes - self._taken_by_neighbours(len(self.calls))),
            limit_bytes=int(self.fraction * self.total_bytes),
            reserved_bytes=self.weights_bytes,
            allocated_bytes=self.weights_bytes,
        )

    def release_memory(self) -> None:
        self.released += 1

    def restart(self) -> None:
        self._require_open()
        if self.restarts_left is not None and self.restarts >= self.restarts_left:
            raise DeviceError("The fake device does not come back.")
        self.restarts += 1
        self._lost = False

    def close(self) -> None:
        self._closed = True

    def _require_open(self) -> None:
        if self._closed:
            raise DeviceError("This encoder is closed. Build a new one.")

    def _decide(
        self, call: int, token_ids: Sequence[TokenIds], peak_bytes: int
    ) -> Literal["done", "oom", "ambiguous", "sticky"]:
        if self._lost or call in self.sticky_calls:
            return "sticky"
        if self.always is not None:
            return self.always
        if self.fault is not None and (kind := self.fault(token_ids)) is not None:
            return kind
        if call in self.ambiguous_calls:
            return "ambiguous"
        limit_bytes = int(self.fraction * self.total_bytes) - self.weights_bytes
        free_bytes = self.total_bytes - self.weights_bytes - self._taken_by_neighbours(call)
        return "oom" if call in self.oom_calls or peak_bytes > min(limit_bytes, free_bytes) else "done"

    def _taken_by_neighbours(self, call: int) -> int:
        return sum(one.taken_bytes for one in self.neighbours if one.from_call <= call < one.until_call)


def hash_row(token_ids: TokenIds) -> str:
    """A row's name in FakeCall: equal token ids, equal name."""
    return hashlib.sha256(np.ascontiguousarray(token_ids, np.int32).tobytes()).hexdigest()[:16]


def to_unit_vector(token_ids: TokenIds, dimension: int) -> Vectors:
    """The fake embedding: a float32 unit vector that depends on the token ids alone; shape (dimension,)."""
    seed = int(hash_row(token_ids), 16)
    vector = np.random.default_rng(seed).standard_normal(dimension)
    unit: Vectors = (vector / np.linalg.norm(vector)).astype(np.float32)
    return unit
