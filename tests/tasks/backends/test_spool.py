"""The spool: what was written comes back, torn or foreign files never do."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backends.spool import SpoolFolder, clear_spools
from tasks.errors import SpoolError
from tasks.records import Node, Partition


def make_node(number: int, tokens: int, *, generation: str = "g1", payload: dict[str, object] | None = None) -> Node:
    return Node(
        node_id=str(uuid.uuid5(uuid.NAMESPACE_URL, str(number))),
        doc_id=f"folder/doc {number // 3}.md",
        generation=generation,
        token_ids=np.arange(number, number + tokens, dtype=np.int32),
        payload=payload if payload is not None else {"number": number, "text": "слово 字 🙂\n"},
    )


@pytest.fixture(params=["local", "memory"])
def spool(request: pytest.FixtureRequest, tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(str(tmp_path / "spool") if request.param == "local" else f"memory://{uuid.uuid4().hex}/spool")


def write_bytes(spool: SpoolFolder, path: str, content: bytes) -> None:
    spool._files.pipe_file(path, content)


def read_bytes(spool: SpoolFolder, path: str) -> bytes:
    return spool._files.cat_file(path)


def test_all_spools_of_a_folder_are_cleared_of_their_own_files(spool: SpoolFolder) -> None:
    assert clear_spools(spool.url, "'port'") == 0
    assert clear_spools(f"{spool.url}/missing", "'port'") == 0
    parts = [SpoolFolder(f"{spool.url}/{name}") for name in ("one", "other")]
    beside = spool.write_partition(1, [make_node(1, 5)], 0.5)
    for part in parts:
        partition = part.write_partition(1, [make_node(1, 5)], 0.5)
        part.write_vectors(partition, np.arange(1), np.ones((1, 4), np.float32))
        write_bytes(part, f"{part._folder}/notes.txt", b"mine")
    assert clear_spools(spool.url, "'port'") == 4
    for part in parts:
        assert part.measure() == 0
        assert read_bytes(part, f"{part._folder}/notes.txt") == b"mine"
    assert len(spool.read_partition(beside)) == 1


def test_a_spool_that_a_run_holds_is_not_cleared(tmp_path: Path) -> None:
    held, left = SpoolFolder(f"{tmp_path}/held"), SpoolFolder(f"{tmp_path}/left")
    for spool in (held, left):
        spool.write_partition(1, [make_node(1, 5)], 0.5)
    held.lock("'port'")
    assert clear_spools(str(tmp_path), "'port'") == 1
    assert held.measure() > 0
    held.unlock()
    assert clear_spools(str(tmp_path), "'port'") == 1


def test_nodes_come_back_whole_and_longest_first(spool: SpoolFolder) -> None:
    nodes = [make_node(1, 5), make_node(2, 9), make_node(3, 5), make_node(4, 1)]
    partition = spool.write_partition(7, nodes, 0.25)
    assert (partition.index, partition.nodes, partition.tokens, partition.longest_tokens) == (7, 4, 20, 9)
    assert partition.source_fraction == 0.25

    read = spool.read_partition(partition)
    assert [node.payload["number"] for node in read] == [2, 1, 3, 4]  # equal lengths keep their order
    for node in read:
        original = nodes[node.payload["number"] - 1]
        assert (node.node_id, node.doc_id, node.generation, node.payload) == (
            original.node_id,
            original.doc_id,
            original.generation,
            original.payload,
        )
        assert node.token_ids.dtype == np.int32
        assert np.array_equal(node.token_ids, original.token_ids)
    assert spool.read_lengths(partition).tolist() == [9, 5, 5, 1]


def test_token_ids_are_views_of_one_array(spool: SpoolFolder) -> None:
    partition = spool.write_partition(0, [make_node(number, 10 + number) for number in range(50)], 1.0)
    first, second = spool.read_partition(partition)[:2]
    address = first.token_ids.__array_interface__["data"][0]
    assert second.token_ids.__array_interface__["data"][0] == address + first.token_ids.nbytes


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=60),
)
@settings(deadline=None, max_examples=40)
def test_any_lengths_and_texts_survive(lengths: list[int], texts: list[str]) -> None:
    spool = SpoolFolder(f"memory://{uuid.uuid4().hex}")
    nodes = [
        make_node(number, tokens, payload={"text": texts[number % len(texts)]}) for number, tokens in enumerate(lengths)
    ]
    partition = spool.write_partition(0, nodes, 1.0)
    read = spool.read_partition(partition)
    assert [node.tokens for node in read] == sorted(lengths, reverse=True) == spool.read_lengths(partition).tolist()
    by_id = {node.node_id: node for node in nodes}
    assert {node.node_id for node in read} == by_id.keys()
    for node in read:
        assert node.payload == by_id[node.node_id].payload
        assert np.array_equal(node.token_ids, by_id[node.node_id].token_ids)
    spool.clear()


def test_vectors_come_back_with_their_rows(spool: SpoolFolder) -> None:
    partition = spool.write_partition(0, [make_node(number, 3) for number in range(6)], 1.0)
    assert spool.read_vectors(partition) is None
    rows = np.array([4, 0, 5])
    vectors = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    spool.write_vectors(partition, rows, vectors)
    spool.write_vectors(partition, rows, vectors)  # a retried task writes again
    read = spool.read_vectors(partition)
    assert read is not None
    assert np.array_equal(read[0], rows)
    assert read[1].dtype == np.float32
    assert np.array_equal(read[1], vectors)


def test_vectors_of_other_nodes_or_settings_are_not_found(spool: SpoolFolder) -> None:
    nodes = [make_node(number, 3) for number in range(6)]
    first = spool.write_partition(0, nodes, 1.0)
    spool.write_vectors(first, np.arange(6), np.ones((6, 4), dtype=np.float32))
    other_model = spool.write_partition(0, [make_node(number, 3, generation="g2") for number in range(6)], 1.0)
    other_nodes = spool.write_partition(0, nodes[:5], 1.0)
    assert spool.read_vectors(other_model) is None
    assert spool.read_vectors(other_nodes) is None
    # The same nodes planned again after a crash: their vectors are still good.
    assert spool.read_vectors(spool.write_partition(0, nodes, 1.0)) is not None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foreign"])
def test_torn_files_are_refused(spool: SpoolFolder, damage: str) -> None:
    nodes = [make_node(number, 200) for number in range(20)]
    partition = spool.write_partition(0, nodes, 1.0)
    spool.write_vectors(partition, np.arange(20), np.ones((20, 64), dtype=np.float32))
    for path in (partition.path, partition.path.replace(".parquet", ".npz")):
        content = bytearray(read_bytes(spool, path))
        if damage == "flip":
            content[len(content) // 2] ^= 0xFF
        damaged = {"cut": content[:-100], "flip": content, "empty": b"", "foreign": b"PK\3\4 not ours"}[damage]
        write_bytes(spool, path, bytes(damaged))
    with pytest.raises(SpoolError, match=r"torn.*Delete it"):
        spool.read_partition(partition)
    with pytest.raises(SpoolError, match=r"torn.*Delete it"):
        spool.read_vectors(partition)


def test_every_flipped_byte_of_the_data_is_noticed(tmp_path: Path) -> None:
    spool = SpoolFolder(str(tmp_path))
    # Random ids don't compress: the file holds them as they are, and only the checksum can tell.
    random = np.random.default_rng(1)
    nodes = [
        replace(make_node(number, 30), token_ids=random.integers(0, 2**31, 30).astype(np.int32)) for number in range(8)
    ]
    partition = spool.write_partition(0, nodes, 1.0)
    original = spool.read_partition(partition)
    content = Path(partition.path).read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        Path(partition.path).write_bytes(damaged)
        try:
            read = spool.read_partition(partition)
        except SpoolError:
            continue
        # A byte that carries nothing we read (the footer's writer name, say) may change.
        assert [node.payload for node in read] == [node.payload for node in original], position
        assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(read, original, strict=True)), position


def test_a_missing_partition_names_the_way_out(spool: SpoolFolder) -> None:
    partition = spool.write_partition(3, [make_node(1, 2)], 1.0)
    assert spool.clear() == 1
    with pytest.raises(SpoolError, match=r"partition-000003.*is gone.*Run the ingest again"):
        spool.read_partition(partition)


def test_a_stored_partition_is_removed_alone_and_only_once(spool: SpoolFolder) -> None:
    stored, waiting = (spool.write_partition(index, [make_node(index, 2)], 0.5) for index in (0, 1))
    for partition in (stored, waiting):
        spool.write_vectors(partition, np.zeros(1, dtype=np.int64), np.ones((1, 4), dtype=np.float32))
    spool.remove_partition(stored)
    spool.remove_partition(stored)
    assert spool.read_vectors(stored) is None
    assert spool.read_partition(waiting)[0].tokens == 2
    assert spool.read_vectors(waiting) is not None
    assert spool.clear() == 2


def test_clear_leaves_other_files_alone(tmp_path: Path) -> None:
    spool = SpoolFolder(str(tmp_path))
    partition = spool.write_partition(0, [make_node(1, 2)], 1.0)
    spool.write_vectors(partition, np.zeros(1, dtype=np.int64), np.ones((1, 4), dtype=np.float32))
    unfinished = tmp_path / f"{Path(partition.path).name}.{uuid.uuid4().hex}.tmp"
    unfinished.write_bytes(b"killed while writing")
    theirs = [tmp_path / "partition-notes.parquet", tmp_path / "partition-000001.npz", tmp_path / "thesis.docx"]
    for path in theirs:
        path.write_text("keep me")
    assert spool.clear() == 3
    assert sorted(tmp_path.iterdir()) == sorted(theirs)
    assert spool.clear() == 0


def test_a_payload_that_is_not_json_is_named(spool: SpoolFolder) -> None:
    node = make_node(1, 2, payload={"ratio": float("nan")})
    with pytest.raises(SpoolError, match=rf"{node.node_id} of {node.doc_id}.*not JSON"):
        spool.write_partition(0, [make_node(2, 3), node], 1.0)


def test_a_document_id_that_is_not_text_is_named(spool: SpoolFolder) -> None:
    node = replace(make_node(1, 2), doc_id="broken\udcff.txt")
    with pytest.raises(SpoolError, match=r"broken.udcff.txt' is not UTF-8 text"):
        spool.write_partition(0, [node], 1.0)


def test_a_spool_that_can_not_be_used_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="can't be used"):
        SpoolFolder(str(tmp_path / "file" / "spool"))
    with pytest.raises(SpoolError, match=r"nosuch.*driver is installed"):
        SpoolFolder("nosuch://bucket/spool")


def test_rows_of_another_partition_are_refused(spool: SpoolFolder) -> None:
    partition = spool.write_partition(0, [make_node(1, 2)], 1.0)
    spool.write_vectors(partition, np.array([1]), np.ones((1, 4), dtype=np.float32))
    with pytest.raises(SpoolError, match="do not belong to 1 nodes"):
        spool.read_vectors(partition)


def test_a_record_with_another_count_is_refused(spool: SpoolFolder) -> None:
    real = spool.write_partition(0, [make_node(1, 2), make_node(2, 2)], 1.0)
    claimed = Partition(index=0, path=real.path, nodes=3, tokens=6, longest_tokens=2, source_fraction=1.0)
    with pytest.raises(SpoolError, match="2 nodes instead of 3"):
        spool.read_partition(claimed)


def test_embedded_partitions_of_an_earlier_run_are_found_whole_and_torn_ones_left_out(spool: SpoolFolder) -> None:
    embedded = spool.write_partition(0, [make_node(1, 5), make_node(2, 9)], 0.5)
    assert not spool.has_embedded()
    spool.write_vectors(embedded, np.array([1]), np.ones((1, 4), np.float32))
    assert spool.has_embedded()
    spool.write_partition(1, [make_node(3, 5)], 0.7)  # never embedded
    torn = spool.write_partition(2, [make_node(4, 5)], 1.0)
    spool.write_vectors(torn, np.array([0]), np.ones((1, 4), np.float32))
    write_bytes(spool, torn.path, read_bytes(spool, torn.path)[:-20])
    (found,) = SpoolFolder(spool.url).list_embedded()
    assert (found.index, found.path, found.nodes, found.tokens) == (0, embedded.path, 2, 14)
    assert [node.node_id for node in spool.read_partition(found)] == [make_node(2, 9).node_id, make_node(1, 5).node_id]
