"""Embed a partition's nodes on one device: plan, run, and on trouble go down the ladder. No node is embedded twice.

The decisions are in tasks/policy (ladder, budget, micro_batches, memory), the device behind tasks/backends/encoder.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tasks.backends.encoder import Encoder
from tasks.engine.embedded import (
    MISSING,
    ON_CPU,
    ON_DEVICE,
    UNWATCHED,
    Embedded,
    EmbedSettings,
    Spill,
    Watch,
    start_embedding,
)
from tasks.errors import DeviceError
from tasks.policy.budget import compute_budget
from tasks.policy.ladder import (
    Action,
    LadderState,
    clean_up,
    climb,
    replace_process,
    step_down,
)
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import MemoryFit, refine_fit
from tasks.policy.micro_batches import plan_micro_batches
from tasks.records import BatchOutcome, DeviceMemory, LadderStep, MemorySample, MicroBatch, StepKind, TokenIds

logger = logging.getLogger(__name__)

REGROWN = 1.25  # a budget a quarter above the planned one is worth a new plan, less is noise in the free memory


class NodeEmbedder:
    """One device, its memory model and its ladder; budget and model live on from partition to partition."""

    def __init__(
        self,
        encoder: Encoder,
        fit: MemoryFit,
        settings: EmbedSettings,
        *,
        spill: Spill | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        """`stop`, once set, ends embed() before the next micro-batch: what is done is done, the rest is missing."""
        self.encoder = encoder
        self.fit = fit
        self.settings = settings
        self.spill = spill
        self.stop = stop or threading.Event()
        self.state = LadderState()
        self.info = encoder.describe()

    def embed(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Embedded:
        """Every node gets a vector, a place in `spilled` or a reason in `failed`; unless the embedder was told to stop."""
        run = _PartitionRun(self, token_ids, watch)
        run.carry_out()
        return run.result

    @property
    def model(self) -> MemoryModel:
        return self.fit.model

    def learn(self, sample: MemorySample) -> bool:
        """Refine the memory model by what a micro-batch really took; True when it now predicts otherwise."""
        before = self.fit.model
        self.fit = refine_fit(self.fit, [sample])
        return self.fit.model != before


class _PartitionRun:
    """The loop over one partition; an object because its state is what the ladder works on."""

    def __init__(self, embedder: NodeEmbedder, token_ids: Sequence[TokenIds], watch: Watch) -> None:
        self.embedder = embedder
        self.watch = watch
        self.encoder = embedder.encoder
        self.settings = embedder.settings
        self.token_ids = token_ids
        self.lengths = np.fromiter((ids.shape[0] for ids in token_ids), np.int64, len(token_ids))
        self.result = start_embedding(token_ids, embedder.info.dimension, embedder.info.device)
        self.started = time.monotonic()
        self.batches: list[MicroBatch] = []  # what is left of the plan, the next one last
        self.planned_limit = 0
        embedder.state = embedder.state.start_partition()

    def carry_out(self) -> None:
        try:
            memory, budget = self._read_budget()
            self.result.budget_bytes = budget
            self._plan(budget, memory)
            while self.batches and not self.embedder.stop.is_set():
                self._advance()
        except DeviceError as error:
            # The device is gone and a new process does not bring it back: the CPU pool takes what is left.
            lost = str(error)
        else:
            lost = ""
        if lost:
            self._give_up(lost, None)
        self.result.seconds = time.monotonic() - self.started

    def _advance(self) -> None:
        """Run the next micro-batch, or, where the memory has changed under the plan, plan anew."""
        memory, budget = self._read_budget()
        limit = self.embedder.state.limit(budget)
        batch = self.batches[-1]
        if batch.predicted_bytes > limit and (batch.nodes > 1 or self._must_spill(batch, budget)):
            step_at = len(self.result.steps)
            self._plan(budget, memory)
            reason = f"the next micro-batch needs {batch.predicted_bytes:,} bytes, {limit:,} are left"
            self._record(
                "shrink", reason, batch, self.result.budget_bytes, memory, nodes_after=self._batch_of(batch), at=step_at
            )
        elif limit > self.planned_limit * REGROWN and len(self.batches) > 1:
            self._plan(budget, memory)
        else:
            self._run_batch(self.batches.pop(), budget, memory)

    # ------------------------------------------------------------------------------------------ one micro-batch

    def _run_batch(self, batch: MicroBatch, budget: int, memory: DeviceMemory) -> None:
        outcome = self.encoder.encode([self.token_ids[row] for row in batch.rows])
        if outcome.kind == "done":
            self._take(batch, outcome, budget)
            return
        state, settings = self.embedder.state, self.settings.ladder
        if outcome.kind == "oom":
            self.encoder.release_memory()
            state, action = step_down(state, settings, nodes=batch.nodes, predicted_bytes=batch.predicted_bytes)
        elif outcome.kind == "ambiguous":
            self.encoder.release_memory()
            state, action = clean_up(state, settings, nodes=batch.nodes)
        else:
            state, action = replace_process(state, settings, nodes=batch.nodes)
        self.embedder.state = state
        self._act(action, batch, outcome, memory)

    def _take(self, batch: MicroBatch, outcome: BatchOutcome, budget: int) -> None:
        result = self.result
        if outcome.vectors is None:
            raise DeviceError("The encoder says a micro-batch is done and gives no vectors: a defect in the encoder.")
        result.vectors[batch.rows] = outcome.vectors
        result.placed[batch.rows] = ON_DEVICE
        for row in outcome.bad_rows:
            bad = int(batch.rows[row])
            result.placed[bad] = MISSING
            result.failed[bad] = (
                "its vector is not finite or not of unit length, in fp32 too: the model can't embed this text"
            )
        tokens = int(self.lengths[batch.rows].sum())
        result.batch_sizes.append(batch.nodes)
        result.padding_tokens += batch.nodes * batch.padded_tokens - tokens
        if outcome.redone_fp32:
            result.redone_fp32 += outcome.redone_fp32
            memory = self.encoder.read_memory()
            reason = f"{outcome.redone_fp32} vectors overflowed in reduced precision and were made again in fp32"
            self._record("redo_fp32", reason, batch, budget, memory, nodes_after=batch.nodes)
        capped = self.embedder.state.cap_bytes
        self.embedder.state = climb(self.embedder.state, self.settings.ladder, budget_bytes=budget)
        if self.embedder.state.cap_bytes != capped:
            self._record(
                "grow",
                "a run of micro-batches went through",
                batch,
                capped or budget,
                self.encoder.read_memory(),
                nodes_after=batch.nodes,
            )
        if outcome.peak_bytes is not None:
            result.peak_bytes = max(result.peak_bytes or 0, outcome.peak_bytes)
        if outcome.peak_bytes is not None and not outcome.redone_fp32:
            sample = MemorySample(batch.nodes, batch.padded_tokens, batch.masked, outcome.peak_bytes)
            if self.embedder.learn(sample) and self.batches:
                self._repredict()
        limit = self.embedder.state.limit(budget)
        self.watch.on_memory(batch.nodes, limit, batch.predicted_bytes, outcome.peak_bytes)
        self.watch.on_batch(batch.nodes, tokens, limit)

    def _repredict(self) -> None:
        """The planned batches' predictions under the refined model; the loop shrinks those that no longer fit."""
        model = self.embedder.model
        self.batches = [
            replace(b, predicted_bytes=int(model.predict(b.nodes, b.padded_tokens, b.masked))) for b in self.batches
        ]

    # ------------------------------------------------------------------------------------------ the ladder's actions

    def _act(self, action: Action, batch: MicroBatch, outcome: BatchOutcome, memory: DeviceMemory) -> None:
        limit = batch.predicted_bytes
        kind: StepKind = "oom" if outcome.kind == "oom" else "restart"
        reason = outcome.message or outcome.kind
        match action:
            case "retry":
                self._record(
                    kind, f"{reason}; memory cleaned up, once more", batch, limit, memory, nodes_after=batch.nodes
                )
                self.batches.append(batch)
            case "replan":
                step_at = len(self.result.steps)
                self._replan()
                self._record(kind, reason, batch, limit, memory, nodes_after=self._batch_of(batch), at=step_at)
            case "restart":
                step_at = len(self.result.steps)
                self.encoder.restart()
                self._halve_suspects(batch)
                why = f"{reason}; the device process is replaced"
                self._record("restart", why, batch, limit, memory, nodes_after=self._batch_of(batch), at=step_at)
            case "spill_batch":
                self._record(kind, reason, batch, limit, memory)
                if outcome.kind != "oom":
                    self.encoder.restart()
                self._leave(batch.rows, f"{reason}, alone at {batch.padded_tokens} tokens", memory)
            case "spill_longer":
                self._record(kind, reason, batch, limit, memory)
                longer = self.result.missing_rows()
                longer = longer[self.lengths[longer] > batch.padded_tokens // 2]
                self._leave(
                    longer,
                    f"{reason}, again and again for single nodes of {batch.padded_tokens} tokens",
                    memory,
                    kind="exhausted",
                )
                self._replan()
            case "give_up":
                self._give_up(reason, memory)

    def _halve_suspects(self, batch: MicroBatch) -> None:
        """After a lost process the culprit among a batch's nodes is unknown: halving finds it, the others get through."""
        if batch.nodes == 1:
            self.batches.append(batch)
            return
        memory, budget = self._read_budget()
        state = self.embedder.state
        self.embedder.state = replace(state, cap_bytes=max(1, min(state.limit(budget), batch.predicted_bytes) // 2))
        self._plan(budget, memory)

    def _batch_of(self, batch: MicroBatch) -> int:
        """How many nodes go together now with the first of `batch`; 0 where it left the device."""
        return next((b.nodes for b in reversed(self.batches) if batch.rows[0] in b.rows), 0)

    def _give_up(self, reason: str, memory: DeviceMemory | None) -> None:
        self.batches.clear()
        rows = self.result.missing_rows()
        self._leave(rows, f"{reason}; the device is given up for this partition", memory, kind="exhausted")

    def _leave(
        self,
        rows: NDArray[np.int64],
        reason: str,
        memory: DeviceMemory | None,
        *,
        kind: StepKind = "spill",
        batch: MicroBatch | None = None,
    ) -> None:
        """Nodes leave the device: for the CPU pool, or, where there is none, for the list of failures."""
        if rows.size == 0:
            return
        longest = int(self.lengths[rows].max())
        if self.embedder.spill is None:
            way_out = "Lower chunking.max_tokens or, on a GPU, set embedding.spill_to_cpu=true."
            self.result.failed.update({int(row): f"{reason}. {way_out}" for row in rows})
        else:
            future = self.embedder.spill.submit([self.token_ids[row] for row in rows], self.watch)
            self.result.spilled.append((rows, future))
            self.result.placed[rows] = ON_CPU  # spoken for; collect_spilled() corrects it where the pool failed
        leaving = batch or MicroBatch(rows, longest, False, 0)
        self._record(kind, reason, replace(leaving, rows=rows), leaving.predicted_bytes, memory)

    # ------------------------------------------------------------------------------------------ planning

    def _replan(self) -> None:
        memory, budget = self._read_budget()
        self._plan(budget, memory)

    def _read_budget(self) -> tuple[DeviceMemory, int]:
        """Raises DeviceError when the device process is gone and a new one can't be had either."""
        settings = self.settings
        try:
            memory = self.encoder.read_memory()
        except DeviceError as error:
            died = str(error)
        else:
            return memory, compute_budget(
                memory, margin_fraction=settings.margin_fraction, max_bytes=settings.max_budget_bytes
            )
        logger.warning("device process lost reason=%s; a new one is started", died)
        self.encoder.restart()
        memory = self.encoder.read_memory()
        return memory, compute_budget(
            memory, margin_fraction=settings.margin_fraction, max_bytes=settings.max_budget_bytes
        )

    def _must_spill(self, batch: MicroBatch, budget: int) -> bool:
        """A single node over the budget leaves where there is a pool to take it; without one it is tried all the same."""
        return batch.predicted_bytes > budget and self.embedder.spill is not None

    def _plan(self, budget: int, memory: DeviceMemory) -> None:
        """Micro-batches for what has no vector yet. A node over the budget leaves; one over the ladder's cap goes alone."""
        model, settings = self.embedder.model, self.settings
        rows = self.result.missing_rows()
        limit = self.embedder.state.limit(budget)
        plan = plan_micro_batches(
            self.lengths[rows],
            model,
            limit,
            max_tokens=settings.max_micro_batch_tokens,
            min_tokens=settings.min_micro_batch_tokens,
            launch_tokens=settings.launch_tokens,
        )
        batches = [replace(batch, rows=rows[batch.rows]) for batch in plan.batches]
        alone = [
            MicroBatch(rows[[row]], int(tokens), False, int(model.predict(1, int(tokens), False)))
            for row, tokens in ((int(row), self.lengths[rows[row]]) for row in plan.oversized)
        ]
        leaving = [batch for batch in alone if self._must_spill(batch, budget)]
        staying = [batch for batch in alone if not self._must_spill(batch, budget)]
        self.batches = [*reversed(batches), *reversed(staying)]  # popped from the end: longest first
        self.planned_limit = limit
        if leaving:
            away = np.concatenate([batch.rows for batch in leaving])
            need = max(batch.predicted_bytes for batch in leaving)
            reason = f"one node alone needs up to {need:,} bytes, the budget is {budget:,}"
            self._leave(away, reason, memory, batch=leaving[0])

    def _record(
        self,
        kind: StepKind,
        reason: str,
        batch: MicroBatch,
        budget_before: int,
        memory: DeviceMemory | None,
        *,
        nodes_after: int = 0,
        at: int | None = None,
    ) -> None:
        step = LadderStep(
            kind=kind,
            reason=reason,
            nodes_before=batch.nodes,
            nodes_after=nodes_after,
            padded_tokens=batch.padded_tokens,
            budget_before_bytes=budget_before,
            budget_after_bytes=self.embedder.state.limit(budget_before),
            free_bytes=memory.free_bytes if memory else 0,
            at_s=time.monotonic() - self.started,
        )
        self.result.steps.insert(len(self.result.steps) if at is None else at, step)
        logger.info(
            "ladder step=%s nodes=%d->%d padded_tokens=%d budget_bytes=%d->%d free_bytes=%d reason=%s",
            kind, step.nodes_before, nodes_after, step.padded_tokens, budget_before, step.budget_after_bytes,
            step.free_bytes, reason,
        )  # fmt: skip
        self.watch.on_step(step)
