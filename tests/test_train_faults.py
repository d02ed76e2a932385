"""Ranks that die or hang: the others end soon, by themselves, and one sentence says which rank it was, and where."""

from dataclasses import replace
from pathlib import Path

import pytest

from memplan.described import find_machine
from memplan.plan_command import planned_for
from profiler.source import load_source
from tests.faults import assert_death_ends_all, assert_hang_ends_all, assert_silence_ends_all, faulty
from tests.fleet import MODEL, Fleet, events

WORLD = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model and plans for three ranks, by ZeRO's stage."""
    path = tmp_path_factory.mktemp("faults")
    (path / "net.py").write_text(MODEL)
    plan = planned_for(load_source(path / "net.py"), replace(find_machine(), gpus=WORLD), 6, None).plan
    for stage in (0, 1, 3):
        replace(plan, zero_stage=stage).save(path / f"stage-{stage}.json")
    return path


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
    assert_death_ends_all(faulty(folder, WORLD, fault, grace=0.5), int(fault.split()[1]), sentence)


def test_the_first_rank_takes_the_store_with_it_and_the_others_end_all_the_same(folder: Path) -> None:
    assert_death_ends_all(faulty(folder, WORLD, "kill 0 12", grace=0.5), 0, r"rank 0 \(127.0.0.1\) is gone")


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
    fleet = faulty(folder, WORLD, "sleep 1 12", stage, timeout=3)
    assert_hang_ends_all(fleet, 1, where, "[34]", timeout=3)


@pytest.mark.parametrize(
    ("rank", "name"),
    [(0, r"rank 0 \(127.0.0.1\)"), pytest.param(2, r"rank 2 \(\S+\)", marks=pytest.mark.full)],
)
def test_a_process_that_is_stopped_is_known_by_its_silence(rank: int, name: str, folder: Path) -> None:
    """Rank 0 has the store, so then nobody can be asked."""
    assert_silence_ends_all(faulty(folder, WORLD, f"stop {rank} 12", silent=4), rank, name, 4)


def test_a_rank_that_is_slow_for_less_than_the_timeout_is_waited_for(folder: Path) -> None:
    words = ["--plan", "stage-3.json", "--steps", "14", "--collective-timeout", "30"]
    fleet = Fleet(folder, WORLD, "slow").start(*words, fault="pause 1 12", silent=4)
    assert [e.code for e in fleet.wait()] == [0, 0, 0], fleet.said()
    assert fleet.sentences() == []
    steps = {rank: [e for e in events(folder / "slow", rank) if e["event"] == "step"] for rank in range(WORLD)}
    waited = {rank: steps[rank][11]["waited_seconds"] for rank in range(WORLD)}
    assert waited[1] < 2 < min(waited[0], waited[2]), "who waits, and who is waited for, is in the events"
