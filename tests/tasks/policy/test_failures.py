"""Device errors as torch words them, and what each means."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.policy.failures import Failure, classify_failure

RUNTIME = ("RuntimeError", "Exception")
ACCELERATOR = ("AcceleratorError", *RUNTIME)
OOM = ("OutOfMemoryError", *RUNTIME)

OUT_OF_MEMORY: list[Failure] = [
    (OOM, "CUDA out of memory. Tried to allocate 8.03 GiB. GPU 0 has a total capacity of 14.75 GiB"),
    (OOM, "a text of some later version"),
    (ACCELERATOR, "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    (RUNTIME, "CUDA driver error: out of memory"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    (
        RUNTIME,
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
    ),
    (
        RUNTIME,
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried 9 bytes.",
    ),
    (("MemoryError", "Exception"), ""),
    (("_ArrayMemoryError", "MemoryError", "Exception"), "Unable to allocate 9. GiB for an array with shape (9,)"),
    (("OSError", "Exception"), "[Errno 12] Cannot allocate memory"),
]
STICKY: list[Failure] = [
    (ACCELERATOR, "CUDA error: an illegal memory access was encountered"),
    (RUNTIME, "CUDA error: an illegal memory access was encountered"),
    (ACCELERATOR, "CUDA error: device-side assert triggered"),
    (ACCELERATOR, "CUDA error: misaligned address"),
    (ACCELERATOR, "CUDA error: unspecified launch failure"),
    (ACCELERATOR, "CUDA error: uncorrectable ECC error encountered"),
    (RUNTIME, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`"),
    (ACCELERATOR, "CUDA error: a code that no version has had so far"),
]
AMBIGUOUS: list[Failure] = [
    (RUNTIME, "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    (RUNTIME, "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    (RUNTIME, "could not create a primitive"),
    (
        RUNTIME,
        'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/c10/cuda/CUDACachingAllocator.cpp":1016, please report',
    ),
]
BUGS: list[Failure] = [
    (RUNTIME, "The size of tensor a (8) must match the size of tensor b (9) at non-singleton dimension 1"),
    (("ValueError", "Exception"), "too many values to unpack"),
    (("IndexError", "LookupError", "Exception"), "index out of range in self"),
    (ACCELERATOR, "CUDA error: no kernel image is available for execution on the device"),
    (RUNTIME, "shape '[9]' is invalid: INTERNAL ASSERT FAILED in a shape check"),
]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        *((failure, "oom") for failure in OUT_OF_MEMORY),
        *((failure, "sticky") for failure in STICKY),
        *((failure, "ambiguous") for failure in AMBIGUOUS),
        *((failure, None) for failure in BUGS),
    ],
)
def test_each_family_is_told_apart(failure: Failure, kind: str | None) -> None:
    assert classify_failure([failure]) == kind


@given(
    st.lists(st.sampled_from([*OUT_OF_MEMORY, *AMBIGUOUS, *BUGS]), max_size=3),
    st.sampled_from(STICKY),
    st.lists(st.sampled_from([*OUT_OF_MEMORY, *AMBIGUOUS, *BUGS]), max_size=3),
)
@settings(deadline=None)
def test_a_lost_process_is_lost_wherever_in_the_chain_it_is_said(
    before: list[Failure], sticky: Failure, after: list[Failure]
) -> None:
    assert classify_failure([*before, sticky, *after]) == "sticky"


def test_an_out_of_memory_that_a_library_wrapped_is_found() -> None:
    assert classify_failure([(("ValueError", "Exception"), "could not run the model"), OUT_OF_MEMORY[0]]) == "oom"


def test_no_exception_is_no_failure() -> None:
    assert classify_failure([]) is None
