"""What a device error means: out of memory, perhaps a bad moment, a lost process, or a bug. Decided in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

FailureKind = Literal["oom", "ambiguous", "sticky"]

Failure = tuple[tuple[str, ...], str]
"""One exception of a chain: the names of its type and of its base classes, and its message."""

# The process is lost: every later CUDA call in it reports the same error.
_STICKY = (
    "illegal memory access",
    "illegal instruction",
    "invalid program counter",
    "invalid address space",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "ecc error",
    "nvlink error",
    "context is destroyed",
    "cublas_status_execution_failed",
    "cublas_status_mapping_error",
    "cudnn_status_execution_failed",
    "cudnn_status_mapping_error",
)

# They share no type: "CUDA out of memory" is a torch.OutOfMemoryError, "CUDA error: out of memory" an AcceleratorError,
# "CUDA driver error: out of memory", cuBLAS' own and the CPU allocator's are plain RuntimeErrors.
_OUT_OF_MEMORY_TYPES = ("OutOfMemoryError", "MemoryError")
_OUT_OF_MEMORY = (
    "out of memory",
    "cuda_error_out_of_memory",
    "cudaerrormemoryallocation",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "defaultcpuallocator",
    "not enough memory",
    "cannot allocate memory",
    "can't allocate memory",
    "std::bad_alloc",
)

# Seen both when memory ran out inside a library's set-up and after a real fault: one retry tells them apart.
_AMBIGUOUS = (
    "cublas_status_not_initialized",
    "cublas_status_internal_error",
    "cudnn_status_not_initialized",
    "cudnn_status_internal_error",
    "devices are busy or unavailable",
    "all cuda-capable devices are busy",
    # oneDNN and the thread library say so when memory is short, and for other reasons.
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory",
    "resource temporarily unavailable",
)

# An installation that can't run this model on this device: no retry and no new process changes that.
_INSTALLATION = (
    "no kernel image is available",
    "driver version is insufficient",
    "ptx was compiled with an unsupported toolchain",
    "not compiled with cuda",
)


def classify_failure(chain: Sequence[Failure]) -> FailureKind | None:
    """What an exception and its causes (outermost first) mean for the ladder; None: a bug or a broken installation.

    The worst member decides, sticky before oom before ambiguous: an out-of-memory report on top of an illegal access is
    an illegal access.
    """
    kinds = {_classify_one(names, message) for names, message in chain}
    for kind in ("sticky", "oom", "ambiguous"):
        if kind in kinds:
            return kind
    return None


def _classify_one(names: Sequence[str], message: str) -> FailureKind | None:
    said = message.lower()
    if any(phrase in said for phrase in _INSTALLATION):
        return None
    if any(phrase in said for phrase in _STICKY):
        return "sticky"
    if any(name in _OUT_OF_MEMORY_TYPES for name in names) or any(phrase in said for phrase in _OUT_OF_MEMORY):
        return "oom"
    if any(phrase in said for phrase in _AMBIGUOUS) or ("internal assert" in said and "alloc" in said):
        return "ambiguous"
    # An error of the CUDA runtime that is none of the known ones: its context can't be trusted, a new process can.
    if "AcceleratorError" in names or "cuda error:" in said or "cuda driver error:" in said:
        return "sticky"
    return None
