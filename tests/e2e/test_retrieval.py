"""Retrieval quality on the Cranfield collection: the pipeline against brute force over the same nodes with the plain model.

The data folder (corpus.jsonl, queries.jsonl, qrels.tsv) is BALLAST_CRANFIELD, or shared/data/cranfield beside the checkout.
The plain model embeds every BALLAST_PLAIN_EVERY-th node again (8; 1 for the README's figure), of the others it is given the
stored vectors: each that it does embed must be the stored one.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tasks.config import IngestSettings, QdrantSettings
from tasks.records import RunSummary

ROOT = Path(__file__).resolve().parents[2]
CRANFIELD = Path(os.environ.get("BALLAST_CRANFIELD", ROOT.parent / "shared" / "data" / "cranfield"))
PLAIN_EVERY = int(os.environ.get("BALLAST_PLAIN_EVERY", "8"))
WHOLE_DOCUMENT_SCORE = 0.354  # the same model over whole documents, cut at its 256 tokens

pytestmark = [
    pytest.mark.skipif(not (CRANFIELD / "corpus.jsonl").is_file(), reason=f"no Cranfield data in {CRANFIELD}"),
    pytest.mark.timeout(1200),
]


def read_queries() -> dict[str, str]:
    with (CRANFIELD / "queries.jsonl").open(encoding="utf-8") as lines:
        return {row["_id"]: row["text"] for row in map(json.loads, lines)}


def read_judgements() -> dict[str, dict[str, int]]:
    judged: dict[str, dict[str, int]] = {}
    with (CRANFIELD / "qrels.tsv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            judged.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    return judged


def score_ranking(ranked: list[str], judged: Mapping[str, int]) -> float:
    """nDCG@10 with linear gains, as trec_eval has it."""
    gains = [judged.get(doc_id, 0) for doc_id in ranked[:10]]
    ideal = sorted(judged.values(), reverse=True)[:10]
    discounts = 1 / np.log2(np.arange(2, 12))
    best = float(np.dot(ideal, discounts[: len(ideal)]))
    return float(np.dot(gains, discounts[: len(gains)])) / best if best else 0.0


def rank_documents(doc_ids: list[str], scores: NDArray[np.float32]) -> list[str]:
    """One score a document: its best node's."""
    ranked: dict[str, None] = {}
    for row in np.argsort(-scores, kind="stable"):
        ranked.setdefault(doc_ids[row])
    return list(ranked)


def test_the_ranking_documents_take_their_best_node() -> None:
    scores = np.array([0.1, 0.9, 0.5, 0.8], np.float32)
    assert rank_documents(["a", "b", "a", "c"], scores) == ["b", "c", "a"]
    assert score_ranking(["b", "c", "a"], {"b": 2, "a": 1}) == pytest.approx((2 + 1 / 2) / (2 + 1 / np.log2(3)))


@pytest.fixture(scope="module")
def ingested(
    prefect_api: str, minilm: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunSummary, Any]]:
    from flows.ingest import ingest
    from tasks.backends.qdrant import open_store

    data = tmp_path_factory.mktemp("cranfield")
    settings = IngestSettings.model_validate(
        {
            "source": {"uri": str(CRANFIELD / "corpus.jsonl"), "id_field": "_id"},
            "embedding": {"model": minilm, "device": "cpu"},
            "qdrant": {"collection": "cranfield"},
            "data_folder": str(data),
        }
    )
    summary = ingest(settings)
    store = open_store(QdrantSettings(), str(data), environment={})
    yield summary, store
    store.close()


def test_every_document_is_accounted_for(ingested: tuple[RunSummary, Any]) -> None:
    books = ingested[0].books
    assert books.documents_seen == 1400
    assert books.documents_written + books.documents_skipped == 1400
    assert books.documents_failed == 0
    assert books.points_counted == books.nodes_planned


def test_retrieval_is_as_good_as_brute_force_with_the_plain_model(
    ingested: tuple[RunSummary, Any], minilm: str
) -> None:
    from llama_index.core.schema import MetadataMode
    from llama_index.core.vector_stores.utils import metadata_dict_to_node
    from sentence_transformers import SentenceTransformer

    summary, store = ingested
    queries, judgements = read_queries(), read_judgements()
    plain = SentenceTransformer(minilm, device="cpu")
    points, offset = [], None
    while True:
        page, offset = store._client.scroll(summary.physical_collection, limit=1000, offset=offset, with_vectors=True)
        points.extend(page)
        if offset is None:
            break
    nodes = [metadata_dict_to_node(point.payload) for point in points]
    doc_ids = [point.payload["doc_id"] for point in points]
    texts = [node.get_content(MetadataMode.EMBED) for node in nodes]
    assert max(len(plain.tokenizer(text)["input_ids"]) for text in texts) <= 256
    reference = np.array([point.vector["text-dense"] for point in points], np.float32)
    again = np.arange(0, len(texts), PLAIN_EVERY)
    embedded = plain.encode([texts[row] for row in again], batch_size=32, normalize_embeddings=True)
    assert (embedded * reference[again]).sum(axis=1).min() > 0.9999
    reference[again] = embedded
    asked = plain.encode(list(queries.values()), batch_size=32, normalize_embeddings=True)

    brute, ours = [], []
    for row, query_id in enumerate(queries):
        judged = {f"corpus.jsonl#{doc}": score for doc, score in judgements.get(query_id, {}).items()}
        brute.append(score_ranking(rank_documents(doc_ids, reference @ asked[row]), judged))
        hits = store.search("cranfield", asked[row], 100)
        found = np.array([hit.score for hit in hits], np.float32)
        ours.append(score_ranking(rank_documents([hit.doc_id for hit in hits], found), judged))
    print(f"nDCG@10 pipeline {np.mean(ours):.4f}, brute force {np.mean(brute):.4f}, {len(nodes)} nodes")
    assert abs(np.mean(ours) - np.mean(brute)) <= 0.005
    assert np.mean(ours) >= WHOLE_DOCUMENT_SCORE
