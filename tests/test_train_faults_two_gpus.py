"""Ranks that die or hang over NCCL, a process for each of two GPUs: as in test_train_faults.py, where devices wait.

A rank's host does not wait in NCCL: its device does, in a kernel that nobody can call back. The host has given it all
of the step behind that, and waits in the agreement on the gradients, which is on the host; what is said is where the
device is. Several trainings go on at a time, for starting one takes long; each test looks at its own.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.native import native_update
from profiler.source import load_source
from tests.faults import (
    RESTARTING,
    assert_death_ends_all,
    assert_hang_ends_all,
    assert_memplan_said,
    assert_silence_ends_all,
    assert_went_on,
    faulty,
    restarting,
    undisturbed,
)
from tests.fleet import MODEL, Fleet, wait_for_all
from tests.plans import RESIDENT, H, counted, plan_for

WORLD = 2
UNITS = (*(f"layers.{i}" for i in range(4)), "head")
PLACEMENTS = {0: RESIDENT, 3: (H, H, H)}
"""By ZeRO's stage: where all units are."""
DEATHS = {
    "kill 1 12": r"rank 1 \(\S+\) is gone: process \d+ ended without a word",
    "kill 0 12": r"rank 0 \(127.0.0.1\) is gone",
    # By itself, or where its communicators wait for those of the other rank until it has left: by its watchdog.
    "raise 1 12": r"rank 1 \(\S+\)(: | failed: )training failed in step 12: ValueError: the batch is empty",
}
HANG = "sleep 1 12"
HANGS = {0: r"reduce of head of step 12", 3: r"gather of \S+ of step 12"}
"""By ZeRO's stage: the first collective that the rank has not entered."""
TIMEOUT = 5.0
SILENT = 6
KILLED, AT_STEP = 1, 11

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(150),
    pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="fewer than two CUDA devices"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, and a plan for each stage."""
    path = tmp_path_factory.mktemp("faults")
    (path / "net.py").write_text(MODEL)
    model = load_source(path / "net.py").build()
    for stage, placement in PLACEMENTS.items():
        changes = {"gpus": WORLD, "zero_stage": stage, "micro_batch_size": 2}
        plan = plan_for(model, (placement,), device="cuda", units=UNITS, **changes)
        counted(plan, model).save(path / f"stage-{stage}.json")
    native_update()  # compiled once for all, so that nobody waits for who has to do it
    return path


@pytest.fixture(scope="module", autouse=True)
def restarted(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training whose rank is killed, and its launcher; begun before all others, for it starts twice."""
    process = restarting(folder, "restarted", f"kill {KILLED} {AT_STEP}", ["-m", "memplan"], RESTARTING)
    yield process
    process.terminate()  # and so its processes
    process.wait(30)


@pytest.fixture(scope="module", autouse=True)
def calm(folder: Path) -> Iterator[Fleet]:
    """A training in which nothing happens."""
    fleet = undisturbed(folder)
    yield fleet
    fleet.wait(0)


@pytest.fixture(scope="module")
def dying(folder: Path) -> Iterator[dict[str, Fleet]]:
    """Trainings that have ended by the death of a rank."""
    # Who raises gives NCCL back, which waits for the others to leave.
    yield from until_ended({fault: faulty(folder, WORLD, fault, grace=0.5, leave=2.0) for fault in DEATHS})


@pytest.fixture(scope="module")
def stopping(folder: Path) -> Iterator[Fleet]:
    """A training of which a rank stops."""
    fleet = faulty(folder, WORLD, "stop 1 12", silent=SILENT)
    yield fleet
    fleet.wait(0)


@pytest.fixture(scope="module")
def hanging(folder: Path, stopping: Fleet) -> Iterator[dict[int, Fleet]]:
    """Trainings that have ended because a rank hung; ``stopping`` goes on meanwhile."""
    yield from until_ended({stage: faulty(folder, WORLD, HANG, stage, TIMEOUT) for stage in HANGS})


def until_ended(fleets: dict[Any, Fleet]) -> Iterator[dict[Any, Fleet]]:
    try:
        wait_for_all(fleets.values(), 90)
        yield fleets
    finally:
        for fleet in fleets.values():
            fleet.wait(0)


@pytest.mark.parametrize("fault", DEATHS)
def test_a_rank_that_dies_ends_the_other_though_its_device_waits(fault: str, dying: dict[str, Fleet]) -> None:
    assert_death_ends_all(dying[fault], int(fault.split()[1]), DEATHS[fault])


@pytest.mark.parametrize("stage", HANGS)
def test_a_rank_that_hangs_is_named_with_the_collective_that_the_others_device_is_in(
    stage: int, hanging: dict[int, Fleet]
) -> None:
    # A device is asked once a second, and counts as waiting since the first time after it has done the one before.
    assert_hang_ends_all(hanging[stage], 1, HANGS[stage], "[3-8]", TIMEOUT)


def test_a_process_that_is_stopped_is_known_by_its_silence(stopping: Fleet) -> None:
    assert_silence_ends_all(stopping, 1, r"rank 1 \(\S+\)", SILENT)


def test_a_rank_that_is_killed_changes_no_loss_of_a_training_that_starts_again(
    folder: Path, calm: Fleet, restarted: subprocess.Popen[bytes]
) -> None:
    assert [e.code for e in calm.wait()] == [0] * WORLD, calm.said()
    said = assert_went_on(folder, "restarted", restarted, KILLED, AT_STEP)
    assert_memplan_said(said, (folder / "restarted-stderr").read_text(), KILLED)
