"""What the commands call: one place to see it, and to put something else there in a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.progress import RunObserver
    from tasks.config import BudgetSettings, EmbeddingSettings, IngestSettings, QdrantSettings
    from tasks.records import CalibrationReport, CollectionState, LedgerRecord, PlanReport, SearchHit


class Operations:
    """Everything is imported when it is called: torch, Prefect and LlamaIndex take seconds."""

    def ingest(self, settings: IngestSettings, observer: RunObserver, *, changed: Sequence[str] | None = None) -> bool:
        """Run the flow, over the whole source or some changed paths; what it found is in `observer.finished`.

        False: it ended red. Raises what ended it early.
        """
        from flows.api_server import embedded_api
        from tasks.check_inputs import check_inputs

        observer.stage("check", "source, model and data folder")
        check_inputs(settings, changed)
        observer.stage("prefect", "the configured API, or an embedded one")
        with embedded_api(settings.data_folder, meanwhile=self.load_flow):
            state = self.load_flow()(settings, changed, return_state=True)
            if observer.finished is None:
                state.result()
            return bool(state.is_completed())

    def load_flow(self) -> Any:
        from flows.ingest import ingest as ingest_flow
        from tasks.prepare import load_libraries

        load_libraries()
        ingest_flow.serialize_parameters({})  # Prefect imports FastAPI for it, at the first run
        return ingest_flow

    def verify(self, settings: IngestSettings, observer: RunObserver, *, with_source: bool, repair: bool) -> bool:
        """Run the flow; what it found is in `observer.verified`. False: it ended red. Raises what ended it early."""
        from flows.api_server import embedded_api
        from tasks.check_inputs import check_stored

        observer.stage("check", "collection and source")
        check_stored(settings, with_source=with_source)
        observer.stage("prefect", "the configured API, or an embedded one")
        with embedded_api(settings.data_folder, meanwhile=self.load_verify):
            state = self.load_verify()(settings, with_source=with_source, repair=repair, return_state=True)
            if observer.verified is None:
                state.result()
            return bool(state.is_completed())

    def load_verify(self) -> Any:
        from flows.verify import verify as verify_flow

        return verify_flow

    def list_failures(
        self, qdrant: QdrantSettings, data_folder: str, *, retry: bool
    ) -> Mapping[str, Sequence[LedgerRecord]]:
        from tasks.engine.stored_state import list_failures

        return list_failures(qdrant, data_folder, retry=retry)

    def list_collections(
        self, qdrant: QdrantSettings, data_folder: str, *, spool: str | None, name: str | None, drop_old: bool
    ) -> Sequence[CollectionState]:
        from tasks.engine.stored_state import drop_old_collections, list_collections

        if drop_old and name is not None:
            return drop_old_collections(qdrant, data_folder, name, spool=spool)
        return list_collections(qdrant, data_folder, name)

    def plan(self, settings: IngestSettings, gpu_memory_bytes: int | None) -> PlanReport:
        from tasks.plan import plan_source

        return plan_source(settings, gpu_memory_bytes)

    def search(
        self, question: str, *, embedding: EmbeddingSettings, qdrant: QdrantSettings, data_folder: str, limit: int
    ) -> Sequence[SearchHit]:
        from tasks.search import search_collection

        return search_collection(question, embedding=embedding, qdrant=qdrant, data_folder=data_folder, limit=limit)

    def calibrate(self, embedding: EmbeddingSettings, budget: BudgetSettings, data_folder: str) -> CalibrationReport:
        from tasks.calibrate import calibrate_device

        return calibrate_device(embedding, budget, data_folder)
