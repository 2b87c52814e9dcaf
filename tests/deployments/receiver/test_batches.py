"""Whatever fails and whenever the receiver dies: each accepted name comes into a run, and into one only."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.receiver.batches import Batches
from deployments.receiver.config import ReceiverSettings
from deployments.receiver.group_commit import GroupCommit
from deployments.receiver.journal import Delivery, Journal, Receipt
from deployments.receiver.runs import Outcome, RunsUnavailable


@dataclass
class FaultyServer:
    """Runs as a Prefect server has them: one a key. Of its calls a share fails, before or after they had their effect."""

    faults: random.Random
    share: float
    runs: dict[str, list[str] | None] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)

    async def _fail(self) -> None:
        await asyncio.sleep(0)
        if self.faults.random() < self.share:
            raise RunsUnavailable("away", is_away=True)

    async def create(self, deployment: str, changed: Sequence[str] | None, *, key: str, hook: str) -> str:
        await self._fail()
        run = self.keys.setdefault(key, f"run-{len(self.keys)}")
        self.runs.setdefault(run, None if changed is None else list(changed))
        await self._fail()
        return run

    async def release(self, run: str, changed: Sequence[str] | None) -> Outcome:
        await self._fail()
        wanted = None if changed is None else list(changed)
        if run not in self.started:
            self.runs[run] = wanted
            await self._fail()
            self.started.add(run)
        outcome: Outcome = "released" if self.runs[run] == wanted else "missed"
        await self._fail()
        return outcome

    async def check(self, deployment: str) -> None:
        await self._fail()

    def page(self, run: str) -> str | None:
        return None


def configure(hooks: str = "ab", quiet_s: float = 0.0) -> ReceiverSettings:
    hook = {"kind": "generic", "deployment": "ingest/documents", "secret": "SECRET"}
    return ReceiverSettings.model_validate(
        {"hooks": dict.fromkeys(hooks, hook), "quiet_s": quiet_s, "max_window_s": 0.2, "run_wait_s": 0.0}
    )


def delivery(number: int, hook: str = "a") -> Delivery:
    return Delivery(hook, f"d{number}", f"digest {number}", "accepted", None, (f"{hook}/{number:02d}.md",))


class Life:
    """A receiver from its start to its end, orderly or not."""

    def __init__(self, path: Path, server: FaultyServer, **knobs: Any) -> None:
        self._journal = Journal(path)
        self._commits = GroupCommit(self._journal)
        self.batches = Batches(configure(**knobs), self._commits, server)

    async def end(self, patience_s: float) -> int:
        left = await self.batches.stop(patience_s)
        await self._commits.close()
        self._journal.close()
        return left


@settings(deadline=None, max_examples=20)
@given(
    lives=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
    share=st.sampled_from([0.0, 0.2, 0.5]),
    quiet_s=st.sampled_from([0.0, 0.02, 0.1]),
)
def test_each_name_comes_into_one_run(lives: list[list[int]], seed: int, share: float, quiet_s: float) -> None:
    """Each life of the receiver takes deliveries, some of them again, and ends with its work half done."""

    async def main(path: Path) -> FaultyServer:
        server = FaultyServer(random.Random(seed), share)
        for numbers in lives:
            life = Life(path, server, quiet_s=quiet_s)
            await life.batches.start()
            hooks = ["ab"[number % 2] for number in numbers]
            await asyncio.gather(*(life.batches.accept(delivery(n, h)) for n, h in zip(numbers, hooks, strict=True)))
            await life.end(patience_s=server.faults.choice([0.0, 0.01, 0.05]))
        server.share = 0.0
        life = Life(path, server, quiet_s=quiet_s)
        await life.batches.start()
        assert await life.end(patience_s=20) == 0
        return server

    with tempfile.TemporaryDirectory() as folder:
        server = asyncio.run(main(Path(folder) / "journal.sqlite"))
    found = sorted(name for changed in server.runs.values() for name in changed or ())
    assert found == sorted({f"{'ab'[n % 2]}/{n:02d}.md" for numbers in lives for n in numbers})
    assert server.started == set(server.runs)


def test_a_hook_that_is_gone_keeps_what_it_took_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = FaultyServer(random.Random(0), 1.0)

    async def live(patience_s: float, hooks: str) -> tuple[Receipt | None, str | None, int]:
        life = Life(tmp_path / "journal.sqlite", server, hooks=hooks)
        await life.batches.start()
        if server.share:
            await life.batches.accept(delivery(1))
            await asyncio.sleep(0.05)
        return await life.batches.find("a", "d1"), life.batches.fault, await life.end(patience_s)

    assert asyncio.run(live(0, "ab"))[1:] == ("away", 1)
    server.share = 0.0
    receipt, fault, left = asyncio.run(live(5, "b"))
    assert (receipt is not None, fault, left, server.runs) == (True, None, 0, {})
    assert "the hook is not configured any more" in caplog.text
    assert asyncio.run(live(5, "ab"))[2] == 0
    assert server.runs == {"run-0": ["a/01.md"]}
