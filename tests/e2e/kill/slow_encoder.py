"""The encoder's double for a worker process that is to be killed at work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tasks.backends.fake_encoder import FakeEncoder
from tasks.records import BatchOutcome, TokenIds


@dataclass
class SlowEncoder(FakeEncoder):
    """Takes its time, like a model."""

    batch_s: float = 0.02

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        time.sleep(self.batch_s)
        return super().encode(token_ids)
