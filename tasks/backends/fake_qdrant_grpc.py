"""A double of a Qdrant server's gRPC side, for faults on the wire: a real gRPC server over an in-memory QdrantClient.

Not a substitute for a server: it knows the calls that the store makes, and accepts what embedded Qdrant accepts; but it
refuses a facet over a field without an index, as a server does.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tasks.backends.tcp_relay import TcpRelay

if TYPE_CHECKING:
    from qdrant_client import models

    from tasks.backends.fake_qdrant_server import LoopbackQdrant


@dataclass
class RpcFault:
    """What the next matching call meets instead of, or after, its effect; `on` is a pattern of "Points/Upsert"."""

    on: str = "Points/Upsert"
    code: str = "UNAVAILABLE"
    details: str = "Service unavailable"
    retry_after: str | None = None  # in the trailing metadata
    after_effect: bool = False
    drop: bool = False  # the connection is reset, no status is sent
    truncate: bool = False  # a good status, and the answer's last byte is missing
    hang_s: float = 0.0  # no answer until the caller gives up, or for so long


class LoopbackQdrantGrpc:
    """`faults` are met in order, each once; `requests` keeps what was asked as "Service/Method" with metadata and message.

    `beside`: the REST double of the same server; they share points, collections and payload indexes, and are to be asked one
    after the other. `api_key`: every call but the health check must bring it.
    """

    def __init__(
        self, beside: LoopbackQdrant | None = None, *, version: str = "1.19.0", api_key: str | None = None
    ) -> None:
        import grpc  # type: ignore[import-untyped]
        from qdrant_client import QdrantClient

        self.memory = beside.memory if beside else QdrantClient(":memory:")
        self.indexes: dict[str, dict[str, Any]] = beside.indexes if beside else {}
        self.version = version
        self.api_key = api_key
        self.faults: list[RpcFault] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.before: Callable[[str, int], None] | None = None  # told each call and its index before it is answered
        self._owns_memory = beside is None
        self._lock = threading.Lock()
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=8),
            options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        for service, methods in self._routes().items():
            handlers = {
                name: grpc.unary_unary_rpc_method_handler(
                    self._make_behavior(f"{service}/{name}", act), request_deserializer=message.FromString
                )
                for name, (message, act) in methods.items()
            }
            handler = grpc.method_handlers_generic_handler(f"qdrant.{service}", handlers)
            self._server.add_generic_rpc_handlers((handler,))
        # gRPC's server can't break a connection; the relay before it can.
        self._relay = TcpRelay(self._server.add_insecure_port("127.0.0.1:0"))

    @property
    def port(self) -> int:
        return self._relay.port

    def __enter__(self) -> LoopbackQdrantGrpc:
        self._server.start()
        self._relay.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._relay.close()
        self._server.stop(None).wait()
        if self._owns_memory:
            self.memory.close()

    def count_requests(self, pattern: str) -> int:
        return sum(re.fullmatch(pattern, request) is not None for request, _, _ in self.requests)

    def _make_behavior(self, name: str, act: Callable[[Any], Any]) -> Callable[[Any, Any], bytes]:
        """The handler of one method; it answers bytes, so that they can be cut short."""
        import grpc

        def answer(request: Any, context: Any) -> bytes:
            metadata = dict(context.invocation_metadata())
            with self._lock:
                if self.before is not None:
                    self.before(name, len(self.requests))
                self.requests.append((name, metadata, request))
                fault = next((each for each in self.faults if re.fullmatch(each.on, name)), None)
                if fault is not None:
                    self.faults.remove(fault)
                if self.api_key and name != "Qdrant/HealthCheck" and metadata.get("api-key") != self.api_key:
                    context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key or JWT")
                code, said, answered = None, "", b""
                if fault is None or fault.after_effect or fault.truncate:
                    code, said, answered = self._apply(act, request)
            if fault is None:
                if code is not None:
                    context.abort(grpc.StatusCode[code], said)
                return answered
            if fault.truncate:
                return answered[:-1] or b"\n"  # a field's tag without the field
            if fault.hang_s:
                gone = threading.Event()
                context.add_callback(gone.set)
                gone.wait(fault.hang_s)
            if fault.drop:
                self._relay.drop()
            if fault.retry_after is not None:
                context.set_trailing_metadata((("retry-after", fault.retry_after),))
            context.abort(grpc.StatusCode[fault.code], fault.details)
            raise AssertionError("abort raises")

        return answer

    def _apply(self, act: Callable[[Any], Any], request: Any) -> tuple[str | None, str, bytes]:
        """Status code and its reason, None for a good one, and the answer."""
        try:
            return None, "", act(request).SerializeToString()
        except ValueError as error:
            said = str(error)
            known = "ALREADY_EXISTS" if "already exists" in said else "NOT_FOUND" if "not found" in said else None
            return known or "INVALID_ARGUMENT", said, b""
        except KeyError as error:
            return "NOT_FOUND", f"No point with id {error} found", b""

    def _routes(self) -> dict[str, dict[str, tuple[Any, Callable[[Any], Any]]]]:
        from qdrant_client import grpc

        return {
            "Qdrant": {
                "HealthCheck": (
                    grpc.HealthCheckRequest,
                    lambda _: grpc.HealthCheckReply(title="qdrant - vector search engine", version=self.version),
                )
            },
            "Collections": self._collection_routes(),
            "Points": self._point_routes(),
        }

    def _collection_routes(self) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
        from qdrant_client import grpc
        from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc

        def done(result: bool | None) -> Any:
            return grpc.CollectionOperationResponse(result=bool(result))

        def list_all(_: Any) -> Any:
            names = [each.name for each in self.memory.get_collections().collections]
            return grpc.ListCollectionsResponse(collections=[grpc.CollectionDescription(name=name) for name in names])

        def describe(request: Any) -> Any:
            info = RestToGrpc.convert_collection_info(self.memory.get_collection(request.collection_name))
            for field in self.indexes.get(self._resolve(request.collection_name), {}):
                info.payload_schema[field].data_type = grpc.PayloadSchemaType.Keyword
            return grpc.GetCollectionInfoResponse(result=info)

        def create(request: Any) -> Any:
            vectors = GrpcToRest.convert_vectors_config(request.vectors_config)
            metadata = GrpcToRest.convert_payload(request.metadata) or None
            return done(
                self.memory.create_collection(request.collection_name, vectors_config=vectors, metadata=metadata)
            )

        def delete(request: Any) -> Any:
            self.indexes.pop(request.collection_name, None)
            return done(self.memory.delete_collection(request.collection_name))

        def alias(request: Any) -> Any:
            actions = [GrpcToRest.convert_alias_operations(action) for action in request.actions]
            return done(self.memory.update_collection_aliases(actions))

        def list_aliases(_: Any) -> Any:
            there = self.memory.get_aliases().aliases
            return grpc.ListAliasesResponse(aliases=[RestToGrpc.convert_alias_description(each) for each in there])

        def exists(request: Any) -> Any:
            is_there = self.memory.collection_exists(request.collection_name)
            return grpc.CollectionExistsResponse(result=grpc.CollectionExists(exists=is_there))

        return {
            "List": (grpc.ListCollectionsRequest, list_all),
            "Get": (grpc.GetCollectionInfoRequest, describe),
            "Create": (grpc.CreateCollection, create),
            "Delete": (grpc.DeleteCollection, delete),
            "UpdateAliases": (grpc.ChangeAliases, alias),
            "ListAliases": (grpc.ListAliasesRequest, list_aliases),
            "CollectionExists": (grpc.CollectionExistsRequest, exists),
        }

    def _point_routes(self) -> dict[str, tuple[Any, Callable[[Any], Any]]]:
        from qdrant_client import grpc
        from qdrant_client.conversions.conversion import GrpcToRest, RestToGrpc

        completed = grpc.UpdateResult(operation_id=1, status=grpc.UpdateStatus.Completed)

        def done(_: Any) -> Any:
            return grpc.PointsOperationResponse(result=completed)

        def filter_of(request: Any) -> Any:
            return GrpcToRest.convert_filter(request.filter) if request.HasField("filter") else None

        def selectors(request: Any) -> dict[str, Any]:
            """with_payload and with_vectors; a server's defaults are neither."""
            has_payload, has_vectors = request.HasField("with_payload"), request.HasField("with_vectors")
            return {
                "with_payload": has_payload and GrpcToRest.convert_with_payload_selector(request.with_payload),
                "with_vectors": has_vectors and GrpcToRest.convert_with_vectors_selector(request.with_vectors),
            }

        def to_records(found: list[models.Record]) -> list[Any]:
            # No payload is an empty map over gRPC, and None over REST.
            return [
                RestToGrpc.convert_record(each.model_copy(update={"payload": each.payload or {}})) for each in found
            ]

        def upsert(request: Any) -> Any:
            points = [GrpcToRest.convert_point_struct(point) for point in request.points]
            return done(self.memory.upsert(request.collection_name, points))

        def delete(request: Any) -> Any:
            return done(self.memory.delete(request.collection_name, GrpcToRest.convert_points_selector(request.points)))

        def overwrite(request: Any) -> Any:
            payload = GrpcToRest.convert_payload(request.payload)
            points = GrpcToRest.convert_points_selector(request.points_selector)
            return done(self.memory.overwrite_payload(request.collection_name, payload, points))

        def update_batch(request: Any) -> Any:
            operations = [GrpcToRest.convert_points_update_operation(each) for each in request.operations]
            self.memory.batch_update_points(request.collection_name, operations)
            return grpc.UpdateBatchResponse(result=[completed] * len(operations))

        def index(request: Any) -> Any:
            self.memory.get_collection(request.collection_name)
            fields = self.indexes.setdefault(self._resolve(request.collection_name), {})
            fields[request.field_name] = {"data_type": "keyword", "points": 0}
            return done(None)

        def get(request: Any) -> Any:
            ids = [GrpcToRest.convert_point_id(point_id) for point_id in request.ids]
            found = self.memory.retrieve(request.collection_name, ids, **selectors(request))
            return grpc.GetResponse(result=to_records(found))

        def scroll(request: Any) -> Any:
            offset = GrpcToRest.convert_point_id(request.offset) if request.HasField("offset") else None
            found, following = self.memory.scroll(
                request.collection_name,
                filter_of(request),
                limit=request.limit or 10,
                offset=offset,
                **selectors(request),
            )
            page = grpc.ScrollResponse(result=to_records(found))
            if following is not None:
                page.next_page_offset.CopyFrom(RestToGrpc.convert_extended_point_id(following))
            return page

        def count(request: Any) -> Any:
            answer = self.memory.count(request.collection_name, filter_of(request), exact=True)
            return grpc.CountResponse(result=grpc.CountResult(count=answer.count))

        def facet(request: Any) -> Any:
            if request.key not in self.indexes.get(self._resolve(request.collection_name), {}):
                raise ValueError(f"No appropriate index for faceting: `{request.key}`")
            found = self.memory.facet(
                request.collection_name, request.key, filter_of(request), limit=request.limit or 10, exact=request.exact
            )
            return grpc.FacetResponse(hits=[RestToGrpc.convert_facet_value_hit(hit) for hit in found.hits])

        def query(request: Any) -> Any:
            wanted = GrpcToRest.convert_query_points(request)
            found = self.memory.query_points(
                request.collection_name,
                query=wanted.query,
                using=wanted.using,
                query_filter=wanted.filter,
                limit=wanted.limit or 10,
                **selectors(request),
            )
            # A real server numbers its answers' versions; the client's conversion wants one.
            hits = [point.model_copy(update={"version": 0}) for point in found.points]
            return grpc.QueryResponse(result=[RestToGrpc.convert_scored_point(hit) for hit in hits])

        return {
            "Upsert": (grpc.UpsertPoints, upsert),
            "Delete": (grpc.DeletePoints, delete),
            "OverwritePayload": (grpc.SetPayloadPoints, overwrite),
            "UpdateBatch": (grpc.UpdateBatchPoints, update_batch),
            "CreateFieldIndex": (grpc.CreateFieldIndexCollection, index),
            "Get": (grpc.GetPoints, get),
            "Scroll": (grpc.ScrollPoints, scroll),
            "Count": (grpc.CountPoints, count),
            "Facet": (grpc.FacetCounts, facet),
            "Query": (grpc.QueryPoints, query),
        }

    def _resolve(self, name: str) -> str:
        """The collection behind an alias."""
        aliases = {each.alias_name: each.collection_name for each in self.memory.get_aliases().aliases}
        return aliases.get(name, name)
