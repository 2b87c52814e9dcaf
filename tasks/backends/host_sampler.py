"""The host's memory over time, where the CPU pool embeds: what nvml.py is for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tasks.backends.device_memory import read_host_memory
from tasks.backends.sampler import Sampler
from tasks.records import DeviceMemory, MemoryReading

HOST = "host"  # instead of a card's UUID


def read_tree_bytes() -> int:
    """Resident bytes of this process and all its children; pages that they share count once a process."""
    # Proportional sizes would count shared pages once, and cost 10-30 ms a process: too much, every second.
    import psutil

    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the listing and the reading
    return total


class HostSampler(Sampler):
    """Of what this process may take in all (the machine, a container's limit): used, free, and this run's processes."""

    def __init__(
        self,
        interval_s: float = 1.0,
        *,
        memory: Callable[[], DeviceMemory] = read_host_memory,
        process_bytes: Callable[[], int] = read_tree_bytes,
        **options: Any,
    ) -> None:
        """`options` are those of Sampler."""
        super().__init__(interval_s, **options)
        self._memory = memory
        self._process_bytes = process_bytes

    def _read(self, seconds: float) -> list[MemoryReading]:
        memory = self._memory()
        total_bytes = min(memory.limit_bytes, memory.total_bytes)
        return [
            MemoryReading(
                seconds=seconds,
                device_uuid=HOST,
                used_bytes=max(0, total_bytes - memory.free_bytes),
                free_bytes=memory.free_bytes,
                total_bytes=total_bytes,
                process_bytes=self._process_bytes(),
            )
        ]
