"""Tasks: look at a collection, and mend what needs no embedding."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.config import IngestSettings
from tasks.engine.repair_collection import Mended, repair_collection
from tasks.engine.verify_collection import Inspection, inspect_collection
from tasks.publish import publish_table
from tasks.records import VerifyReport
from tasks.secrets import read_environment
from tasks.server_calls import ask_server
from tasks.states import complete
from tasks.tabulate_state import tabulate_findings, tabulate_verify


@task(name="inspect", task_run_name="inspect", cache_policy=NO_CACHE, persist_result=False)
def inspect(settings: IngestSettings, *, with_source: bool) -> Inspection:
    """Points, ledger and source, compared. Raises the errors of inspect_collection(), ApiUnavailable."""
    environment = ask_server(read_environment, settings.pools.server_outage_s)
    found = inspect_collection(settings, with_source=with_source, environment=environment)
    return complete(found, f"{len(found.findings)} findings in {len(found.documents)} documents, {found.points} points")


@task(name="repair", task_run_name="repair", cache_policy=NO_CACHE, persist_result=False)
def repair(settings: IngestSettings, inspection: Inspection) -> Mended:
    """Ledger records and deletes. Raises the errors of repair_collection(), ApiUnavailable."""
    environment = ask_server(read_environment, settings.pools.server_outage_s)
    mended = repair_collection(settings, inspection, environment=environment)
    what = "an ingest embeds what is missing" if mended.needs_ingest else "nothing is to be embedded"
    return complete(mended, " ".join((f"Done; {what}.", *mended.notes)))


def publish_findings(report: VerifyReport) -> None:
    """The table of what was found, on the run's page; nothing found is a row, too."""
    findings = tabulate_findings(report)
    table = findings if findings.rows else tabulate_verify(report)
    publish_table(report.collection, "verify", describe_report(report), table)


def describe_report(report: VerifyReport) -> str:
    """One sentence: how much was compared and what is off."""
    compared = f"{report.documents} documents and {report.points} points of {report.collection}"
    if not report.found and not report.left:
        return f"{compared}: nothing is off"
    kinds = ", ".join(sorted({finding.kind for finding in report.left or report.found}))
    return f"{compared}: {len(report.found)} found, {len(report.repaired)} repaired, {len(report.left)} left ({kinds})"
