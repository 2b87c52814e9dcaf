"""The spool: partition files and their vectors, in a local folder or at an fsspec URL. Whole or absent, never mixed up.

A partition's file name carries a digest of its nodes and their generations, and its vectors' file has the same name
with another ending: vectors of an earlier run can only be read for the very nodes and settings they were made of.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tasks.backends.filesystem import io_errors
from tasks.errors import SpoolError, StoreLocked
from tasks.records import Node, Partition, TokenIds, Vectors

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_OWN_FILES = re.compile(
    r"(partition-\d{6}-[0-9a-f]{16}\.(parquet|npz|(gpu|cpu)\.json)|run-[0-9a-f-]{36}\.(json|revoked))(\.[0-9a-f]{32}\.tmp)?"
)
_ROW_GROUP = 1 << 30  # one row group a file: its token ids stay one array


class SpoolFolder:
    """One run's spool. Nothing is kept open between calls; safe to use from several processes.

    url: a local path or an fsspec URL; made if it is not there. Methods raise SpoolError.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self._files, self._folder = fsspec.core.url_to_fs(url)
            self._files.makedirs(self._folder, exist_ok=True)
        except _opening_errors() as error:
            raise SpoolError(
                f"The spool {url} can't be used ({type(error).__name__}: {error}). Set `spool` to a folder that can be "
                "written, or to a URL whose fsspec driver is installed."
            ) from error
        self.url = url
        self._lock: IO[str] | None = None

    def write_partition(self, index: int, nodes: Sequence[Node], source_fraction: float) -> Partition:
        """Spool nodes, longest first (equal lengths keep their order), as one Parquet file with checksummed pages."""
        import pyarrow.parquet

        if not nodes:
            raise ValueError(f"partition {index} has no nodes")
        lengths = np.fromiter((node.tokens for node in nodes), dtype=np.int64, count=len(nodes))
        ordered = [nodes[row] for row in np.argsort(-lengths, kind="stable")]
        partition = Partition(
            index=index,
            path=f"{self._folder}/partition-{index:06d}-{_digest(ordered)}.parquet",
            nodes=len(ordered),
            tokens=int(lengths.sum()),
            longest_tokens=int(lengths.max()),
            source_fraction=source_fraction,
        )
        try:
            table = _to_table(ordered)
        except UnicodeEncodeError as error:
            raise SpoolError(
                f"Partition {index}: the document id {error.object!r} is not UTF-8 text. Rename that file, or its id."
            ) from error
        content = io.BytesIO()
        pyarrow.parquet.write_table(
            table,
            content,
            row_group_size=_ROW_GROUP,
            compression="zstd",
            use_dictionary=["doc_id", "generation"],
            write_statistics=False,
            write_page_checksum=True,
        )
        self._write(partition.path, content.getbuffer())
        return partition

    def read_partition(self, partition: Partition) -> list[Node]:
        """The nodes in the file's order, longest first; token ids are read-only views of one array."""
        table = self._read_table(partition, ["node_id", "doc_id", "generation", "token_ids", "payload"])
        columns = (table.column(name).to_pylist() for name in ("node_id", "doc_id", "generation", "payload"))
        return [
            Node(
                node_id=node_id, doc_id=doc_id, generation=generation, token_ids=token_ids, payload=json.loads(payload)
            )
            for node_id, doc_id, generation, payload, token_ids in zip(
                *columns, _to_token_ids(table.column("token_ids")), strict=True
            )
        ]

    def read_lengths(self, partition: Partition) -> NDArray[np.int64]:
        """Token counts in the file's order, shape (nodes,); only that column is decoded."""
        lengths = self._read_table(partition, ["tokens"]).column("tokens").to_numpy()
        return lengths.astype(np.int64)  # type: ignore[no-any-return]  # pyarrow is untyped

    def write_vectors(self, partition: Partition, rows: NDArray[np.int64], vectors: Vectors) -> None:
        """Keep vectors, shape (rows, dimension), of the partition's nodes `rows`; replaces what was kept before."""
        if rows.shape != (len(vectors),) or vectors.ndim != 2:
            raise ValueError(f"{rows.shape} rows for vectors of shape {vectors.shape}")
        content = io.BytesIO()
        # A zip without compression: numpy's own format, with a CRC of each array.
        np.savez(content, rows=rows.astype(np.int64), vectors=vectors.astype(np.float32, copy=False))
        self._write(_vectors_path(partition), content.getbuffer())

    def read_vectors(self, partition: Partition) -> tuple[NDArray[np.int64], Vectors] | None:
        """Rows and their vectors as write_vectors kept them; None where none were kept."""
        path = _vectors_path(partition)
        content = self._read(path, missing_ok=True)
        if content is None:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                rows, vectors = arrays["rows"], arrays["vectors"]
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise _torn(path, error) from error
        if rows.shape != (len(vectors),) or (rows.size and not 0 <= rows.min() <= rows.max() < partition.nodes):
            raise _torn(path, f"rows {rows.shape} do not belong to {partition.nodes} nodes")
        return rows, vectors

    def read_doc_ids(self, partition: Partition) -> list[str]:
        """Of each node, in the file's order; only that column is decoded."""
        return [str(each) for each in self._read_table(partition, ["doc_id"]).column("doc_id").to_pylist()]

    def place(self, name: str) -> str:
        """The path of a file of this folder, as Partition has it."""
        return f"{self._folder}/{name}"

    def has_partition(self, partition: Partition) -> bool:
        self._files.invalidate_cache(self._folder)
        try:
            return bool(self._files.exists(partition.path))
        except io_errors() as error:
            raise _unreadable(partition.path, error) from error

    def write_note(self, name: str, content: bytes) -> None:
        """A small file beside the partitions, replaced as a whole: a report, a sign of life. See spool_reports."""
        self._write(self.place(name), memoryview(content))

    def read_note(self, name: str) -> bytes | None:
        """None where there is none."""
        return self._read(self.place(name), missing_ok=True)

    def list_notes(self, ending: str) -> list[str]:
        """Names of the notes that end like this."""
        try:
            return [name for path in self._list_own() if (name := path.rsplit("/", 1)[-1]).endswith(ending)]
        except io_errors() as error:
            raise _unreadable(self.url, error) from error

    def remove_partition(self, partition: Partition) -> None:
        """Remove a partition's nodes, vectors and reports: they are in Qdrant. Nothing happens where they are gone already."""
        stem = partition.path.removesuffix(".parquet")
        try:
            for path in (_vectors_path(partition), partition.path, f"{stem}.gpu.json", f"{stem}.cpu.json"):
                # Not `exists` first: a remote listing may be cached from before the file was written.
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)
        except io_errors() as error:
            raise SpoolError(
                f"{partition.path} can't be removed ({error}). Its points are stored: remove it by hand."
            ) from error

    def measure(self) -> int:
        """Bytes of all its own files."""
        self._files.invalidate_cache(self._folder)
        try:
            found = self._files.ls(self._folder, detail=True)
        except io_errors() as error:
            raise _unreadable(self.url, error) from error
        return sum(int(each["size"] or 0) for each in found if _is_own(each["name"]))

    def lock(self, what: str) -> None:
        """Keep other runs out of this folder until unlock() or the end of the process; only on a local disk.

        Raises StoreLocked: two runs of one source would clear away each other's partitions.
        """
        import fsspec.implementations.local
        import portalocker

        if not isinstance(self._files, fsspec.implementations.local.LocalFileSystem):
            return
        lock = Path(self._folder, ".lock").open("a")  # noqa: SIM115  held until unlock()
        try:
            portalocker.lock(lock, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
        except portalocker.exceptions.LockException as error:
            lock.close()
            raise StoreLocked(
                f"Another run ingests {what} at this moment, in the spool {self.url}. Wait for it or stop it."
            ) from error
        self._lock = lock

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def list_embedded(self) -> list[Partition]:
        """Partitions that have vectors: embedded by a run that ended before it stored them. Torn files are left out."""
        import pyarrow as pa
        import pyarrow.parquet

        found = []
        for path in self._list_own():
            if not path.endswith(".parquet"):
                continue
            index = int(path.rsplit("/", 1)[-1].split("-")[1])
            try:
                with self._files.open(path, "rb") as stream:
                    nodes = pyarrow.parquet.read_metadata(stream).num_rows
                partition = Partition(index, path, nodes, 0, 0, 0.0)
                partition = replace(partition, tokens=int(self.read_lengths(partition).sum()))
                if self.read_vectors(partition) is not None:
                    found.append(partition)
            except (pa.ArrowException, *io_errors(), SpoolError) as error:
                logger.warning("spool file left out path=%s reason=%r: its nodes are embedded again", path, str(error))
        return found

    def has_embedded(self) -> bool:
        """Whether an earlier run left vectors here; list_embedded() reads them all, this reads none."""
        return any(path.endswith(".npz") for path in self._list_own())

    def clear(self) -> int:
        """Remove the spool's own files, unfinished ones too, and no others; returns how many."""
        try:
            names = self._list_own()
            for path in names:
                # A worker that was cut off and comes back renames its own note away meanwhile: go on with the others.
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(path)
        except FileNotFoundError:
            return 0
        except io_errors() as error:
            raise SpoolError(
                f"The spool {self.url} can't be cleared ({error}). Remove its partition-* files by hand."
            ) from error
        return len(names)

    def _list_own(self) -> list[str]:
        self._files.invalidate_cache(self._folder)
        return sorted(path for path in self._files.ls(self._folder, detail=False) if _is_own(path))

    def _read_table(self, partition: Partition, columns: list[str]) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet

        content = self._read(partition.path)
        try:
            table = pyarrow.parquet.read_table(
                pa.BufferReader(content), columns=columns, use_threads=False, page_checksum_verification=True
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _torn(partition.path, error) from error
        if table.num_rows != partition.nodes:
            raise _torn(partition.path, f"{table.num_rows} nodes instead of {partition.nodes}")
        return table

    def _read(self, path: str, *, missing_ok: bool = False) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(path)
        except FileNotFoundError as error:
            if missing_ok:
                return None
            raise SpoolError(
                f"Spool file {path} is gone. Was the spool cleared, or is it not shared? Run the ingest again."
            ) from error
        except io_errors() as error:
            raise _unreadable(path, error) from error
        return content

    def _write(self, path: str, content: memoryview) -> None:
        # A reader sees the whole file or none. Stores with a rename get it from that; object stores publish at once.
        unfinished = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._files.pipe_file(unfinished, bytes(content))
            self._files.mv(unfinished, path)
        except io_errors() as error:
            with contextlib.suppress(*io_errors()):
                self._files.rm_file(unfinished)
            raise SpoolError(
                f"Spool file {path} of {len(content)} bytes can't be written ({error}). "
                "Free space, or set `spool` to another folder."
            ) from error


def clear_spools(url: str, what: str) -> int:
    """Remove the own files of every spool in the folder `url`; returns how many. One that a run holds is left alone.

    `what` the spools are of, for the log. Raises SpoolError.
    """
    import fsspec

    try:
        files, folder = fsspec.core.url_to_fs(url)
        files.invalidate_cache(folder)
        found = [each["name"] for each in files.ls(folder, detail=True) if each["type"] == "directory"]
    except FileNotFoundError:
        return 0
    except _opening_errors() as error:
        raise SpoolError(
            f"The spools in {url} can't be listed ({type(error).__name__}: {error}). Set `spool` to what it was when "
            "they were written, or remove that folder by hand."
        ) from error
    removed = 0
    for path in sorted(found):
        spool = SpoolFolder(f"{url}/{path.rstrip('/').rsplit('/', 1)[-1]}")
        try:
            spool.lock(what)
        except StoreLocked as error:
            logger.warning("spool not cleared url=%s reason=%r", spool.url, str(error))
            continue
        try:
            removed += spool.clear()
        finally:
            spool.unlock()
    return removed


def _to_table(nodes: Sequence[Node]) -> pa.Table:
    import pyarrow as pa

    offsets = np.zeros(len(nodes) + 1, dtype=np.int32)
    np.cumsum([node.tokens for node in nodes], out=offsets[1:])
    values = np.concatenate([node.token_ids for node in nodes]).astype(np.int32, copy=False)
    return pa.table(
        {
            "node_id": pa.array([node.node_id for node in nodes], pa.string()),
            "doc_id": pa.array([node.doc_id for node in nodes], pa.large_string()),
            "generation": pa.array([node.generation for node in nodes], pa.string()),
            "tokens": pa.array(np.diff(offsets)),
            "token_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
            "payload": pa.array([_to_json(node) for node in nodes], pa.large_string()),
        }
    )


def _to_json(node: Node) -> str:
    try:
        # ASCII: a lone surrogate survives the spool, so that the store can refuse its point by name.
        return json.dumps(node.payload, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise SpoolError(
            f"Node {node.node_id} of {node.doc_id}: its payload is not JSON ({error}). Clean the document's metadata: "
            "no NaN or infinity, only text, numbers, lists and objects."
        ) from error


def _to_token_ids(column: Any) -> list[TokenIds]:
    """A list column as numpy views, one a node: no Python list a row, 4 bytes a token."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=True)
    return [values[start:end] for start, end in pairwise(offsets)]


def _digest(nodes: Sequence[Node]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for node in nodes:
        # Node ids say nothing of the model; generations do.
        digest.update(f"{node.node_id}\0{node.generation}\0{node.tokens}\n".encode())
    return digest.hexdigest()


def _vectors_path(partition: Partition) -> str:
    return partition.path.removesuffix(".parquet") + ".npz"


def _is_own(path: str) -> bool:
    return _OWN_FILES.fullmatch(path.rsplit("/", 1)[-1]) is not None


def _opening_errors() -> tuple[type[BaseException], ...]:
    return (*io_errors(), ValueError, ImportError)


def _unreadable(path: str, reason: object) -> SpoolError:
    return SpoolError(f"Spool file {path} can't be read ({reason}). Check the disk or the store behind it.")


def _torn(path: str, reason: object) -> SpoolError:
    return SpoolError(f"Spool file {path} is torn or not what it says ({reason}). Delete it and run the ingest again.")
