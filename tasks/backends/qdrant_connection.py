"""Opening Qdrant: a server by URL, over gRPC or REST, or the embedded one in the data folder; where an API key may travel.

A server's vectors travel over gRPC where it answers there: as raw floats, a fifth of the bytes that REST's decimals take.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import sqlite3
import warnings
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from tasks.backends.qdrant_faults import client_errors, to_store_error
from tasks.config import QdrantSettings
from tasks.errors import ConfigError, StoreError, StoreLocked, StoreUnavailable

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

log = logging.getLogger(__name__)

SERVER_HINT = (
    "docker run -d -p 6333:6333 -p 6334:6334 -v qdrant:/qdrant/storage qdrant/qdrant, "
    "then QDRANT_URL=http://localhost:6333"
)

_REST_PORT, _GRPC_PORT = 6333, 6334  # what a Qdrant listens on unless it is told otherwise
_PROBE_S = 3.0  # a port that a firewall drops costs an opening this much, where nobody asked for gRPC

_OLDEST_SERVER = (1, 16)  # the first that keeps a collection's metadata, where the fingerprint lives

# Said better by our own log lines and errors. Filters by exact message that stay: `catch_warnings` swaps the whole
# process's filters back and forth and is not safe where tasks run in threads.
_ANSWERED_WARNINGS = (
    "Api key is used with an insecure connection",
    "Local mode is not recommended for collections with more than",
)


def choose_url(settings: QdrantSettings, environment: Mapping[str, str]) -> str | None:
    """The server's URL: the setting, else QDRANT_URL, else None for the embedded Qdrant."""
    return (settings.url or environment.get("QDRANT_URL") or "").strip() or None


def connect_server(url: str, settings: QdrantSettings, environment: Mapping[str, str]) -> QdrantClient:
    """A client of the server at `url` that has answered once, over gRPC or REST as `settings.transport` says.

    The key comes from QDRANT_API_KEY only. Raises ConfigError for a URL or key that can't be used or would show the key
    to others, StoreUnavailable where nothing answers, StoreRejected for a key that is refused, StoreError for a server
    that is too old.
    """
    api_key = read_api_key(environment)
    parts = _check_url(url)
    if api_key and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        if not (settings.allow_plain_http or is_plain_http_allowed(environment)):
            raise ConfigError(
                f"QDRANT_API_KEY would travel unencrypted to {parts.hostname}, since {url} is plain http. "
                "Use an https:// URL, or set qdrant.allow_plain_http=true (a whole machine: QDRANT_ALLOW_PLAIN_HTTP=true) "
                "if that network is yours."
            )
        log.warning("qdrant url=%s the API key travels unencrypted: qdrant.allow_plain_http is set", url)
    _filter_answered_warnings()
    if settings.transport == "grpc":
        return _connect_grpc(url, settings, api_key)
    client = _make_client(url, settings, api_key, over_grpc=False)
    try:
        _check_server(client, url)
        faster = _try_grpc(client, url, settings, api_key) if settings.transport == "auto" else None
    except BaseException:
        client.close()
        raise
    if faster is None:
        return client
    client.close()
    return faster


def is_plain_http_allowed(environment: Mapping[str, str]) -> bool:
    """QDRANT_ALLOW_PLAIN_HTTP is true: who runs a machine knows its network, whoever writes a run's parameters may not."""
    return environment.get("QDRANT_ALLOW_PLAIN_HTTP", "").strip().lower() == "true"


def speaks_grpc(client: QdrantClient) -> bool:
    """Whether its requests travel over gRPC; never so for an embedded Qdrant."""
    return bool(client.init_options.get("prefer_grpc")) and client.init_options.get("url") is not None


def read_api_key(environment: Mapping[str, str]) -> str | None:
    """QDRANT_API_KEY without the white space around it. Raises ConfigError for one that no header can carry."""
    api_key = environment.get("QDRANT_API_KEY", "").strip()
    wrong = re.search(r"[^!-~]", api_key)
    if wrong:
        # Checked here, and never shown: the HTTP and gRPC libraries both quote a header that they refuse.
        raise ConfigError(
            f"QDRANT_API_KEY can't be sent: character {wrong.start() + 1} of its {len(api_key)} is a space, a control "
            "character or not ASCII. Copy the key again."
        )
    return api_key or None


def load_client() -> None:
    """Import what any connection needs: a second of CPU, for which there is time while something else starts."""
    import portalocker  # noqa: F401
    import qdrant_client  # noqa: F401


def open_embedded(folder: Path) -> QdrantClient:
    """The embedded Qdrant in `folder`, made if it is not there. Raises StoreLocked where another process has it."""
    from qdrant_client import QdrantClient

    _check_lock(folder)
    _filter_answered_warnings()
    try:
        # Every call goes through the store's own lock, so SQLite need not insist on the thread that opened it.
        return QdrantClient(path=str(folder), force_disable_check_same_thread=True)
    except RuntimeError as error:
        if "already accessed" not in str(error):
            raise
        raise _locked(folder) from error
    except (OSError, ValueError) as error:
        raise StoreError(
            f"The embedded Qdrant in {folder} can't be opened ({type(error).__name__}: {error}). "
            "Check the folder's permissions and the disk; or name another data folder and ingest again."
        ) from error


def set_write_ahead_log(folder: Path, physical: str) -> None:
    """Switch an embedded collection's SQLite file to write-ahead logging, which it remembers. As durable as before.

    The client commits each point by itself: 820-970 points/s at 384-d with a rollback journal, 2,200-2,800 with this.
    """
    from qdrant_client.local.persistence import STORAGE_FILE_NAME

    storage = folder / "collection" / physical / STORAGE_FILE_NAME
    if not storage.exists():  # another layout in a later client: slower, not wrong
        log.debug("qdrant storage=%s not there: left as it is", storage)
        return
    try:
        with closing(sqlite3.connect(storage)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.Error as error:  # some network file systems have no shared memory for it
        log.info("qdrant storage=%s no write-ahead log, writing is slower: %s", storage, error)


def is_loopback(host: str) -> bool:
    """Whether packets to `host` stay on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_url(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        has_port = parts.port is not None  # reading it raises for nonsense
    except ValueError as error:
        raise ConfigError(f"The Qdrant URL can't be read ({error}). It looks like https://host:6333.") from error
    # None of these messages may quote a URL that holds a secret: `user:password@host` without a scheme is one, too.
    if "@" in url or parts.query or parts.fragment:
        raise ConfigError(
            f"The Qdrant URL of {parts.hostname or 'a host'} holds a user or password, a query or a fragment, which Qdrant "
            "ignores. A key comes from QDRANT_API_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"The Qdrant URL {url!r} needs http:// or https:// and a host, as in https://host:6333.")
    if not has_port:
        log.debug("qdrant url=%s no port given: 6333", url)
    return parts


def _make_client(url: str, settings: QdrantSettings, api_key: str | None, *, over_grpc: bool) -> QdrantClient:
    from qdrant_client import QdrantClient

    is_here = is_loopback(urlsplit(url).hostname or "")
    options: dict[str, Any] = {
        # A connection that died without a word (a NAT, a moved pod) is noticed by these, not by each request's timeout.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 20_000,
        # By default a server that comes back is left alone for up to two minutes.
        "grpc.max_reconnect_backoff_ms": 10_000,
        # A page of vectors is larger than gRPC's 4 MiB; -1: no limit, as over REST.
        "grpc.max_send_message_length": -1,
        "grpc.max_receive_message_length": -1,
    }
    if is_here:
        options["grpc.enable_http_proxy"] = 0
    return QdrantClient(
        url=url,
        grpc_port=settings.grpc_port,
        prefer_grpc=over_grpc,
        grpc_options=options,
        api_key=api_key,
        timeout=settings.timeout_s,
        # The client's own check runs in a thread and warns; ours is below and fails with a reason.
        check_compatibility=False,
        # HTTP_PROXY in the environment would carry a loopback request, and the key with it, to another host.
        trust_env=not is_here,
    )


def _connect_grpc(url: str, settings: QdrantSettings, api_key: str | None) -> QdrantClient:
    """gRPC or nothing."""
    client = _make_client(url, settings, api_key, over_grpc=True)
    try:
        _list_over_grpc(client, timeout_s=settings.timeout_s)
        _check_version(client.info().version, url)
    except client_errors() as error:
        client.close()
        fault = to_store_error(error, action="be opened", place=f"at {url}")
        if isinstance(fault, StoreUnavailable):
            raise StoreUnavailable(
                f"{fault} qdrant.transport=grpc needs the server's gRPC port, here {settings.grpc_port}: publish it, or "
                "set qdrant.grpc_port; qdrant.transport=auto takes REST instead.",
                retry_after_s=fault.retry_after_s,
            ) from error
        raise fault from error
    except BaseException:
        client.close()
        raise
    return client


def _try_grpc(client: QdrantClient, url: str, settings: QdrantSettings, api_key: str | None) -> QdrantClient | None:
    """A gRPC client of the server that `client` reaches over REST; None, and a line in the log, where there is none."""
    if urlsplit(url).port not in (None, _REST_PORT) and settings.grpc_port == _GRPC_PORT:
        # Another Qdrant may have the usual gRPC port of this host.
        log.info("qdrant url=%s transport=rest reason=set qdrant.grpc_port: this is not the usual REST port", url)
        return None
    faster = _make_client(url, settings, api_key, over_grpc=True)
    try:
        names = _list_over_grpc(faster, timeout_s=_PROBE_S)
        is_same = names == {each.name for each in client.get_collections().collections}
        is_same = is_same and faster.info().version == client.info().version
    except client_errors() as error:
        faster.close()
        fault = to_store_error(error, action="be reached over gRPC", place=f"at {url}")
        log.info("qdrant url=%s transport=rest grpc_port=%d reason=%s", url, settings.grpc_port, fault)
        return None
    except BaseException:
        faster.close()
        raise
    if not is_same:
        faster.close()
        log.warning(
            "qdrant url=%s transport=rest grpc_port=%d reason=another Qdrant answers there: set qdrant.grpc_port",
            url,
            settings.grpc_port,
        )
        return None
    return faster


def _list_over_grpc(client: QdrantClient, *, timeout_s: float) -> set[str]:
    """The collections' names: the cheapest question that needs the key (a health check needs none)."""
    from qdrant_client import grpc

    answer = client.grpc_collections.List(grpc.ListCollectionsRequest(), timeout=timeout_s)
    return {each.name for each in answer.collections}


def _check_server(client: QdrantClient, url: str) -> None:
    """One question that needs no rights and one that needs the key, over REST."""
    try:
        version = client.info().version
        client.get_collections()
    except client_errors() as error:
        fault = to_store_error(error, action="be opened", place=f"at {url}")
        said = f"Qdrant at {url} could not be opened: "
        if isinstance(error, ValueError):  # an answer that is no JSON: a web server, a proxy's page
            raise StoreUnavailable(
                f"What answers at {url} is not a Qdrant server ({error}). Check host and port of --qdrant or QDRANT_URL, "
                "or unset it for the embedded Qdrant."
            ) from error
        if isinstance(fault, StoreUnavailable):
            raise StoreUnavailable(
                f"Qdrant at {url} does not answer: {str(fault).removeprefix(said)} Start it if it does not run, "
                "check host and port, or unset QDRANT_URL (and leave out --qdrant) "
                "for the embedded Qdrant.",
                retry_after_s=fault.retry_after_s,
            ) from error
        raise fault from error
    _check_version(version, url)


def _check_version(version: str, url: str) -> None:
    if read_version(version) < _OLDEST_SERVER:
        oldest = ".".join(map(str, _OLDEST_SERVER))
        raise StoreError(
            f"Qdrant at {url} is version {version}; Ballast needs {oldest} or later, for a collection's metadata. "
            "Upgrade the server."
        )


def read_version(version: str) -> tuple[int, int]:
    """Major and minor; a version that can't be read (a development build) counts as new enough."""
    try:
        major, minor = version.removeprefix("v").split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        return _OLDEST_SERVER


def _check_lock(folder: Path) -> None:
    # The client takes its lock only after it has read every collection (28 s and 6 GB at 100,000 points), and then
    # leaves the files open: ask first. Another process may come in between; the client's own lock then says so.
    import portalocker

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a") as lock:
            portalocker.lock(lock, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
            _make_catalog(folder)
            portalocker.unlock(lock)
    except portalocker.exceptions.LockException as error:
        raise _locked(folder) from error
    except OSError as error:
        raise StoreError(
            f"The data folder {folder} can't be written ({error}). Name another one with --data-folder."
        ) from error


def _make_catalog(folder: Path) -> None:
    """The client's list of collections, whole or not there.

    The client replaces it in one step, but makes the first one in place: left empty by a kill, it would never open again.
    """
    from qdrant_client.local.qdrant_local import META_INFO_FILENAME

    catalog = folder / META_INFO_FILENAME
    if not catalog.exists() or not catalog.stat().st_size:
        unfinished = catalog.with_suffix(".first")
        unfinished.write_text('{"collections": {}, "aliases": {}}', encoding="utf-8")
        unfinished.replace(catalog)


def _locked(folder: Path) -> StoreLocked:
    return StoreLocked(
        f"The embedded Qdrant in {folder} is in use: it serves one process, and one client in it, at a time. "
        f"Wait for the other or stop it; for several processes run a Qdrant server: {SERVER_HINT}"
    )


def _filter_answered_warnings() -> None:
    for message in _ANSWERED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
