"""One run a collection at a time, whatever started it, on whatever machine: who holds a collection is in the Prefect server.

The record is a Prefect Variable, `ballast_collection_<key>`: its name is unique, so making it is the lock, and it lies in
the server's database. Prefect's own leases do not do: with the server's default storage a restart forgets them, with
`concurrency(strict=True)` and with a deployment's concurrency_limit the run then ends ("cancelled by the runtime
environment", measured four minutes after a restart), and three renewals that fail in a row end it as well.

The holder counts up a number in its record. Nobody compares clocks: who waits takes the record away if that number stood
still while the server answered all the time, so an outage of the server, however long, costs nobody a collection. The run
itself does not survive every outage: a process worker exits after about 15 minutes without its server, and its runs with it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import httpx
from prefect.client.orchestration import get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from tasks.claim import Claim, HoldTimes, Watched, describe_holder, to_variable
from tasks.errors import BallastError, RunStopped, StoreLocked
from tasks.server_calls import ask_server, is_server_away

logger = logging.getLogger(__name__)

# Set by flows.api_server: that server is this command's own, nobody else can ask it.
EMBEDDED_API = "BALLAST_EMBEDDED_API"
RELEASE_PATIENCE_S = 60.0

# What this run holds: a flow that it calls (verify calls ingest) works under the same hold.
_held: ContextVar[frozenset[str]] = ContextVar("held_collections", default=frozenset())


@contextmanager
def hold_collection(
    collection: str,
    *,
    patience_s: float,
    stop: threading.Event,
    note: Callable[[str], None],
    times: HoldTimes | None = None,
) -> Iterator[None]:
    """Hold the collection; wait for its turn first. Without a server that others can ask there is nothing to hold.

    A server that is away does not matter while it is held. Where another run took it all the same (this one was cut off
    or frozen for longer than `silent_s`), `stop` is set and StoreLocked raised at the end. Raises StoreLocked after
    `patience_s` of waiting, RunStopped where `stop` is set meanwhile, ApiUnavailable.
    """
    if collection in _held.get() or not has_shared_server():
        yield
        return
    times = times or HoldTimes()
    with get_client(sync_client=True) as client:
        claim = Claim(client, collection)
        wait_for_turn(claim, times, patience_s, stop, note)
    keeper = Keeper(claim, times, stop)
    keeper.start()
    before = _held.set(_held.get() | {collection})
    try:
        yield
    finally:
        _held.reset(before)
        keeper.end()
    if keeper.lost_to is not None:
        raise StoreLocked(
            f"{keeper.lost_to} took the collection {collection} over: this run could not reach the Prefect server for more "
            f"than {times.silent_s:g} s while others could. What is stored stays; the next run goes on from there."
        )


def has_shared_server() -> bool:
    """Whether a Prefect server is configured that is not the command's own embedded one."""
    if os.environ.get(EMBEDDED_API):
        return False
    return bool(os.environ.get("PREFECT_API_URL")) or get_current_settings().api.url is not None


def wait_for_turn(
    claim: Claim, times: HoldTimes, patience_s: float, stop: threading.Event, note: Callable[[str], None]
) -> None:
    """Until the collection is held. Raises StoreLocked, RunStopped, ApiUnavailable."""
    deadline = time.monotonic() + patience_s
    watched = Watched(times)
    told: uuid.UUID | None = None

    def tell(text: str) -> None:
        note(text)
        logger.info("collection=%s %s", claim.collection, text)  # a worker's run has no terminal, its page has the log

    def has_ended(run_id: str) -> bool:
        return ask_server(partial(claim.has_run_ended, run_id), RELEASE_PATIENCE_S, stop)

    while True:
        left_s = max(deadline - time.monotonic(), 1.0)
        record = ask_server(claim.take, left_s, stop)
        if record is None:
            return
        holder = describe_holder(record)
        if told != record.id:
            told = record.id
            tell(f"Waiting for {holder}, which holds the collection {claim.collection}.")
        if reason := watched.find_end(record, has_ended):
            tell(f"Taking the collection {claim.collection} over from {holder}: {reason}.")
            # By its id: a new record has a new one, so of several who wait only one removes this holder's.
            ask_server(partial(claim.remove, record.id), left_s, stop)
        elif time.monotonic() >= deadline:
            raise StoreLocked(
                f"{holder} has held the collection {claim.collection} for more than {patience_s:g} s. Wait for its end or "
                f"cancel it; if there is no such run, delete the Prefect variable {to_variable(claim.collection)}."
            )
        elif stop.wait(times.poll_s):
            raise RunStopped(f"The run was told to stop while it waited for the collection {claim.collection}.")


class Keeper:
    """Renews a claim from a thread of its own, for as long as it takes; outages of the server only delay it."""

    def __init__(self, claim: Claim, times: HoldTimes, stop: threading.Event) -> None:
        self.lost_to: str | None = None
        self._claim = claim
        self._times = times
        self._stop = stop
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="hold-collection", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Stop renewing and release. A server that is away is told to the log: who waits finds out by itself."""
        self._done.set()
        self._thread.join(RELEASE_PATIENCE_S)
        if self.lost_to is not None:
            return
        with get_client(sync_client=True) as client:
            self._claim.use(client)
            try:
                ask_server(self._claim.release, RELEASE_PATIENCE_S)
            except BallastError as error:
                logger.warning("collection=%s not released: %s", self._claim.collection, error)

    def _keep(self) -> None:
        is_away = False
        with get_client(sync_client=True) as client:
            self._claim.use(client)
            while not self._done.wait(self._times.renew_s) and self.lost_to is None:
                try:
                    if not self._claim.renew() and not self._done.is_set():
                        self._take_again()
                    is_away = False
                except (PrefectHTTPStatusError, httpx.TransportError, OSError) as error:
                    if not is_away or not is_server_away(error):
                        logger.warning("collection=%s held, but not renewed: %s", self._claim.collection, error)
                    is_away = True

    def _take_again(self) -> None:
        """The record is gone: removed by hand, or by a run that waited. Ours again, unless another one has it."""
        other = self._claim.take()
        if other is None:
            logger.warning("collection=%s its record was gone and is made again", self._claim.collection)
            return
        self.lost_to = describe_holder(other)
        logger.error("collection=%s lost to %s", self._claim.collection, self.lost_to)
        self._stop.set()
