"""Two Qdrants whose state can be read and copied, and a reader that looks at documents while they are replaced."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.backends.fake_qdrant_server import LoopbackQdrant


@dataclass(frozen=True)
class Stored:
    """All of a Qdrant: physical collection -> point id -> payload and vector."""

    aliases: dict[str, str]
    collections: dict[str, dict[str, tuple[dict[str, Any], NDArray[np.float32]]]]

    def ids_by_document(self, name: str) -> dict[str, set[str]]:
        """doc_id -> its point ids, of the collection that the alias points to."""
        found: dict[str, set[str]] = {}
        for point_id, (payload, _) in self.collections.get(self.aliases.get(name, ""), {}).items():
            found.setdefault(payload["doc_id"], set()).add(point_id)
        return found

    def list_differences(self, other: Stored, *, atol: float = 1e-6) -> list[str]:
        """Each way in which the two are not the same; `atol` is the vectors'."""
        found = []
        if self.aliases != other.aliases:
            found.append(f"aliases {self.aliases} {other.aliases}")
        for name in sorted(self.collections.keys() | other.collections.keys()):
            mine, its = self.collections.get(name), other.collections.get(name)
            if mine is None or its is None:
                found.append(f"{name}: only on one side")
                continue
            for point_id in sorted(mine.keys() | its.keys()):
                one, another = mine.get(point_id), its.get(point_id)
                if one is None or another is None:
                    found.append(f"{name}/{point_id}: {one and one[0]} {another and another[0]}")
                elif one[0] != another[0]:
                    found.append(f"{name}/{point_id}: {one[0]} {another[0]}")
                elif one[1].shape != another[1].shape or not np.allclose(one[1], another[1], atol=atol):
                    found.append(f"{name}/{point_id}: another vector")
        return found


def read_stored(client: Any) -> Stored:
    aliases = {each.alias_name: each.collection_name for each in client.get_aliases().aliases}
    collections = {}
    for name in (each.name for each in client.get_collections().collections):
        points, _ = client.scroll(name, limit=100_000, with_payload=True, with_vectors=True)
        collections[name] = {
            str(point.id): (
                _without_time(point.payload),
                np.asarray((point.vector or {}).get("text-dense", ()), np.float32),
            )
            for point in points
        }
    return Stored(aliases, collections)


def _without_time(payload: dict[str, Any]) -> dict[str, Any]:
    """A ledger record has the time of its writing; whether there is one counts, not which."""
    return {**payload, "updated_at": bool(payload["updated_at"])} if "updated_at" in payload else payload


@dataclass
class Reader:
    """Looks at documents that a run replaces or keeps, and notes each time that it finds neither version whole."""

    name: str
    versions: dict[str, list[set[str]]]  # doc_id -> the node ids of each version
    looks: int = 0
    holes: list[str] = field(default_factory=list)

    def look(self, ids: set[str], when: str) -> None:
        self.looks += 1
        for doc_id, versions in self.versions.items():
            if not any(version <= ids for version in versions):
                has = [f"{len(version & ids)} of {len(version)}" for version in versions]
                self.holes.append(f"{doc_id}: {' and '.join(has)} nodes after {when}")


class Place(Protocol):
    """A data folder and a Qdrant: with the points of `start`, whose folder's copy it is, or empty."""

    data_folder: Path
    reader: Reader | None

    def __init__(self, data_folder: Path, start: Any) -> None: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def read(self) -> Stored: ...

    def close(self) -> None: ...


class EmbeddedPlace:
    """A data folder with an embedded Qdrant. Nobody can read it while a run has it: the reader looks between the runs."""

    def __init__(self, data_folder: Path, start: EmbeddedPlace | None) -> None:
        self.data_folder = data_folder
        self.reader: Reader | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def read(self) -> Stored:
        from qdrant_client import QdrantClient

        client = QdrantClient(path=str(self.data_folder / "qdrant"))
        stored = read_stored(client)
        client.close()
        if self.reader is not None:
            physical = stored.collections.get(stored.aliases.get(self.reader.name, ""), {})
            self.reader.look(set(physical), "a run")
        return stored

    def close(self) -> None:
        shutil.rmtree(self.data_folder, ignore_errors=True)


class ServerPlace:
    """A data folder, and the double of a server, which outlives the runs. The reader looks after every request."""

    def __init__(self, data_folder: Path, start: ServerPlace | None) -> None:
        self.data_folder = data_folder
        self.double = _ReadQdrant()
        if start is not None:
            _copy_points(start.double, self.double)
        self.double.__enter__()

    @property
    def reader(self) -> Reader | None:
        return self.double.reader

    @reader.setter
    def reader(self, reader: Reader | None) -> None:
        self.double.reader = reader

    @property
    def settings(self) -> dict[str, Any]:
        return {"url": self.double.url, "transport": "rest"}

    def read(self) -> Stored:
        return self.double.read()

    def close(self) -> None:
        self.double.__exit__()
        shutil.rmtree(self.data_folder, ignore_errors=True)


class _ReadQdrant(LoopbackQdrant):
    reader: Reader | None = None

    def answer(self, request: str, size: int, headers: dict[str, str], body: dict[str, Any]) -> Any:
        answered = super().answer(request, size, headers, body)
        reader = self.reader
        if reader is not None and (request.startswith("PUT") or request.endswith(("/delete", "/batch", "/aliases"))):
            everything = {"limit": 100_000, "with_payload": False}
            status, _, found = super().answer(f"POST /collections/{reader.name}/points/scroll", 0, {}, everything)
            ids = {point["id"] for point in found["result"]["points"]} if status == 200 else set()
            reader.look(ids, request)
        return answered

    def read(self) -> Stored:
        with self._lock:
            return read_stored(self.memory)


def _copy_points(source: LoopbackQdrant, target: LoopbackQdrant) -> None:
    from qdrant_client import models

    for name in (each.name for each in source.memory.get_collections().collections):
        config = source.memory.get_collection(name).config
        target.memory.create_collection(name, vectors_config=config.params.vectors, metadata=config.metadata)
        points, _ = source.memory.scroll(name, limit=100_000, with_payload=True, with_vectors=True)
        copied = [
            models.PointStruct(id=point.id, vector=point.vector, payload=copy.deepcopy(point.payload))
            for point in points
        ]
        if copied:
            target.memory.upsert(name, copied)
    for alias in source.memory.get_aliases().aliases:
        created = models.CreateAlias(collection_name=alias.collection_name, alias_name=alias.alias_name)
        target.memory.update_collection_aliases([models.CreateAliasOperation(create_alias=created)])
    target.indexes = copy.deepcopy(source.indexes)
