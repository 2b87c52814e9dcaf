"""A double of a Qdrant server, for faults on the wire: a loopback HTTP server over an in-memory QdrantClient.

Not a substitute for a server: it knows the routes that the store uses, and accepts what embedded Qdrant accepts. But it
refuses a facet or a filter on a field without a payload index, as a server in strict mode does.
"""

from __future__ import annotations

import json
import re
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], Any]


@dataclass
class Fault:
    """What the next matching request meets instead of, or after, its effect."""

    on: str = "PUT /collections/[^/]+/points"
    status: int = 503
    error: str = "Service unavailable"
    headers: dict[str, str] = field(default_factory=dict)
    after_effect: bool = False
    reset: bool = False
    hang_s: float = 0.0  # no answer until the caller gives up, or for so long; then a reset
    skip: int = 0  # so many matching requests pass first


class LoopbackQdrant:
    """`faults` are met in order, each once; `requests` keeps what was asked as "METHOD /path" with headers and body.

    While `is_down` every request gets a 503.
    """

    def __init__(self, *, version: str = "1.19.0", largest_body: int = 32 * 1024**2) -> None:
        from qdrant_client import QdrantClient

        self.memory = QdrantClient(":memory:")
        self.version = version
        self.largest_body = largest_body
        self.indexes: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.is_down = False
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> LoopbackQdrant:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self.memory.close()

    def count_requests(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, request) is not None for request, _, _ in self.requests)

    def answer(self, request: str, size: int, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        """What one request gets: status (0: a reset, after headers' "hang" seconds at most), headers and body."""
        with self._lock:
            self.requests.append((request, headers, body))
            if self.is_down:
                return 503, {}, {"status": {"error": "Service unavailable"}, "time": 0}
            fault = next((each for each in self.faults if re.fullmatch(each.on, request)), None)
            if fault is not None and fault.skip > 0:
                fault.skip -= 1
                fault = None
            if fault is not None:
                self.faults.remove(fault)
            if fault is None or fault.after_effect:
                if size > self.largest_body:
                    said = f"JSON payload ({size} bytes) is larger than allowed (limit: {self.largest_body} bytes)."
                    return 400, {}, {"status": {"error": said}, "time": 0}
                status, result = self._apply(request, body)
            if fault is not None:
                if fault.reset or fault.hang_s:
                    return 0, {"hang": str(fault.hang_s)}, None
                return fault.status, fault.headers, {"status": {"error": fault.error}, "time": 0}
            if status != 200:
                return status, {}, {"status": {"error": result}, "time": 0}
            return 200, {}, {"status": "ok", "time": 0, "result": result}

    def _apply(self, request: str, body: dict[str, Any]) -> tuple[int, Any]:
        completed = {"operation_id": 1, "status": "completed"}
        for pattern, act in self._routes():
            match = re.fullmatch(pattern, request)
            if match:
                try:
                    result = act(body, **match.groupdict())
                except ValueError as error:
                    there = "already exists" in str(error)
                    return 409 if there else 404 if "not found" in str(error) else 400, str(error)
                except KeyError as error:
                    return 404, f"No point with id {error} found"
                return 200, completed if result is None else result
        return 404, f"no route for {request}"

    def _routes(self) -> list[tuple[str, Callable[..., Any]]]:
        from qdrant_client import models

        one = r"/collections/(?P<name>[^/]+)"
        memory = self.memory

        def describe(_: Any, name: str) -> Any:
            info = memory.get_collection(name).model_dump(mode="json")
            return {**info, "payload_schema": self.indexes.get(name, {})}

        def create(body: Any, name: str) -> Any:
            wanted = models.CreateCollection(**body)
            return memory.create_collection(name, vectors_config=wanted.vectors, metadata=wanted.metadata)

        def index(body: Any, name: str) -> None:
            schema = {"data_type": body["field_schema"], "points": 0}
            self.indexes.setdefault(name, {})[body["field_name"]] = schema

        def alias(body: Any) -> Any:
            return memory.update_collection_aliases(models.ChangeAliasesOperation(**body).actions)

        def upsert(body: Any, name: str) -> None:
            memory.upsert(name, models.PointsList(**body).points)

        def batch(body: Any, name: str) -> Any:
            memory.batch_update_points(name, models.UpdateOperations(**body).operations)
            return [{"operation_id": 1, "status": "completed"}] * len(body["operations"])

        def drop(_: Any, name: str) -> bool:
            self.indexes.pop(name, None)
            return memory.delete_collection(name)

        def delete(body: Any, name: str) -> None:
            if "filter" in body:
                self._check_filter(name, body["filter"])
                memory.delete(name, models.FilterSelector(**body))
            else:
                memory.delete(name, models.PointIdsList(**body))

        def retrieve(body: Any, name: str) -> Any:
            wanted = models.PointRequest(**body)
            found = memory.retrieve(name, wanted.ids, wanted.with_payload or False, wanted.with_vector or False)
            return [record.model_dump(mode="json") for record in found]

        def scroll(body: Any, name: str) -> Any:
            wanted = models.ScrollRequest(**body)
            self._check_filter(name, body.get("filter"))
            found, following = memory.scroll(
                name,
                scroll_filter=wanted.filter,
                limit=wanted.limit or 10,
                offset=wanted.offset,
                with_payload=wanted.with_payload or False,
                with_vectors=wanted.with_vector or False,
            )
            return {"points": [record.model_dump(mode="json") for record in found], "next_page_offset": following}

        def count(body: Any, name: str) -> Any:
            self._check_filter(name, body.get("filter"))
            return memory.count(name, count_filter=models.CountRequest(**body).filter).model_dump(mode="json")

        def facet(body: Any, name: str) -> Any:
            wanted = models.FacetRequest(**body)
            self._check_index(name, wanted.key)
            self._check_filter(name, body.get("filter"))
            found = memory.facet(name, wanted.key, facet_filter=wanted.filter, limit=wanted.limit or 10)
            return found.model_dump(mode="json")

        def query(body: Any, name: str) -> Any:
            wanted = models.QueryRequest(**body)
            self._check_filter(name, body.get("filter"))
            found = memory.query_points(
                name, query=wanted.query, using=wanted.using, query_filter=wanted.filter, limit=wanted.limit or 10
            )
            return found.model_dump(mode="json")

        return [
            ("GET /collections", lambda _: memory.get_collections().model_dump(mode="json")),
            ("GET /aliases", lambda _: memory.get_aliases().model_dump(mode="json")),
            ("POST /collections/aliases", alias),
            (f"GET {one}", describe),
            (f"PUT {one}", create),
            (f"PUT {one}/index", index),
            (f"PUT {one}/points", upsert),
            (f"POST {one}/points", retrieve),
            (f"POST {one}/points/batch", batch),
            (f"POST {one}/points/query", query),
            (f"POST {one}/points/count", count),
            (f"POST {one}/points/scroll", scroll),
            (f"POST {one}/points/delete", delete),
            (f"POST {one}/facet", facet),
            (f"DELETE {one}", drop),
        ]

    def _check_filter(self, name: str, conditions: Any) -> None:
        """Raises ValueError for a filter on a field without an index."""
        for clause in (conditions or {}).values():
            for condition in clause or ():
                if "key" in condition:
                    self._check_index(name, condition["key"])

    def _check_index(self, name: str, field: str) -> None:
        aliases = {alias.alias_name: alias.collection_name for alias in self.memory.get_aliases().aliases}
        if field not in self.indexes.get(aliases.get(name, name), {}):
            raise ValueError(f'Bad request: Index required but not found for "{field}" of one of: [keyword]')

    def _make_handler(self) -> type[BaseHTTPRequestHandler]:
        double = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                content = self.rfile.read(size)
                path = self.path.split("?")[0]
                headers: dict[str, str] = {}
                if path == "/":
                    status, answer = 200, {"title": "qdrant", "version": double.version}
                    double.requests.append(("GET /", dict(self.headers), {}))
                else:
                    body = json.loads(content) if content else {}
                    status, headers, answer = double.answer(f"{self.command} {path}", size, dict(self.headers), body)
                if status == 0:
                    select.select([self.connection], [], [], float(headers["hang"]))  # readable: the caller is gone
                    # Linger 0: the client sees a reset, not an orderly end.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.close_connection = True
                    return
                encoded = json.dumps(answer).encode()
                self.send_response(status)
                # A fault may promise more bytes than come: an answer that is cut off.
                for key, value in {"Content-Length": str(len(encoded)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(encoded)

            do_GET = do_PUT = do_POST = do_DELETE = handle_any  # noqa: N815  the names that http.server looks for

            def log_message(self, *_: object) -> None:
                pass

        return Handler
