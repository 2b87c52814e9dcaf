"""What memory there is and what this process may take of it: a CUDA device by torch, the host by the kernel."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import resource
from pathlib import Path
from typing import Any

from tasks.records import DeviceMemory

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")

# cgroup v1 writes "no limit" as the largest page-aligned integer; nothing real comes near.
_NO_LIMIT = 1 << 60


def read_cuda_memory(device: str, fraction: float = 1.0) -> DeviceMemory:
    """One CUDA device, e.g. "cuda:0". The limit is `fraction` of it, as given to set_per_process_memory_fraction.

    The driver goes on showing the whole card under such a cap, so what may still be taken is
    min(limit - reserved, free + reserved - allocated).
    """
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        limit_bytes=int(fraction * total_bytes),
        reserved_bytes=torch.cuda.memory_reserved(device),
        allocated_bytes=torch.cuda.memory_allocated(device),
    )


def read_host_memory(fraction: float = 1.0, *, cgroup_root: Path = CGROUP_ROOT, proc: Path = PROC) -> DeviceMemory:
    """The host as this process sees it: the tightest of the machine, its cgroups (v1 and v2) and RLIMIT_AS.

    reserved_bytes = allocated_bytes = the resident size: malloc does not tell what it keeps for reuse.
    """
    total_bytes, available_bytes = _read_machine(proc)
    limits = [int(fraction * total_bytes)]
    free = [available_bytes]
    for limit_bytes, used_bytes in read_cgroup_limits(cgroup_root=cgroup_root, proc=proc):
        limits.append(limit_bytes)
        free.append(limit_bytes - used_bytes)
    virtual_bytes, resident_bytes = read_process_size(proc)
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append(address_space)
        # Address space, not resident memory, is what runs out under this limit.
        free.append(address_space - virtual_bytes)
    return DeviceMemory(
        total_bytes=total_bytes,
        free_bytes=max(0, min(free)),
        limit_bytes=min(limits),
        reserved_bytes=resident_bytes,
        allocated_bytes=resident_bytes,
    )


def read_process_size(proc: Path = PROC) -> tuple[int, int]:
    """This process's virtual and resident bytes."""
    if (proc / "self/statm").exists():
        pages = (proc / "self/statm").read_text().split()
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        return int(pages[0]) * page_bytes, int(pages[1]) * page_bytes
    import psutil

    size = psutil.Process().memory_info()
    return size.vms, size.rss


class HeapTrimmer:
    """Gives freed heap pages back to the system when the process has grown by `slack_bytes`; does nothing without glibc.

    A CPU's activations are freed after every micro-batch, but glibc keeps them, and micro-batches of ever other shapes leave
    holes that fit nothing: MiniLM's process grew from 0.5 to 1.4 GB over 90 batches of 4,096 tokens, and stays at 0.8 GB, as
    fast, when trimmed on growth. A fixed mmap threshold keeps it at 0.6 GB, a fifth slower.
    """

    def __init__(self, slack_bytes: int = 160 * 1024**2, proc: Path = PROC) -> None:
        self._slack_bytes = slack_bytes
        self._proc = proc
        self._floor_bytes = read_process_size(proc)[1]
        try:
            self._trim: Any = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError):
            self._trim = None

    def trim_if_grown(self) -> bool:
        """Costs some microseconds where there is nothing to do. True where it trimmed."""
        if self._trim is None or read_process_size(self._proc)[1] <= self._floor_bytes + self._slack_bytes:
            return False
        self._trim(0)
        # What is left is in use: not to be trimmed for after every batch.
        self._floor_bytes = max(self._floor_bytes, read_process_size(self._proc)[1])
        return True


def limit_address_space(headroom_bytes: int) -> int:
    """Cap this process `headroom_bytes` above its size now; returns the cap. What exceeds it fails like a full device.

    Relative to the present size, since torch, its threads' stacks and the weights take address space of their own.
    """
    virtual_bytes, _ = read_process_size()
    cap = virtual_bytes + headroom_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (cap, hard))
    return cap


def read_cgroup_limits(*, cgroup_root: Path = CGROUP_ROOT, proc: Path = PROC) -> list[tuple[int, int]]:
    """(limit, used) bytes of every memory cgroup above this process that has a limit; file cache does not count."""
    membership = proc / "self/cgroup"
    if not membership.exists():
        return []
    found: list[tuple[int, int]] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = cgroup_root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroup_root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        # In a container the path may be the host's, while only the container's own root is mounted here.
        levels = [level for level in dict.fromkeys((folder, *folder.parents, root)) if level.is_relative_to(root)]
        readings = (_read_cgroup(level, names) for level in levels)
        found.extend(reading for reading in readings if reading is not None)
    return found


def _read_cgroup(folder: Path, names: tuple[str, str, str]) -> tuple[int, int] | None:
    limit_name, used_name, cache_name = names
    if not (folder / limit_name).exists() or not (folder / used_name).exists():
        return None
    limit = (folder / limit_name).read_text().strip()
    if limit == "max" or int(limit) >= _NO_LIMIT:
        return None
    used_bytes = int((folder / used_name).read_text())
    if (folder / "memory.stat").exists():
        for line in (folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name == cache_name:
                used_bytes -= int(value)
    return int(limit), max(0, used_bytes)


def _read_machine(proc: Path) -> tuple[int, int]:
    """Total and available bytes. psutil where it is installed, else the kernel's own table."""
    if importlib.util.find_spec("psutil") is not None and proc == PROC:
        import psutil

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    table = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
    return int(table["MemTotal"].split()[0]) * 1024, int(table["MemAvailable"].split()[0]) * 1024


def read_processor_name(proc: Path = PROC) -> str:
    """The CPU's marketing name, part of the key a host's fitted memory model is stored under."""
    table = proc / "cpuinfo"
    if table.exists():
        for line in table.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
