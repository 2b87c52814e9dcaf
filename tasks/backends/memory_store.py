"""Fitted memory models on disk: one JSON file a MemoryKey, holding the samples, so that a better fit needs no new
probes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tasks.records import MemoryKey, MemorySample

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the file format: a file of another version is ignored and the device probed anew."""


@dataclass(frozen=True, slots=True)
class StoredFit:
    """What a calibration measured under one key."""

    samples: tuple[MemorySample, ...]
    tokens_per_s: float  # 0 where it could not be measured
    launch_tokens: int  # tokens that the device embeds in the time of an empty launch


def save_fit(folder: str | Path, key: MemoryKey, fit: StoredFit) -> Path:
    """Write the key's file and return its path; a reader sees the old file or the new one, never half of one. Raises
    OSError."""
    path = _find_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"version": VERSION, "key": asdict(key), **asdict(fit)}
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def load_fit(folder: str | Path, key: MemoryKey) -> StoredFit | None:
    """What was saved under exactly this key; None where nothing was, or where the file can't be used (logged)."""
    path = _find_path(folder, key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("memory fit ignored path=%s reason=%r", path, str(error))
        return None
    try:
        return _parse_fit(text, key)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("memory fit ignored path=%s reason=%r: the device is probed anew", path, str(error))
        return None


def _parse_fit(text: str, key: MemoryKey) -> StoredFit:
    record = json.loads(text)
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise ValueError(f"not a memory fit of version {VERSION}")
    if record["key"] != asdict(key):
        raise ValueError(f"it belongs to another key: {record['key']}")
    samples = tuple(MemorySample(**sample) for sample in record["samples"])
    for sample in samples:
        numbers = (sample.nodes, sample.padded_tokens, sample.peak_bytes)
        if not isinstance(sample.masked, bool) or not all(type(x) is int and x > 0 for x in numbers):
            raise ValueError(f"a sample makes no sense: {sample}")
    tokens_per_s, launch_tokens = float(record["tokens_per_s"]), int(record["launch_tokens"])
    if not 0 <= tokens_per_s < float("inf") or launch_tokens < 0:
        raise ValueError(f"tokens_per_s={tokens_per_s} launch_tokens={launch_tokens} make no sense")
    return StoredFit(samples, tokens_per_s, launch_tokens)


def _find_path(folder: str | Path, key: MemoryKey) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
    return Path(folder) / f"memory-{digest[:20]}.json"
