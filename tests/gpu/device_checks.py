"""What the tests run in a device process, which imports this module by name."""

from typing import Any

from random_encoder import STORY, RandomEncoder

from tasks.backends.allocator import check_allocator_settings
from tasks.records import Vectors


def check_allocator(spec: RandomEncoder) -> bool:
    """Whether expandable segments took effect."""
    spec().describe()
    return check_allocator_settings()


def run_unmasked_and_masked(spec: RandomEncoder) -> dict[str, Any]:
    """What torch dispatches, and peaks of one long row with only the flash and the memory-efficient kernel allowed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    encoder = spec()
    info = encoder.describe()
    long_row = spec.draw_nodes([spec.max_tokens])
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        fused = encoder.encode(long_row)
    story = encoder.encode(spec.draw_nodes(STORY))
    return {
        "kernels": (info.kernel_unmasked, info.kernel_masked),
        "fused": fused.kind,
        "peak": fused.peak_bytes,
        "scores": info.shape.heads * spec.max_tokens**2 * 2,
        "story": story.kind,
        "story_peak": story.peak_bytes,
        "story_scores": len(STORY) * info.shape.heads * max(STORY) ** 2 * 2,
    }


def encode_some(spec: RandomEncoder) -> Vectors:
    """Vectors of a masked batch."""
    outcome = spec().encode(spec.draw_nodes([700, 300, 300, 40, 7]))
    assert outcome.vectors is not None, outcome.message
    return outcome.vectors
