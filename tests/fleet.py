"""Processes of ``memplan train`` as a launcher would start them, forked where everything is imported, with faults."""

import io
import json
import multiprocessing as mp
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from offload.ranks import CONNECTIONS
from tests.commands import PATHS
from tests.ranks import free_port

REPEATING = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""On a GPU, for products that are the same to the last bit every time."""

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
    run: str
    """Name of its directory there; several may train in one folder at a time."""
    processes: list[mp.Process] = field(default_factory=list)
    _ended: dict[int, Ended] = field(default_factory=dict)
    _killed: bool = False

    @property
    def run_dir(self) -> Path:
        return self.folder / self.run

    def start(self, *words: str, fault: str = "none -1 0", **constants: float) -> "Fleet":
        """Start them; ``constants`` are those of the watchdog."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(self.world)}
        common |= {**CONNECTIONS, **REPEATING, "FAULT": fault}
        arguments = ["memplan", "train", "net.py", "--no-tui", "--out", self.run, *words]
        for rank in range(self.world):
            own = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            streams = [str(self._stream(name, rank)) for name in ("stdout", "stderr")]
            target = (str(self.folder), streams, own, arguments, constants)
            self.processes.append(_context.Process(target=_member, args=target))
            self._stream("stderr", rank).write_text("")
        for process in self.processes:
            process.start()
        return self

    def running(self) -> set[int]:
        """Ranks that have not ended; of the others it is noted when they did."""
        for rank, process in enumerate(self.processes):
            if not self._killed and rank not in self._ended and process.exitcode is not None:
                self._ended[rank] = Ended(process.exitcode, time.time())
        return set(range(self.world)) - self._ended.keys()

    def wait(self, seconds: float = 60, stopped: int | None = None) -> list[Ended]:
        """When each has ended; those that have not after so many seconds are killed, and have no code.

        For a rank that is ``stopped``, nobody waits.
        """
        until = time.time() + seconds
        while self.running() - {stopped} and time.time() < until:
            time.sleep(0.02)
        self._killed = True
        for process in self.processes:
            process.kill()
            process.join()
        return [self._ended.get(rank, Ended(None, time.time())) for rank in range(self.world)]

    def said(self, rank: int | None = None) -> str:
        """What a process, or all of them, wrote to stderr."""
        ranks = range(self.world) if rank is None else [rank]
        return "".join(self._stream("stderr", r).read_text() for r in ranks)

    def sentences(self) -> list[str]:
        """Its lines that are from memplan."""
        return [line for line in self.said().splitlines() if line.startswith("memplan: ")]

    def _stream(self, name: str, rank: int) -> Path:
        return self.folder / f"{self.run}-{name}-{rank}"


def wait_for_all(fleets: Iterable[Fleet], seconds: float = 60) -> None:
    """Wait until all have ended, and note for each when it did; ``Fleet.wait`` tells then."""
    fleets, until = list(fleets), time.time() + seconds
    while [fleet for fleet in fleets if fleet.running()] and time.time() < until:
        time.sleep(0.02)


def environment(**more: str) -> dict[str, str]:
    """For processes that are to run this checkout, wherever its packages and those that it needs come from."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, **REPEATING, **more}


def events(run_dir: Path, rank: int = 0) -> list[dict]:
    """What a rank told."""
    name = "events.jsonl" if rank == 0 else f"events-{rank}.jsonl"
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    """By step, the last of each."""
    return {e["step"]: e["loss"] for e in events(run_dir) if e["event"] == "step"}


def _member(folder: str, streams: list[str], variables: dict[str, str], arguments: list[str], constants: dict) -> None:
    import torch

    from memplan import cli
    from offload import watchdog

    for name in ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_ERROR_FILE"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    os.chdir(folder)
    torch.set_num_threads(1)
    for name, value in constants.items():
        setattr(watchdog, name.upper() + "_SECONDS", value)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w"), write_through=True) for n in (1, 2))
    sys.argv = arguments
    cli.main()
