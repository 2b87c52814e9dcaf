"""Points a second into Qdrant, client side: what reading, converting and sending them costs, over gRPC and REST.

    python tests/benchmarks/upsert_rate.py [--points 10240]

Vectors of 1024 dimensions and payloads as LlamaIndex writes them, in batches of 256, with wait=True. Qdrant is a sink: a
process of its own that reads every request to its end and says "completed" without storing anything. So the rate is the
client's own limit, no server's; the CPU time a point is what this work takes from tokenising and feeding a GPU. Each client is
a process of its own; a batch before the first is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
BATCH = 256
VECTOR = "text-dense"
COLLECTION = "bench"
TEXT = "Before a ballast tank is entered it is ventilated for {} hours and its air is measured at three heights. " * 9


@dataclass(frozen=True)
class Rate:
    client: str
    points: int
    seconds: float
    cpu_s: float  # of the client's process
    wire_bytes: int  # of all requests, as they arrive: bodies and messages without their framing

    @property
    def per_s(self) -> float:
        return self.points / self.seconds


# ---------------------------------------------------------------------------------------------- the sink


class Sink:
    """Enough of a server's answers that clients go on; counts the bytes that arrive."""

    def __init__(self, dimension: int) -> None:
        self.received = 0
        self._dimension = dimension
        self._lock = threading.Lock()

    def count(self, size: int) -> None:
        with self._lock:
            self.received += size

    def describe(self) -> Any:
        from qdrant_client import QdrantClient, models

        client = QdrantClient(":memory:")
        vectors = {VECTOR: models.VectorParams(size=self._dimension, distance=models.Distance.COSINE)}
        client.create_collection(
            COLLECTION, vectors_config=vectors, metadata={"owner": "ballast", "dimension": self._dimension}
        )
        return client.get_collection(COLLECTION)

    def start_rest(self) -> int:
        sink = self
        described = self.describe().model_dump(mode="json")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # a connection is kept, as a server keeps it

            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                left = size
                while left:
                    left -= len(self.rfile.read(min(left, 1 << 20)))
                if self.command == "PUT":
                    sink.count(size)
                result: Any = {"operation_id": 1, "status": "completed"}
                if self.command == "GET":
                    result = {"collections": [{"name": COLLECTION}]}
                    result = described if self.path.startswith(f"/collections/{COLLECTION}") else result
                    result = {"exists": True} if self.path.endswith("/exists") else result
                answer: Any = {"status": "ok", "time": 0, "result": result}
                if self.path == "/":
                    answer = {"title": "qdrant", "version": "1.19.0"}
                content = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_DELETE = handle_any

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return int(server.server_address[1])

    def start_grpc(self) -> int:
        from concurrent.futures import ThreadPoolExecutor

        import grpc
        from qdrant_client import grpc as messages
        from qdrant_client.conversions.conversion import RestToGrpc

        described = messages.GetCollectionInfoResponse(result=RestToGrpc.convert_collection_info(self.describe()))
        completed = messages.UpdateResult(operation_id=1, status=messages.UpdateStatus.Completed)
        stored = messages.PointsOperationResponse(result=completed).SerializeToString()
        answers = {
            "/qdrant.Qdrant/HealthCheck": messages.HealthCheckReply(title="qdrant", version="1.19.0"),
            "/qdrant.Collections/List": messages.ListCollectionsResponse(
                collections=[messages.CollectionDescription(name=COLLECTION)]
            ),
            "/qdrant.Collections/Get": described,
            "/qdrant.Collections/CollectionExists": messages.CollectionExistsResponse(
                result=messages.CollectionExists(exists=True)
            ),
        }
        encoded = {path: message.SerializeToString() for path, message in answers.items()}

        class Raw(grpc.GenericRpcHandler):
            """Bytes in, bytes out: nothing is parsed."""

            def service(self, details: Any) -> Any:
                if details.method == "/qdrant.Points/Upsert":
                    return grpc.unary_unary_rpc_method_handler(take)
                return grpc.unary_unary_rpc_method_handler(lambda _request, _context: encoded[details.method])

        def take(request: bytes, _context: Any) -> bytes:
            self.count(len(request))
            return stored

        options = [("grpc.max_receive_message_length", -1)]
        self._grpc = grpc.server(ThreadPoolExecutor(4), [Raw()], options=options)
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        return int(port)


def serve(dimension: int) -> None:
    """Until stdin closes; a line asks for the bytes that have arrived."""
    sink = Sink(dimension)
    print(json.dumps({"rest": sink.start_rest(), "grpc": sink.start_grpc()}), flush=True)
    for _ in sys.stdin:
        print(sink.received, flush=True)


@contextmanager
def start_sink(dimension: int) -> Iterator[tuple[dict[str, int], Callable[[], int]]]:
    """(its ports, how many bytes have arrived)"""
    command = [sys.executable, "-W", "ignore", __file__, "--serve", str(dimension)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def read_received() -> int:
        stdin.write("\n")
        stdin.flush()
        return int(stdout.readline())

    try:
        yield json.loads(stdout.readline()), read_received
    finally:
        stdin.close()
        process.wait(30)
        stdout.close()


# ---------------------------------------------------------------------------------------------- the clients

Upload = Callable[[Sequence[str], NDArray[np.float32], Sequence[dict[str, Any]]], object]


def make_points(count: int, dimension: int) -> tuple[list[str], NDArray[np.float32], list[dict[str, Any]]]:
    """Ids, unit vectors, and payloads as our chunk workers write them."""
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores.utils import node_to_metadata_dict

    rng = np.random.default_rng(5)
    vectors = rng.standard_normal((count, dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
    payloads = []
    for number, point_id in enumerate(ids):
        metadata = {"file_name": f"{number:05d}.txt", "title": "Enclosed spaces", "format": "txt"}
        node = TextNode(id_=point_id, text=TEXT.format(*[number % 24] * 9), metadata=metadata)
        payload = node_to_metadata_dict(node, remove_text=False, flat_metadata=False)
        payloads.append({**payload, "doc_id": f"{number:05d}.txt", "generation": "0" * 64, "ballast_nodes": 1})
    return ids, vectors, payloads


def connect(ports: dict[str, int], *, over_grpc: bool) -> Any:
    from qdrant_client import QdrantClient

    url = f"http://127.0.0.1:{ports['rest']}"
    options = {"grpc.max_send_message_length": -1}
    return QdrantClient(
        url=url,
        grpc_port=ports["grpc"],
        prefer_grpc=over_grpc,
        grpc_options=options,
        timeout=60,
        check_compatibility=False,
    )


def use_ballast(ports: dict[str, int], *, over_grpc: bool) -> Upload:
    from tasks.backends.qdrant import open_store
    from tasks.config import QdrantSettings

    url = f"http://127.0.0.1:{ports['rest']}"
    transport = "grpc" if over_grpc else "rest"
    settings = QdrantSettings(
        url=url, grpc_port=ports["grpc"], transport=transport, collection=COLLECTION, batch_points=BATCH
    )
    store = open_store(settings, ".", environment={})
    return lambda ids, vectors, payloads: store.upsert(COLLECTION, ids, vectors, payloads)


def use_upload_points(ports: dict[str, int], *, over_grpc: bool) -> Upload:
    """qdrant_client's own, with all that it needs to be safe: wait=True."""
    from qdrant_client import models

    client = connect(ports, over_grpc=over_grpc)

    def upload(ids: Sequence[str], vectors: NDArray[np.float32], payloads: Sequence[dict[str, Any]]) -> None:
        points = (
            models.PointStruct(id=point_id, vector={VECTOR: row.tolist()}, payload=payload)
            for point_id, row, payload in zip(ids, vectors, payloads, strict=True)
        )
        client.upload_points(COLLECTION, points, batch_size=BATCH, wait=True)

    return upload


def use_llama_index(ports: dict[str, int], *, over_grpc: bool) -> Upload:
    """Nodes with their embeddings as Python floats: what its embedding classes give it. Making the nodes is not counted."""
    from llama_index.vector_stores.qdrant import QdrantVectorStore

    store = QdrantVectorStore(COLLECTION, client=connect(ports, over_grpc=over_grpc), batch_size=BATCH)
    return lambda nodes, _vectors, _payloads: store.add(list(nodes))


CLIENTS: dict[str, tuple[Callable[..., Upload], bool]] = {
    "Ballast, gRPC": (use_ballast, True),
    "Ballast, REST": (use_ballast, False),
    "upload_points, gRPC": (use_upload_points, True),
    "upload_points, REST": (use_upload_points, False),
    "QdrantVectorStore.add, gRPC": (use_llama_index, True),
    "QdrantVectorStore.add, REST": (use_llama_index, False),
}


def run_client(name: str, ports: dict[str, int], points: int, dimension: int) -> dict[str, float]:
    make, over_grpc = CLIENTS[name]
    ids, vectors, payloads = make_points(points + BATCH, dimension)
    items: Sequence[Any] = ids
    if make is use_llama_index:
        items = to_nodes(ids, vectors, payloads)
    upload = make(ports, over_grpc=over_grpc)
    upload(items[:BATCH], vectors[:BATCH], payloads[:BATCH])
    began, cpu_s = time.perf_counter(), time.process_time()
    upload(items[BATCH:], vectors[BATCH:], payloads[BATCH:])
    return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_s}


def to_nodes(ids: Sequence[str], vectors: NDArray[np.float32], payloads: Sequence[dict[str, Any]]) -> list[Any]:
    from llama_index.core.vector_stores.utils import metadata_dict_to_node

    nodes = []
    for point_id, row, payload in zip(ids, vectors, payloads, strict=True):
        node = metadata_dict_to_node(payload)
        node.id_ = point_id
        node.embedding = row.tolist()
        nodes.append(node)
    return nodes


def measure(name: str, points: int, dimension: int, *, apart: bool) -> Rate:
    with start_sink(dimension) as (ports, read_received):
        if apart:
            told = run_apart(["--client", name, "--ports", json.dumps(ports)], points, dimension)
        else:
            told = run_client(name, ports, points, dimension)
        return Rate(name, points, wire_bytes=read_received() * points // (points + BATCH), **told)


def run_apart(options: Sequence[str], points: int, dimension: int) -> dict[str, float]:
    """run_client() in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, *options]
    command += ["--points", str(points), "--dimension", str(dimension)]
    environment = {**os.environ, "DO_NOT_TRACK": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if result.returncode:
        raise SystemExit(f"{' '.join(options)} failed: {result.stderr[-3000:]}")
    told: dict[str, float] = json.loads(result.stdout)
    return told


def print_table(rates: Sequence[Rate], dimension: int) -> None:
    print(f"{rates[0].points:,} points of {dimension} dimensions, batches of {BATCH}, into a sink\n")
    print("| client | points/s | CPU us a point | bytes a point | Ballast over gRPC is |")
    print("| --- | ---: | ---: | ---: | --- |")
    ours = rates[0]
    for one in rates:
        ratio = f"{ours.per_s / one.per_s:.1f}x as fast, {ours.cpu_s / one.cpu_s:.2f} of the CPU"
        print(
            f"| {one.client} | {one.per_s:,.0f} | {1e6 * one.cpu_s / one.points:,.0f} | {one.wire_bytes / one.points:,.0f} "
            f"| {'' if one is ours else ratio} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10_240)
    parser.add_argument("--dimension", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true", help="the whole way in small: its figures mean nothing")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--ports", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
    elif given.client:
        print(json.dumps(run_client(given.client, given.ports, given.points, given.dimension)))
    else:
        points, dimension = (2 * BATCH, 32) if given.tiny else (given.points, given.dimension)
        rates = [measure(name, points, dimension, apart=not given.tiny) for name in CLIENTS]
        if given.json:
            print(json.dumps([asdict(one) for one in rates], indent=1))
        else:
            if given.tiny:
                print("Tiny: the figures mean nothing.\n")
            print_table(rates, dimension)


if __name__ == "__main__":
    main()
