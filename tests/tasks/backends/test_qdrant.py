"""The store over embedded Qdrant, in memory and on disk, and over a loopback server: one contract."""

from __future__ import annotations

import http.server
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from tasks.backends.fake_qdrant_server import Fault, LoopbackQdrant
from tasks.backends.points import split_batches
from tasks.backends.qdrant import QdrantStore, open_store
from tasks.backends.qdrant_calls import RetryPolicy
from tasks.backends.qdrant_connection import is_loopback, read_version
from tasks.config import QdrantSettings
from tasks.errors import ConfigError, StoreError, StoreLocked, StoreRejected, StoreUnavailable

DIMENSION = 8
PRINT_A, PRINT_B = "a" * 32, "b" * 32
UPSERT = "PUT /collections/[^/]+/points"


def open_server(server: LoopbackQdrant, *, sleeps: list[float] | None = None, **knobs: Any) -> QdrantStore:
    client = QdrantClient(url=server.url, timeout=5, check_compatibility=False)
    waited = [] if sleeps is None else sleeps
    return QdrantStore(client, place=f"at {server.url}", is_embedded=False, sleep=waited.append, **knobs)


def prepare(store: QdrantStore, name: str = "docs", *, dimension: int = DIMENSION, fingerprint: str = PRINT_A) -> str:
    return store.prepare_collection(name, dimension=dimension, fingerprint=fingerprint, model="mini")


def make_points(count: int, *, seed: int = 0, doc_id: str = "a.md") -> tuple[list[str], Any, list[dict[str, Any]]]:
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [str(uuid.uuid5(uuid.NAMESPACE_URL, f"{doc_id} {seed} {number}")) for number in range(count)]
    payloads = [
        {
            "doc_id": doc_id,
            "generation": "g1",
            "_node_content": json.dumps(
                {
                    "text": f"text {number}",
                    "start_char_idx": number,
                    "end_char_idx": number + 6,
                    "metadata": {"title": "A"},
                }
            ),
        }
        for number in range(count)
    ]
    return ids, vectors, payloads


def sizes_of_upserts(server: LoopbackQdrant) -> list[int]:
    return [len(body["points"]) for request, _, body in server.requests if re.fullmatch(UPSERT, request)]


# ---------------------------------------------------------------------------------------------- the contract


def test_points_are_stored_found_and_counted(store: QdrantStore) -> None:
    physical = prepare(store)
    ids, vectors, payloads = make_points(700)
    store.upsert(physical, ids, vectors, payloads)
    store.upsert(physical, ids[:10], vectors[:10], payloads[:10])  # a retried task
    assert store.count(physical) == store.count("docs") == 700
    stranger = str(uuid.uuid4())
    assert store.existing_ids(physical, [*ids, stranger]) == set(ids)
    assert store.existing_generations(physical, [ids[3], stranger]) == {ids[3]: "g1"}
    assert store.count_ids(physical, [ids[0], ids[0], ids[1], stranger]) == 2
    assert store.existing_ids(physical, []) == set()

    hit = store.search("docs", vectors[42], limit=3)[0]
    assert hit.score == pytest.approx(1.0, abs=1e-5)
    assert (hit.node_id, hit.doc_id, hit.text) == (ids[42], "a.md", "text 42")
    assert (hit.start_char, hit.end_char, hit.metadata) == (42, 48, {"title": "A"})


def test_search_within_one_document(store: QdrantStore) -> None:
    physical = prepare(store)
    for doc_id in ("a.md", "b.md"):
        store.upsert(physical, *make_points(20, doc_id=doc_id))
    hits = store.search(physical, make_points(1)[1][0], limit=50, doc_id="b.md")
    assert len(hits) == 20
    assert {hit.doc_id for hit in hits} == {"b.md"}


def test_refreshed_payloads_keep_their_vectors(store: QdrantStore) -> None:
    physical = prepare(store)
    ids, vectors, payloads = make_points(5)
    store.upsert(physical, ids, vectors, payloads)
    changed = [{**payload, "generation": "g2"} for payload in payloads]
    del changed[1]["doc_id"]
    store.refresh_payloads(physical, ids[:2], changed[:2])
    assert store.existing_generations(physical, ids) == dict(zip(ids, ["g2", "g2", "g1", "g1", "g1"], strict=True))
    hit = store.search(physical, vectors[1], limit=1)[0]
    assert (hit.node_id, hit.doc_id) == (ids[1], "")  # the payload is replaced, not merged
    assert hit.score == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(StoreRejected, match="could not refresh 1 payloads"):
        store.refresh_payloads(physical, [str(uuid.uuid4())], changed[:1])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda ids, vectors, payloads: vectors[1].fill(np.nan), "1 of 3 vectors are not finite.*norm nan"),
        (lambda ids, vectors, payloads: vectors.__imul__(3), "3 of 3 vectors .*norm 3"),
        (lambda ids, vectors, payloads: payloads[2].update(x=float("inf")), "payload is not JSON"),
        (lambda ids, vectors, payloads: payloads[2].update(x="\ud800"), "payload is not JSON"),
        (lambda ids, vectors, payloads: payloads[2].update(x=np.float32(1)), "payload is not JSON"),
        (lambda ids, vectors, payloads: payloads.pop(), "3 ids, 3 vectors and 2 payloads"),
        (lambda ids, vectors, payloads: ids.__setitem__(1, "guide.md#3"), "'guide.md#3' is not a UUID"),
        (lambda ids, vectors, payloads: ids.__setitem__(2, ids[0]), "comes twice in 3 points"),
    ],
)
def test_nonsense_is_refused_before_it_is_sent(store: QdrantStore, spoil: Any, message: str) -> None:
    physical = prepare(store)
    ids, vectors, payloads = make_points(3)
    spoil(ids, vectors, payloads)
    with pytest.raises(StoreRejected, match=message):
        store.upsert(physical, ids, vectors, payloads)
    assert store.count(physical) == 0


def test_vectors_of_another_shape_are_refused(store: QdrantStore) -> None:
    physical = prepare(store)
    ids, vectors, payloads = make_points(3)
    for wrong in (vectors[:, :4], vectors.astype(np.float64)):
        with pytest.raises(StoreRejected, match=r"float32 of shape \(points, 8\)"):
            store.upsert(physical, ids, wrong, payloads)


def test_threads_share_a_store(store: QdrantStore) -> None:
    physical = prepare(store)
    parts = [make_points(120, seed=seed) for seed in range(6)]

    def write_and_read(part: tuple[list[str], Any, list[dict[str, Any]]]) -> str:
        store.upsert(physical, *part)
        return store.search("docs", part[1][0], limit=1)[0].node_id

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(write_and_read, parts)) == [ids[0] for ids, _, _ in parts]
    assert store.count("docs") == 720


# ---------------------------------------------------------------------------------------------- embedded


def test_points_survive_a_kill(tmp_path: Path) -> None:
    """Whatever an upsert returned for is there after kill -9, and the file is still one that any client opens."""
    write = f"""
import os, signal
import numpy as np
from tasks.backends.qdrant import open_store
from tasks.config import QdrantSettings
store = open_store(QdrantSettings(), {str(tmp_path)!r}, environment={{}})
physical = store.prepare_collection("docs", dimension=4, fingerprint="a" * 32, model="mini")
vectors = np.eye(4, dtype=np.float32)
ids = ["00000000-0000-4000-8000-00000000000%d" % number for number in range(4)]
store.upsert(physical, ids, vectors, [{{"generation": "g1"}}] * 4)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", write], check=False).returncode == -signal.SIGKILL
    storage = tmp_path / "qdrant" / "collection" / f"docs--{PRINT_A[:12]}" / "storage.sqlite"
    with closing(sqlite3.connect(storage)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    client = QdrantClient(path=str(tmp_path / "qdrant"))
    assert client.count("docs").count == 4
    client.close()


def test_a_folder_whose_first_opening_was_killed_opens(tmp_path: Path) -> None:
    """The client writes its list of collections in place the first time: a kill leaves it empty."""
    (tmp_path / "qdrant").mkdir()
    (tmp_path / "qdrant" / "meta.json").touch()
    store = open_store(QdrantSettings(), str(tmp_path), environment={})
    store.prepare_collection("docs", dimension=4, fingerprint=PRINT_A, model="mini")
    store.close()
    again = open_store(QdrantSettings(), str(tmp_path), environment={})
    assert again.list_collections() == ["docs"]
    again.close()


def test_a_folder_held_by_another_process_says_so(tmp_path: Path) -> None:
    hold = (
        "import sys; from qdrant_client import QdrantClient; "
        f"client = QdrantClient(path={str(tmp_path / 'qdrant')!r}); "
        "print('held', flush=True); sys.stdin.read(); client.close()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StoreLocked, match=r"serves one process.*QDRANT_URL=http"):
            open_store(QdrantSettings(), str(tmp_path), environment={})
        holder.communicate()
    open_store(QdrantSettings(), str(tmp_path), environment={}).close()


def test_a_folder_that_can_not_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "qdrant").write_text("a file")
    with pytest.raises(StoreError, match=r"can't be written.*--data-folder"):
        open_store(QdrantSettings(), str(tmp_path), environment={})


def test_embedded_limits(caplog: pytest.LogCaptureFixture) -> None:
    client = QdrantClient(":memory:")
    with closing(QdrantStore(client, place="in memory", is_embedded=True)) as store:
        physical = prepare(store)
        ids, vectors, payloads = make_points(50_001)
        for start in range(0, 10_000, 5_000):
            part = slice(start, start + 5_000)
            store.upsert(physical, ids[part], vectors[part], payloads[part])
        assert "embedded Qdrant: slow above 10000" not in caplog.text
        with pytest.raises(StoreError, match=r"50,001 points.*50,000 at most.*docker run.*QDRANT_URL"):
            store.upsert(physical, ids, vectors, payloads)
        assert store.count(physical) == 10_000  # refused before anything was written
        for start in range(10_000, 10_200, 100):
            part = slice(start, start + 100)
            store.upsert(physical, ids[part], vectors[part], payloads[part])
        assert caplog.text.count("embedded Qdrant: slow above 10000") == 1


# ---------------------------------------------------------------------------------------------- a server


def test_batches_are_capped_by_points_and_bytes(server: LoopbackQdrant) -> None:
    ids, vectors, payloads = make_points(10)
    payloads[4]["big"] = "x" * 30_000
    with closing(open_server(server, batch_points=4, batch_bytes=20_000)) as store:
        store.upsert(prepare(store), ids, vectors, payloads)
        assert store.count("docs") == 10
    assert sizes_of_upserts(server) == [4, 1, 4, 1]


def test_split_batches_keeps_every_point() -> None:
    sizes = [5, 1, 1, 9, 30, 2, 2, 2, 2]
    batches = list(split_batches(sizes, max_points=3, max_bytes=10))
    assert [index for batch in batches for index in range(len(sizes))[batch]] == list(range(len(sizes)))
    assert [sizes[batch] for batch in batches] == [[5, 1, 1], [9], [30], [2, 2, 2], [2]]
    assert list(split_batches([], max_points=3, max_bytes=10)) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=500, after_effect=True),
        Fault(status=408),
        Fault(status=429, headers={"Retry-After": "7"}),
        Fault(status=429, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
        Fault(reset=True),
        Fault(reset=True, after_effect=True),
        Fault(status=200),  # a proxy's nonsense with a good status
    ],
    ids=lambda fault: f"{fault.status}{'-reset' * fault.reset}{'-after' * fault.after_effect}{len(fault.headers)}",
)
def test_transient_faults_are_outlived(server: LoopbackQdrant, fault: Fault) -> None:
    sleeps: list[float] = []
    ids, vectors, payloads = make_points(6)
    with closing(open_server(server, sleeps=sleeps, batch_points=3)) as store:
        physical = prepare(store)
        server.faults = [fault]
        store.upsert(physical, ids, vectors, payloads)
        assert store.existing_ids(physical, ids) == set(ids)
    assert server.count_requests(UPSERT) == 3
    assert len(sleeps) == 1
    if fault.headers.get("Retry-After") == "7":
        assert 7 <= sleeps[0] < 8


def test_attempts_are_bounded(server: LoopbackQdrant) -> None:
    sleeps: list[float] = []
    with closing(open_server(server, sleeps=sleeps, retry=RetryPolicy(attempts=3, longest_wait_s=2.0))) as store:
        physical = prepare(store)
        server.faults = [Fault(status=503, error="overloaded") for _ in range(9)]
        with pytest.raises(StoreUnavailable, match=r"could not upsert 2 points into 'docs--a+': HTTP 503: overloaded"):
            store.upsert(physical, *make_points(2))
    assert server.count_requests(UPSERT) == 3
    assert len(sleeps) == 2
    assert max(sleeps) <= 2.0


def test_a_long_wait_asked_for_is_left_to_the_caller(server: LoopbackQdrant) -> None:
    sleeps: list[float] = []
    with closing(open_server(server, sleeps=sleeps)) as store:
        physical = prepare(store)
        server.faults = [Fault(status=429, headers={"Retry-After": "3600"})]
        with pytest.raises(StoreUnavailable) as caught:
            store.upsert(physical, *make_points(2))
    assert caught.value.retry_after_s == 3600
    assert sleeps == []


@pytest.mark.parametrize("status", [429, 413])
def test_a_batch_that_is_too_much_is_halved(server: LoopbackQdrant, status: int) -> None:
    ids, vectors, payloads = make_points(8)
    with closing(open_server(server)) as store:
        physical = prepare(store)
        server.faults = [Fault(status=status), Fault(status=status)]
        store.upsert(physical, ids, vectors, payloads)
        assert store.existing_ids(physical, ids) == set(ids)
    assert sizes_of_upserts(server) == [8, 4, 2, 2, 4]


def test_a_body_over_the_servers_limit_is_halved_until_one_point_is_refused() -> None:
    ids, vectors, payloads = make_points(4)
    for payload in payloads:
        payload["big"] = "x" * 40_000
    with LoopbackQdrant(largest_body=100_000) as server, closing(open_server(server)) as store:
        physical = prepare(store)
        store.upsert(physical, ids, vectors, payloads)
        assert store.count(physical) == 4
        store.refresh_payloads(physical, ids, [{**payload, "generation": "g2"} for payload in payloads])
        assert store.existing_generations(physical, ids) == dict.fromkeys(ids, "g2")
        payloads[2]["big"] = "x" * 200_000
        with pytest.raises(StoreRejected, match=r"upsert 1 points .*HTTP 400.*larger than allowed"):
            store.upsert(physical, ids, vectors, payloads)


def test_a_refused_request_is_sent_once(server: LoopbackQdrant) -> None:
    sleeps: list[float] = []
    with closing(open_server(server, sleeps=sleeps)) as store:
        physical = prepare(store)
        server.faults = [Fault(status=400, error="Wrong input: no such vector")]
        with pytest.raises(StoreRejected, match="HTTP 400: Wrong input: no such vector"):
            store.upsert(physical, *make_points(2))
        server.faults = [Fault(status=403, error="Forbidden")]
        with pytest.raises(StoreRejected, match="QDRANT_API_KEY"):
            store.upsert(physical, *make_points(2))
    assert server.count_requests(UPSERT) == 2
    assert sleeps == []


def test_a_write_that_was_only_acknowledged_is_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    class Hesitant(QdrantClient):
        answers = iter(["acknowledged", "wait_timeout", "completed"])

        def upsert(self, *args: Any, **kwargs: Any) -> models.UpdateResult:
            assert kwargs["wait"] is True
            super().upsert(*args, **kwargs)
            return models.UpdateResult(operation_id=1, status=models.UpdateStatus(next(self.answers)))

    sleeps: list[float] = []
    client = Hesitant(":memory:")
    with closing(QdrantStore(client, place="in memory", is_embedded=True, sleep=sleeps.append)) as store:
        store.upsert(prepare(store), *make_points(2))
    assert len(sleeps) == 2
    assert "'acknowledged' to a write that waits" in caplog.text


# ---------------------------------------------------------------------------------------------- opening


def test_environment_and_settings_choose_the_server(server: LoopbackQdrant, tmp_path: Path) -> None:
    environment = {"QDRANT_URL": server.url, "QDRANT_API_KEY": " secret-key\n"}
    with closing(open_store(QdrantSettings(), str(tmp_path), environment=environment)) as store:
        prepare(store)
        assert not store.is_embedded
    assert all(headers["api-key"] == "secret-key" for _, headers, _ in server.requests)
    assert list(tmp_path.iterdir()) == []
    settings = QdrantSettings(url=server.url)
    with closing(open_store(settings, str(tmp_path), environment={"QDRANT_URL": "http://127.0.0.1:9"})) as store:
        assert store.list_collections() == ["docs"]
    assert "api-key" not in server.requests[-1][1]
    with closing(open_store(QdrantSettings(), str(tmp_path), environment={"QDRANT_URL": ""})) as store:
        assert store.is_embedded


def test_a_loopback_request_never_goes_through_a_proxy(
    server: LoopbackQdrant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    environment = {"QDRANT_URL": server.url, "QDRANT_API_KEY": "secret-key"}
    open_store(QdrantSettings(), str(tmp_path), environment=environment).close()
    assert server.count_requests("GET /collections") == 1


@pytest.mark.parametrize("url", ["http://qdrant.example:6333", "http://10.0.0.7", "http://127.0.0.1.example:6333"])
def test_a_key_never_travels_over_plain_http_to_another_host(url: str, tmp_path: Path) -> None:
    environment = {"QDRANT_API_KEY": "secret-key", "QDRANT_ALLOW_PLAIN_HTTP": "no"}
    with pytest.raises(ConfigError, match=r"unencrypted.*https://.*allow_plain_http") as caught:
        open_store(QdrantSettings(url=url), str(tmp_path), environment=environment)
    assert "secret-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameter", "environment"), [(True, {}), (False, {"QDRANT_ALLOW_PLAIN_HTTP": "true"})], ids=["run", "machine"]
)
def test_plain_http_with_a_key_can_be_allowed(
    parameter: bool,
    environment: dict[str, str],
    server: LoopbackQdrant,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    # Linux takes 0.0.0.0 for this machine; by its name it is another host.
    settings = QdrantSettings(url=server.url.replace("127.0.0.1", "0.0.0.0"), allow_plain_http=parameter)
    open_store(settings, str(tmp_path), environment={"QDRANT_API_KEY": "secret-key", **environment}).close()
    assert server.requests[-1][1]["api-key"] == "secret-key"
    assert "travels unencrypted" in caplog.text
    assert "secret-key" not in caplog.text


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:6333", "needs http:// or https://"),
        ("qdrant", "needs http:// or https://"),
        ("http://", "needs http:// or https:// and a host"),
        ("http://host:port", "can't be read"),
        ("https://user:hunter2@qdrant.example", "has a password"),
    ],
)
def test_urls_that_can_not_be_used(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_store(QdrantSettings(url=url), str(tmp_path), environment={})
    assert "hunter2" not in str(caught.value)


def test_nothing_listening_says_what_to_do(tmp_path: Path) -> None:
    with LoopbackQdrant() as gone:
        url = gone.url
    with pytest.raises(StoreUnavailable, match=rf"Qdrant at {url} does not answer.*unset QDRANT_URL"):
        open_store(QdrantSettings(url=url), str(tmp_path), environment={})


def test_a_web_server_that_is_no_qdrant_is_told_apart(tmp_path: Path) -> None:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    (tmp_path / "index.html").write_text("hello")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        with pytest.raises(StoreUnavailable, match="is not a Qdrant server") as caught:
            open_store(QdrantSettings(url=f"http://127.0.0.1:{web.server_port}"), str(tmp_path), environment={})
        web.shutdown()
        thread.join()
    assert "QDRANT_URL" in str(caught.value)


def test_a_wrong_key_and_an_old_server_are_told_at_opening(server: LoopbackQdrant, tmp_path: Path) -> None:
    server.faults = [Fault(on="GET /collections", status=401, error="Must provide an API key")]
    with pytest.raises(StoreRejected, match=r"401: Must provide an API key.*QDRANT_API_KEY"):
        open_store(QdrantSettings(url=server.url), str(tmp_path), environment={})
    server.version = "1.15.5"
    with pytest.raises(StoreError, match=r"version 1.15.5; Ballast needs 1.16"):
        open_store(QdrantSettings(url=server.url), str(tmp_path), environment={})


def test_loopback_hosts() -> None:
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.1.2.3", "::1"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "10.0.0.1", "localhost.example", "qdrant", "::2"]))


def test_versions() -> None:
    assert read_version("1.19.0") == read_version("v1.19.0-rc1") == (1, 19)
    assert read_version("dev") == (1, 16)
