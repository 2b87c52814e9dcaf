"""Many small writes, one commit: each waits for the disk, but they wait together."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deployments.receiver.journal import Journal
from tasks.errors import BallastError

T = TypeVar("T")

_Work = Callable[[Journal], Any]


class GroupCommit:
    """Runs pieces of work on the journal, in the order in which they were asked for, in a thread of its own.

    What is asked for while a commit is under way shares the next one: an fsync of some milliseconds would else be the
    limit of deliveries a second. A piece of work raises before it writes anything, or not at all.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[tuple[_Work, asyncio.Future[Any]]] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._loop = asyncio.create_task(self._commit_groups())
        self._is_closed = False

    async def do(self, work: Callable[[Journal], T]) -> T:
        """What `work` returns, once it is on the disk. Raises what it raises, and sqlite3.Error where it can't be written."""
        if self._is_closed or self._loop.done():
            raise sqlite3.OperationalError("the receiver is stopping")
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, future))
        self._wake.set()
        return await future

    async def close(self) -> None:
        """Write what waits, and end the thread. The journal stays open."""
        self._is_closed = True
        self._wake.set()
        await self._loop
        self._thread.shutdown()

    async def _commit_groups(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            group, self._waiting = self._waiting, []
            if group:
                try:
                    outcomes = await loop.run_in_executor(self._thread, self._commit, [work for work, _ in group])
                    for (_, future), outcome in zip(group, outcomes, strict=True):
                        _settle(future, *outcome)
                finally:
                    # A bug in a piece of work ends this loop: nobody may wait for ever, and do() says so from now on.
                    for _, future in group:
                        _settle(future, None, sqlite3.OperationalError("the journal's thread has ended"))
            elif self._is_closed:
                return
            if self._is_closed:
                self._wake.set()

    def _commit(self, group: list[_Work]) -> list[tuple[Any, Exception | None]]:
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            self._journal.begin()
            for work in group:
                try:
                    outcomes.append((work(self._journal), None))
                except BallastError as error:
                    outcomes.append((None, error))
            self._journal.commit()
        except sqlite3.Error as error:
            self._journal.roll_back()
            # None of them is on the disk, whatever its own outcome was.
            return [(None, sqlite3.OperationalError(str(error))) for _ in group]
        return outcomes


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return  # whoever asked is gone, and it is written all the same; or it is settled
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
