"""The same stages on Prefect's work pools: groups of partitions handed to workers, their reports taken back.

Which partition goes where is decided in tasks/policy/groups.py. The spool says what is done and who is alive; the server only
who has ended: so neither its restart nor a worker's death in silence loses anything.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prefect.futures import PrefectFuture

from flows.stages import Followed, Result, follow
from tasks.engine.ingest_run import IngestRun
from tasks.engine.shared_partitions import PoolDevices, put_on_one_clock
from tasks.engine.signs_of_life import BEAT_S
from tasks.errors import ApiUnavailable, DeviceError, SpoolError
from tasks.hand_over import collect_partition, hand_over_group
from tasks.policy.groups import Dispatcher, Group, GroupLimits
from tasks.pool_runs import END_PATIENCE_S, PoolRuns, RunLook
from tasks.publish import ProgressArtifact
from tasks.records import Partition, PartitionReport, Pool, PoolReport, SignOfLife
from tasks.upsert import count_retries

logger = logging.getLogger(__name__)

UNKNOWN = RunLook("ended", "the Prefect server does not know this run any more")
MISSED_BEATS = 4
UNSERVED_NOTE_S = 60.0  # a worker polls every few seconds; one that has not come by then is worth a word


@dataclass(slots=True)
class _GroupRun:
    """A group on its way through a worker."""

    group: Group
    run_id: str
    since: float  # this process's monotonic clock, as all of these
    phase: str = "waiting"
    phase_since: float = 0.0
    beat: int = -1
    beat_since: float = 0.0
    sign: SignOfLife | None = None
    is_noted: bool = False


@dataclass(slots=True)
class _Collecting:
    partition: Partition
    report: PoolReport
    task: Followed[PartitionReport]


@dataclass(slots=True)
class _ServerView:
    away_since: float | None = None
    looks: Mapping[str, RunLook] = field(default_factory=dict)


class PoolStages:
    """Driven by the flow's thread. See flows.stages.Stages."""

    def __init__(self, run: IngestRun, runs: PoolRuns) -> None:
        pools = run.settings.pools
        self._run = run
        self._runs = runs
        self._pools = pools
        self._dispatcher = Dispatcher(
            GroupLimits(
                gpu_runs=pools.gpu_runs,
                cpu_runs=pools.cpu_runs,
                startup_fraction=pools.startup_fraction,
                max_attempts=pools.max_attempts,
                group_tokens=pools.group_tokens,
                spill=run.settings.embedding.spill_to_cpu,
            )
        )
        self._progress = ProgressArtifact(run.settings.qdrant.collection)
        self._wake = threading.Event()
        self._starting: list[tuple[Group, Followed[str]]] = []
        self._groups: dict[int, _GroupRun] = {}
        self._collecting: list[_Collecting] = []
        self._server = _ServerView()
        self._signs: dict[str, tuple[float, SignOfLife]] = {}
        self._lost: list[tuple[Partition, Pool, str]] = []
        self._held_since: dict[Pool, tuple[int, float]] = {}
        self._spool_away_since: float | None = None
        self._shares: dict[int, float] = {}
        self._spooled_fraction = 0.0
        self._stored_fraction = 0.0
        self._started = time.monotonic()
        self._next_look = 0.0
        retries = count_retries(run.settings.qdrant.outage_s)
        self._hand_over = hand_over_group.with_options(retries=retries)
        self._collect = collect_partition.with_options(retries=retries)

    def follow(self, future: PrefectFuture[Result]) -> Followed[Result]:
        return follow(future, self._wake)

    def embed(self, partition: Partition) -> None:
        # Partitions come in the source's order and are stored in any.
        self._shares[partition.index] = partition.source_fraction - self._spooled_fraction
        self._spooled_fraction = partition.source_fraction
        self._dispatcher.add(partition)

    def is_full(self) -> bool:
        # With nothing under way nothing would ever make room: then one partition is taken, however large.
        try:
            return self.is_busy() and self._run.is_spool_full()
        except SpoolError as error:
            self._note_spool(error)
            return True

    def complete(self) -> None:
        self._dispatcher.complete()

    def is_busy(self) -> bool:
        return bool(self._starting or self._collecting or self._lost or self._dispatcher.is_busy)

    def wait(self) -> None:
        self._wake.wait(self._pools.poll_s)
        self._wake.clear()

    def finish(self) -> None:
        self._progress.finish()
        devices = self._run.devices
        if isinstance(devices, PoolDevices):
            devices.memory_series, devices.budget_series = put_on_one_clock(list(self._signs.values()))

    def close(self) -> None:
        """End what is still under way: after an error, a cancellation. Its partitions are the next run's."""
        if self._starting:
            self._run.stop.set()  # a hand-over that waits for a server would start its run when nobody looks after it
        now = time.monotonic()
        for group, started in self._starting:
            try:
                left_s = max(0.0, now + END_PATIENCE_S - time.monotonic())
                run_id = started.future.result(timeout=left_s, raise_on_failure=False)
            except TimeoutError:
                logger.warning("group number=%d is being handed over still: the next run ends its run", group.number)
                continue
            if isinstance(run_id, str):  # not the error that kept it from starting
                self._groups[group.number] = _GroupRun(group, run_id, since=now)
        ending = list(self._groups.values())
        self._groups.clear()
        for each in ending:  # all of them before the first call to a server that may be away
            try:
                self._run.shared.revoke(each.run_id)
            except SpoolError as error:  # perhaps what ended this run: the others are to be ended all the same
                logger.warning("run=%s not revoked reason=%r", each.run_id, str(error))
        for each in ending:
            self._end_run(each, "its ingest run has ended", crashed=False)

    def advance(self) -> None:
        self._run.refuse_if_stopped()
        self._finish_collecting()
        self._finish_starting()
        if time.monotonic() >= self._next_look:
            self._look_or_wait()
            self._next_look = time.monotonic() + self._pools.poll_s
        self._fail_lost()
        held = self._find_held()
        while (group := self._dispatcher.next_group(is_full=self.is_full(), held=held)) is not None:
            self._starting.append((group, self.follow(self._hand_over.submit(self._run, self._runs, group))))

    # ------------------------------------------------------------------------------------------ tasks of this run

    def _finish_starting(self) -> None:
        for group, started in [each for each in self._starting if each[1].is_done]:
            self._starting.remove((group, started))
            now = time.monotonic()
            run_id = started.future.result()
            self._groups[group.number] = _GroupRun(group, run_id, since=now, phase_since=now, beat_since=now)

    def _finish_collecting(self) -> None:
        for each in [each for each in self._collecting if each.task.is_done]:
            self._collecting.remove(each)
            if not self._run.shared.is_taken(each.partition, each.report.pool):
                each.task.future.result()  # nodes that failed are in its report; an error that kept it out ends the run here
            if not each.report.left_rows:
                self._stored_fraction += self._shares.pop(each.partition.index, 0.0)
                self._progress.update(replace(each.partition, source_fraction=min(1.0, self._stored_fraction)))

    def _take(self, group: Group, partition: Partition, report: PoolReport) -> None:
        self._dispatcher.report(group.number, partition.index)
        self._dispatcher.learn(group.pool, tokens_per_s=report.partition.tokens_per_s, start_up_s=report.start_up_s)
        if group.pool == "gpu" and isinstance(self._run.devices, PoolDevices):
            self._run.devices.tokens_per_s = self._dispatcher.tokens_per_s("gpu")
        if report.left_rows:
            self._dispatcher.leave(partition, _estimate_left_tokens(partition, report))
        task = self.follow(self._collect.submit(self._run, partition, report))
        self._collecting.append(_Collecting(partition, report, task))

    # ------------------------------------------------------------------------------------------ looking at workers

    def _look_or_wait(self) -> None:
        """A spool that is away for a moment, as a share or a bucket can be, costs a look; for longer, the run."""
        try:
            self._look()
        except SpoolError as error:
            self._note_spool(error)
        else:
            self._spool_away_since = None

    def _note_spool(self, error: SpoolError) -> None:
        """Raises it where the spool has been away for too long."""
        self._spool_away_since = self._spool_away_since or time.monotonic()
        if time.monotonic() - self._spool_away_since > self._pools.silent_s:
            raise error
        logger.warning("spool away reason=%r", str(error))

    def _find_held(self) -> list[Pool]:
        """Pools that get no new group for a moment: their last runs ended before their first partition.

        A worker that can't start takes group after group faster than one at work. Raises DeviceError where none of the pool's
        workers can.
        """
        held: list[Pool] = []
        pools: tuple[Pool, ...] = ("gpu", "cpu")
        for pool in pools:
            failures, reason = self._dispatcher.start_failures(pool)
            if not failures:
                self._held_since.pop(pool, None)
                continue
            count, since = self._held_since.get(pool, (0, 0.0))
            if count != failures:
                since = time.monotonic()
                self._held_since[pool] = failures, since
            if not self._dispatcher.can_start(pool):
                raise DeviceError(
                    f"{failures} runs in a row on {pool}-pool ended before their first partition, the last with: {reason}. "
                    "Mend its workers and run again: what is stored is not embedded twice."
                )
            if time.monotonic() - since < self._pools.poll_s * 2**failures:
                held.append(pool)
        return held

    def _look(self) -> None:
        """First who has ended, then what is reported: a run that ends has written its reports before."""
        if not self._groups:
            return
        looks = self._look_at_server()
        self._take_reports()
        now = time.monotonic()
        for number, each in list(self._groups.items()):
            look = looks.get(each.run_id, UNKNOWN) if looks is not None else None
            self._read_life(each, now)
            if look is not None and look.phase != each.phase:
                each.phase, each.phase_since = look.phase, now
            if not self._dispatcher.open_partitions(number):
                self._end_group(number, each, died_over=None, reason="")
            elif look is not None and look.phase == "ended" and not (look.is_crashed and self._is_beating(each, now)):
                self._run.shared.revoke(each.run_id)  # the server may say so of one that it only lost sight of
                self._end_group(number, each, died_over=self._current(each), reason=look.state)
            elif (reason := self._find_dead(each, now)) is not None:
                self._run.shared.revoke(each.run_id)
                self._end_run(each, reason, crashed=True)
                self._end_group(number, each, died_over=self._current(each), reason=reason)
            elif each.phase == "waiting":
                self._note_unserved(each, now)

    def _look_at_server(self) -> Mapping[str, RunLook] | None:
        """None while it is away, as long as pools.server_outage_s allows. Raises ApiUnavailable after that."""
        try:
            looks = self._runs.look([each.run_id for each in self._groups.values()])
        except ApiUnavailable:
            now = time.monotonic()
            if self._server.away_since is None:
                self._server.away_since = now
                self._run.observer.note(
                    "the Prefect server is away: workers go on, their reports come through the spool"
                )
            if now - self._server.away_since > self._pools.server_outage_s:
                raise
            return None
        if self._server.away_since is not None:
            self._run.observer.note(
                f"the Prefect server was away for {time.monotonic() - self._server.away_since:.0f} s"
            )
            self._server.away_since = None
        return looks

    def _take_reports(self) -> None:
        reported = self._run.shared.list_reported()
        for number, each in self._groups.items():
            group = each.group
            unreported = self._dispatcher.open_partitions(number)
            for partition in [each for each in group.partitions if each.index in unreported]:
                if (partition.path.rsplit("/", 1)[-1], group.pool) not in reported:
                    continue
                report = self._run.shared.read_report(partition, group.pool)
                if report is not None:
                    self._take(group, partition, report)

    def _read_life(self, each: _GroupRun, now: float) -> None:
        sign = self._run.shared.read_sign_of_life(each.run_id)
        if sign is None:
            return
        if each.sign is None:
            self._signs[each.run_id] = now - self._started, sign
        else:
            self._signs[each.run_id] = self._signs[each.run_id][0], sign
        if sign.beat != each.beat:
            each.beat, each.beat_since = sign.beat, now
        each.sign = sign

    def _is_beating(self, each: _GroupRun, now: float) -> bool:
        """Alive, whatever the server says: its automation takes a run for dead that it has not heard of for minutes."""
        return each.sign is not None and now - each.beat_since < MISSED_BEATS * BEAT_S

    def _current(self, each: _GroupRun) -> int | None:
        return each.sign.partition if each.sign is not None else None

    def _find_dead(self, each: _GroupRun, now: float) -> str | None:
        """Why this run counts as dead, None where it does not."""
        pools = self._pools
        silent_s = now - (each.beat_since if each.sign is not None else each.phase_since)
        if each.sign is not None or each.phase == "running":  # its first sign is the first thing it does
            return f"no sign of life for {silent_s:.0f} s (pools.silent_s)" if silent_s > pools.silent_s else None
        if each.phase == "pending" and silent_s > pools.pending_s:
            return f"taken by a worker and not running after {silent_s:.0f} s (pools.pending_s)"
        return None

    def _note_unserved(self, each: _GroupRun, now: float) -> None:
        waited_s = now - each.phase_since
        if waited_s > self._pools.worker_wait_s and self._server.away_since is None:
            raise DeviceError(
                f"No worker took group {each.group.number} of {each.group.pool}-pool for {waited_s:.0f} s "
                f"(pools.worker_wait_s). Start one: `prefect worker start --pool {each.group.pool}-pool`; then run again."
            )
        if waited_s < UNSERVED_NOTE_S or each.is_noted:
            return
        try:
            is_served = self._runs.is_served(each.group.pool)
        except ApiUnavailable:
            return
        each.is_noted = True
        if not is_served:
            self._run.tell(
                f"{each.group.pool}-pool has no worker: group {each.group.number} waits. "
                f"`prefect worker start --pool {each.group.pool}-pool` starts one."
            )

    # ------------------------------------------------------------------------------------------ ends

    def _end_group(self, number: int, each: _GroupRun, *, died_over: int | None, reason: str) -> None:
        del self._groups[number]
        pool: Pool = each.group.pool
        unreported = len(self._dispatcher.open_partitions(number))
        for partition in self._dispatcher.end(number, died_over=died_over, reason=reason):
            self._lost.append((partition, pool, f"{pool}-pool could not embed it: {reason}"))
        logger.info(
            "group number=%d pool=%s partitions=%d unreported=%d run=%s reason=%r",
            number, pool, len(each.group.partitions), unreported, each.run_id, reason,
        )  # fmt: skip
        if unreported:
            self._run.tell(f"group {number} on {pool}-pool ended ({reason}): {unreported} of its partitions run again")

    def _fail_lost(self) -> None:
        """Once each; a spool that is away keeps the rest for the next time."""
        while self._lost:
            try:
                self._run.shared.fail(*self._lost[0])
            except SpoolError as error:
                self._note_spool(error)
                return
            self._lost.pop(0)

    def _end_run(self, each: _GroupRun, reason: str, *, crashed: bool) -> None:
        try:
            self._runs.end(each.run_id, reason, crashed=crashed)
        except ApiUnavailable as error:
            # It has been revoked in the spool, which is what keeps it from writing; the server learns by its own automation.
            logger.warning("run=%s not ended on the server reason=%r", each.run_id, str(error))


def _estimate_left_tokens(partition: Partition, report: PoolReport) -> int:
    """What is left is among the longest of the partition; the report says how many tokens are done."""
    return max(partition.tokens - report.partition.tokens, len(report.left_rows))
