"""Files wherever fsspec finds them: connect, read within a limit, and say without secrets what went wrong."""

from __future__ import annotations

import os
import stat
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tasks.backends.texts import Unusable
from tasks.errors import SourceError
from tasks.url_secrets import hide_secrets

_BLOCK_BYTES = 256 * 1024

# What transports raise beside OSError; looked up only where fsspec has loaded them.
_TRANSPORT_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)


def connect(uri: str) -> tuple[Any, str]:
    """fsspec file system and path on it. Raises SourceError: a protocol that is unknown or not installed."""
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if is_local_file(uri):  # a name with "::" or "://" in it may well be a file's
        return LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (
        ImportError,
        ValueError,
        OSError,
        zipfile.BadZipFile,
        tarfile.TarError,
    ) as error:  # an archive is opened here
        raise SourceError(
            f"The source {hide_secrets(uri)} can't be opened: {type(error).__name__} {hide_secrets(str(error))}. "
            "Use a path, a glob or an fsspec URL, and install what its protocol needs (s3://: pip install s3fs)."
        ) from error
    return fs, path


def connect_to_file(file_uri: str, source_uri: str) -> Any:
    """The file system of a file that was listed in a source, in whatever process this is."""
    from fsspec.implementations.local import LocalFileSystem

    # The source's own URL holds what the connection needs: a user, a password, a chain of protocols.
    return LocalFileSystem() if file_uri.startswith("/") else connect(source_uri)[0]


def is_local_file(uri: str) -> bool:
    try:
        return Path(uri).expanduser().exists()
    except (
        OSError,
        RuntimeError,
    ):  # a name too long for a file, a parent that may not be searched, no such user's home
        return False


def is_local(fs: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def is_web(fs: Any) -> bool:
    return "http" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def open_binary(fs: Any, path: str) -> IO[bytes]:
    """Raises Unusable for what is not a regular file, and io_errors()."""
    # Opening a FIFO waits for a writer, for ever: one may have taken the file's place since it was listed.
    if is_local(fs):
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise Unusable("not a regular file (a pipe, a socket or a device)", "skipped")
        return Path(path).open("rb")  # 50 us less than by fsspec, which does no more here: it counts for small files
    stream: IO[bytes] = fs.open(path, "rb")
    return stream


def read_bytes(fs: Any, path: str, max_bytes: int, knob: str) -> bytes:
    """The whole file. Raises Unusable: larger than max_bytes, which `knob` sets; and io_errors()."""
    with open_binary(fs, path) as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Unusable(describe_too_large(None, max_bytes, knob))
    return data


def read_blocks(fs: Any, path: str, max_bytes: int, knob: str) -> Iterator[bytes]:
    """The file in blocks of at most _BLOCK_BYTES; none for an empty one. Raises as read_bytes does."""
    read = 0
    with open_binary(fs, path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            read += len(block)
            if read > max_bytes:
                raise Unusable(describe_too_large(None, max_bytes, knob))
            yield block


def describe_too_large(size_bytes: int | None, max_bytes: int, knob: str) -> str:
    size = f"{size_bytes:,} bytes" if size_bytes is not None else f"more than {max_bytes:,} bytes"
    return (
        f"{size}; the limit is {max_bytes:,}, since it is held in memory as a whole. Split it, or raise source.{knob}"
    )


def io_errors() -> tuple[type[BaseException], ...]:
    """For an `except` clause: what opening and reading may raise, on disk or on the wire."""
    found: list[type[BaseException]] = [OSError]
    for module, name in _TRANSPORT_ERRORS:
        kind = getattr(sys.modules.get(module), name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            found.append(kind)
    return tuple(found)


def explain_io_error(error: BaseException) -> str:
    if is_web_refusal(error):
        error = error.__cause__ or error
    if isinstance(error, FileNotFoundError):
        return "not there any more: it vanished after it was listed"
    if isinstance(error, PermissionError):
        return "permission denied: let this user read it"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:  # a resolver's are negative
        return f"can't be read: {os.strerror(error.errno)}"
    return f"can't be read: {type(error).__name__} {hide_secrets(str(error))}".rstrip()


def is_web_refusal(error: BaseException) -> bool:
    """fsspec says that a page is not found whatever happened: a 401, a 500 or a refused connection is in the cause."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and cause is not None and getattr(cause, "status", None) != 404
