"""Files wherever fsspec finds them: connect, read within a limit, and say without secrets what went wrong."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tasks.backends.texts import Unusable
from tasks.errors import SourceError

_BLOCK_BYTES = 256 * 1024

# Up to the last @ before the path: a password may hold an @ and spaces. One with a / in it shows by a port that is none.
_USERINFO = re.compile(r"(?<=://)(?:[^/\n]+|[^/@:\[\s]*:(?!:|\d*(?:/|$))[^@\n]*)@")
_PARAMETER = re.compile(r"([?&;#])([^=&;?#/\s]+)=([^&\s]*)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Of a parameter's name, by whole words: ?author=, ?keyword= and ?design= are no secrets.
_SECRET_WORD = re.compile(
    r"key|sig|auth|code|pass|passw|pwd|pw|jwt|sas|authorization|.*(?:token|secret|password|passwd|passphrase|credentials?"
    r"|signature|apikey|accesskey)"
)
# By the parameter that signs a URL (S3, Google, Azure; S3 of old, CloudFront): what each new signature changes with it.
_SIGNED_WITH = {
    "x-amz-signature": {"x-amz-date", "x-amz-expires", "x-amz-credential", "x-amz-security-token"},
    "x-goog-signature": {"x-goog-date", "x-goog-expires", "x-goog-credential"},
    "sig": {"se", "st", "ske", "skt"},
    "signature": {"expires", "awsaccesskeyid", "googleaccessid", "policy", "key-pair-id", "x-amz-security-token"},
}
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


def has_password(uri: str) -> bool:
    """Whether a link of the chain has `user:password@` in it."""
    found = (_USERINFO.search(link) for link in uri.split("::"))
    return any(userinfo[0][:-1].partition(":")[2] for userinfo in found if userinfo)


def remove_secrets(link: str) -> str:
    """One link of a chain, for the key of its documents: equal for whoever asks and whenever it was signed, but for no other.

    A password goes; a bare `name@` stays, since it may be a container (abfs://container@account). A signature goes with
    what comes with it (its date, expiry and credential), and so do they only where there is one. Any other parameter that
    hide_secrets blanks becomes a short hash of its value: two URLs that differ only there are two sources.
    """
    address, question, query = _USERINFO.sub(_drop_password, link).partition("?")
    parts = [(part.partition("=")[0].lower(), part) for part in query.split("&")]
    signed = {name for name, _ in parts} & _SIGNED_WITH.keys()
    dropped = signed.union(*(_SIGNED_WITH[name] for name in signed))
    if signed:
        query = "&".join(part for name, part in parts if name not in dropped)
        question = "?" if query else ""
    return _replace_secrets(f"{address}{question}{query}", _hash)


def hide_secrets(text: str) -> str:
    """The text with user:password@ and the values of signature-like URL parameters blanked."""
    return _replace_secrets(_USERINFO.sub("***@", text), lambda _: "***")


def _drop_password(userinfo: re.Match[str]) -> str:
    name = userinfo[0][:-1].partition(":")[0]
    return f"{name}@" if name else ""


def _replace_secrets(text: str, replace: Callable[[str], str]) -> str:
    def replace_one(match: re.Match[str]) -> str:
        sign, name, value = match.groups()
        # What is no secret may hold a parameter that is one: page=1;token=x
        new = replace(value) if value and _is_secret(name) else _replace_secrets(value, replace)
        return f"{sign}{name}={new}"

    return _PARAMETER.sub(replace_one, text)


def _is_secret(name: str) -> bool:
    return any(_SECRET_WORD.fullmatch(word.lower()) for word in _WORD.findall(name))


def _hash(value: str) -> str:
    return f"sha256-{hashlib.sha256(value.encode(errors='backslashreplace')).hexdigest()[:8]}"
