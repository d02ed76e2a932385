"""Checkpoints of ``memplan train``: beside the steps, kept so many, and what is said when one can not be written."""

import errno
import io
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from memplan.described import find_machine
from memplan.plan_command import planned_for
from memplan.train import TrainingOptions, prepare_run, train
from offload.checkpoint import checked, found
from offload.engine import Engine
from offload.errors import CheckpointError
from offload.events import EventLog
from offload.plan import Plan
from offload.saver import Saving
from profiler.source import load_source
from tests.test_cli import GOOD, events, memplan


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A model file with data and dropout, and a plan for it on the CPU."""
    path = tmp_path_factory.mktemp("model") / "net.py"
    data = "\ndef train_batches(n):\n    while True:\n        yield example_batch(n)\n"
    path.write_text(GOOD.replace("range(12)", "range(2)") + data)
    return path, planned_for(load_source(path), find_machine(), 8, None).plan


def trained(planned: tuple[Path, Plan], run_dir: Path, last_step: int, *, resume: bool = False, every: int = 2) -> str:
    """Train in this process; returns what a person sees."""
    path, plan = planned
    said = io.StringIO()
    options = TrainingOptions(last_step, 1e-2, 1.0, 0, resume, dashboard=False, checkpoint_every=every)
    prepare_run(run_dir, resume=resume)
    assert train(load_source(path), plan, run_dir, options, Console(file=said, width=300)) == 0
    return said.getvalue()


def losses(run_dir: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in events(run_dir) if e["event"] == "step"}


def test_checkpoints_come_every_so_many_steps_the_newest_stay_and_each_is_told(planned: tuple, tmp_path: Path) -> None:
    trained(planned, tmp_path / "run", 7)
    told = [e for e in events(tmp_path / "run") if e["event"] == "checkpoint"]
    assert [e["step"] for e in told][-1] == 7
    assert {e["step"] for e in told} <= {2, 3, 4, 5, 6, 7}, "one that is due while another is written comes after it"
    assert len(told) >= 2
    kept = found(tmp_path / "run" / "checkpoints")
    assert list(kept) == [f"step-{e['step']}" for e in told[:-3:-1]]
    for path in kept.values():
        checked(path)
    assert told[-1]["bytes"] == sum(p.stat().st_size for p in kept["step-7"].iterdir() if p.name != "manifest.json")


def test_a_checkpoint_of_the_last_step_is_not_made_twice(planned: tuple, tmp_path: Path) -> None:
    trained(planned, tmp_path / "run", 2)
    assert [e["step"] for e in events(tmp_path / "run") if e["event"] == "checkpoint"] == [2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(planned: tuple, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    trained(planned, tmp_path / "undisturbed", 8, every=100)
    trained(planned, run_dir, 4, every=3)
    file = found(run_dir / "checkpoints")["step-4"] / "rank-0.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    said = trained(planned, run_dir, 8, resume=True)
    assert f"warning: {file} is damaged" in said
    assert "going on from step-3, the one before" in said
    assert any(e["event"] == "warning" and "going on from step-3" in e["message"] for e in events(run_dir))
    assert losses(run_dir) == losses(tmp_path / "undisturbed")


def test_a_full_disk_is_a_warning_and_training_goes_on(
    planned: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, real = tmp_path / "run", os.posix_fallocate

    def full_at_times(descriptor: int, offset: int, size: int) -> None:
        if "checkpoints/.step-4" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, size)

    begin = Engine.save_checkpoint

    def begin_and_end(*args: Any, **kwargs: Any) -> Saving:
        saving = begin(*args, **kwargs)
        saving.settle()  # whatever the disk's pace: each is over before the next is due
        return saving

    monkeypatch.setattr(Engine, "save_checkpoint", begin_and_end)
    monkeypatch.setattr(os, "posix_fallocate", full_at_times)
    said = trained(planned, run_dir, 7)
    assert "step-4 was not saved: No space left on device; what was there before is still there" in said
    warning = next(e for e in events(run_dir) if e["event"] == "warning")
    assert warning["step"] == 4
    assert [e["step"] for e in events(run_dir) if e["event"] == "checkpoint"] == [2, 6, 7]
    assert list(losses(run_dir)) == list(range(1, 8))
    assert list(found(run_dir / "checkpoints")) == ["step-7", "step-6"]


def test_where_the_last_one_fails_the_command_says_so(
    planned: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match="step-2 was not saved: No space left on device"):
        trained(planned, tmp_path / "run", 2)
    assert events(tmp_path / "run")[-1]["reason"] == "failed"


def test_events_that_find_no_room_are_a_warning_and_come_when_there_is_some(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    most, before = resource.getrlimit(resource.RLIMIT_FSIZE)[1], signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with EventLog(path) as log:
        log.write("note", message="first")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, most))
        try:
            with pytest.warns(
                RuntimeWarning, match=r"events.jsonl lacks events from here on: File too large; training"
            ):
                log.write("note", message="second")
            for _ in range(1000):
                log.write("note", message="more than is kept")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            signal.signal(signal.SIGXFSZ, before)
        log.write("note", message="last")
    told = [json.loads(line)["message"] for line in path.read_text().splitlines()]
    assert told[:2] == ["first", "second"]
    assert told[-1] == "last"


def test_half_a_line_of_a_killed_run_does_not_harm_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "note"}\n{"event": "st')
    with EventLog(path) as log:
        log.write("note", message="again")
    with EventLog(path) as log:
        log.write("note", message="and again")
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert [json.loads(line)["message"] for line in lines[2:]] == ["again", "and again"]


def test_export_as_a_person_runs_it(planned: tuple, tmp_path: Path) -> None:
    trained(planned, tmp_path / "run", 1)
    done = memplan("export", "run", "--out", "folder", "--dtype", "bf16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("written: folder (1 file, ")
    assert done.stdout.rstrip().endswith("in bf16, of step-1)")
    again = memplan("export", "run", "--out", "folder", folder=tmp_path)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    none = memplan("export", ".", "--out", "other", folder=tmp_path)
    assert none.returncode == 2
    assert "there is no checkpoint in ." in none.stderr
