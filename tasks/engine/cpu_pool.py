"""The CPU pool of one process: fresh worker processes that embed what the device could not place."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import UNWATCHED, Embedded, Watch
from tasks.errors import DeviceError, ModelError
from tasks.records import TokenIds

if TYPE_CHECKING:
    from tasks.engine.measure_device import MeasuredDevice

logger = logging.getLogger(__name__)


class CpuPool:
    """Workers, each a NodeEmbedder over a CPU encoder in a process of its own, started when first needed.

    The ladder runs in here too: a CPU runs out of memory as a GPU does, and the way down is the same, but for its end:
    a node that does not fit alone has nowhere left to go and fails by name.
    """

    def __init__(self, make_worker: Callable[[], tuple[NodeEmbedder, MeasuredDevice]], workers: int) -> None:
        """`make_worker` starts a process and loads the model; called once a worker, when it is first needed."""
        self._make_worker = make_worker
        self._idle: queue.LifoQueue[NodeEmbedder] = queue.LifoQueue()  # the last one used has its model loaded
        self._all: list[NodeEmbedder] = []
        self._lock = threading.Lock()
        self._is_full = False  # a worker could not be started: those that are there do it all
        self.workers = workers
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="cpu-pool")

    def start(self) -> MeasuredDevice:
        """Start the first worker now. Raises ModelError or DeviceError."""
        embedder, measured = self._add_worker()
        self._idle.put(embedder)
        return measured

    def submit(self, token_ids: Sequence[TokenIds], watch: Watch = UNWATCHED) -> Future[Embedded]:
        """The future's rows are those of `token_ids`; nodes that fit nowhere are in its `failed`."""
        return self._threads.submit(self._embed, token_ids, watch)

    def _embed(self, token_ids: Sequence[TokenIds], watch: Watch) -> Embedded:
        embedder = self._take_idle()
        try:
            return embedder.embed(token_ids, watch)
        finally:
            self._idle.put(embedder)

    def _take_idle(self) -> NodeEmbedder:
        # As many threads as workers: whoever finds none idle may make one.
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            if not self._is_full:
                return self._grow()
        return self._idle.get()

    def _grow(self) -> NodeEmbedder:
        """One worker more. Where there is no room for it beside those at work, wait for one of them, now and later."""
        try:
            return self._add_worker()[0]
        except (DeviceError, ModelError) as error:
            if not self._all:
                raise
            reason = str(error)
        self._is_full = True
        logger.warning("cpu_pool workers=%d of=%d reason=%r", len(self._all), self.workers, reason)
        return self._idle.get()

    def _add_worker(self) -> tuple[NodeEmbedder, MeasuredDevice]:
        embedder, measured = self._make_worker()
        with self._lock:
            self._all.append(embedder)
        return embedder, measured

    def close(self) -> None:
        """End every worker. Waits for those at work: their embedders' `stop` makes that one micro-batch."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for embedder in self._all:
            embedder.encoder.close()
