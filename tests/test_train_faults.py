"""Ranks that die or hang: the others end soon, by themselves, and one sentence says which rank it was, and where."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from memplan.described import find_machine
from memplan.plan_command import planned_for
from profiler.source import load_source
from tests.fleet import MODEL, Fleet, events

SOON_SECONDS = 30
LEAVE = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and plans for three ranks, by ZeRO's stage."""
    path = tmp_path_factory.mktemp("faults")
    (path / "net.py").write_text(MODEL)
    plan = planned_for(load_source(path / "net.py"), replace(find_machine(), gpus=3), 6, None).plan
    for stage in (0, 1, 3):
        replace(plan, zero_stage=stage).save(path / f"stage-{stage}.json")
    return path


def faulty(folder: Path, fault: str, run: str, stage: int = 3, timeout: float = 60, **constants: float) -> Fleet:
    words = ["--plan", f"stage-{stage}.json", "--steps", "100000", "--out", run]
    fleet = Fleet(folder, 3)
    return fleet.start(*words, "--collective-timeout", str(timeout), fault=fault, leave=LEAVE, **constants)


def last_step_at(run_dir: Path, rank: int = 0) -> float:
    return [e["time"] for e in events(run_dir, rank) if e["event"] == "step"][-1]


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("kill 1 12", r"rank 1 \(\S+\) is gone: process \d+ ended without a word"),
        pytest.param("exit 2 12", r"rank 2 \(\S+\) is gone: process \d+ ended without a word", marks=pytest.mark.full),
        ("raise 1 12", r"rank 1 \(\S+\): training failed in step 12: ValueError: the batch is empty"),
        pytest.param(
            "raise 0 1",
            r"rank 0 \(\S+\): training failed in step 1: ValueError: the batch is empty",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_rank_that_dies_ends_the_others_and_one_sentence_names_it(fault: str, sentence: str, folder: Path) -> None:
    run = fault.replace(" ", "-")
    fleet = faulty(folder, fault, run, grace=0.5)
    ended = fleet.wait()
    culprit = int(fault.split()[1])
    (said,) = fleet.sentences()
    assert re.match(f"memplan: {sentence}", said)
    others = [e for rank, e in enumerate(ended) if rank != culprit]
    assert all(e.code for e in ended), "none of them says that all is well"
    assert max(e.at for e in others) - ended[culprit].at < SOON_SECONDS
    for rank in {0, 1, 2} - {culprit}:
        end = events(folder / run, rank)[-1]
        assert (end["event"], end["reason"], end["rank"]) == ("end", "failed", culprit)
    assert len(re.findall("Traceback", fleet.said())) <= 1, "the lines of the person's own file"


def test_the_first_rank_takes_the_store_with_it_and_the_others_end_all_the_same(folder: Path) -> None:
    fleet = faulty(folder, "kill 0 12", "kill-0", grace=0.5)
    ended = fleet.wait()
    (said,) = fleet.sentences()
    assert re.match(r"memplan: rank 0 \(127.0.0.1\) is gone", said)
    assert max(e.at for e in ended) - ended[0].at < SOON_SECONDS
    assert all(e.code for e in ended)


@pytest.mark.parametrize(
    ("stage", "where"),
    [
        (3, r"gather of \S+ of step 12"),
        pytest.param(0, r"(reduce of|agreement on) .* of step 12", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_hangs_is_named_with_the_collective_that_the_others_are_in(
    stage: int, where: str, folder: Path
) -> None:
    run = f"sleep-{stage}"
    fleet = faulty(folder, "sleep 1 12", run, stage, timeout=3)
    ended = fleet.wait()
    (said,) = fleet.sentences()
    assert re.match(rf"memplan: rank 1 \(\S+\) has not entered '{where}' for [34] s, where ranks 0, 2 wait", said)
    assert "it is at net.py:" in said, "the line that hangs"
    assert [e.code for e in ended] == [1, 1, 1], "the one that hangs ends, too"
    assert max(e.at for e in ended) - last_step_at(folder / run) < 3 + SOON_SECONDS
    waits = [e for e in events(folder / run) if e["event"] == "waiting"]
    assert waits
    assert {e["step"] for e in waits} == {12}


@pytest.mark.parametrize(
    ("rank", "name"),
    [(0, r"rank 0 \(127.0.0.1\)"), pytest.param(2, r"rank 2 \(\S+\)", marks=pytest.mark.full)],
)
def test_a_process_that_is_stopped_is_known_by_its_silence(rank: int, name: str, folder: Path) -> None:
    """Rank 0 has the store, so then nobody can be asked."""
    fleet = faulty(folder, f"stop {rank} 12", f"stop-{rank}", silent=4)
    until = time.time() + 60
    while not fleet.sentences() and time.time() < until:
        time.sleep(0.1)
    ended = fleet.wait(8)
    (said,) = fleet.sentences()
    assert re.match(rf"memplan: {name} is silent for 4 s", said)
    assert [e.code for e in ended] == [None if r == rank else 1 for r in range(3)]


def test_a_rank_that_is_slow_for_less_than_the_timeout_is_waited_for(folder: Path) -> None:
    words = ["--plan", "stage-3.json", "--steps", "14", "--out", "slow", "--collective-timeout", "30"]
    fleet = Fleet(folder, 3).start(*words, fault="pause 1 12", silent=4)
    assert [e.code for e in fleet.wait()] == [0, 0, 0], fleet.said()
    assert fleet.sentences() == []
    steps = {rank: [e for e in events(folder / "slow", rank) if e["event"] == "step"] for rank in range(3)}
    waited = {rank: steps[rank][11]["waited_seconds"] for rank in range(3)}
    assert waited[1] < 2 < min(waited[0], waited[2]), "who waits, and who is waited for, is in the events"
