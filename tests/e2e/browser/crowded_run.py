"""One ingest with a real model whose device is too small: a CPU process plays a GPU with a neighbour. Run by the test.

`python crowded_run.py SOURCE DATA_FOLDER MODEL COLLECTION`: against the Prefect server of PREFECT_API_URL.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import tasks.prepare
from flows.ingest import ingest
from flows.progress import RunObserver
from tasks.backends.process_encoder import ProcessEncoder
from tasks.config import IngestSettings
from tasks.engine.devices import Devices, make_pool, make_spec
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.measure_device import measure_device, to_embed_settings
from tasks.engine.open_run import open_run
from tasks.metrics import start_metrics
from tasks.observe import Observer, observing
from tasks.records import BatchOutcome, ModelFiles, TokenIds

# By the closed form for MiniLM in fp32 one node of 200 tokens needs 38 MiB, one of 256 needs 40.4: the longest spill.
BUDGET_BYTES = 40 * 1024**2
CROWDED_CALLS = (2, 3, 14)
OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 18.00 MiB. GPU 0 has 3.12 MiB free (a neighbour's burst, for the test)"
)


class CrowdedEncoder(ProcessEncoder):
    """The real encoder in its process; some calls find that a neighbour has taken the memory."""

    crowded_calls: Iterator[bool] = iter(())

    def encode(self, token_ids: Sequence[TokenIds]) -> BatchOutcome:
        if next(self.crowded_calls, False):
            return BatchOutcome("oom", message=OUT_OF_MEMORY)
        return super().encode(token_ids)


def start(settings: IngestSettings, files: ModelFiles, observer: Observer, stop: threading.Event) -> Devices:
    """As start_devices() does for a GPU; what that can't place goes to the real CPU pool."""
    pool = make_pool(settings, files, stop)
    encoder = CrowdedEncoder(make_spec(settings.embedding, settings.budget, files, "cpu", threads=1))
    measured = measure_device(encoder, settings.embedding, settings.budget, settings.data_folder)
    encoder.crowded_calls = (call in CROWDED_CALLS for call in count(1))  # not while it was measured
    options = to_embed_settings(settings.budget, encoder.describe(), measured.launch_tokens)
    embedder = NodeEmbedder(encoder, measured.fit, options, spill=pool, stop=stop)
    embedder.info = replace(embedder.info, device="cuda:0")
    note = "a CPU process that plays a GPU with 40 MiB to spare"
    speed = measured.tokens_per_s
    return Devices(embedder, pool, device="cuda:0", note=note, tokens_per_s=speed, observer=observer, stop=stop)


def main(source: str, data: str, model: str, collection: str) -> None:
    tasks.prepare.open_run = partial(open_run, start=start)
    settings = IngestSettings.model_validate(
        {
            "source": {"uri": source},
            "embedding": {"model": model, "cpu_workers": 1},
            "chunking": {"workers": 1},
            "budget": {"max_bytes": BUDGET_BYTES, "grow_after": 2},
            "partition": {"max_nodes": 30},
            "qdrant": {"collection": collection},
            "data_folder": data,
        }
    )
    observer = RunObserver()
    with observing(observer), start_metrics({**os.environ, "BALLAST_METRICS_PORT": "0"}, collection=collection) as url:
        assert url is not None
        state = ingest(settings, return_state=True)
        with urllib.request.urlopen(url, timeout=10) as answer:
            metrics = answer.read().decode()
    assert observer.finished is not None, state.message
    books = observer.finished[0].books
    print(
        json.dumps(
            {
                "flow_run": str(state.state_details.flow_run_id),
                "state": state.name,
                "message": state.message,
                "nodes": books.nodes_planned,
                "spilled": books.nodes_cpu,
                "metrics": metrics,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
