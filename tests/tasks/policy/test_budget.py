import pytest

from tasks.policy.budget import compute_available, compute_budget
from tasks.records import DeviceMemory

GIB = 1024**3


@pytest.mark.parametrize(
    ("memory", "available"),
    [
        (DeviceMemory(total_bytes=16 * GIB, free_bytes=15 * GIB, limit_bytes=16 * GIB), 15 * GIB),
        # 4 GiB reserved of which 1 GiB in use: 3 GiB of cached blocks are reusable though not free.
        (DeviceMemory(16 * GIB, 11 * GIB, 16 * GIB, reserved_bytes=4 * GIB, allocated_bytes=1 * GIB), 14 * GIB),
        # Capped to 4 GiB on a card that shows 140 GiB free.
        (DeviceMemory(141 * GIB, 140 * GIB, 4 * GIB, reserved_bytes=1 * GIB, allocated_bytes=1 * GIB), 3 * GIB),
        # A neighbour has taken all but 1 GiB.
        (DeviceMemory(16 * GIB, 1 * GIB, 16 * GIB, reserved_bytes=2 * GIB, allocated_bytes=2 * GIB), 1 * GIB),
        # More in use than the limit says: nothing left, never a negative budget.
        (DeviceMemory(16 * GIB, 1 * GIB, 2 * GIB, reserved_bytes=3 * GIB, allocated_bytes=3 * GIB), 0),
    ],
)
def test_available_is_bounded_by_the_limit_and_by_what_is_free_or_reusable(
    memory: DeviceMemory, available: int
) -> None:
    assert compute_available(memory) == available


def test_the_budget_keeps_a_margin_and_obeys_its_cap() -> None:
    memory = DeviceMemory(total_bytes=10_000, free_bytes=10_000, limit_bytes=10_000)
    assert compute_budget(memory, margin_fraction=0.1) == 9_000
    assert compute_budget(memory, margin_fraction=0.1, max_bytes=500) == 500
