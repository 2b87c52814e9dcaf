"""The budget: how many device bytes one micro-batch may take now."""

from __future__ import annotations

from tasks.records import DeviceMemory


def compute_available(memory: DeviceMemory) -> int:
    """Bytes this process can still put tensors into: under its limit, from free memory and from blocks it already holds.

    min(limit - allocated, free + reserved - allocated). The device's free memory alone would be wrong twice: blocks that
    the allocator caches are reusable but not free, and a capped process sees the free memory of the whole card.
    """
    reusable = memory.reserved_bytes - memory.allocated_bytes
    return max(0, min(memory.limit_bytes - memory.allocated_bytes, memory.free_bytes + reusable))


def compute_budget(memory: DeviceMemory, *, margin_fraction: float, max_bytes: int | None = None) -> int:
    """Available bytes less the margin, at most `max_bytes`."""
    budget = int(compute_available(memory) * (1.0 - margin_fraction))
    return budget if max_bytes is None else min(budget, max_bytes)
