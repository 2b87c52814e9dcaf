"""Host memory under cgroups and limits; the CUDA readings are in tests/gpu."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tasks.backends.device_memory import (
    read_cgroup_limits,
    read_host_memory,
    read_process_size,
    read_processor_name,
)
from tasks.records import DeviceMemory

GIB = 1024**3
ROOT = Path(__file__).resolve().parents[3]


def build_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_the_host_is_what_the_kernel_says() -> None:
    memory = read_host_memory()
    assert memory.total_bytes == psutil.virtual_memory().total
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert memory.limit_bytes <= memory.total_bytes
    assert memory.reserved_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_a_fraction_caps_the_limit() -> None:
    assert read_host_memory(fraction=0.25).limit_bytes <= psutil.virtual_memory().total // 4


def test_a_version_2_cgroup_and_its_ancestors_are_read_without_the_file_cache(tmp_path: Path) -> None:
    build_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "cgroup/pod/container/memory.max": "max\n",
            "cgroup/pod/container/memory.current": "77\n",
            "cgroup/pod/memory.max": f"{8 * GIB}\n",
            "cgroup/pod/memory.current": f"{5 * GIB}\n",
            "cgroup/pod/memory.stat": f"anon 1\ninactive_file {2 * GIB}\n",
        },
    )
    limits = read_cgroup_limits(cgroup_root=tmp_path / "cgroup", proc=tmp_path / "proc")
    assert limits == [(8 * GIB, 3 * GIB)]


def test_a_container_whose_path_is_the_hosts_reads_its_own_root(tmp_path: Path) -> None:
    build_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/docker-1234.scope\n",
            "cgroup/memory.max": f"{2 * GIB}\n",
            "cgroup/memory.current": f"{GIB}\n",
        },
    )
    assert read_cgroup_limits(cgroup_root=tmp_path / "cgroup", proc=tmp_path / "proc") == [(2 * GIB, GIB)]


def test_a_version_1_cgroup_is_read_and_its_no_limit_is_none(tmp_path: Path) -> None:
    build_tree(
        tmp_path,
        {
            "proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/job\n",
            "cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "cgroup/memory/memory.usage_in_bytes": "5\n",
            "cgroup/memory/job/memory.limit_in_bytes": f"{GIB}\n",
            "cgroup/memory/job/memory.usage_in_bytes": "4096\n",
        },
    )
    assert read_cgroup_limits(cgroup_root=tmp_path / "cgroup", proc=tmp_path / "proc") == [(GIB, 4096)]


def test_the_tightest_of_machine_and_cgroup_wins(tmp_path: Path) -> None:
    build_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/statm": "1000 500 0 0 0 0 0\n",
            "proc/meminfo": f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {12 * GIB // 1024} kB\n",
            "cgroup/memory.max": f"{4 * GIB}\n",
            "cgroup/memory.current": f"{GIB}\n",
        },
    )
    memory = read_host_memory(cgroup_root=tmp_path / "cgroup", proc=tmp_path / "proc")
    page = resource.getpagesize()
    assert memory == DeviceMemory(16 * GIB, 3 * GIB, 4 * GIB, reserved_bytes=500 * page, allocated_bytes=500 * page)


READ_UNDER_A_LIMIT = """
from tasks.backends.device_memory import limit_address_space, read_host_memory
cap = limit_address_space({headroom})
memory = read_host_memory()
try:
    bytearray(2 * {headroom})
except MemoryError:
    print(cap, memory.limit_bytes, memory.free_bytes)
"""


def test_an_address_space_limit_bounds_limit_and_free_memory() -> None:
    headroom = GIB // 2
    script = READ_UNDER_A_LIMIT.format(headroom=headroom)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    cap, limit_bytes, free_bytes = map(int, told.split())
    assert limit_bytes == cap
    assert 0 < free_bytes <= headroom


def test_process_size_and_processor_name_are_told() -> None:
    virtual_bytes, resident_bytes = read_process_size()
    assert virtual_bytes >= resident_bytes > 0
    assert read_processor_name()


TRIM = """
from tasks.backends.device_memory import HeapTrimmer, read_process_size
trimmer = HeapTrimmer(slack_bytes=100 * 1024**2)
assert not trimmer.trim_if_grown(), "nothing has grown yet"
blocks = [bytearray(b"x" * 100_000) for _ in range(3000)]
kept = blocks[::50]
del blocks
before = read_process_size()[1]
assert trimmer.trim_if_grown(), "300 MB of holes"
assert read_process_size()[1] < before - 150 * 1024**2, "given back"
assert not trimmer.trim_if_grown(), "once"
"""


def test_a_heap_full_of_holes_is_given_back_when_it_has_grown() -> None:
    # A process of its own: this one's heap may have room for the blocks without growing.
    result = subprocess.run([sys.executable, "-c", TRIM], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
