"""The sample corpus: every document of it is read, one is empty, and its binary files are what the script makes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tasks.backends.listing import FORMATS
from tasks.backends.readers import read_file
from tasks.backends.sources import open_source
from tasks.config import SourceSettings
from tasks.records import Document, FileRef, Rejection

SAMPLES = Path(__file__).parents[2] / "samples"


def read_all(folder: Path) -> dict[str, Document | Rejection]:
    settings = SourceSettings(uri=str(folder))
    items = [read_file(item, settings) if isinstance(item, FileRef) else item for item in open_source(settings)]
    return {item.doc_id: item for item in items}


def test_every_sample_is_read_but_the_empty_one() -> None:
    items = read_all(SAMPLES)
    rejected = {name: item.status for name, item in items.items() if isinstance(item, Rejection)}
    assert rejected == {"notes/to-be-written.txt": "skipped"}
    documents = [item for item in items.values() if isinstance(item, Document)]
    formats = Counter(document.metadata["format"] for document in documents)
    assert set(formats) == set(FORMATS)
    assert 30 <= len(documents) <= 60
    assert all(document.metadata.get("title") for document in documents if document.metadata["format"] != "txt")


def test_the_binary_samples_are_what_the_script_makes(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(
        [sys.executable, str(SAMPLES.parent / "make_samples.py"), str(tmp_path)],
        check=True,
        env=environment,
        timeout=120,
    )
    made = read_all(tmp_path)
    committed = read_all(SAMPLES)
    assert {name: committed[name] for name in made} == made
