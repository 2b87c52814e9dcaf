"""Bursts become runs: the first delivery creates one that collects, the burst's end gives it all paths and lets it start."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from deployments.receiver.config import HookSettings, ReceiverSettings
from deployments.receiver.group_commit import GroupCommit
from deployments.receiver.journal import Batch, Delivery, Receipt, unite
from deployments.receiver.runs import FlowRuns, RunsUnavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_PAUSE_S = 15.0
PRUNE_EVERY_S = 3600.0
# Of run_wait_s: a server that is slow to make the run holds up one sender, and not all of a burst for as long.
JOINED_WAIT = 0.25


class Batches:
    """One task a batch carries it from its first delivery to its release; the journal knows where each one is.

    A batch of an earlier process is carried on by start(). Prefect away: its task asks again until it is back.
    """

    def __init__(self, settings: ReceiverSettings, commits: GroupCommit, runs: FlowRuns) -> None:
        self._settings = settings
        self._hooks: Mapping[str, HookSettings] = settings.hooks
        self._commits = commits
        self._runs = runs
        self._carried: dict[str, asyncio.Task[None]] = {}
        self._has_run: dict[str, asyncio.Event] = {}
        self._is_closed: dict[str, asyncio.Event] = {}
        self._is_away = False
        self._faults: dict[str, str] = {}
        self._tick = asyncio.Event()
        self._closer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Carry on what an earlier process left; a burst that was open then is over."""
        await self._commits.do(lambda journal: journal.close_all())
        for batch in await self._commits.do(lambda journal: journal.unfinished()):
            if batch.hook in self._hooks:
                logger.info("webhook_batch resumed batch=%s hook=%s run=%s", batch.id, batch.hook, batch.run)
                self._carry(batch)
            else:
                logger.warning(
                    "webhook_batch left batch=%s hook=%s: the hook is not configured any more; its deliveries wait until it is",
                    batch.id,
                    batch.hook,
                )
        self._closer = asyncio.create_task(self._close_batches())

    @property
    def fault(self) -> str | None:
        """Why deliveries that were accepted don't become runs at present."""
        return next(iter(self._faults.values()), None)

    async def stop(self, patience_s: float) -> int:
        """End the open bursts and release their runs; how many are left to the next start after `patience_s`."""
        if self._closer is not None:
            self._closer.cancel()
            await asyncio.wait([self._closer])
        await self._commits.do(lambda journal: journal.close_all())
        for event in self._is_closed.values():
            event.set()
        tasks = list(self._carried.values())
        if not tasks:
            return 0
        _, left = await asyncio.wait(tasks, timeout=patience_s)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)
        return len(left)

    async def accept(self, delivery: Delivery) -> Receipt:
        """Write it down, wait a moment for its run. Raises Refused 409 and sqlite3.Error."""
        receipt = await self._commits.do(lambda journal: journal.accept(delivery, time.time()))
        if receipt.batch is None or receipt.run is not None or receipt.batch_state == "done":
            return receipt
        if receipt.is_new and not receipt.coalesced:
            batch_id = receipt.batch
            self._carry(await self._commits.do(lambda journal: journal.read_batch(batch_id)))
            self._tick.set()
        await self._wait_for_run(receipt.batch, self._settings.run_wait_s * (JOINED_WAIT if receipt.coalesced else 1))
        found = await self.find(delivery.hook, delivery.id)
        return replace(found, is_new=receipt.is_new) if found else receipt

    async def find(self, hook: str, delivery_id: str) -> Receipt | None:
        return await self._commits.do(lambda journal: journal.find(hook, delivery_id))

    async def _wait_for_run(self, batch: str, patience_s: float) -> None:
        event = self._has_run.get(batch)
        # While Prefect is known to be away nobody is kept waiting for it.
        if event is None or self._is_away:
            return
        try:
            async with asyncio.timeout(patience_s):
                await event.wait()
        except TimeoutError:
            return

    # ------------------------------------------------------------------------------------------ one batch

    def _carry(self, batch: Batch) -> None:
        if batch.id in self._carried:
            return
        self._has_run[batch.id] = asyncio.Event()
        self._is_closed[batch.id] = asyncio.Event()
        if batch.state != "open":
            self._is_closed[batch.id].set()
        task = asyncio.create_task(self._carry_through(batch))
        self._carried[batch.id] = task
        task.add_done_callback(lambda done: self._forget(batch.id, done))

    def _forget(self, batch: str, task: asyncio.Task[None]) -> None:
        del self._carried[batch], self._is_closed[batch]
        self._has_run.pop(batch).set()
        self._faults.pop(batch, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("webhook_batch failed batch=%s", batch, exc_info=error)

    async def _carry_through(self, batch: Batch) -> None:
        while True:
            batch = await self._repeat(batch, self._ensure_run, batch)
            self._has_run[batch.id].set()
            await self._is_closed[batch.id].wait()
            left = await self._repeat(batch, self._release, batch)
            if left is None:
                return
            batch = left

    async def _ensure_run(self, batch: Batch) -> Batch:
        if batch.run is not None:
            return batch
        # The journal knows what a run is created with before the server does: the key gives back the same run after a
        # crash in between, with the parameters that it had then.
        seed, names = await self._commits.do(lambda journal: journal.take_seed(batch.id))
        run = await self._runs.create(
            self._hooks[batch.hook].deployment,
            unite(names, self._settings.max_paths, self._settings.max_paths_bytes),
            key=f"webhook:{seed.id}:{seed.attempt}",
            hook=batch.hook,
        )
        logger.info("webhook_batch collecting batch=%s hook=%s run=%s", batch.id, batch.hook, run)
        return await self._commits.do(lambda journal: journal.set_run(batch.id, run))

    async def _release(self, batch: Batch) -> Batch | None:
        """None when all that the batch's deliveries name is in a run; else the batch, which needs another run."""
        run = batch.run
        assert run is not None
        names = await self._commits.do(lambda journal: journal.read_names(batch.id, batch.covered))
        changed = unite(names, self._settings.max_paths, self._settings.max_paths_bytes)
        outcome = await self._runs.release(run, changed)
        covered = batch.covered if outcome == "gone" else batch.seed or 0
        missed = [] if outcome == "released" else await self._commits.do(lambda j: j.read_names(batch.id, covered))
        if missed:
            # Even where it named the same paths: they changed again after that run had begun to look.
            logger.warning(
                "webhook_batch %s run=%s hook=%s missed_deliveries=%d: another run follows",
                outcome,
                run,
                batch.hook,
                len(missed),
            )
            return await self._commits.do(lambda journal: journal.start_over(batch.id, covered))
        await self._commits.do(lambda journal: journal.finish(batch.id))
        paths = "all" if changed is None else len(changed)
        logger.info(
            "webhook_batch released batch=%s hook=%s run=%s deliveries=%d changed=%s",
            batch.id,
            batch.hook,
            run,
            len(names),
            paths,
        )
        return None

    async def _repeat(self, batch: Batch, step: Callable[[Batch], Awaitable[T]], argument: Batch) -> T:
        """Until the server takes it. What it refuses today (no such deployment) it may take when that is mended."""
        pause_s = 0.25
        while True:
            try:
                result = await step(argument)
            except (RunsUnavailable, sqlite3.Error) as error:
                self._is_away = isinstance(error, RunsUnavailable) and error.is_away
                self._faults[batch.id] = str(error)
                logger.warning("webhook_batch waiting batch=%s hook=%s reason=%r", batch.id, batch.hook, str(error))
                # Those who wait for a run's id get their answer without.
                self._has_run[batch.id].set()
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311  spreads the tries, hides nothing
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                self._is_away = False
                self._faults.pop(batch.id, None)
                return result

    # ------------------------------------------------------------------------------------------ the clock

    async def _close_batches(self) -> None:
        """Close each burst at its end; forget old deliveries now and then."""
        settings = self._settings
        pruned = 0.0
        while True:
            self._tick.clear()
            now = time.time()
            try:
                unfinished = await self._commits.do(
                    lambda journal, now=now: journal.close_due(now, settings.quiet_s, settings.max_window_s)  # type: ignore[misc]
                )
                if now - pruned > PRUNE_EVERY_S:
                    before = now - settings.keep_days * 86_400
                    await self._commits.do(lambda journal, before=before: journal.prune(before))  # type: ignore[misc]
                    pruned = now
            except sqlite3.Error as error:
                logger.warning("webhook_journal unwritable reason=%r", str(error))
                await asyncio.sleep(1)
                continue
            unfinished = [batch for batch in unfinished if batch.hook in self._hooks]
            for batch in unfinished:
                self._carry(batch)
                if batch.state != "open":
                    self._is_closed[batch.id].set()
            due = [
                min(batch.latest + settings.quiet_s, batch.opened + settings.max_window_s) - time.time()
                for batch in unfinished
                if batch.state == "open"
            ]
            try:
                # A burst that goes on moves its end: look again when it would have come.
                async with asyncio.timeout(max(0.02, min(due)) if due else PRUNE_EVERY_S):
                    await self._tick.wait()
            except TimeoutError:
                continue
