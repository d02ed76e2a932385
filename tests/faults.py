"""Trainings in which one rank fails, and what must come of each: over gloo, and over NCCL, alike."""

import re
import subprocess
import sys
import time
from pathlib import Path

from tests.fleet import Fleet, environment, events, losses

SOON_SECONDS = 30
LEAVE = 1.0
STEPS, EVERY = 24, 3
"""Of a training that is started again, and between its checkpoints."""
RESTARTING = ["--nproc", "2", "--max-restarts", "1"]


def faulty(folder: Path, world: int, fault: str, stage: int = 3, timeout: float = 60, **constants: float) -> Fleet:
    """A training by the plan ``stage-N.json`` that would not end by itself, but for its fault."""
    words = ["--plan", f"stage-{stage}.json", "--steps", "100000", "--collective-timeout", str(timeout)]
    fleet = Fleet(folder, world, f"{fault.replace(' ', '-')}-stage-{stage}")
    return fleet.start(*words, fault=fault, **{"leave": LEAVE, **constants})


def the_sentence(fleet: Fleet) -> str:
    """The only one that all of its ranks say."""
    said = fleet.sentences()
    assert len(said) == 1, f"{said} in\n{fleet.said()}"
    print(f"{fleet.run}: {said[0]}")
    return said[0]


def assert_death_ends_all(fleet: Fleet, culprit: int, sentence: str) -> None:
    """The others end soon, by themselves, and the sentence says which rank it was."""
    ended, others = fleet.wait(), set(range(fleet.world)) - {culprit}
    said = the_sentence(fleet)
    assert re.match(f"memplan: {sentence}", said), said
    assert all(e.code for e in ended), f"none of them says that all is well, or goes on: {ended}\n{fleet.said()}"
    seconds = max(ended[rank].at for rank in others) - ended[culprit].at
    assert seconds < SOON_SECONDS, seconds
    for rank in others:
        end = events(fleet.run_dir, rank)[-1]
        assert (end["event"], end.get("reason"), end.get("rank")) == ("end", "failed", culprit), end
    assert len(re.findall("Traceback", fleet.said())) <= 1, f"the lines of the person's own file\n{fleet.said()}"


def assert_hang_ends_all(fleet: Fleet, culprit: int, where: str, seconds: str, timeout: float) -> None:
    """In step 12; ``where`` is the collective that the others are in, and ``seconds`` for how long they may be."""
    ended, others = fleet.wait(), [rank for rank in range(fleet.world) if rank != culprit]
    wait = f"ranks {', '.join(map(str, others))} wait" if len(others) > 1 else f"rank {others[0]} waits"
    said = the_sentence(fleet)
    named = rf"memplan: rank {culprit} \(\S+\) has not entered '{where}' for {seconds} s, where {wait}"
    assert re.match(named, said), said
    assert "it is at net.py:" in said, f"the line that hangs: {said}"
    codes = [e.code for e in ended]
    assert codes == [1] * fleet.world, f"the one that hangs ends, too: {codes}\n{fleet.said()}"
    last_step = [e["time"] for e in events(fleet.run_dir, others[0]) if e["event"] == "step"][-1]
    assert max(e.at for e in ended) - last_step < timeout + SOON_SECONDS
    waits = [e for e in events(fleet.run_dir, others[0]) if e["event"] == "waiting"]
    assert waits, "whoever watches the run sees it"
    assert waits[-1]["step"] == 12


def assert_silence_ends_all(fleet: Fleet, stopped: int, name: str, seconds: int) -> None:
    """It can not end by itself, and nobody else ends it."""
    until = time.time() + 60
    while not fleet.sentences() and time.time() < until:
        time.sleep(0.1)
    codes = [e.code for e in fleet.wait(SOON_SECONDS, stopped)]
    said = the_sentence(fleet)
    assert re.match(rf"memplan: {name} is silent for {seconds} s", said), said
    assert codes == [None if rank == stopped else 1 for rank in range(fleet.world)], f"{codes}\n{fleet.said()}"


def restarting(folder: Path, run: str, fault: str, before: list[str], after: list[str]) -> subprocess.Popen[bytes]:
    """``memplan train`` by stage-3.json, with what starts it; what it says on stderr is in ``RUN-stderr``."""
    words = ["--plan", "stage-3.json", "--steps", str(STEPS), "--checkpoint-every", str(EVERY), "--out", run]
    command = [sys.executable, *before, "train", "net.py", "--no-tui", *words, *after]
    with (folder / f"{run}-stdout").open("w") as stdout, (folder / f"{run}-stderr").open("w") as stderr:
        return subprocess.Popen(command, cwd=folder, env=environment(FAULT=fault), stdout=stdout, stderr=stderr)


def undisturbed(folder: Path) -> Fleet:
    """The same training, and nothing happens in it."""
    return Fleet(folder, 2, "undisturbed").start("--plan", "stage-3.json", "--steps", str(STEPS))


def assert_went_on(folder: Path, run: str, process: subprocess.Popen[bytes], rank: int, step: int) -> list[str]:
    """Started again once, from the last checkpoint, to the losses of ``undisturbed``; gives what it said of itself."""
    try:
        code = process.wait(200)
    finally:
        process.terminate()  # and with it its processes
    errors = (folder / f"{run}-stderr").read_text()
    assert code == 0, errors
    assert losses(folder / run) == losses(folder / "undisturbed"), (rank, step)
    starts = [e for e in events(folder / run) if e["event"] == "run"]
    assert len(starts) == 2, (rank, step)
    # A checkpoint is on the disk when the next one begins.
    assert max(1, (step - 1) // EVERY * EVERY - EVERY + 1) <= starts[1]["first_step"] <= step
    assert starts[0]["session"] != starts[1]["session"]
    return [line for line in errors.splitlines() if line.startswith("memplan: ")]


def assert_memplan_said(said: list[str], errors: str, rank: int) -> None:
    """What its own launcher says of the rank that was killed."""
    assert re.fullmatch(rf"memplan: rank {rank} \(\S+\) was ended by SIGKILL, as .*", said[0]), errors
    assert said[1:] == ["memplan: starting again from the last checkpoint, 1 of 1 times"], errors
    assert "Traceback" not in errors, errors
