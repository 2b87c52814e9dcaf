"""The encoder port: token ids in, vectors out, device memory told. Adapters: torch_encoder, process_encoder, fake_encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tasks.records import BatchOutcome, DeviceMemory, EncoderInfo, TokenIds


class Encoder(Protocol):
    """One model on one device. Not thread-safe: one caller at a time.

    `encode` pads shorter rows to the longest and masks only if the rows' lengths differ. Vectors come back float32,
    L2-normalised, in the order of the rows, synchronised with the device. Failures of the device come back as an outcome,
    after the failed frames are gone; only a broken installation or a programming error raises.
    """

    def describe(self) -> EncoderInfo:
        """Load the model if it is not loaded. Raises ModelError or DeviceError."""
        ...

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        """Embed one micro-batch."""
        ...

    def read_memory(self) -> DeviceMemory:
        """The device's memory now."""
        ...

    def release_memory(self) -> None:
        """Collect garbage and give cached blocks back: after an OOM, never per batch (it synchronises)."""
        ...

    def restart(self) -> None:
        """Replace the process that holds the device. Raises DeviceError where there is no process to replace."""
        ...

    def close(self) -> None:
        """Free the device. The encoder can't be used afterwards."""
        ...
