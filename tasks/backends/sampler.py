"""A thread that reads memory while a run goes on; where the readings come from is its subclasses' business."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from tasks.records import MemoryReading

logger = logging.getLogger(__name__)

MAX_READINGS = 2000


class Sampler:
    """Takes readings every `interval_s` from start() to stop().

    The series stays below `max_readings`: when full, every second reading goes and the interval doubles, so a long run keeps
    its whole course.
    """

    def __init__(
        self,
        interval_s: float = 1.0,
        *,
        max_readings: int = MAX_READINGS,
        clock: Callable[[], float] = time.monotonic,
        on_reading: Callable[[MemoryReading], None] = lambda _reading: None,
    ) -> None:
        """`on_reading` is told of each reading, by the sampler's thread; it must not raise."""
        self._interval_s = interval_s
        self._max_readings = max(2, max_readings)
        self._clock = clock
        self._on_reading = on_reading
        self._started_s = 0.0
        self._readings: list[MemoryReading] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.absence = ""  # why there are no readings

    def start(self) -> None:
        """Begin to sample; logs one line with the reason where there is nothing to read."""
        self._started_s = self._clock()
        if not self._open():
            logger.info("memory_readings=absent reason=%r: no memory series for this run", self.absence)
            return
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """One last reading, then the end of the thread. Does nothing where it was not started."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        self._close()

    def series(self) -> list[MemoryReading]:
        """The readings so far, in time order, all devices of one time together."""
        return list(self._readings)

    def sample(self) -> None:
        """Take one reading of every device now."""
        readings = self._read(self._clock() - self._started_s)
        with self._lock:
            self._readings = self._thin_out([*self._readings, *readings])
        for reading in readings:
            self._on_reading(reading)

    # ------------------------------------------------------------------------------------------ for subclasses

    def _open(self) -> bool:
        """Get ready to read; False where that can't be, and `absence` says why."""
        return True

    def _close(self) -> None: ...

    def _read(self, seconds: float) -> list[MemoryReading]:
        """One reading a device, all as of `seconds`."""
        raise NotImplementedError

    def _thin_out(self, readings: Sequence[MemoryReading]) -> list[MemoryReading]:
        if len(readings) <= self._max_readings:
            return list(readings)
        times = sorted({reading.seconds for reading in readings})
        kept = set(times[::2])
        self._interval_s *= 2
        return [reading for reading in readings if reading.seconds in kept]

    def _run(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self._interval_s)
        self.sample()
