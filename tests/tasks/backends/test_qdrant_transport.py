"""gRPC or REST: which is taken, why, and that the API key is seen by nobody on the way."""

from __future__ import annotations

import io
import json
import logging
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient

from tasks.backends import qdrant_connection
from tasks.backends.fake_qdrant_grpc import LoopbackQdrantGrpc, RpcFault
from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.config import IngestSettings, QdrantSettings
from tasks.errors import BallastError, ConfigError, StoreError, StoreRejected, StoreUnavailable

KEY = "s3cret-K3Y-0f-mine"
NAMED = {"QDRANT_API_KEY": KEY}


@pytest.fixture
def keyed(server: LoopbackQdrant) -> Iterator[LoopbackQdrantGrpc]:
    with LoopbackQdrantGrpc(server, api_key=KEY) as double:
        yield double


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="tasks")
    return caplog


def write_one(store: QdrantStore) -> None:
    physical = store.prepare_collection("docs", dimension=2, fingerprint="a" * 32, model="mini")
    row = np.array([[0.6, 0.8]], dtype=np.float32)
    store.upsert(physical, ["00000000-0000-4000-8000-000000000001"], row, [{"doc_id": "a.md"}])


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [message for message in caplog.messages if "transport=rest" in message]


# ---------------------------------------------------------------------------------------------- auto


def test_auto_writes_over_grpc_where_it_answers(
    server: LoopbackQdrant, keyed: LoopbackQdrantGrpc, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    settings = QdrantSettings(url=server.url, grpc_port=keyed.port)
    with closing(open_store(settings, str(tmp_path), environment=NAMED)) as store:
        write_one(store)
        assert store.count("docs") == 1
    assert keyed.count_requests("Points/Upsert") == 1
    assert server.count_requests("PUT .*") == 0
    assert all(metadata["api-key"] == KEY for _, metadata, _ in keyed.requests)
    assert reasons(logged) == []


def test_auto_takes_rest_where_no_grpc_answers_and_says_why(
    server: LoopbackQdrant, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    with closing(open_store(QdrantSettings(url=server.url, grpc_port=1), str(tmp_path), environment=NAMED)) as store:
        write_one(store)
    assert server.count_requests("PUT /collections/[^/]+/points") == 1
    [said] = reasons(logged)
    assert "grpc_port=1 " in said
    assert "UNAVAILABLE" in said


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "DEADLINE_EXCEEDED"])
def test_auto_takes_rest_where_grpc_refuses(
    server: LoopbackQdrant, grpc_server: LoopbackQdrantGrpc, tmp_path: Path, logged: pytest.LogCaptureFixture, code: str
) -> None:
    grpc_server.faults = [RpcFault(on="Collections/List", code=code)]
    settings = QdrantSettings(url=server.url, grpc_port=grpc_server.port)
    with closing(open_store(settings, str(tmp_path), environment={})) as store:
        write_one(store)
    assert server.count_requests("PUT /collections/[^/]+/points") == 1
    assert [code in said for said in reasons(logged)] == [True]


def test_auto_gives_a_silent_port_a_moment_only(
    server: LoopbackQdrant, tmp_path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qdrant_connection, "_PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = QdrantSettings(url=server.url, grpc_port=silent.getsockname()[1], timeout_s=50)
        open_store(settings, str(tmp_path), environment={}).close()
    assert ["DEADLINE_EXCEEDED" in said for said in reasons(logged)] == [True]


@pytest.mark.parametrize("differs", ["collections", "version"])
def test_auto_never_writes_to_another_qdrant_on_that_port(
    server: LoopbackQdrant, tmp_path: Path, logged: pytest.LogCaptureFixture, differs: str
) -> None:
    with LoopbackQdrantGrpc(version="1.18.2" if differs == "version" else server.version) as other:
        if differs == "collections":
            other.memory.create_collection("theirs", vectors_config={})
        settings = QdrantSettings(url=server.url, grpc_port=other.port)
        with closing(open_store(settings, str(tmp_path), environment={})) as store:
            write_one(store)
        assert other.count_requests("Points/.*") == 0
    assert ["another Qdrant answers there" in said for said in reasons(logged)] == [True]


def test_an_unusual_rest_port_does_not_ask_the_usual_grpc_port(
    server: LoopbackQdrant, tmp_path: Path, logged: pytest.LogCaptureFixture
) -> None:
    open_store(QdrantSettings(url=server.url), str(tmp_path), environment={}).close()
    assert ["set qdrant.grpc_port" in said for said in reasons(logged)] == [True]


def test_rest_never_asks_for_grpc(server: LoopbackQdrant, grpc_server: LoopbackQdrantGrpc, tmp_path: Path) -> None:
    settings = QdrantSettings(url=server.url, grpc_port=grpc_server.port, transport="rest")
    with closing(open_store(settings, str(tmp_path), environment={})) as store:
        write_one(store)
    assert grpc_server.requests == []


# ---------------------------------------------------------------------------------------------- grpc


def open_grpc(port: int, tmp_path: Path, key: str | None = None, *, url: str = "http://127.0.0.1:1") -> QdrantStore:
    settings = QdrantSettings(url=url, grpc_port=port, transport="grpc", timeout_s=5)
    return open_store(settings, str(tmp_path), environment={"QDRANT_API_KEY": key} if key else {})


def test_grpc_needs_no_rest(keyed: LoopbackQdrantGrpc, tmp_path: Path) -> None:
    with closing(open_grpc(keyed.port, tmp_path, KEY)) as store:
        write_one(store)
        assert store.list_collections() == ["docs"]


def test_grpc_that_does_not_answer_names_the_way_out(server: LoopbackQdrant, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"UNAVAILABLE.*port, here 1: publish it.*transport=auto takes REST"):
        open_grpc(1, tmp_path, url=server.url)
    assert server.requests == []


@pytest.mark.parametrize("key", [None, "another-key"])
def test_a_wrong_key_is_told_at_opening(keyed: LoopbackQdrantGrpc, tmp_path: Path, key: str | None) -> None:
    with pytest.raises(StoreRejected, match=r"UNAUTHENTICATED: Invalid API key.*QDRANT_API_KEY"):
        open_grpc(keyed.port, tmp_path, key)


def test_an_old_server_is_told_at_opening(tmp_path: Path) -> None:
    with (
        LoopbackQdrantGrpc(version="1.15.5") as old,
        pytest.raises(StoreError, match=r"version 1.15.5; Ballast needs 1.16"),
    ):
        open_grpc(old.port, tmp_path)


def test_https_never_speaks_plain_grpc(keyed: LoopbackQdrantGrpc, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="gRPC UNAVAILABLE"):
        open_grpc(keyed.port, tmp_path, KEY, url="https://127.0.0.1")
    assert keyed.requests == []


def test_a_loopback_call_never_goes_through_a_proxy(
    keyed: LoopbackQdrantGrpc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("grpc_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        open_grpc(keyed.port, tmp_path, KEY).close()
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody came
            proxy.accept()


# ---------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize("transport", ["auto", "grpc", "rest"])
@pytest.mark.parametrize("url", ["http://qdrant.example:6333", "http://10.0.0.7", "http://127.0.0.1.example:6333"])
def test_a_key_never_travels_unencrypted_to_another_host(transport: Any, url: str, tmp_path: Path) -> None:
    settings = QdrantSettings(url=url, transport=transport)
    with pytest.raises(ConfigError, match=r"unencrypted.*https://.*allow_plain_http"):
        open_store(settings, str(tmp_path), environment=NAMED)


@pytest.mark.parametrize("bad", [f"{KEY}\n{KEY}", f"{KEY} {KEY}", f"{KEY}é", f"\x7f{KEY}"], ids=ascii)
@pytest.mark.parametrize("transport", ["grpc", "rest"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(
    server: LoopbackQdrant, keyed: LoopbackQdrantGrpc, tmp_path: Path, bad: str, transport: Any
) -> None:
    settings = QdrantSettings(url=server.url, grpc_port=keyed.port, transport=transport)
    with pytest.raises(ConfigError, match="QDRANT_API_KEY can't be sent: character") as caught:
        open_store(settings, str(tmp_path), environment={"QDRANT_API_KEY": bad})
    assert KEY not in tell_all(caught.value)
    assert server.requests == keyed.requests == []


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@qdrant.example",
        f"user:{KEY}@qdrant.example:6333",
        f"https://qdrant.example?api-key={KEY}",
        f"https://qdrant.example/#{KEY}",
    ],
)
def test_a_key_in_a_url_is_refused_unseen(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="QDRANT_API_KEY") as caught:
        open_store(QdrantSettings(url=url), str(tmp_path), environment={})
    assert KEY not in tell_all(caught.value)
    with pytest.raises(ConfigError, match="QDRANT_API_KEY") as caught:
        open_store(QdrantSettings(), str(tmp_path), environment={"QDRANT_URL": url})
    assert KEY not in tell_all(caught.value)


REST_FAULTS = [
    Fault(on=".*", status=401, error="Invalid API key or JWT"),
    Fault(on=".*", status=403, error="Forbidden"),
    Fault(on=".*", status=404, error="Not found"),
    Fault(on=".*", status=503),
    Fault(on=".*", status=429, headers={"Retry-After": "3600"}),
    Fault(on=".*", reset=True),
]
GRPC_FAULTS = [
    RpcFault(on=".*", code="UNAUTHENTICATED"),
    RpcFault(on=".*", code="PERMISSION_DENIED"),
    RpcFault(on=".*", code="INTERNAL"),
    RpcFault(on=".*", code="RESOURCE_EXHAUSTED", retry_after="3600"),
    RpcFault(on=".*", drop=True),
    RpcFault(on=".*", truncate=True),
]


def tell_all(error: BaseException) -> str:
    """Everything an error may show: its text, its repr, and the tracebacks of all that led to it."""
    written = io.StringIO()
    traceback.print_exception(error, file=written)
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None:
        chain.append(each)
        each = each.__cause__ or each.__context__
    return written.getvalue() + "".join(f"{each!s}{each!r}{each.args!r}" for each in chain)


@pytest.mark.parametrize("fault", [*REST_FAULTS, *GRPC_FAULTS], ids=lambda fault: f"{fault}"[:70])
def test_no_error_and_no_log_line_shows_the_key(
    server: LoopbackQdrant, keyed: LoopbackQdrantGrpc, fault: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a request that works, one that fails, and an opening that fails; httpx and the rest log at DEBUG."""
    caplog.set_level(logging.DEBUG)
    over_grpc = isinstance(fault, RpcFault)
    settings = QdrantSettings(url=server.url, grpc_port=keyed.port, transport="grpc" if over_grpc else "rest")
    double: Any = keyed if over_grpc else server
    told = []
    with closing(open_store(settings, ".", environment=NAMED)) as store:
        write_one(store)
        double.faults = [fault]
        store.calls.should_stop = lambda: True  # no waiting here
        with pytest.raises(BallastError) as caught:
            store.count("docs")
        told += [tell_all(caught.value), repr(store), repr(vars(store)), repr(vars(store.calls))]
        double.faults = [fault]
        with pytest.raises(BallastError) as caught:
            open_store(settings, ".", environment=NAMED)
        told.append(tell_all(caught.value))
    assert double.requests[0][1]["api-key"] == KEY or double.requests[1][1]["api-key"] == KEY
    assert KEY not in "".join(told)
    assert KEY not in caplog.text
    assert KEY not in "".join(repr(vars(record)) for record in caplog.records)


@pytest.mark.parametrize("transport", ["auto", "grpc", "rest"])
def test_an_unreachable_server_shows_no_key(transport: Any, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    with LoopbackQdrant() as gone:
        url = gone.url
    with pytest.raises(StoreUnavailable) as caught:
        open_store(QdrantSettings(url=url, grpc_port=1, transport=transport), str(tmp_path), environment=NAMED)
    assert KEY not in tell_all(caught.value) + caplog.text


def test_settings_hold_no_key_to_show() -> None:
    """Flow parameters are stored and shown by Prefect, and artifacts are made of them: there is no place for a key."""

    def names(schema: Any) -> Iterator[str]:
        if isinstance(schema, dict):
            yield from schema.get("properties", {})
            for below in schema.values():
                yield from names(below)

    knobs = set(names(IngestSettings.model_json_schema()))
    assert "grpc_port" in knobs
    assert not [knob for knob in knobs if re.search(r"key$|secret|password|token$|auth|credential", knob)]


def test_the_clients_memory_of_its_key_is_not_what_we_print(keyed: LoopbackQdrantGrpc, tmp_path: Path) -> None:
    with closing(open_grpc(keyed.port, tmp_path, KEY)) as store:
        assert KEY in json.dumps(store._client.init_options, default=str)  # so it is worth looking for
        assert KEY not in repr(store._client)


def test_plain_clients_can_be_told_apart() -> None:
    with closing(QdrantClient(":memory:")) as client:
        assert not qdrant_connection.speaks_grpc(client)
    with closing(QdrantClient(url="http://127.0.0.1", prefer_grpc=True, check_compatibility=False)) as client:
        assert qdrant_connection.speaks_grpc(client)
