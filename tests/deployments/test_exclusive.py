"""Two runs of one collection never overlap: against a real server, through its restarts, with real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prefect_server import PrefectServer

from flows.setup_server import connect
from tasks.claim import HoldTimes, to_variable
from tasks.errors import RunStopped, StoreLocked
from tasks.exclusive import hold_collection

QUICK = HoldTimes(poll_s=0.1, renew_s=0.2, ended_s=3.0, silent_s=6.0)

HOLD = """
import sys, threading
from prefect import flow
from flows.setup_server import connect
from tasks.claim import HoldTimes
from tasks.exclusive import hold_collection

@flow(flow_run_name="killed from /data")
def hold(collection: str) -> None:
    with hold_collection(collection, patience_s=60, stop=threading.Event(), note=print,
                         times=HoldTimes(poll_s=0.1, renew_s=0.2)):
        print("held", flush=True)
        sys.stdin.readline()

hold(sys.argv[1])
"""


class Holder:
    """Holds a collection in a thread until it is told to let go."""

    def __init__(self, collection: str, times: HoldTimes = QUICK, patience_s: float = 60) -> None:
        self.held = threading.Event()
        self.let_go = threading.Event()
        self.stop = threading.Event()
        self.notes: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._hold, args=(collection, times, patience_s))
        self._thread.start()

    def _hold(self, collection: str, times: HoldTimes, patience_s: float) -> None:
        try:
            with hold_collection(
                collection, patience_s=patience_s, stop=self.stop, note=self.notes.append, times=times
            ):
                self.held.set()
                self.let_go.wait()
        except (StoreLocked, RunStopped) as error:
            self.error = error

    def end(self) -> None:
        self.let_go.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def holding(collection: str, times: HoldTimes = QUICK) -> Iterator[Holder]:
    holder = Holder(collection, times)
    try:
        assert holder.held.wait(30)
        yield holder
    finally:
        holder.end()


def record_of(server: PrefectServer, collection: str) -> dict[str, object] | None:
    found = server.ask("POST", "/variables/filter", {"variables": {"name": {"any_": [to_variable(collection)]}}})
    return found[0] if found else None


def wait_until(is_so: object, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_second_run_waits_for_the_first_and_says_so(shared_api: PrefectServer) -> None:
    with holding("turns") as first:
        second = Holder("turns")
        wait_until(lambda: second.notes)
        assert not second.held.wait(1.0)
        first.let_go.set()
        assert second.held.wait(30)
        second.end()
    assert second.notes == ["Waiting for a process outside any flow run, which holds the collection turns."]
    assert record_of(shared_api, "turns") is None, "nothing stays behind"


def test_of_many_at_once_one_holds_at_a_time(shared_api: PrefectServer) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        with hold_collection(
            "crowd", patience_s=60, stop=threading.Event(), note=lambda _text: None, times=HoldTimes(poll_s=0.02)
        ):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 8


def test_other_collections_do_not_wait(shared_api: PrefectServer) -> None:
    with holding("one"), holding("two"):
        pass
    assert to_variable("a-b") != to_variable("a_b") != to_variable("A b")
    assert to_variable("文書") != to_variable("資料")


def test_a_flow_that_the_holder_calls_works_under_its_hold(shared_api: PrefectServer) -> None:
    stop = threading.Event()
    with (
        hold_collection("nested", patience_s=5, stop=stop, note=lambda _text: None),
        hold_collection("nested", patience_s=5, stop=stop, note=lambda _text: None),
    ):
        assert record_of(shared_api, "nested")
    assert record_of(shared_api, "nested") is None


def test_it_is_released_after_an_error(shared_api: PrefectServer) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        hold_collection("error", patience_s=5, stop=threading.Event(), note=lambda _text: None),
    ):
        _ = 1 / 0
    assert record_of(shared_api, "error") is None


def test_patience_ends_with_the_holder_and_the_way_out(shared_api: PrefectServer) -> None:
    with holding("patience"):
        second = Holder("patience", patience_s=0.5)
        second.end()
    assert isinstance(second.error, StoreLocked)
    assert "for more than 0.5 s" in str(second.error)
    assert "ballast_collection_patience" in str(second.error)


def test_a_run_that_is_told_to_stop_does_not_wait_on(shared_api: PrefectServer) -> None:
    with holding("stopped"):
        second = Holder("stopped")
        wait_until(lambda: second.notes)
        second.stop.set()
        second.end()
    assert isinstance(second.error, RunStopped)


def test_a_server_that_is_away_costs_nobody_a_collection(shared_api: PrefectServer) -> None:
    collection = "outage"
    with holding(collection) as first:
        second = Holder(collection)
        wait_until(lambda: second.notes)
        shared_api.stop(kill=True)
        time.sleep(QUICK.ended_s)
        shared_api.start()
        with connect(wait_s=90):  # as `ballast setup` does: it waits for a server that is starting
            pass
        before = record_of(shared_api, collection)
        assert before is not None
        wait_until(lambda: record_of(shared_api, collection)["value"] != before["value"], 60)  # type: ignore[index]
        assert not second.held.is_set()
        assert not first.stop.is_set()
        first.let_go.set()
        assert second.held.wait(60)
        second.end()
    assert first.error is None
    assert second.error is None


def test_a_silent_holder_loses_it_and_is_told_to_stop(shared_api: PrefectServer) -> None:
    """One that is cut off or frozen, from the waiting run's view."""
    with holding("silent", HoldTimes(renew_s=8.0)) as first:
        second = Holder("silent", HoldTimes(poll_s=0.1, renew_s=0.5, ended_s=1.0, silent_s=2.0))
        assert second.held.wait(30)
        assert any("gave no sign of life" in note for note in second.notes)
        assert first.stop.wait(30)
        second.end()
    assert isinstance(first.error, StoreLocked)
    assert "took the collection silent over" in str(first.error)


def test_a_record_that_was_removed_is_made_again(shared_api: PrefectServer) -> None:
    with holding("removed") as first:
        record = record_of(shared_api, "removed")
        assert record is not None
        shared_api.ask("DELETE", f"/variables/{record['id']}")
        wait_until(lambda: record_of(shared_api, "removed"))
        assert not first.stop.is_set()
    assert first.error is None
    assert record_of(shared_api, "removed") is None


def test_a_killed_process_holds_nothing_up(shared_api: PrefectServer) -> None:
    command = [sys.executable, "-c", HOLD, "killed"]
    with subprocess.Popen(
        command, env=shared_api.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = Holder("killed")
        wait_until(lambda: second.notes)
        assert not second.held.wait(0.5)
        first.kill()
        first.wait()
        assert second.held.wait(30)
        second.end()
    assert second.notes[0].startswith("Waiting for the run 'killed from /data' (")
    assert "its process is not there any more" in second.notes[-1]
