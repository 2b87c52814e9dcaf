"""What the driver says of the GPUs' memory, sampled while a run goes on. Tolerant: without NVML the series is empty."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from tasks.backends.sampler import Sampler
from tasks.records import MemoryReading

logger = logging.getLogger(__name__)


def read_process_tree() -> frozenset[int]:
    """This process and all its children; only this one where psutil is missing."""
    try:
        psutil: Any = importlib.import_module("psutil")
    except ImportError:
        return frozenset({os.getpid()})
    return frozenset({os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))})


@dataclass(frozen=True, slots=True)
class _Device:
    handle: Any
    uuid: str


class MemorySampler(Sampler):
    """Reads used, free and total bytes of each device every `interval_s`, and this process tree's share.

    Devices are named by UUID or PCI bus id, never by index: NVML counts all cards in bus order, CUDA only the visible
    ones in its own. MIG slices are devices of their own.
    """

    def __init__(
        self,
        interval_s: float = 1.0,
        *,
        device_uuids: Collection[str] | None = None,
        pids: Callable[[], Collection[int]] = read_process_tree,
        nvml: Any = None,
        **options: Any,
    ) -> None:
        """`device_uuids` None: all devices. `nvml` is pynvml unless a test gives another. `options` are those of Sampler."""
        super().__init__(interval_s, **options)
        self._wanted = None if device_uuids is None else {_bare(uuid) for uuid in device_uuids}
        self._pids = pids
        self._nvml = nvml
        self._devices: list[_Device] = []

    def _read(self, seconds: float) -> list[MemoryReading]:
        nvml = self._nvml
        pids = set(self._pids())
        readings = []
        for device in self._devices:
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(device.handle)
            except nvml.NVMLError as error:
                # A card that falls off the bus must not end the run; the encoder will tell.
                logger.warning("nvml_reading=failed device=%s reason=%r", device.uuid, str(error))
                continue
            readings.append(
                MemoryReading(
                    seconds=seconds,
                    device_uuid=device.uuid,
                    used_bytes=int(memory.used),
                    free_bytes=int(memory.free),
                    total_bytes=int(memory.total),
                    process_bytes=self._read_process_bytes(device.handle, pids),
                )
            )
        return readings

    # ------------------------------------------------------------------------------------------ devices

    def _open(self) -> bool:
        if self._nvml is None:
            try:
                self._nvml = importlib.import_module("pynvml")
            except ImportError as error:
                self.absence = f"the package nvidia-ml-py is not installed ({error})"
                return False
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            found = self._find_devices()
        except nvml.NVMLError as error:
            self.absence = str(error)
            return False
        self._devices = [device for device, names in found if self._wanted is None or names & self._wanted]
        if not self._devices:
            self.absence = f"none of {len(found)} devices is one of {sorted(self._wanted or ())}"
            nvml.nvmlShutdown()
            return False
        return True

    def _close(self) -> None:
        self._nvml.nvmlShutdown()

    def _find_devices(self) -> list[tuple[_Device, set[str]]]:
        """Every card, or its MIG slices where it is cut into some, with all the names it answers to."""
        nvml = self._nvml
        found: list[tuple[_Device, set[str]]] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            uuid = _to_text(nvml.nvmlDeviceGetUUID(handle))
            names = {_bare(uuid), _bare(_to_text(nvml.nvmlDeviceGetPciInfo(handle).busId))}
            slices = self._find_slices(handle)
            if slices:
                # CUDA may name a slice by its card: then all the card's slices are meant.
                found.extend((one, names | {_bare(one.uuid)}) for one in slices)
            else:
                found.append((_Device(handle, uuid), names))
        return found

    def _find_slices(self, card: Any) -> list[_Device]:
        nvml = self._nvml
        try:
            is_cut = nvml.nvmlDeviceGetMigMode(card)[0] == 1
        except nvml.NVMLError:
            return []  # a card that knows no MIG
        slices: list[_Device] = []
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card) if is_cut else 0):
            try:
                handle = nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index)
            except nvml.NVMLError:
                continue  # an empty place
            slices.append(_Device(handle, _to_text(nvml.nvmlDeviceGetUUID(handle))))
        return slices

    # ------------------------------------------------------------------------------------------ readings

    def _read_process_bytes(self, handle: Any, pids: set[int]) -> int | None:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:
            return None
        ours = [process.usedGpuMemory for process in processes if process.pid in pids]
        # In a container NVML lists the host's process ids, none of which is ours; some drivers give no figures.
        if (processes and not ours) or any(used is None for used in ours):
            return None
        return sum(int(used) for used in ours)


def _bare(uuid: str) -> str:
    """CUDA writes a UUID bare, NVML with GPU- or MIG- before it; bus ids differ in case and length of the domain."""
    text = uuid.lower()
    for prefix in ("gpu-", "mig-"):
        text = text.removeprefix(prefix)
    if text.count(":") == 2:
        domain, bus, device = text.split(":")
        text = f"{int(domain, 16):08x}:{bus}:{device}"
    return text


def _to_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def read_total_bytes(nvml: Any = None) -> int | None:
    """Memory of this machine's first card; None where NVML finds no card. `nvml` is pynvml unless a test gives another."""
    sampler = MemorySampler(nvml=nvml)
    if not sampler._open():
        return None
    try:
        sampler.sample()
        return sampler.series()[0].total_bytes
    finally:
        sampler._nvml.nvmlShutdown()
