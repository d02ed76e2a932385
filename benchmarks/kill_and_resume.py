"""Training that is killed at random moments, while it saves in the background, and resumed each time.

    python -m benchmarks.kill_and_resume --times 200

A small model with dropout is trained on the CPU in fp32, its state in all three tiers, with a checkpoint every other
step. SIGKILL comes at a moment that a seeded generator chooses, for four of five processes from the first step on, for
the others from their start, so that they are killed while they resume too; the next process resumes. Every load must
be of a whole checkpoint, and every loss that any of them wrote must be the one that a run nobody disturbed had in that
step, to the last bit. Ends with 1 where one is not.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.common import host
from memplan.described import find_machine
from memplan.plan_command import planned_for
from memplan.train import TrainingOptions, prepare_run, train
from offload.checkpoint import found
from offload.plan import Plan
from profiler.source import load_source

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True) for _ in range(6))
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 50)
    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x.mT).mT)

def build_model():
    return Net()

def example_batch(batch_size):
    return torch.randint(0, 50, (batch_size, 12))

def train_batches(batch_size):
    while True:
        yield example_batch(batch_size)

def loss(outputs, batch):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), batch.flatten())
"""
STEPS, EVERY = 30, 2
FROM_FIRST_STEP = 0.8
TIERS = {"gpu_memory": "3MiB", "host_memory": "2MiB"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=200, help="Loads of a checkpoint after a kill.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill-and-resume.json")
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memplan-killed-") as folder:
        result = Killer(Path(folder), random.Random(wishes.seed)).run(wishes.times)
    wishes.out.write_text(json.dumps({"benchmark": "kill and resume", "machine": host(), **result}, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bool(result["other_losses"] or result["damaged"]))


class Killer:
    """Runs of one model and plan in a folder, each process a fork of this one, which never computes."""

    def __init__(self, folder: Path, moments: random.Random) -> None:
        self._folder, self._moments = folder, moments
        self._counts: Counter[str] = Counter()
        (folder / "swap").mkdir()
        (folder / "net.py").write_text(MODEL)

    def run(self, times: int) -> dict[str, Any]:
        """Until so many checkpoints were loaded after a kill."""
        began = time.perf_counter()
        self._whole(self._make_plan)
        self._whole(lambda: self._train(self._folder / "undisturbed", resume=False))
        events = _events(self._folder / "undisturbed")
        seconds = events[-1]["time"] - events[0]["time"]
        expected = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
        assert len(expected) == STEPS
        while self._counts["loads"] < times:
            self._one_run(self._folder / f"run-{self._counts['runs']}", seconds, expected, times)
            self._counts["runs"] += 1
        names = ("loads", "kills", "kills_while_saving", "kills_before_a_checkpoint", "runs", "steps_compared")
        figures = {name: self._counts[name] for name in (*names, "other_losses", "damaged")}
        tiers = {t for p in self._plan().placements for t in (p.parameters, p.optimizer)}
        facts = {"steps_of_a_run": STEPS, "checkpoint_every": EVERY, "tiers": sorted(tiers)}
        return {**figures, **facts, "undisturbed_seconds": seconds, "seconds": time.perf_counter() - began}

    def _one_run(self, run_dir: Path, seconds: float, expected: dict[int, float], times: int) -> None:
        """Kill and resume a run until it ends by itself, or was killed before it had a checkpoint."""
        resume, ended = False, False
        while not ended and self._counts["loads"] < times:
            before, began = _starts(run_dir), time.time()
            process = _forked(lambda resume=resume: self._train(run_dir, resume))
            if self._moments.random() < FROM_FIRST_STEP:
                while process.is_alive() and _starts(run_dir) == before:
                    time.sleep(0.005)
            process.join(self._moments.uniform(0, seconds))
            ended = process.exitcode is not None
            if not ended:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                self._counts["kills"] += 1
                left = (run_dir / "checkpoints").glob(".*.partial")
                self._counts["kills_while_saving"] += any(p.stat().st_mtime > began for p in left)
            elif process.exitcode:
                raise SystemExit("a run failed by itself; what it said is above")
            self._counts["loads"] += _starts(run_dir) - before if resume else 0
            resume = bool(found(run_dir / "checkpoints"))
            if not ended and not resume:
                self._counts["kills_before_a_checkpoint"] += 1
                break
        for event in _events(run_dir):
            if event["event"] == "step":
                self._counts["steps_compared"] += 1
                self._counts["other_losses"] += event["loss"] != expected[event["step"]]
            self._counts["damaged"] += event["event"] == "warning"

    def _whole(self, work: Callable[[], None]) -> None:
        """In a process of its own."""
        process = _forked(work)
        process.join()
        if process.exitcode:
            raise SystemExit("it failed without being disturbed; what it said is above")

    def _make_plan(self) -> None:
        machine = find_machine(**TIERS, nvme=f"{self._folder / 'swap'}:64MiB")
        planned_for(load_source(self._folder / "net.py"), machine, 8, None).plan.save(self._folder / "plan.json")

    def _plan(self) -> Plan:
        return Plan.load(self._folder / "plan.json")

    def _train(self, run_dir: Path, resume: bool) -> None:
        torch.set_num_threads(1)
        options = TrainingOptions(STEPS, 1e-2, 1.0, 0, resume, dashboard=False, checkpoint_every=EVERY)
        prepare_run(run_dir, resume=resume)
        train(load_source(self._folder / "net.py"), self._plan(), run_dir, options, Console(file=io.StringIO()))


def _forked(work: Callable[[], None]) -> Any:
    def guarded() -> None:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - said here, for nobody else is in this process
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=guarded)
    process.start()
    return process


def _events(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines; a killed process leaves half of one."""
    path, events = run_dir / "events.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def _starts(run_dir: Path) -> int:
    """Processes that got as far as their first step; what they resume from is loaded then."""
    return sum(e["event"] == "run" for e in _events(run_dir))


if __name__ == "__main__":
    sys.exit(main())
