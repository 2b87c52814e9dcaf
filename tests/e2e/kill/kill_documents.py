"""Documents before and after a change, and a model's folder for a run whose encoder is the double."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from tasks.backends.model_files import resolve_model
from tasks.backends.tokenizer import name_export

DIMENSION = 24
WORDS = [
    "pilot",
    "tug",
    "breakwater",
    "ballast",
    "tonne",
    "harbour",
    "tide",
    "log",
    "fender",
    "berth",
    "draught",
    "anchor",
    "quay",
    "crane",
    "hatch",
    "bilge",
    "keel",
    "bow",
    "stern",
    "rudder",
    "winch",
    "capstan",
    "hawser",
    "bollard",
    "lighthouse",
    "buoy",
    "channel",
    "fairway",
    "current",
    "swell",
    "gale",
    "forecast",
    "manifest",
    "customs",
]


def write_paragraphs(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.randint(30, 38))).capitalize() + "." for _ in range(count)]


def write_documents(folder: Path) -> tuple[Path, Path]:
    """Two folders: as it was, and as it is after some documents were edited, added and deleted."""
    rng = random.Random("harbour")
    before = {f"kept-{n}.txt": write_paragraphs(rng, n % 4 + 1) for n in range(5)}
    before |= {f"edited-{n}.txt": write_paragraphs(rng, 12) for n in range(3)}
    before |= {f"gone-{n}.txt": write_paragraphs(rng, n + 2) for n in range(3)}
    before["cut.txt"] = write_paragraphs(rng, 6)
    before["rewritten.md"] = ["# Rules", *write_paragraphs(rng, 4), "## Tugs", *write_paragraphs(rng, 4)]
    before["repeated.txt"] = write_paragraphs(rng, 1) * 5
    before["twin.txt"] = before["kept-3.txt"]
    before["empty.txt"] = []
    after = {name: list(texts) for name, texts in before.items() if not name.startswith("gone")}
    for n in range(3):
        after[f"edited-{n}.txt"][3 * n : 3 * n + 2] = write_paragraphs(rng, 2)
        after[f"new-{n}.txt"] = write_paragraphs(rng, 2 * n + 1)
    after["cut.txt"] = after["cut.txt"][:4]  # every node of it is stored already
    after["rewritten.md"] = ["# Other rules", *write_paragraphs(rng, 7)]
    after["repeated.txt"] *= 2
    folders = folder / "before", folder / "after"
    for target, documents in zip(folders, (before, after), strict=True):
        target.mkdir()
        for name, paragraphs in documents.items():
            (target / name).write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folders


def prepare_model(model: Path, folder: Path, data_folder: Path) -> Path:
    """A folder with the model's shape, a small vocabulary and no weights: the encoder is the double.

    Each run hashes the model and reads its tokenizer twice: with 90 MB of weights and 30,522 words most of a run's time.
    The tokenizer is exported into `data_folder` as a first run does it, but without the import of transformers.
    """
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("model.safetensors", "*.md", "vocab.txt"))
    (folder / "model.safetensors").touch()
    for name, key in (("config.json", "hidden_size"), ("1_Pooling/config.json", "word_embedding_dimension")):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, key: DIMENSION}))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {token: number for token, number in tokenizer["model"]["vocab"].items() if number < 1_200}
    tokenizer["model"]["vocab"] = {word: 2_000 + number for number, word in enumerate(WORDS)} | vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    exported = name_export(resolve_model(str(folder)).revision, str(data_folder / "tokenizers"))
    exported.parent.mkdir(parents=True)
    shutil.copy(folder / "tokenizer.json", exported)
    return folder
