"""What was accepted, in SQLite: a delivery is answered only when it is here, and here it stays until a run has it.

One process, one connection, one thread; see GroupCommit for how many deliveries share one commit.
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.receiver.refused import Refused
from tasks.errors import ConfigError

_VERSION = 1
_TABLES = """
CREATE TABLE batch (
    id TEXT PRIMARY KEY,
    hook TEXT NOT NULL,
    opened REAL NOT NULL,
    latest REAL NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('open', 'closed', 'done')),
    attempt INTEGER NOT NULL DEFAULT 1,
    seed INTEGER,
    covered INTEGER NOT NULL DEFAULT 0,
    run TEXT
) STRICT;
CREATE INDEX batch_by_state ON batch (state) WHERE state != 'done';
CREATE TABLE delivery (
    number INTEGER PRIMARY KEY,
    hook TEXT NOT NULL,
    id TEXT NOT NULL,
    digest TEXT NOT NULL,
    received REAL NOT NULL,
    status TEXT NOT NULL,
    reason TEXT,
    changed TEXT NOT NULL,
    batch TEXT REFERENCES batch (id),
    coalesced INTEGER NOT NULL,
    UNIQUE (hook, id)
) STRICT;
CREATE INDEX delivery_by_digest ON delivery (hook, digest);
CREATE INDEX delivery_by_batch ON delivery (batch, number);
"""


@dataclass(frozen=True, slots=True)
class Delivery:
    """`digest`: sha256 (hex) of the body. `changed`: doc ids, None for the whole source.

    `is_body_unique`: the signature covers no id, so the same body again is the same delivery, whatever id it came with.
    """

    hook: str
    id: str
    digest: str
    status: str
    reason: str | None
    changed: tuple[str, ...] | None
    is_body_unique: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a delivery. `run`: the run that has it or will have it, None while there is none."""

    delivery: Delivery
    batch: str | None
    batch_state: str | None
    run: str | None
    coalesced: bool
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Deliveries that share a run. Numbers are those of deliveries, in the order in which they came.

    `seed`: the last delivery that the run was created with; None until it is to be created. `covered`: the last one that
    an earlier run has taken. `attempt`: the how manieth run this is.
    """

    id: str
    hook: str
    opened: float
    latest: float
    state: str
    attempt: int
    seed: int | None
    covered: int
    run: str | None


class Journal:
    """Raises ConfigError: another receiver has the file, or it is no journal. sqlite3.Error: the disk."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made in one thread and used in another; GroupCommit sees to it that it is one at a time.
        self._db = sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except sqlite3.OperationalError as error:
            self._db.close()
            raise ConfigError(
                f"The journal {path} can't be opened: {error}. One receiver at a time has it: stop the other one, or name "
                "another file in journal."
            ) from error
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise ConfigError(f"{path} is no journal: {error}. Name another file in journal.") from error

    def _open(self) -> None:
        # Exclusive: two receivers over one journal would each release the other's runs. The lock dies with the process.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        # FULL: an answer of 202 outlives a power cut, too. One fsync a group, not one a delivery.
        self._db.execute("PRAGMA synchronous = FULL")
        self.begin()
        if self._db.execute("PRAGMA user_version").fetchone()[0] == 0:
            for statement in _TABLES.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
        self.commit()

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def roll_back(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def close(self) -> None:
        self._db.close()

    # ------------------------------------------------------------------------------------------ deliveries

    def accept(self, delivery: Delivery, now: float) -> Receipt:
        """Write it down and give it to the hook's open batch, or to a new one.

        The same delivery again: its receipt, and nothing is written. Raises Refused 409: the id came with another body, or
        the body, where it is unique, with another id.
        """
        known = self.find(delivery.hook, delivery.id)
        if known is not None:
            if known.delivery.digest != delivery.digest:
                raise Refused(
                    409,
                    f"The delivery id {delivery.id} came before with another body. Send new content under a new id.",
                )
            return known
        if delivery.is_body_unique:
            row = self._db.execute(
                "SELECT id FROM delivery WHERE hook = ? AND digest = ? LIMIT 1", (delivery.hook, delivery.digest)
            ).fetchone()
            if row is not None:
                raise Refused(
                    409, f"This body came before, as delivery {row[0]}: a replay. Redeliver that one, or push again."
                )
        batch, is_joined = (None, False) if delivery.reason else self._find_batch(delivery.hook, now)
        self._db.execute(
            "INSERT INTO delivery (hook, id, digest, received, status, reason, changed, batch, coalesced) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                delivery.hook,
                delivery.id,
                delivery.digest,
                now,
                delivery.status,
                delivery.reason,
                json.dumps(delivery.changed),
                batch.id if batch else None,
                is_joined,
            ),
        )
        if batch is None:
            return Receipt(delivery, None, None, None, coalesced=False, is_new=True)
        return Receipt(delivery, batch.id, "open", batch.run, coalesced=is_joined, is_new=True)

    def _find_batch(self, hook: str, now: float) -> tuple[Batch, bool]:
        row = self._db.execute(f"{_SELECT_BATCH} WHERE state = 'open' AND hook = ?", (hook,)).fetchone()
        if row is not None:
            self._db.execute("UPDATE batch SET latest = ? WHERE id = ?", (now, row[0]))
            return Batch(*row), True
        batch = Batch(str(uuid.uuid4()), hook, now, now, "open", 1, None, 0, None)
        self._db.execute(
            "INSERT INTO batch (id, hook, opened, latest, state) VALUES (?, ?, ?, ?, ?)",
            (batch.id, hook, now, now, "open"),
        )
        return batch, False

    def find(self, hook: str, delivery_id: str) -> Receipt | None:
        row = self._db.execute(
            "SELECT d.hook, d.id, d.digest, d.status, d.reason, d.changed, d.batch, d.coalesced, b.state, b.run "
            "FROM delivery d LEFT JOIN batch b ON b.id = d.batch WHERE d.hook = ? AND d.id = ?",
            (hook, delivery_id),
        ).fetchone()
        if row is None:
            return None
        hook, delivery_id, digest, status, reason, changed, batch, coalesced, state, run = row
        delivery = Delivery(hook, delivery_id, digest, status, reason, _read_changed(changed))
        return Receipt(delivery, batch, state, run, coalesced=bool(coalesced))

    # ------------------------------------------------------------------------------------------ batches

    def unfinished(self) -> list[Batch]:
        """In the order in which they were opened."""
        rows = self._db.execute(f"{_SELECT_BATCH} WHERE state != 'done' ORDER BY opened")
        return [Batch(*row) for row in rows]

    def read_batch(self, batch: str) -> Batch:
        return Batch(*self._db.execute(f"{_SELECT_BATCH} WHERE id = ?", (batch,)).fetchone())

    def close_due(self, now: float, quiet_s: float, max_window_s: float) -> list[Batch]:
        """Close the open batches whose burst is over; all that are unfinished. A clock set back closes them, too."""
        self._db.execute(
            "UPDATE batch SET state = 'closed' WHERE state = 'open' "
            "AND (latest + ? <= ? OR opened + ? <= ? OR latest > ? + 1)",
            (quiet_s, now, max_window_s, now, now),
        )
        return self.unfinished()

    def close_all(self) -> None:
        self._db.execute("UPDATE batch SET state = 'closed' WHERE state = 'open'")

    def take_seed(self, batch: str) -> tuple[Batch, list[tuple[str, ...] | None]]:
        """Fix which deliveries the batch's run is created with, and what they name; the same ones when asked again."""
        self._db.execute(
            "UPDATE batch SET seed = (SELECT max(number) FROM delivery WHERE batch = batch.id) "
            "WHERE id = ? AND seed IS NULL",
            (batch,),
        )
        seeded = self.read_batch(batch)
        return seeded, self.read_names(batch, seeded.covered, seeded.seed)

    def read_names(self, batch: str, after: int, upto: int | None = None) -> list[tuple[str, ...] | None]:
        """What the batch's deliveries with numbers in (after, upto] name."""
        rows = self._db.execute(
            "SELECT changed FROM delivery WHERE batch = ? AND number > ? AND number <= ? ORDER BY number",
            (batch, after, upto if upto is not None else 2**62),
        )
        return [_read_changed(row[0]) for row in rows]

    def set_run(self, batch: str, run: str) -> Batch:
        self._db.execute("UPDATE batch SET run = ? WHERE id = ?", (run, batch))
        return self.read_batch(batch)

    def start_over(self, batch: str, covered: int) -> Batch:
        """The batch needs another run, for the deliveries after `covered`."""
        self._db.execute(
            "UPDATE batch SET attempt = attempt + 1, seed = NULL, run = NULL, covered = ? WHERE id = ?",
            (covered, batch),
        )
        return self.read_batch(batch)

    def finish(self, batch: str) -> None:
        self._db.execute("UPDATE batch SET state = 'done' WHERE id = ?", (batch,))

    def touch(self) -> None:
        """Write something: raises sqlite3.Error where nothing can be written."""
        self._db.execute(f"PRAGMA user_version = {_VERSION}")

    def prune(self, before: float) -> int:
        """Forget deliveries received before, but those that wait for a run; how many."""
        done = "(batch IS NULL OR batch IN (SELECT id FROM batch WHERE state = 'done'))"
        cursor = self._db.execute(f"DELETE FROM delivery WHERE received < ? AND {done}", (before,))  # noqa: S608  no input
        self._db.execute(
            "DELETE FROM batch WHERE state = 'done' AND id NOT IN (SELECT batch FROM delivery WHERE batch IS NOT NULL)"
        )
        return cursor.rowcount


_SELECT_BATCH = "SELECT id, hook, opened, latest, state, attempt, seed, covered, run FROM batch"


def _read_changed(text: str) -> tuple[str, ...] | None:
    changed = json.loads(text)
    return None if changed is None else tuple(changed)


def unite(names: Sequence[tuple[str, ...] | None], max_paths: int, max_bytes: int) -> list[str] | None:
    """What one run is to look at: the union, sorted; None, the whole source, where one asks for it or it grows too large.

    `max_bytes` counts the names as JSON in ASCII, the longest that they can become as a run's parameters.
    """
    union: set[str] = set()
    for changed in names:
        if changed is None:
            return None
        union.update(changed)
        if len(union) > max_paths:
            return None
    paths = sorted(union)
    return None if len(json.dumps(paths)) > max_bytes else paths
