"""The verify flow: look, mend what needs no embedding, ingest what is missing, look again."""

from __future__ import annotations

import threading
import time
from typing import Any, cast

from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Failed
from prefect.utilities.annotations import quote

from flows.ingest import ingest
from tasks.config import IngestSettings
from tasks.engine.verify_collection import Inspection, make_report
from tasks.exclusive import hold_collection
from tasks.observe import current_observer
from tasks.records import VerifyReport
from tasks.states import complete
from tasks.verify import describe_report, inspect, publish_findings
from tasks.verify import repair as repair_findings


def _name_run() -> str:
    settings = IngestSettings.model_validate(cast(Any, flow_run.parameters["settings"]))
    return f"{settings.qdrant.collection}: {'repair' if flow_run.parameters.get('repair') else 'verify'}"


@flow(name="verify", flow_run_name=_name_run, persist_result=False)
def verify(settings: IngestSettings, with_source: bool = True, repair: bool = False) -> VerifyReport:
    """Compare a collection with its ledger and its source. CollectionDiffers, red, where anything is off at the end."""
    stop, watcher = threading.Event(), current_observer.get()
    with hold_collection(
        settings.qdrant.collection, patience_s=settings.collection_wait_s, stop=stop, note=watcher.note
    ):
        report = look_and_mend(settings, with_source=with_source, repair=repair)
    publish_findings(report)
    watcher.verify_finished(report)
    if not report.is_clean:
        return cast(VerifyReport, Failed(name="CollectionDiffers", message=describe_report(report)))
    return complete(report, describe_report(report))


def look_and_mend(settings: IngestSettings, *, with_source: bool, repair: bool) -> VerifyReport:
    """Look; mend and ingest where that is asked for and something is off; look again."""
    started = time.monotonic()
    found = inspect.submit(settings, with_source=with_source).result()
    again: Inspection | None = None
    notes: tuple[str, ...] = ()
    if repair and found.findings:
        # quote: Prefect would look into every document for futures to wait for.
        mended = repair_findings.submit(settings, quote(found)).result()  # type: ignore[call-overload]
        notes = mended.notes
        if mended.needs_ingest:
            notes += embed_missing(mended.settings)
        again = inspect.submit(settings, with_source=with_source).result()
    return make_report(found, again, notes, time.monotonic() - started)


def embed_missing(settings: IngestSettings) -> tuple[str, ...]:
    """The ordinary ingest: only nodes without a point are embedded. What it could not do is for the second look to find."""
    state = ingest(settings, return_state=True)
    return () if state.is_completed() else (f"The ingest ended as {state.name}: {state.message}",)
