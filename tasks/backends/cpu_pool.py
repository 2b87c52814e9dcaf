"""The CPU pool of one machine: fresh processes, each with the model in fp32, that take what the GPU can't place."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tasks.backends.encoder import Encoder
from tasks.backends.process_encoder import ProcessEncoder
from tasks.errors import DeviceError
from tasks.records import BatchOutcome, TokenIds


class CpuPool:
    """`workers` processes, each started when there is work for it that no other is free to take.

    Outcomes are those of Encoder.encode. A worker that died is replaced before its sticky outcome is handed on, so the
    next micro-batch finds the pool whole.
    """

    def __init__(self, factory: Callable[[], Encoder], workers: int, *, batch_timeout_s: float = 600.0) -> None:
        """`factory` builds one worker's encoder, in its process: an EncoderSpec with device="cpu" and `threads` set."""
        if workers < 1:
            raise ValueError(f"a CPU pool of {workers} workers has nobody to work")
        self._encoders = [ProcessEncoder(factory, batch_timeout_s=batch_timeout_s) for _ in range(workers)]
        # Last in, first out: a worker that is running already is taken before one that would have to start.
        self._idle: queue.LifoQueue[ProcessEncoder] = queue.LifoQueue()
        for encoder in self._encoders:
            self._idle.put(encoder)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="cpu-pool")
        self._closed = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        return [pid for encoder in self._encoders if (pid := encoder.pid) is not None]

    def submit(self, token_ids: Sequence[TokenIds]) -> Future[BatchOutcome]:
        """Embed one micro-batch; its future raises ModelError or DeviceError where a worker can't be started."""
        if self._closed:
            raise DeviceError("This CPU pool is closed. Build a new one.")
        return self._threads.submit(self._encode, list(token_ids))

    def close(self) -> None:
        """Finish what was started, drop what was not, end all workers."""
        self._closed = True
        self._threads.shutdown(wait=True, cancel_futures=True)
        for encoder in self._encoders:
            encoder.close()

    def _encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        encoder = self._idle.get()
        try:
            outcome = encoder.encode(token_ids)
            if outcome.kind == "sticky":
                encoder.restart()
            elif outcome.kind != "done":
                encoder.release_memory()
            return outcome
        finally:
            self._idle.put(encoder)
