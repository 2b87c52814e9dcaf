"""For a machine with a CUDA device and only torch, transformers, sentence-transformers, numpy and pytest:

python3 -m pytest tests/gpu -p no:cacheprovider
"""

import sys
from pathlib import Path

import pytest

# Not a package: the device processes import these modules by name, and inherit the path.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]


@pytest.fixture(scope="session")
def device() -> str:
    """The first CUDA device; skips where there is none."""
    from tasks.backends.allocator import set_allocator_environment

    if "torch" not in sys.modules:
        set_allocator_environment()
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"needs a CUDA device; torch {torch.__version__} sees none")
    return "cuda:0"


@pytest.fixture(scope="session")
def total_bytes(device: str) -> int:
    import torch

    return int(torch.cuda.get_device_properties(device).total_memory)
