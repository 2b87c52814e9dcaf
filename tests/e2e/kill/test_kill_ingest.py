"""`kill -9` of a running ingest at any moment, then a run that nobody disturbs: the end is as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from kill_documents import prepare_model, write_documents
from killed_runs import Ended, Zygote
from places import EmbeddedPlace, Place, Reader, ServerPlace, Stored

from tasks.backends.spool import SpoolFolder

NAME = "port"
RANDOM_KILLS = 24  # of each of the two stores
AT_ONCE = 2
SEED = "ballast" if os.environ.get("CI") else os.urandom(4).hex()
PLACES: dict[str, type[Place]] = {"embedded": EmbeddedPlace, "server": ServerPlace}

# Kills that must be among those at the steps, whatever else changes: each gap of the commit, and of the deletes' end.
GAPS = {
    "< spool vectors": "embedded, not stored",
    "< ledger pending": "announced, no point touched",
    "< refresh payloads": "reused nodes of the new generation, the others of the old one",
    "< upsert": "stored, not counted",
    "< count": "counted, nothing deleted",
    "> delete old generations": "old and new points side by side",
    "< delete old generations": "deleted, the ledger still says pending",
    "< ledger done": "committed, the spool not cleared",
    "< delete gone documents": "points deleted, records still there",
    "< ledger forget": "all deletes done, books not closed",
    "> switch": "the new collection complete, the alias on the old one",
    "< switch": "switched, the run not ended",
}

Kill = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What a run is given."""

    documents: Path
    max_tokens: int


@dataclass(frozen=True, eq=False)
class Scenario:
    """What is stored when a run begins, what it is given, and how it ends where nobody disturbs it.

    `after_kill`: what the run after the kill is given.
    """

    name: str
    start: Place | None
    job: Job
    after_kill: Job
    undisturbed: Ended
    end: Place
    expected: Stored
    versions: dict[
        str, list[set[str]]
    ]  # doc_id -> node ids before and after, of the documents that are there both times

    @property
    def physical(self) -> str:
        return self.expected.aliases[NAME]


@dataclass
class Trial:
    """A run that was killed, perhaps another, and the one after them."""

    scenario: Scenario
    kills: Sequence[Kill]
    killed: list[Ended] = field(default_factory=list)
    looks: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def was_killed(self) -> bool:
        return any(ended.was_killed for ended in self.killed)

    def __str__(self) -> str:
        hit = [f"{kill} in {ended.under_way()}" for kill, ended in zip(self.kills, self.killed, strict=False)]
        return f"{self.scenario.name}, {', then '.join(hit)}: {'; '.join(self.problems[:5])}"


class Laboratory:
    """The scenarios of one store, and trials in them."""

    def __init__(self, zygote: Zygote, make_place: type[Place], folder: Path, minilm: Path) -> None:
        self._zygote = zygote
        self._make_place = make_place
        self._folder = folder
        self._numbers = itertools.count()
        self._model = prepare_model(minilm, folder / "model", folder / "empty")
        self._places: list[Place] = []
        self.scenarios: list[Scenario] = []

    def play_scenarios(self) -> None:
        """Each once, undisturbed."""
        before, after = write_documents(self._folder)
        first = self._play("first run", None, Job(before, 64))
        changed = self._play("changed documents", first, Job(after, 64))
        rebuilt = self._play("other chunking", first, Job(after, 48))
        changed_back = replace(
            changed, name="changed and changed back", after_kill=first.job, end=first.end, expected=first.expected
        )
        self.scenarios = [first, changed, rebuilt, changed_back]

    def _play(self, name: str, start: Scenario | None, job: Job) -> Scenario:
        """The scenario that begins where `start` ended."""
        place = self._open_place(start.end if start else None)
        self._places.append(place)
        undisturbed = self._run(place, job)
        assert undisturbed.status == 0, undisturbed.log
        assert undisturbed.result["off"] == []
        expected = place.read()
        was = start.expected.ids_by_document(NAME) if start else {}
        now = expected.ids_by_document(NAME)
        versions = {doc_id: [was[doc_id], now[doc_id]] for doc_id in was.keys() & now.keys()}
        return Scenario(name, start.end if start else None, job, job, undisturbed, place, expected, versions)

    def _open_place(self, start: Place | None) -> Place:
        folder = self._folder / f"data-{next(self._numbers)}"
        shutil.copytree(start.data_folder if start else self._folder / "empty", folder)
        return self._make_place(folder, start)

    def _run(self, place: Place, job: Job, kill: Kill | None = None) -> Ended:
        settings = {
            "source": {"uri": str(job.documents), "name": "harbour"},
            "chunking": {"max_tokens": job.max_tokens, "overlap_tokens": 8},
            "embedding": {"model": str(self._model)},
            "partition": {"max_nodes": 8, "max_tokens": 400},
            "qdrant": {"collection": NAME, "batch_points": 4, **place.settings},
            "data_folder": str(place.data_folder),
        }
        return self._zygote.run(settings, kill)

    def try_all(self, trials: Sequence[tuple[Scenario, Sequence[Kill]]]) -> list[Trial]:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            return list(threads.map(lambda each: self.try_kills(*each), trials))

    def try_steps(self, steps: Sequence[tuple[Scenario, str, int]]) -> list[Trial]:
        """Kill at the nth time of a step, before it (">") or after it ("<")."""
        return self.try_all([(each, [{"mark": mark, "nth": nth, "after_s": 0.0}]) for each, mark, nth in steps])

    def try_kills(self, scenario: Scenario, kills: Sequence[Kill]) -> Trial:
        """Run and kill, once a kill; then let a run end, and hold what it leaves against the undisturbed run's end."""
        trial = Trial(scenario, kills)
        place = self._open_place(scenario.start)
        reader = place.reader = Reader(NAME, scenario.versions)
        try:
            self._carry_out(trial, place)
        finally:
            place.close()
        trial.looks = reader.looks
        trial.problems += reader.holes
        return trial

    def _carry_out(self, trial: Trial, place: Place) -> None:
        scenario = trial.scenario
        for kill in trial.kills:
            trial.killed.append(self._run(place, scenario.job, kill))
            if trial.killed[-1].status > 0:
                trial.problems.append(trial.killed[-1].log)
        if not trial.was_killed:
            return
        known = set(place.read().collections.get(scenario.physical, ())) | read_spooled(place, scenario.physical)
        ended = self._run(place, scenario.after_kill)
        if ended.status != 0:
            trial.problems.append(f"the clean run ended with {ended.status}: {ended.log}")
            return
        embedded = ended.result["embedded"]
        trial.problems += [f"books: {line}" for line in ended.result["off"]]
        trial.problems += [f"{node_id} was stored, and is embedded again" for node_id in known & set(embedded)]
        if not ended.result["rows"] == len(embedded) == len(set(embedded)):
            trial.problems.append(f"{ended.result['rows']} rows embedded for {len(embedded)} nodes")
        trial.problems += place.read().list_differences(scenario.expected)

    def close(self) -> None:
        for place in self._places:
            place.close()


def read_spooled(place: Place, physical: str) -> set[str]:
    """The nodes whose vectors are in the spool."""
    found: set[str] = set()
    for folder in (place.data_folder / "spool" / physical).glob("*"):
        spool = SpoolFolder(str(folder))
        for partition in spool.list_embedded():
            kept = spool.read_vectors(partition)
            nodes = spool.read_partition(partition)
            found |= {nodes[row].node_id for row in kept[0]} if kept else set()
    return found


@pytest.fixture(scope="module", params=PLACES)
def laboratory(
    request: pytest.FixtureRequest, zygote: Zygote, minilm: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laboratory]:
    opened = Laboratory(zygote, PLACES[request.param], tmp_path_factory.mktemp(request.param), Path(minilm))
    try:
        opened.play_scenarios()
        yield opened
    finally:
        opened.close()


def report(trials: Sequence[Trial]) -> None:
    """What was hit, how often: the innermost step that was under way."""
    kills = [ended for trial in trials for ended in trial.killed if ended.was_killed]
    hit = Counter((ended.under_way() or ["between two steps"])[-1] for ended in kills)
    print(
        f"\n{len(trials)} trials, {len(kills)} kills, {sum(trial.looks for trial in trials)} looks of the reader, {SEED=}"
    )
    print("\n".join(f"{count:6d} {stage}" for stage, count in hit.most_common()))


def list_problems(trials: Sequence[Trial]) -> list[str]:
    return [f"{trial} ({SEED=})" for trial in trials if trial.problems]


def test_killed_at_random_moments(laboratory: Laboratory) -> None:
    rng = random.Random(SEED)
    done: list[Trial] = []
    while (left := RANDOM_KILLS - sum(trial.was_killed for trial in done)) > 0:
        trials = []
        for scenario in itertools.islice(itertools.cycle(laboratory.scenarios), left):
            # By the clock, or some moments after a step that was chosen at random: the clock alone hits the longest ones.
            mark, nth = choose_step(rng, scenario.undisturbed.marks)
            by_clock: Kill = {"after_s": rng.uniform(0, scenario.undisturbed.seconds)}
            by_step: Kill = {"mark": mark, "nth": nth, "after_s": rng.expovariate(200)}
            kills = rng.choice([[by_clock], [by_step], [by_step, by_clock]])  # the last: killed again while it recovers
            trials.append((scenario, kills))
        done += laboratory.try_all(trials)
    report(done)
    assert list_problems(done) == []
    assert all(trial.looks for trial in done if trial.was_killed and trial.scenario.start is not None)


def choose_step(rng: random.Random, marks: Sequence[str]) -> tuple[str, int]:
    """One of the marks, and whether it is the first, second, ... of its kind."""
    at = rng.randrange(len(marks))
    return marks[at], marks[: at + 1].count(marks[at])


def test_killed_before_and_after_every_step(laboratory: Laboratory) -> None:
    """Each step in one of the scenarios that have it, the gaps of a commit in all of them."""
    rng = random.Random(SEED)
    having: dict[str, list[Scenario]] = {}
    for scenario in laboratory.scenarios:
        for mark in dict.fromkeys(scenario.undisturbed.marks):
            if not mark.startswith("> request"):  # nothing is between it and the end of the step before
                having.setdefault(mark, []).append(scenario)
    wanted = [
        (scenario, mark)
        for mark, scenarios in having.items()
        for scenario in (scenarios if mark in GAPS else [rng.choice(scenarios)])
    ]
    # Some moment of its kind; in the changed documents also the first one, whose documents have no node in the spool.
    trials = [
        (scenario, mark, nth)
        for scenario, mark in wanted
        for nth in sorted(
            {rng.randint(1, scenario.undisturbed.marks.count(mark))}
            | ({1} if mark in GAPS and scenario.name == "changed documents" else set())
        )
    ]
    done = laboratory.try_steps(trials)
    # Steps run side by side: what came n times in one run may come less often in another. Then the first one.
    hit = {(trial.scenario, trial.kills[0]["mark"]) for trial in done if trial.was_killed}
    done += laboratory.try_steps([(*each, 1) for each in wanted if each not in hit])
    hit = {(trial.scenario, trial.kills[0]["mark"]) for trial in done if trial.was_killed}
    report(done)
    assert list_problems(done) == []
    assert GAPS.keys() <= {mark for _, mark in hit}
    assert [(scenario.name, mark) for scenario, mark in wanted if mark in GAPS and (scenario, mark) not in hit] == []
