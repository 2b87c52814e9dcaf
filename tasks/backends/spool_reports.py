"""What workers and the ingest run tell each other through the spool: reports of partitions, signs of life, revocations.

Files, not messages: they are there after a restart of the server, the worker or the run, and a shared spool is all they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tasks.backends.spool import SpoolFolder
from tasks.errors import SpoolError
from tasks.records import Partition, Pool, PoolReport, SignOfLife

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {}  # compiled once a record


def write_report(spool: SpoolFolder, partition: Partition, report: PoolReport) -> None:
    """The last thing a worker does with a partition: all of the report's stored rows are in Qdrant."""
    spool.write_note(_report_name(partition, report.pool), _adapter(PoolReport).dump_json(report))


def read_report(spool: SpoolFolder, partition: Partition, pool: Pool) -> PoolReport | None:
    """None where this pool has not reported it. Raises SpoolError."""
    report: PoolReport | None = _read(spool, _report_name(partition, pool), PoolReport)
    return report


def list_reports(spool: SpoolFolder) -> set[tuple[str, Pool]]:
    """Names of the reported partitions' files, and by which pool: one listing instead of a look at each."""
    pools: tuple[Pool, ...] = ("gpu", "cpu")
    return {
        (f"{name.removesuffix(f'.{pool}.json')}.parquet", pool)
        for pool in pools
        for name in spool.list_notes(f".{pool}.json")
    }


def write_sign_of_life(spool: SpoolFolder, run_id: str, sign: SignOfLife) -> None:
    spool.write_note(f"run-{run_id}.json", _adapter(SignOfLife).dump_json(sign))


def read_sign_of_life(spool: SpoolFolder, run_id: str) -> SignOfLife | None:
    sign: SignOfLife | None = _read(spool, f"run-{run_id}.json", SignOfLife)
    return sign


def revoke_run(spool: SpoolFolder, run_id: str) -> None:
    """Tell a run that counts as dead, should it still be there, that its partitions are others' now."""
    spool.write_note(f"run-{run_id}.revoked", b"")


def is_revoked(spool: SpoolFolder, run_id: str) -> bool:
    return spool.read_note(f"run-{run_id}.revoked") is not None


def _report_name(partition: Partition, pool: Pool) -> str:
    return f"{partition.path.rsplit('/', 1)[-1].removesuffix('.parquet')}.{pool}.json"


def _adapter(record: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    if record not in _ADAPTERS:
        _ADAPTERS[record] = TypeAdapter(record)
    return _ADAPTERS[record]


def _read(spool: SpoolFolder, name: str, record: type[Any]) -> Any:
    from pydantic import ValidationError

    content = spool.read_note(name)
    if content is None:
        return None
    try:
        return _adapter(record).validate_json(content)
    except ValidationError as error:
        raise SpoolError(
            f"Spool file {spool.place(name)} is not a {record.__name__} ({error.error_count()} errors). Do workers and "
            "ingest run the same version of Ballast?"
        ) from error
