"""The journal: each delivery once, each name in some run, through crashes, a full disk and two receivers."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.receiver.group_commit import GroupCommit
from deployments.receiver.journal import Delivery, Journal, unite
from deployments.receiver.refused import Refused
from tasks.errors import BallastError, ConfigError

ROOT = Path(__file__).resolve().parents[3]


def delivery(name: str, *changed: str, hook: str = "docs", digest: str | None = None, unique: bool = False) -> Delivery:
    return Delivery(hook, name, digest or f"digest of {name}", "accepted", None, changed, is_body_unique=unique)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path / "deep" / "journal.sqlite")
    yield journal
    journal.close()


def test_a_burst_shares_a_batch_and_another_hook_has_its_own(journal: Journal) -> None:
    first, second = journal.accept(delivery("1", "a.md"), 100.0), journal.accept(delivery("2", "b.md"), 101.0)
    other = journal.accept(delivery("1", "c.md", hook="other"), 101.0)
    assert (first.coalesced, second.coalesced, other.coalesced) == (False, True, False)
    assert first.batch == second.batch != other.batch
    assert journal.read_names(first.batch or "", 0) == [("a.md",), ("b.md",)]


def test_the_same_delivery_again_has_the_same_receipt_and_writes_nothing(journal: Journal) -> None:
    first = journal.accept(delivery("1", "a.md"), 100.0)
    again = journal.accept(delivery("1", "a.md"), 105.0)
    assert (first.is_new, again.is_new) == (True, False)
    assert (again.delivery.id, again.batch, again.coalesced) == (first.delivery.id, first.batch, first.coalesced)
    assert len(journal.read_names(first.batch or "", 0)) == 1
    assert journal.unfinished()[0].latest == 100.0  # nor does it make the burst longer


def test_an_id_is_for_one_body_and_a_unique_body_for_one_id(journal: Journal) -> None:
    journal.accept(delivery("1", "a.md", unique=True), 100.0)
    with pytest.raises(Refused, match="1 came before with another body") as caught:
        journal.accept(delivery("1", "a.md", digest="other"), 101.0)
    assert caught.value.status == 409
    with pytest.raises(Refused, match="This body came before, as delivery 1: a replay") as caught:
        journal.accept(delivery("2", "a.md", digest="digest of 1", unique=True), 101.0)
    assert caught.value.status == 409
    assert journal.accept(delivery("3", "a.md", digest="digest of 1"), 101.0).is_new


@pytest.mark.parametrize(
    ("opened", "latest", "now", "is_due"),
    [
        (100, 100, 109.9, False),
        (100, 100, 110, True),
        (100, 155, 159, False),
        (100, 155, 160, True),  # a burst that does not end
        (100, 100, 98, True),  # the clock was set back
    ],
)
def test_a_batch_closes_after_quiet_or_at_the_windows_end(
    journal: Journal, opened: float, latest: float, now: float, is_due: bool
) -> None:
    journal.accept(delivery("1"), opened)
    journal.accept(delivery("2"), latest)
    (batch,) = journal.close_due(now, quiet_s=10, max_window_s=60)
    assert (batch.state == "closed") is is_due
    assert journal.accept(delivery("3"), now).coalesced is not is_due


def test_a_seed_stays_what_it_was_when_asked_again(journal: Journal) -> None:
    batch = journal.accept(delivery("1", "a.md"), 100.0).batch or ""
    seed = journal.take_seed(batch)[0].seed
    journal.accept(delivery("2", "b.md"), 101.0)
    again, names = journal.take_seed(batch)
    assert (again.seed, names) == (seed, [("a.md",)])
    assert journal.read_names(batch, seed or 0) == [("b.md",)]
    again = journal.start_over(batch, seed or 0)
    assert (again.attempt, again.seed, again.run, again.covered) == (2, None, None, seed)


def test_old_deliveries_are_forgotten_but_not_those_that_wait(journal: Journal) -> None:
    done = journal.accept(delivery("1", hook="a"), 100.0).batch or ""
    journal.finish(done)
    waiting = journal.accept(delivery("2", hook="b"), 100.0).batch
    journal.accept(Delivery("c", "3", "d", "ignored", "why", ()), 100.0)
    journal.accept(delivery("4", hook="d"), 300.0)
    assert journal.prune(200.0) == 2
    assert journal.find("a", "1") is None
    assert journal.find("c", "3") is None
    assert {batch.id for batch in journal.unfinished()} >= {waiting}
    assert journal.find("b", "2") is not None


def test_one_receiver_has_the_journal(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="One receiver at a time has it"):
        Journal(tmp_path / "deep" / "journal.sqlite")


def test_another_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Notes, and enough of them to be no empty database\n" * 20)
    with pytest.raises(ConfigError, match="is no journal"):
        Journal(tmp_path / "notes.md")


def test_what_was_committed_outlives_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite"
    script = (
        "import os, sys; from pathlib import Path; from deployments.receiver.journal import Delivery, Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in range(3):\n"
        "    journal.begin(); journal.accept(Delivery('docs', str(n), 'd', 'accepted', None, (f'{n}.md',)), 100.0 + n)\n"
        "    if n < 2: journal.commit()\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, env={**os.environ}, check=False)
    journal = Journal(path)
    try:
        (batch,) = journal.unfinished()
        assert journal.read_names(batch.id, 0) == [("0.md",), ("1.md",)]
    finally:
        journal.close()


# ---------------------------------------------------------------------------------------------- union

CHANGED = st.none() | st.lists(st.sampled_from("abcdefgh"), max_size=5).map(tuple)


@settings(deadline=None)
@given(st.lists(CHANGED, max_size=6), st.integers(1, 10))
def test_a_union_has_every_name_or_is_the_whole_source(names: list[tuple[str, ...] | None], max_paths: int) -> None:
    union = unite(names, max_paths, 10_000)
    wanted = {name for changed in names if changed is not None for name in changed}
    if None in names or len(wanted) > max_paths:
        assert union is None
    else:
        assert union == sorted(wanted)


def test_names_too_long_for_a_runs_parameters_become_the_whole_source() -> None:
    assert unite([("ü" * 100,)], 10, 604) == ["ü" * 100]
    assert unite([("ü" * 100,)], 10, 603) is None  # six bytes each, escaped, and brackets and quotes


# ---------------------------------------------------------------------------------------------- group commit


def test_many_deliveries_at_once_share_few_commits_and_each_has_its_own_outcome(tmp_path: Path) -> None:
    commits = 0

    class Counting(Journal):
        def commit(self) -> None:
            nonlocal commits
            commits += 1
            super().commit()

    async def main() -> list[object]:
        journal = Counting(tmp_path / "journal.sqlite")
        group = GroupCommit(journal)
        try:
            return await asyncio.gather(
                *(
                    group.do(lambda j, n=n: j.accept(delivery(str(n % 100), digest=str(n // 150)), n))
                    for n in range(200)
                ),
                return_exceptions=True,
            )
        finally:
            await group.close()
            journal.close()

    outcomes = asyncio.run(main())
    assert commits < 20
    assert sum(getattr(outcome, "is_new", False) for outcome in outcomes) == 100
    assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 50
    journal = Journal(tmp_path / "journal.sqlite")
    assert len(journal.read_names(journal.unfinished()[0].id, 0)) == 100
    journal.close()


def test_a_commit_that_fails_takes_nobody_in(tmp_path: Path) -> None:
    class Full(Journal):
        is_full = False

        def commit(self) -> None:
            if self.is_full:
                raise sqlite3.OperationalError("database or disk is full")
            super().commit()

    async def main() -> None:
        journal = Full(tmp_path / "journal.sqlite")
        group = GroupCommit(journal)
        journal.is_full = True
        with pytest.raises(sqlite3.OperationalError, match="disk is full"):
            await group.do(lambda j: j.accept(delivery("1"), 1.0))
        journal.is_full = False
        assert await group.do(lambda j: j.find("docs", "1")) is None
        assert (await group.do(lambda j: j.accept(delivery("1"), 1.0))).is_new
        await group.close()
        with pytest.raises(sqlite3.OperationalError, match="stopping"):
            await group.do(lambda j: j.unfinished())
        journal.close()

    asyncio.run(main())


def test_refusals_are_errors_of_ballast() -> None:
    assert issubclass(Refused, BallastError)  # what GroupCommit hands to the one who asked, and to nobody else
