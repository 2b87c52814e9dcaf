"""Worker processes and the signals of a terminal."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import wait

from tasks.backends.processes import spawn_pool


def test_an_interrupt_from_the_first_moment_on_is_the_parents_business() -> None:
    with spawn_pool(1) as pool:
        answer = pool.submit(os.getpid)
        [worker] = pool._processes
        while not answer.done():  # its interpreter starts and imports meanwhile
            os.kill(worker, signal.SIGINT)
            time.sleep(0.01)
        assert answer.result() == worker
        wait([again := pool.submit(os.getpid)])
        assert again.result() == worker
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
