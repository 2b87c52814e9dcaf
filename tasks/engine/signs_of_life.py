"""A worker's run writes a beat into the spool, so that the ingest run knows it is there, whatever the server knows."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from tasks.backends.spool import SpoolFolder
from tasks.backends.spool_reports import write_sign_of_life
from tasks.errors import SpoolError
from tasks.records import SignOfLife

logger = logging.getLogger(__name__)

BEAT_S = 5.0


class SignsOfLife:
    """A thread that beats until stop(). `describe` gives what goes with the beat; called in that thread."""

    def __init__(self, spool: SpoolFolder, run_id: str) -> None:
        self.run_id = run_id
        self.describe: Callable[[], SignOfLife] = lambda: SignOfLife(beat=0)
        self._spool = spool
        self._beats = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="signs-of-life", daemon=True)

    def start(self) -> None:
        self.beat()
        self._thread.start()

    def stop(self) -> None:
        """The last beat carries what is known at the end."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            self.beat()

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_S):
            self.beat()

    def beat(self) -> None:
        """Now: what is told has changed."""
        try:
            with self._lock:
                self._beats += 1
                write_sign_of_life(self._spool, self.run_id, replace(self.describe(), beat=self._beats))
        except SpoolError as error:
            # A spool that is away for a moment: the next beat tells; the run itself fails where it needs the spool.
            logger.warning("sign of life not written beat=%d reason=%r", self._beats, str(error))
