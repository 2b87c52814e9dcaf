"""A run's claim to a collection, as a record in the Prefect server, and when the record of another one may be taken away."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run

from tasks.publish import to_key

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Variable


@dataclass(frozen=True, slots=True)
class HoldTimes:
    """Seconds. A holder counts every `renew_s`; one that stands still is gone after `silent_s`, or sooner: after `ended_s`
    where its flow run has ended, and at once where its process was on this machine and is not there any more."""

    poll_s: float = 3.0
    renew_s: float = 10.0
    ended_s: float = 45.0
    silent_s: float = 300.0


def to_variable(collection: str) -> str:
    """The record's name: lower-case letters, digits and underscores; a hash where that alone would be ambiguous."""
    key = to_key(collection)
    if key != collection:
        key += f"-{hashlib.sha256(collection.encode()).hexdigest()[:8]}"
    return f"ballast_collection_{key.replace('-', '_')}"


class Claim:
    """A run's claim to a collection: the record's content, and how to make, renew and remove it."""

    def __init__(self, client: SyncPrefectClient, collection: str) -> None:
        self.collection = collection
        self._client = client
        self._name = to_variable(collection)
        self._record_id: uuid.UUID | None = None
        self._content: dict[str, Any] = {
            "token": str(uuid.uuid4()),
            "collection": collection,
            "run": flow_run.name,
            "run_id": str(flow_run.id) if flow_run.id else None,
            "process": describe_process(),
            "count": 0,
        }

    def use(self, client: SyncPrefectClient) -> None:
        """Clients of Prefect belong to one thread."""
        self._client = client

    def take(self) -> Variable | None:
        """Make the record. None: it is ours; else the record of whoever has the collection. Safe to repeat."""
        from prefect.client.schemas.actions import VariableCreate

        while True:
            found = self._client.read_variable_by_name(self._name)
            if found is None:
                try:
                    found = self._client.create_variable(
                        VariableCreate(name=self._name, value=self._content, tags=["ballast"])
                    )
                except ObjectAlreadyExists:
                    continue  # another one was faster
            elif content_of(found).get("token") != self._content["token"]:
                return found
            self._record_id = found.id
            return None

    def renew(self) -> bool:
        """Count up; False where the record is gone. Raises what the client raises."""
        self._content["count"] += 1
        try:
            self._client.request(
                "PATCH", "/variables/{id}", path_params={"id": self._record_id}, json={"value": self._content}
            )
        except PrefectHTTPStatusError as error:
            if error.response.status_code == 404:
                return False
            raise
        return True

    def release(self) -> None:
        """Remove our own record; nobody else's."""
        if self._record_id is not None:
            self.remove(self._record_id)

    def remove(self, record_id: uuid.UUID) -> None:
        """Remove this very record; one that is gone is fine."""
        try:
            self._client.request("DELETE", "/variables/{id}", path_params={"id": record_id})
        except PrefectHTTPStatusError as error:
            if error.response.status_code != 404:
                raise

    def has_run_ended(self, run_id: str) -> bool:
        """Whether the server knows a flow run as ended, or not at all."""
        try:
            state = self._client.read_flow_run(uuid.UUID(run_id)).state
        except ObjectNotFound:
            return True
        return state is not None and state.is_final()


class Watched:
    """What one who waits has seen of the holder: since when its count stands still, without a gap in the looking."""

    def __init__(self, times: HoldTimes, clock: Callable[[], float] = time.monotonic) -> None:
        self._times = times
        self._clock = clock
        self._seen: tuple[object, object] | None = None
        self._since = self._last = clock()

    def find_end(self, record: Variable, has_ended: Callable[[str], bool]) -> str | None:
        """Why the holder is gone; None while it may be there. `has_ended` tells of a flow run's id."""
        now = self._clock()
        content = content_of(record)
        seen = record.id, content.get("count")
        # A gap: the server was away, or this process stood still. The holder gets all its time again.
        if seen != self._seen or now - self._last > self._times.poll_s + 2 * self._times.renew_s:
            self._seen, self._since = seen, now
        self._last = now
        still_s = now - self._since
        if is_process_gone(content.get("process")):
            return "its process is not there any more"
        if still_s >= self._times.silent_s:
            return f"it gave no sign of life for {still_s:.0f} s"
        run_id = content.get("run_id")
        if still_s >= self._times.ended_s and isinstance(run_id, str) and has_ended(run_id):
            return "its flow run has ended"
        return None


def content_of(record: Variable) -> dict[str, Any]:
    """A record's content; empty where somebody else wrote something into it."""
    return record.value if isinstance(record.value, dict) else {}


def describe_holder(record: Variable) -> str:
    """The holder, for people."""
    content = content_of(record)
    if content.get("run"):
        return f"the run {content['run']!r} ({content.get('run_id')})"
    return "a process outside any flow run"


def describe_process() -> str | None:
    """This process, so that another one on the same kernel and in the same container can tell whether it is alive."""
    place = _find_place()
    return f"{place} {os.getpid()}" if place else None


def is_process_gone(process: object) -> bool:
    """Whether it was a process of this very machine (and container), and is not there any more. False where in doubt."""
    if not isinstance(process, str):
        return False
    place, _, pid = process.rpartition(" ")
    if place != _find_place() or not pid.isdecimal():
        return False
    return not Path(f"/proc/{pid}").exists()


def _find_place() -> str | None:
    # Host names repeat among containers; a boot and a PID namespace don't.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None
