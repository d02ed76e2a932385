"""Training whose processes are started again goes on from the last checkpoint, to the losses of an undisturbed one."""

import functools
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from memplan.cli import app
from memplan.described import find_machine
from memplan.plan_command import planned_for
from memplan.train import prepare_run
from offload.errors import PlanError
from profiler.source import load_source
from tests.faults import EVERY, RESTARTING, STEPS, assert_memplan_said, assert_went_on, restarting, undisturbed
from tests.fleet import MODEL, environment, losses
from tests.ranks import free_port

LAUNCHERS = {
    "memplan": (["-m", "memplan"], RESTARTING),
    "torchrun": (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "memplan"],
        [],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, a plan for two ranks, and an undisturbed run."""
    path = tmp_path_factory.mktemp("restarts")
    (path / "net.py").write_text(MODEL)
    plan = planned_for(load_source(path / "net.py"), replace(find_machine(), gpus=2), 4, None).plan
    whole = plan.budget.gpu_bytes  # parts of another stage are padded otherwise
    prediction = replace(plan.prediction, gpu_peak_bytes=whole, gpu_upper_bytes=whole)
    replace(plan, zero_stage=3, prediction=prediction).save(path / "stage-3.json")
    fleet = undisturbed(path)
    assert [e.code for e in fleet.wait()] == [0, 0], fleet.said()
    return path


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_killed_in_any_step_changes_no_loss(launcher: str, folder: Path) -> None:
    moment = random.Random()
    rank, step = moment.randrange(2), moment.randrange(1, STEPS)
    process = restarting(folder, launcher, f"kill {rank} {step}", *LAUNCHERS[launcher])
    said = assert_went_on(folder, launcher, process, rank, step)
    if launcher == "memplan":
        assert_memplan_said(said, (folder / "memplan-stderr").read_text(), rank)
    else:
        assert [re.sub(r"\(.*", "", line) for line in said] == [f"memplan: rank {rank} "]


@pytest.mark.full
def test_nodes_go_on_together_though_only_one_of_them_counts_the_restart(folder: Path) -> None:
    words = ["--plan", "stage-3.json", "--steps", str(STEPS), "--out", "nodes", "--checkpoint-every", str(EVERY)]
    agent = [f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-backend=c10d", "--rdzv-id=nodes", "--nnodes=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *agent, "--nproc-per-node=1", "--max-restarts=1"]
    start = functools.partial(
        subprocess.Popen, cwd=folder, env=environment(FAULT="kill 1 11"), stderr=subprocess.PIPE, text=True
    )
    nodes = [start([*command, "-m", "memplan", "train", "net.py", "--no-tui", *words]) for _ in range(2)]
    errors = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    assert losses(folder / "nodes") == losses(folder / "undisturbed")
    said = [line for text in errors for line in text.splitlines() if line.startswith("memplan: ")]
    assert len(said) == 1
    assert said[0].startswith("memplan: rank 1 ")


def test_a_run_that_may_be_started_again_must_have_a_name(folder: Path) -> None:
    done = CliRunner().invoke(app, ["train", str(folder / "net.py"), "--nproc", "2", "--max-restarts", "1"])
    assert isinstance(done.exception, PlanError)
    assert str(done.exception) == "with --max-restarts, name the run by --out: what is started again must find it"


@pytest.mark.full
def test_ctrl_c_ends_all_processes_after_the_step_with_a_checkpoint(folder: Path) -> None:
    words = ["--plan", "stage-3.json", "--steps", "1000000", "--out", "interrupted", "--nproc", "2"]
    command = [sys.executable, "-m", "memplan", "train", "net.py", "--no-tui", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment(), start_new_session=True, **pipes)
    until = time.time() + 100
    while '"step"' not in (log.read_text() if (log := folder / "interrupted" / "events.jsonl").exists() else ""):
        assert time.time() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")
    assert re.search(r"interrupted at step \d+", said)
    assert len(list((folder / "interrupted" / "checkpoints").glob("step-*"))) == 1


def test_sigterm_for_the_launcher_ends_all_and_starts_nothing_again(folder: Path) -> None:
    words = ["--plan", "stage-3.json", "--steps", "1000000", "--out", "ended", "--nproc", "2", "--max-restarts", "3"]
    command = [sys.executable, "-m", "memplan", "train", "net.py", "--no-tui", *words]
    process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True)
    until = time.time() + 100
    while '"step"' not in (log.read_text() if (log := folder / "ended" / "events.jsonl").exists() else ""):
        assert time.time() < until
        time.sleep(0.05)
    process.terminate()
    try:
        errors = process.communicate(timeout=20)[1]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    said = [line for line in errors.splitlines() if line.startswith("memplan: ")]
    assert said == ["memplan: the launcher was ended by SIGTERM"]


def test_what_was_ended_before_it_had_a_directory_begins_anew(tmp_path: Path) -> None:
    assert not prepare_run(tmp_path / "runs" / "early", resume=False, restarted=True)
    assert (tmp_path / "runs" / "early").is_dir()
