"""Pools of fresh worker processes: spawned, never forked (CUDA and threads don't survive a fork), never left behind."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any


def spawn_pool(
    workers: int,
    *,
    environment: Mapping[str, str] | None = None,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> ProcessPoolExecutor:
    """A pool whose processes start from nothing with `environment` set before any heavy import, and end with their parent."""
    return _InterruptProofPool(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(dict(environment or {}), initializer, initargs),
    )


class _InterruptProofPool(ProcessPoolExecutor):
    """Ctrl-C reaches every process of a terminal: workers leave it to their parent, from their first moment on.

    An initializer comes too late for that: imports take seconds, and an interrupt in them ends in a traceback.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # Workers start in here, in this thread, and inherit what it blocks; other threads still get the signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(
    environment: dict[str, str], initializer: Callable[..., None] | None, initargs: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with_parent() -> None:
    # A pool's workers hold both ends of the call queue, so they never see end-of-file when the parent is killed with
    # SIGKILL and would stay for ever, with their device memory: watch the parent's sentinel instead.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def read_process_age_s() -> float:
    """Seconds since this process was started, imports and all; 0 where psutil is missing."""
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError:
        return 0.0
    return max(0.0, time.time() - float(psutil.Process().create_time()))
