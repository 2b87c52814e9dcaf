"""Collections damaged by hand, in every way there is a name for: verify finds exactly that, and a repair mends it.

Real files, chunker, embedded Qdrant and ledger; the vectors are a double's, for nothing here depends on their meaning.
"""

from __future__ import annotations

import random
import shutil
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from tasks.backends.fake_encoder import GIB, FakeEncoder
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.qdrant_ledger import Ledger
from tasks.config import IngestSettings, QdrantSettings
from tasks.engine.devices import Devices
from tasks.engine.embed_nodes import NodeEmbedder
from tasks.engine.embedded import EmbedSettings
from tasks.engine.open_run import open_run
from tasks.engine.repair_collection import repair_collection
from tasks.engine.verify_collection import inspect_collection, make_report
from tasks.errors import StoreMismatch, StoreMissing
from tasks.policy.memory import MemoryModel
from tasks.policy.memory_fit import start_fit
from tasks.records import LedgerRecord, ModelFiles, VerifyReport

SENTENCE = "Berth {number} of {name}: the pilot boards {number} miles before the breakwater when the tide allows it."
DOCUMENTS = 24


def write_document(folder: Path, name: str, sentences: int = 6, first: str = "") -> None:
    texts = [SENTENCE.format(number=number, name=name) for number in range(sentences)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n\n".join([*([first] if first else []), *texts]))


class NoCpuPool:
    """In the place of the CPU pool: nothing spills in these tests."""

    workers = 1

    def close(self) -> None:
        pass


def start_double(_settings: IngestSettings, _files: ModelFiles, observer: Any, stop: threading.Event) -> Devices:
    encoder = FakeEncoder(total_bytes=8 * GIB, dimension=384, max_tokens=256)
    law = MemoryModel(encoder.c0, encoder.c1, 0.0, 0.0, encoder.c1, encoder.c1, encoder.c2, 0.0)
    embedder = NodeEmbedder(encoder, start_fit(law), EmbedSettings(max_micro_batch_tokens=8_192), stop=stop)
    pool: Any = NoCpuPool()
    return Devices(embedder, pool, device="cpu", note="a double", tokens_per_s=0, observer=observer, stop=stop)


class Harbour:
    """One data folder and its sources; everything is opened anew for each command, as processes would."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self.docs = folder / "docs"
        self._model = model

    def settings(self, source: str = "docs", **groups: dict[str, Any]) -> IngestSettings:
        values: dict[str, Any] = {
            "source": {"uri": str(self.folder / source), "name": source},
            "embedding": {"model": self._model},
            "chunking": {"max_tokens": 48, "overlap_tokens": 0},
            "partition": {"max_tokens": 4_000},
            "qdrant": {"collection": "port"},
            "data_folder": str(self.folder / "data"),
        }
        for name, group in groups.items():
            values[name] = {**values.get(name, {}), **group}
        return IngestSettings.model_validate(values)

    def ingest(self, settings: IngestSettings | None = None) -> int:
        """Returns how many nodes were embedded."""
        run = open_run(settings or self.settings(), {}, chunk_workers=0, start=start_double)
        devices = threading.Thread(target=run.start_devices)
        devices.start()
        embedded = 0
        try:
            while (partition := run.spool_next_partition()) is not None:
                devices.join()
                embedded += run.embed_partition(partition).nodes
                run.upsert_partition(partition)
            run.settle()
            run.close_books()
        finally:
            run.close()
            devices.join()
        return embedded

    def verify(
        self, settings: IngestSettings | None = None, *, repair: bool = False, with_source: bool = True
    ) -> VerifyReport:
        settings = settings or self.settings()
        found = inspect_collection(settings, with_source=with_source, environment={})
        if not repair:
            return make_report(found, None, (), 0.0)
        mended = repair_collection(settings, found, environment={})
        self.embedded = self.ingest(mended.settings) if mended.needs_ingest else 0
        again = inspect_collection(settings, with_source=with_source, environment={})
        return make_report(found, again, mended.notes, 0.0)

    @contextmanager
    def store(self) -> Iterator[tuple[QdrantStore, str]]:
        store = open_store(QdrantSettings(), str(self.folder / "data"), environment={})
        try:
            yield store, next(state.physical for state in store.list_physical("port") if state.is_live)
        finally:
            store.close()

    @contextmanager
    def by_hand(self) -> Iterator[tuple[QdrantClient, str]]:
        """The plain client, as somebody would use it who knows nothing of Ballast."""
        with self.store() as (_, physical):
            pass
        client = QdrantClient(path=str(self.folder / "data" / "qdrant"))
        try:
            yield client, physical
        finally:
            client.close()

    def read_points(self) -> dict[str, tuple[str, str]]:
        """Point id -> (document, generation)."""
        with self.store() as (store, physical):
            pages = list(store.scroll_points(physical, with_vectors=False))
        return {
            point_id: (doc_id, generation)
            for page in pages
            for point_id, doc_id, generation in zip(page.ids, page.doc_ids, page.generations, strict=True)
        }

    def read_ledger(self) -> dict[tuple[str, str], LedgerRecord]:
        with self.store() as (store, physical):
            records = [record for page in store.ledger(physical).scroll() for record in page]
        return {(record.source, record.doc_id): replace(record, updated_at="") for record in records}


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Harbour:
    """Some documents, ingested once; each test damages a copy."""
    harbour = Harbour(tmp_path_factory.mktemp("ingested"), minilm)
    for number in range(DOCUMENTS):
        write_document(harbour.docs, f"{number:02}.txt")
    assert harbour.ingest() >= 3 * DOCUMENTS
    return harbour


@pytest.fixture
def harbour(ingested: Harbour, tmp_path: Path, minilm: str) -> Harbour:
    shutil.copytree(ingested.folder, tmp_path / "copy", symlinks=True)
    return Harbour(tmp_path / "copy", minilm)


def list_findings(report: VerifyReport) -> dict[str, list[str]]:
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for finding in report.found:
        kinds[finding.doc_id].append(finding.kind)
    return dict(kinds)


def ids_of(harbour: Harbour, doc_id: str) -> list[str]:
    return sorted(point_id for point_id, (owner, _) in harbour.read_points().items() if owner == doc_id)


def test_a_healthy_collection_has_no_findings_with_its_source_and_without(harbour: Harbour) -> None:
    for with_source in (True, False):
        report = harbour.verify(with_source=with_source)
        assert list_findings(report) == {}
        assert (report.documents, report.points) == (DOCUMENTS, len(harbour.read_points()))
        assert report.is_clean


def damage_every_way(harbour: Harbour) -> dict[str, list[str]]:
    """Each document in another way; returns what verify should find."""
    points = {doc_id: ids_of(harbour, doc_id) for doc_id in (f"{number:02}.txt" for number in range(DOCUMENTS))}
    rng = np.random.default_rng(7)
    unit = rng.normal(size=384)
    unit = unit / np.linalg.norm(unit)

    write_document(harbour.docs, "new.txt")
    (harbour.docs / "empty.txt").touch()  # nothing to embed in these two: not missing
    (harbour.docs / "glyphs.txt").write_text("\ue000\ue001 \ue002")
    (harbour.docs / "01.txt").unlink()
    write_document(harbour.docs, "02.txt", first="A first paragraph that is new.")
    (harbour.docs / "03.txt").unlink()
    (harbour.docs / "03.txt").symlink_to("nowhere")
    (harbour.docs / "04.txt").write_text("")
    with harbour.store() as (store, physical):
        ledger = store.ledger(physical)
        records = ledger.read("docs", list(points))
        ledger.write([replace(records["05.txt"], status="pending", is_partial=True)])
        store.delete_points(physical, points["06.txt"][:1])
        store.delete_points(physical, points["07.txt"])
        ledger.remove("docs", ["08.txt", "09.txt"])
        store.delete_points(physical, points["09.txt"][-1:])
    with harbour.by_hand() as (client, physical):
        copies = {
            doc_id: client.retrieve(physical, [points[doc_id][0]], with_payload=True)[0].payload
            for doc_id in ("10.txt", "11.txt", "18.txt")
        }

        def put(point_id: int | str, vector: Any, payload: Any) -> None:
            client.upsert(physical, [models.PointStruct(id=point_id, vector=vector, payload=payload)])

        def put_vector(doc_id: str, vector: Any) -> None:
            (point,) = client.retrieve(physical, [points[doc_id][1]], with_payload=True)
            with np.errstate(invalid="ignore"):  # it divides infinity by itself, and stores that
                put(str(point.id), vector, point.payload)

        dense = {"text-dense": unit.tolist()}
        put(str(uuid.uuid4()), dense, copies["10.txt"])
        put(str(uuid.uuid4()), dense, {**copies["11.txt"], "generation": "f" * 64})
        put_vector("12.txt", {})
        put_vector("13.txt", {"text-dense": (3 * unit).tolist()})
        put_vector("14.txt", {"text-dense": [0.0] * 384})
        put_vector("15.txt", {"text-dense": [float("inf"), *unit.tolist()[1:]]})
        put(17, dense, {"note": "somebody's own"})
        put(str(uuid.uuid4()), dense, {**copies["18.txt"], "generation": None})
        put(str(uuid.uuid4()), dense, {**copies["10.txt"], "doc_id": "never-was.txt", "ballast_nodes": 1})
    return {
        "new.txt": ["missing_document"],
        "01.txt": ["surplus_document"],
        "02.txt": ["stale_document"],
        "03.txt": ["unreadable"],
        "04.txt": ["stale_document"],
        "05.txt": ["half_written"],
        "06.txt": ["missing_points"],
        "07.txt": ["missing_points"],
        "08.txt": ["orphan_points"],
        "09.txt": ["orphan_points"],
        "10.txt": ["surplus_points"],
        "11.txt": ["other_generation"],
        "12.txt": ["wrong_dimension"],
        "13.txt": ["bad_vector"],
        "14.txt": ["bad_vector"],
        "15.txt": ["bad_vector"],
        "": ["orphan_points"],
        "18.txt": ["orphan_points"],
        "never-was.txt": ["surplus_document"],
    }


def test_every_damage_is_found_and_a_repair_ends_where_an_undisturbed_run_would(
    harbour: Harbour, tmp_path: Path, minilm: str
) -> None:
    expected = damage_every_way(harbour)
    report = harbour.verify()
    assert list_findings(report) == expected
    assert not report.is_clean
    assert list_findings(harbour.verify()) == expected  # looking changes nothing

    repaired = harbour.verify(repair=True)
    # A link to nowhere is for a person to mend; its points are as they were.
    assert [(finding.doc_id, finding.kind) for finding in repaired.left] == [("03.txt", "unreadable")]
    assert len(repaired.repaired) == len(expected) - 1

    write_document(harbour.docs, "03.txt")
    undisturbed = Harbour(tmp_path / "undisturbed", minilm)
    (harbour.docs / "03.txt").unlink()
    write_document(harbour.docs, "03.txt")
    shutil.copytree(harbour.docs, undisturbed.docs)
    undisturbed.ingest()
    harbour.ingest()
    assert harbour.read_points() == undisturbed.read_points()
    assert harbour.read_ledger() == undisturbed.read_ledger()
    assert harbour.verify().is_clean


def test_three_percent_of_the_points_deleted_by_hand_are_found_and_only_these_embedded_again(
    harbour: Harbour,
) -> None:
    before = harbour.read_points()
    lost = random.Random(3).sample(sorted(before), max(3, round(0.03 * len(before))))
    with harbour.store() as (store, physical):
        store.delete_points(physical, lost)
    report = harbour.verify()
    assert list_findings(report) == {doc_id: ["missing_points"] for doc_id, _ in map(before.__getitem__, lost)}
    assert sum(int(each.expected.split()[0]) - int(each.found) for each in report.found) == len(lost)

    repaired = harbour.verify(repair=True)
    assert repaired.is_clean
    assert len(repaired.repaired) == len(report.found)
    assert harbour.embedded == len(lost)
    assert harbour.read_points() == before


def test_a_lost_ledger_is_written_again_from_the_points_alone(harbour: Harbour) -> None:
    before = harbour.read_ledger()
    with harbour.by_hand() as (client, physical):
        client.delete_collection(f"{physical}--ledger")
    report = harbour.verify(with_source=False)
    assert {kind for kinds in list_findings(report).values() for kind in kinds} == {"orphan_points"}
    assert harbour.verify(with_source=False, repair=True).is_clean
    assert harbour.read_ledger() == before
    assert harbour.ingest() == 0


def test_without_a_source_nothing_is_deleted_that_would_have_to_be_embedded_again(harbour: Harbour) -> None:
    victim = ids_of(harbour, "02.txt")[0]
    with harbour.by_hand() as (client, physical):
        (point,) = client.retrieve(physical, [victim], with_payload=True)
        doubled = models.PointStruct(id=victim, vector={"text-dense": [2.0] + [0.0] * 383}, payload=point.payload)
        client.upsert(physical, [doubled])
    before = harbour.read_points()
    report = harbour.verify(with_source=False, repair=True)
    assert [(finding.doc_id, finding.kind) for finding in report.left] == [("02.txt", "bad_vector")]
    assert "run `ballast verify SOURCE --repair`" in report.notes[0]
    assert harbour.read_points() == before
    assert harbour.verify(repair=True).is_clean


def test_a_repair_with_other_settings_is_refused_before_anything_is_changed(harbour: Harbour) -> None:
    with harbour.store() as (store, physical):
        store.delete_points(physical, ids_of_open(store, physical)[:2])
    before = harbour.read_points(), harbour.read_ledger()
    with pytest.raises(StoreMismatch, match=r"chunking\.max_tokens"):
        harbour.verify(harbour.settings(chunking={"max_tokens": 64}), repair=True)
    assert (harbour.read_points(), harbour.read_ledger()) == before


def ids_of_open(store: QdrantStore, physical: str) -> list[str]:
    return [point_id for page in store.scroll_points(physical, with_vectors=False) for point_id in page.ids]


def test_a_repair_takes_model_and_chunking_from_the_collection(harbour: Harbour) -> None:
    with harbour.store() as (store, physical):
        store.delete_points(physical, ids_of_open(store, physical)[:2])
    said = harbour.settings().model_dump(include={"source", "partition", "qdrant", "data_folder"}, exclude_unset=True)
    assert harbour.verify(IngestSettings.model_validate(said), repair=True).is_clean


def test_a_document_that_another_run_writes_meanwhile_is_left_alone(harbour: Harbour) -> None:
    """Its points are those of the next version already, and the first look has seen the record of the last one."""
    with harbour.store() as (store, physical):
        store.delete_points(physical, ids_of_open(store, physical)[:1])
    found = inspect_collection(harbour.settings(), with_source=True, environment={})
    doc_id = found.findings[0].doc_id
    write_document(harbour.docs, doc_id, first="A new version.")
    harbour.ingest()
    before = harbour.read_points(), harbour.read_ledger()
    mended = repair_collection(harbour.settings(), found, environment={})
    assert "written meanwhile" in mended.notes[0]
    assert (harbour.read_points(), harbour.read_ledger()) == before
    assert harbour.verify().is_clean


def test_a_document_comes_back_after_a_repair_that_was_killed_while_it_deleted_it(
    harbour: Harbour, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = harbour.read_points(), harbour.read_ledger()
    content = (harbour.docs / "01.txt").read_text()
    (harbour.docs / "01.txt").unlink()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            harbour.verify(repair=True)
    assert ids_of(harbour, "01.txt") == []
    (harbour.docs / "01.txt").write_text(content)
    assert harbour.ingest() > 0
    assert (harbour.read_points(), harbour.read_ledger()) == before
    assert harbour.verify().is_clean


def test_many_documents_that_left_are_withheld_until_confirmed(harbour: Harbour) -> None:
    for number in range(12):
        (harbour.docs / f"{number:02}.txt").unlink()
    before = harbour.read_points()
    report = harbour.verify(repair=True)
    assert len(report.left) == 12
    assert "12 documents of 24" in report.notes[0]
    assert "--confirm-deletes" in report.notes[0]
    assert harbour.read_points() == before
    assert harbour.verify(harbour.settings(deletes={"confirmed": True}), repair=True).is_clean
    assert {doc_id for doc_id, _ in harbour.read_points().values()} == {f"{number:02}.txt" for number in range(12, 24)}


def test_points_of_nobody_in_great_number_are_withheld_until_confirmed(harbour: Harbour) -> None:
    with harbour.by_hand() as (client, physical):
        vector = {"text-dense": [1.0] + [0.0] * 383}
        client.upsert(physical, [models.PointStruct(id=number, vector=vector) for number in range(40)])
    report = harbour.verify(repair=True)
    assert [finding.kind for finding in report.left] == ["orphan_points"]
    assert "40 of" in report.notes[0]
    assert harbour.verify(harbour.settings(deletes={"confirmed": True}), repair=True).is_clean


def test_another_source_is_checked_against_the_ledger_and_repaired_with_its_own_files(harbour: Harbour) -> None:
    write_document(harbour.folder / "west", "00.txt")
    harbour.ingest(harbour.settings("west"))
    with harbour.store() as (store, physical):
        pages = list(store.scroll_points(physical, with_vectors=False))
        west = [i for page in pages for i, source in zip(page.ids, page.sources, strict=True) if source == "west"]
        store.delete_points(physical, west[:1])
    report = harbour.verify(repair=True)
    assert [(finding.source, finding.doc_id) for finding in report.left] == [("west", "00.txt")]
    assert harbour.verify(harbour.settings("west"), repair=True).is_clean
    assert harbour.verify().is_clean


def test_a_source_under_a_name_that_nobody_knows_is_told(harbour: Harbour) -> None:
    (harbour.folder / "docs").rename(harbour.folder / "moved")
    report = harbour.verify(harbour.settings("moved"))
    assert "knows no source 'moved'; it has docs" in report.notes[0]
    assert "--source-name" in report.notes[0]


def test_a_parked_document_is_counted_and_is_no_finding(harbour: Harbour) -> None:
    (harbour.docs / "bad.pdf").write_bytes(b"no PDF at all")
    for _ in range(3):
        harbour.ingest()
    report = harbour.verify()
    assert (report.is_clean, report.parked) == (True, 1)


def test_a_failed_document_is_off_until_it_is_parked(harbour: Harbour) -> None:
    (harbour.docs / "bad.pdf").write_bytes(b"no PDF at all")
    harbour.ingest()
    assert list_findings(harbour.verify()) == {"bad.pdf": ["unreadable"]}


def test_no_collection_is_an_error_and_makes_none(tmp_path: Path, minilm: str) -> None:
    harbour = Harbour(tmp_path, minilm)
    write_document(harbour.docs, "a.txt")
    with pytest.raises(StoreMissing, match="Run `ballast ingest` first"):
        harbour.verify()
    assert not (tmp_path / "data").exists()
