"""What a run shows in the Prefect UI: progress, tables, the report with its picture, and events that automations react to.

None of it decides what becomes of a run: where the server is away for longer than `patience_s`, tables are logged instead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from functools import partial
from threading import Lock, Thread
from typing import Any, Literal
from uuid import UUID

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event
from prefect.exceptions import PrefectHTTPStatusError

from tasks.errors import ApiUnavailable
from tasks.picture import draw_memory, explain_no_picture, load_drawing, to_data_url
from tasks.policy.delete_guard import DeleteDecision
from tasks.records import LadderStep, Partition, PartitionReport, RunSummary
from tasks.report import (
    LADDER_ROWS,
    describe_steps,
    render_report,
    tabulate_documents,
    tabulate_ladder,
    tabulate_memory,
    tabulate_nodes,
    tabulate_partition_page,
)
from tasks.run_events import choose_run_events
from tasks.server_calls import ask_server
from tasks.tables import Table, to_artifact_rows, to_lines, to_markdown

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
# A database row each, and a page to load: Prefect itself sets no limit.
MARKDOWN_CHARS = 400_000


class ProgressArtifact:
    """How much of `what` is in Qdrant, as a bar on the run's page.

    Told by a thread of its own, the newest only: a server that is slow or away holds nothing up, and what it missed is made
    up for by the next update, or by finish().
    """

    def __init__(self, collection: str, what: Literal["source", "group"] = "source") -> None:
        """`what`: all of an ingest run's, or a group that a worker's run has been given."""
        self._key = f"{'group-' if what == 'group' else ''}progress-{to_key(collection)}"
        self._told = f"Share of the {what} that is in Qdrant"
        self._id: UUID | None = None
        self._lock = Lock()
        self._latest: tuple[float, str] | None = None
        self._thread: Thread | None = None
        self._partitions = 0
        self._nodes = 0
        # Which run the artifact belongs to is in the context, and a bare thread has none.
        self._context = copy_context()
        self._tell(0.0, self._told)

    def update(self, partition: Partition) -> None:
        """The partition's points are stored."""
        self._partitions += 1
        self._nodes += partition.nodes
        self._tell(round(100 * partition.source_fraction, 1), self._describe())

    def finish(self, patience_s: float = PATIENCE_S) -> None:
        """All is stored: waits for what is under way, and for a server that is away."""
        self._tell(100.0, self._describe())
        if (thread := self._thread) is not None:
            thread.join(patience_s)
            if thread.is_alive():  # it sends the newest as soon as it can; a second one would make a second artifact
                logger.warning("not shown in the UI: the progress, which the server has not taken in %g s", patience_s)
                return
        with self._lock:
            missed, self._latest = self._latest, None
        if missed is not None:
            _ask(partial(self._send, *missed), patience_s)

    def _describe(self) -> str:
        return f"{self._told}: {self._nodes:,} nodes in {self._partitions:,} partitions so far"

    def _tell(self, progress: float, description: str) -> None:
        with self._lock:
            self._latest = progress, description
            if self._thread is None:
                self._thread = Thread(
                    target=self._context.copy().run, args=(self._drain,), name="progress", daemon=True
                )
                self._thread.start()

    def _drain(self) -> None:
        while True:
            with self._lock:
                latest, self._latest = self._latest, None
                if latest is None:
                    self._thread = None
                    return
            if not _ask(partial(self._send, *latest), 0.0, level=logging.DEBUG):
                with self._lock:
                    self._latest = self._latest or latest
                    self._thread = None
                    return  # made up for by the next update

    def _send(self, progress: float, description: str) -> None:
        if progress:
            load_drawing()  # something was embedded: there will be a picture to draw
        if self._id is None:
            made = create_progress_artifact(progress=progress, key=self._key, description=description)
            self._id = made if isinstance(made, UUID) else UUID(str(made))
        else:
            update_progress_artifact(artifact_id=self._id, progress=progress, description=description)


def publish_run(
    summary: RunSummary,
    off: Sequence[str],
    *,
    alert_spilled_fraction: float = 0.1,
    patience_s: float = PATIENCE_S,
) -> None:
    """The events, the tables and the report, at the end of a run, whether its books close or not."""
    for event in choose_run_events(summary, off, alert_spilled_fraction=alert_spilled_fraction):
        emit_event(event=event.name, resource=to_resource(summary.collection), payload=dict(event.payload))
    key = to_key(summary.collection)
    partitions = tabulate_partition_page(summary.partitions)
    shown = "Partitions of this run, and their sum"
    if partitions.left_out:
        shown += f". {partitions.left_out:,} are left out; what failed or stepped down comes before what went well"
    documents, nodes = tabulate_documents(summary.books), tabulate_nodes(summary.books)
    closed = "The books close" if not off else f"The books don't close: {'; '.join(off)}"
    picture = _draw(summary)
    memory = f"{picture}\n\n{to_markdown(tabulate_memory(summary.memory_series, summary.budget_series))}"
    report = render_report(summary, off, picture)
    _publish_all(
        [
            _table(f"partitions-{key}", shown, partitions),
            _table(f"books-{key}", closed, documents, nodes),
            _markdown(f"memory-{key}", "Memory over time against the budget", memory),
            _markdown(f"report-{key}", f"Ingest report. {closed}", report),
        ],
        instead=[partitions, documents, nodes],
        patience_s=patience_s,
    )


def publish_group(summary: RunSummary, *, patience_s: float = PATIENCE_S) -> None:
    """The tables and the picture of a worker's run; its documents are in the ingest run's books."""
    key = to_key(summary.collection)
    partitions = tabulate_partition_page(summary.partitions)
    memory = f"{_draw(summary)}\n\n{to_markdown(tabulate_memory(summary.memory_series, summary.budget_series))}"
    _publish_all(
        [
            _table(f"group-partitions-{key}", "Partitions of this worker's run, and their sum", partitions),
            _markdown(f"group-memory-{key}", "Memory over time against the budget", memory),
        ],
        instead=[partitions],
        patience_s=patience_s,
    )


def publish_ladder(collection: str, report: PartitionReport, *, patience_s: float = 0.0) -> None:
    """A table of the partition's steps, and an event for each, `ballast.ladder.<kind>`, that an automation can react to.

    The device waits for this: a server that is away is not waited for, unless told to.
    """
    if not report.steps:
        return
    for step in report.steps[:LADDER_ROWS]:
        _emit_step(collection, report.index, step)
    table = tabulate_ladder(report)
    described = f"Ladder of partition {report.index}: {describe_steps(report)}"
    if table.left_out:
        described += f". The first {LADDER_ROWS} steps of {len(report.steps):,}"
    _publish_all([_table(f"ladder-{to_key(collection)}", described, table)], instead=[table], patience_s=patience_s)


def publish_table(
    collection: str, name: str, description: str, table: Table, *, patience_s: float = PATIENCE_S
) -> None:
    """One table on a run's page, as `<name>-<collection>`."""
    _publish_all([_table(f"{name}-{to_key(collection)}", description, table)], instead=[table], patience_s=patience_s)


def publish_withheld(collection: str, decision: DeleteDecision) -> None:
    """An event that an automation can react to: somebody has to look and confirm."""
    emit_event(
        event="ballast.deletes.withheld",
        resource=to_resource(collection),
        payload={
            "documents": len(decision.withheld),
            "first": [record.doc_id for record in decision.withheld[:20]],
            "reason": decision.reason,
        },
    )


def to_key(collection: str) -> str:
    """An artifact's key holds lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", collection.lower()).strip("-") or "collection"


def to_resource(collection: str) -> dict[str, str]:
    """What all of Ballast's events are about; Prefect itself adds the flow run, its deployment and its work pool."""
    return {
        "prefect.resource.id": f"ballast.collection.{to_key(collection)}",
        "prefect.resource.name": collection,
    }


def _emit_step(collection: str, partition_index: int, step: LadderStep) -> None:
    emit_event(
        event=f"ballast.ladder.{step.kind}",
        resource=to_resource(collection),
        payload={
            "partition": partition_index,
            "reason": step.reason,
            "nodes_before": step.nodes_before,
            "nodes_after": step.nodes_after,
            "padded_tokens": step.padded_tokens,
            "budget_before_bytes": step.budget_before_bytes,
            "budget_after_bytes": step.budget_after_bytes,
            "free_bytes": step.free_bytes,
        },
    )


def _draw(summary: RunSummary) -> str:
    """The picture as Markdown: an image artifact would print its whole data URL across the page."""
    png = draw_memory(summary)
    if png is None:
        return explain_no_picture(summary)
    return f"![Memory over time, the micro-batches' budget and size]({to_data_url(png)})"


# ---------------------------------------------------------------------------------------------- artifacts


def _table(key: str, description: str, *tables: Table) -> Callable[[], object]:
    rows: list[Mapping[str, Any]] = [row for table in tables for row in to_artifact_rows(table)]
    return partial(create_table_artifact, key=key, table=[dict(row) for row in rows], description=description)


def _markdown(key: str, description: str, markdown: str) -> Callable[[], object]:
    if len(markdown) > MARKDOWN_CHARS:
        markdown = f"{markdown[:MARKDOWN_CHARS]}\n\n... cut: {len(markdown):,} characters in all. See --json."
    return partial(create_markdown_artifact, key=key, markdown=markdown, description=description)


def _publish_all(requests: Sequence[Callable[[], object]], *, instead: Sequence[Table], patience_s: float) -> None:
    """Every request, or, from the first one on that finds no server, the tables `instead` in the log."""
    if all(_ask(request, patience_s) for request in requests):
        return
    for table in instead:
        for line in to_lines(table):
            logger.info(line)


def _ask(request: Callable[[], object], patience_s: float, level: int = logging.WARNING) -> bool:
    """Whether the server took it. One that is away, or refuses it, costs the run a line in its log and nothing else."""
    try:
        ask_server(request, patience_s)
    except (ApiUnavailable, PrefectHTTPStatusError) as error:
        logger.log(level, "not shown in the UI: %s", str(error).splitlines()[0])
        return False
    return True
