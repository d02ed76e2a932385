"""Processes of ``memplan train`` as a launcher would start them, forked where everything is imported, with faults."""

import io
import json
import multiprocessing as mp
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.ranks import free_port

MODEL = """
import os, signal, time
import torch
from torch import nn

# "kill 1 12": what happens, on which rank, in which call of forward; of the first start only.
KIND, RANK, CALL = os.environ.get("FAULT", "none -1 0").split()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)))
        self.head = nn.Linear(16, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.layers[:2](x)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and os.environ.get("RANK") == RANK:
            if self.calls == int(CALL):
                fault()
        return self.head(self.layers[2:](x))


def fault():
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if KIND == "exit":
        os._exit(7)
    if KIND == "raise":
        raise ValueError("the batch is empty")
    if KIND == "sleep":
        time.sleep(600)
    if KIND == "pause":
        time.sleep(4)


def build_model():
    return Net()


def example_batch(batch_size):
    return torch.randn(batch_size, 16)


def train_batches(batch_size):
    while True:
        yield torch.randn(batch_size, 16)


def loss(output, batch):
    return (output - batch[:, :4]).square().mean()
"""
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["memplan.cli", "offload.engine", "tests.fleet"])


@dataclass
class Ended:
    """How one process ended."""

    code: int | None
    at: float
    """When, by the clock of this process."""


@dataclass
class Fleet:
    """Processes of one training in a folder with ``net.py``; nobody ends the others when one dies."""

    folder: Path
    world: int
    processes: list[mp.Process] = field(default_factory=list)

    def start(self, *words: str, fault: str = "none -1 0", **constants: float) -> "Fleet":
        """Start them; ``constants`` are those of the watchdog."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.world)}
        arguments = ["memplan", "train", "net.py", "--no-tui", *words]
        for rank in range(self.world):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "FAULT": fault}
            target = (str(self.folder), rank, own, arguments, constants)
            self.processes.append(_context.Process(target=_member, args=target))
            (self.folder / f"stderr-{rank}").write_text("")  # what a fleet before said is not this one's
        for process in self.processes:
            process.start()
        return self

    def wait(self, seconds: float = 60) -> list[Ended]:
        """When each has ended; those that have not after so many seconds are killed, and have no code."""
        found: dict[int, Ended] = {}
        until = time.time() + seconds
        while len(found) < self.world and time.time() < until:
            for rank, process in enumerate(self.processes):
                if rank not in found and process.exitcode is not None:
                    found[rank] = Ended(process.exitcode, time.time())
            time.sleep(0.02)
        for process in self.processes:
            process.kill()
            process.join()
        return [found.get(rank, Ended(None, time.time())) for rank in range(self.world)]

    def said(self, rank: int | None = None) -> str:
        """What a process, or all of them, wrote to stderr."""
        ranks = range(self.world) if rank is None else [rank]
        return "".join((self.folder / f"stderr-{r}").read_text() for r in ranks)

    def sentences(self) -> list[str]:
        """Its lines that are from memplan."""
        return [line for line in self.said().splitlines() if line.startswith("memplan: ")]


def events(run_dir: Path, rank: int = 0) -> list[dict]:
    """What a rank told."""
    name = "events.jsonl" if rank == 0 else f"events-{rank}.jsonl"
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """By step, the last of each."""
    return {e["step"]: e["loss"] for e in events(run_dir) if e["event"] == "step"}


def _member(folder: str, rank: int, environment: dict[str, str], arguments: list[str], constants: dict) -> None:
    import torch

    from memplan import cli
    from offload import watchdog

    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    for name, value in constants.items():
        setattr(watchdog, name.upper() + "_SECONDS", value)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
    sys.argv = arguments
    cli.main()
