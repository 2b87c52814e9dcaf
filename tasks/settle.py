"""Task: the end of a source, once every partition is stored."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.engine.commit import Settled
from tasks.engine.ingest_run import IngestRun
from tasks.publish import publish_withheld
from tasks.states import complete


@task(name="settle", task_run_name="settle", cache_policy=NO_CACHE, persist_result=False)
def settle_source(run: IngestRun) -> Settled:
    """Failures into the ledger, deletes propagated or withheld, the source's points counted.

    DeletesWithheld where the guard kept documents that have left the source: the run's page shows it, with the way out.
    """
    settled = run.settle()
    done = f"{settled.points_counted} points counted, {len(settled.decision.delete)} documents deleted"
    if settled.decision.withheld:
        publish_withheld(run.settings.qdrant.collection, settled.decision)
        return complete(settled, f"{settled.decision.reason} {done}", name="DeletesWithheld")
    return complete(settled, done)
