"""The verify flow through its front door: real Prefect API, real model, embedded Qdrant."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config import IngestSettings
from tasks.records import VerifyReport

pytestmark = pytest.mark.usefixtures("prefect_api")

TEXT = "The pilot boards {} miles before the breakwater, and two tugs are required above {} thousand tonnes. "


def make_settings(folder: Path, **values: Any) -> IngestSettings:
    return IngestSettings.model_validate(
        {
            "source": str(folder / "docs"),
            "qdrant": {"collection": "port"},
            "data_folder": str(folder / "data"),
            **values,
        }
    )


def run_verify(settings: IngestSettings, **parameters: bool) -> tuple[Any, VerifyReport | None]:
    from flows.progress import RunObserver
    from flows.verify import verify
    from tasks.observe import observing

    observer = RunObserver()
    with observing(observer):
        state = verify(settings, **parameters, return_state=True)
    return state, observer.verified


def read_table(state: Any) -> list[dict[str, str]]:
    """The findings' table artifact of this flow run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        run_filter = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
        (artifact,) = client.read_artifacts(artifact_filter=run_filter)
    assert artifact.key == "verify-port"
    table: list[dict[str, str]] = json.loads(str(artifact.data))
    return table


@pytest.fixture(scope="module")
def port(prefect_api: str, minilm: str, tmp_path_factory: pytest.TempPathFactory) -> IngestSettings:
    """A collection with settings of its own; what is returned knows only its name and where the documents are."""
    from flows.ingest import ingest

    folder = tmp_path_factory.mktemp("verify")
    (folder / "docs").mkdir()
    for name in "abc":
        text = "".join(TEXT.format(number, 10 * number) for number in range(30))
        (folder / "docs" / f"{name}.txt").write_text(f"Rules of berth {name}. {text}")
    embedding = {"model": minilm, "device": "cpu"}
    made = make_settings(folder, embedding=embedding, chunking={"max_tokens": 100, "workers": 1})
    assert ingest(made, return_state=True).is_completed()
    return make_settings(folder, embedding={"device": "cpu"}, chunking={"workers": 1})


def delete_some(settings: IngestSettings) -> int:
    from tasks.backends.qdrant import open_store

    store = open_store(settings.qdrant, settings.data_folder, environment={})
    try:
        (state,) = store.list_physical("port")
        ids = [point_id for page in store.scroll_points(state.physical, with_vectors=False) for point_id in page.ids]
        store.delete_points(state.physical, ids[::10])
        return len(ids)
    finally:
        store.close()


def test_what_differs_is_red_and_a_repair_makes_it_green(port: IngestSettings) -> None:
    state, report = run_verify(port)
    assert state.is_completed(), state.message
    assert report is not None
    assert report.is_clean
    assert read_table(state)[0]["found"] == "0"

    before = delete_some(port)
    state, report = run_verify(port)
    assert (state.is_failed(), state.name) == (True, "CollectionDiffers")
    assert report is not None
    assert {finding.kind for finding in report.left} == {"missing_points"}
    assert {row["what is off"] for row in read_table(state)} == {"missing_points"}
    assert f"{len(report.left)} left (missing_points)" in state.message

    state, repaired = run_verify(port, repair=True)
    assert state.is_completed(), state.message
    assert repaired is not None
    assert len(repaired.repaired) == len(report.left)
    assert repaired.points == before
    assert {row["repaired"] for row in read_table(state)} == {"yes"}


def test_without_a_source_the_ledger_alone_is_compared(port: IngestSettings, tmp_path: Path) -> None:
    elsewhere = port.model_copy(update={"source": port.source.model_copy(update={"uri": str(tmp_path / "gone")})})
    state, report = run_verify(elsewhere, with_source=False)
    assert state.is_completed(), state.message
    assert report is not None
    assert (report.source, report.documents) == ("", 3)
