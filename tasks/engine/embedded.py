"""What embedding a partition takes and gives: settings, the working record of its vectors, who watches, where nodes spill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DeviceError, ModelError
from tasks.policy.ladder import (
    LadderSettings,
)
from tasks.policy.micro_batches import LAUNCH_TOKENS, MIN_TOKENS
from tasks.records import LadderStep, TokenIds, Vectors

MISSING, ON_DEVICE, ON_CPU = 0, 1, 2


@dataclass(frozen=True, slots=True)
class EmbedSettings:
    """What the loop needs of the knobs; see BudgetSettings and EmbeddingSettings in tasks/config.py."""

    max_micro_batch_tokens: int
    min_micro_batch_tokens: int = MIN_TOKENS
    launch_tokens: int = LAUNCH_TOKENS
    margin_fraction: float = 0.06
    max_budget_bytes: int | None = None
    ladder: LadderSettings = field(default_factory=LadderSettings)


@dataclass(slots=True)
class Embedded:
    """A partition's vectors and how they came about; rows are those of the partition."""

    vectors: Vectors
    placed: NDArray[np.int8]  # MISSING, ON_DEVICE or ON_CPU a row
    device: str
    failed: dict[int, str] = field(default_factory=dict)  # row -> reason
    steps: list[LadderStep] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    padding_tokens: int = 0
    redone_fp32: int = 0
    peak_bytes: int | None = None
    budget_bytes: int = 0
    seconds: float = 0.0
    spilled: list[tuple[NDArray[np.int64], Future[Embedded]]] = field(default_factory=list)

    @property
    def nodes(self) -> int:
        return int(self.placed.shape[0])

    def missing_rows(self) -> NDArray[np.int64]:
        rows = np.flatnonzero(self.placed == MISSING)
        return rows[[int(row) not in self.failed for row in rows]] if self.failed else rows

    def collect_spilled(self) -> Embedded:
        """Wait for the CPU pool and take its vectors in. Closed afterwards: every row is placed or failed.

        A pool that can't start is no reason to lose what the device has done: its nodes fail by name. What a pool that is
        closed had not begun stays missing.
        """
        for rows, future in self.spilled:
            try:
                error = future.exception()
            except CancelledError:
                self.placed[rows] = MISSING
                continue
            if isinstance(error, (DeviceError, ModelError)):
                self.placed[rows] = MISSING
                self.failed.update({int(row): f"no place on the device, nor on the CPU pool: {error}" for row in rows})
                continue
            spilled = future.result()
            self.vectors[rows] = spilled.vectors
            self.placed[rows] = np.where(spilled.placed == MISSING, MISSING, ON_CPU).astype(np.int8)
            self.failed.update({int(rows[row]): reason for row, reason in spilled.failed.items()})
            self.steps.extend(replace(step, reason=f"CPU pool: {step.reason}") for step in spilled.steps)
            self.redone_fp32 += spilled.redone_fp32
            if self.device == "cpu":
                # Not until the pool was done with it: partitions queue up there, and the wait is not this one's work.
                self.seconds = max(self.seconds, spilled.seconds)
                self.batch_sizes.extend(spilled.batch_sizes)
                self.padding_tokens += spilled.padding_tokens
                self.budget_bytes = max(self.budget_bytes, spilled.budget_bytes)
        self.spilled.clear()
        return self


@dataclass(frozen=True, slots=True)
class Watch:
    """Who is told: of each micro-batch's nodes, tokens and budget, of what it was to take and took, and of each step.

    on_memory(nodes, budget_bytes, predicted_bytes, peak_bytes): bytes on top of the weights; no peak where none is known.
    """

    on_batch: Callable[[int, int, int], None] = lambda _nodes, _tokens, _budget_bytes: None
    on_step: Callable[[LadderStep], None] = lambda _step: None
    on_memory: Callable[[int, int, int, int | None], None] = lambda _nodes, _budget, _predicted, _peak: None


UNWATCHED = Watch()


class Spill(Protocol):
    """Where nodes go that the device can't place: the CPU pool."""

    def submit(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Future[Embedded]: ...


def start_embedding(token_ids: Sequence[TokenIds], dimension: int, device: str) -> Embedded:
    nodes = len(token_ids)
    return Embedded(np.full((nodes, dimension), np.nan, np.float32), np.zeros(nodes, np.int8), device)
