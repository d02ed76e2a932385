"""Processes of one training: how this one came to be, and how several are started on this machine.

torchrun, and Kubernetes' PyTorchJob as it, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm sets
names of its own, which are read where those are missing.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from memplan.errors import LaunchError
from offload.ranks import TIMEOUT

SLURM_PORTS = 15000, 20000
"""Between which the port of a Slurm job is, by its number: every process finds the same one."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    master: str = "127.0.0.1"
    port: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> "Place":
        """From the environment; alone where it says nothing. Raises LaunchError where it contradicts itself."""
        if "RANK" in environment or "WORLD_SIZE" in environment:
            names = {"rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "port": "MASTER_PORT"}
            place = cls(**_numbers(environment, names), master=_text(environment, "MASTER_ADDR"))
        elif int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
            names = {"rank": "SLURM_PROCID", "world": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"}
            first, last = SLURM_PORTS
            port = int(
                environment.get("MASTER_PORT", first + int(environment.get("SLURM_JOB_ID", "0")) % (last - first))
            )
            master = environment.get("MASTER_ADDR") or _text(environment, "SLURM_LAUNCH_NODE_IPADDR")
            place = cls(**_numbers(environment, names), master=master, port=port)
        else:
            return cls()
        if not 0 <= place.rank < place.world or not 0 <= place.local_rank < place.world:
            raise LaunchError(
                f"the environment says rank {place.rank} (local {place.local_rank}) of {place.world}; start the "
                "processes by torchrun, or set RANK, LOCAL_RANK and WORLD_SIZE so that ranks count from 0"
            )
        return place

    @property
    def speaks(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


def _numbers(environment: Mapping[str, str], names: Mapping[str, str]) -> dict[str, int]:
    found = {}
    for field, name in names.items():
        text = _text(environment, name)
        if not text.isdigit():
            raise LaunchError(f"{name} is {text!r}; it must be a number from 0 on")
        found[field] = int(text)
    return found


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise LaunchError(f"{name} is not set, though others of its kind are; start the processes by torchrun")
    return environment[name]


@contextmanager
def joined(place: Place, device: str) -> Iterator[None]:
    """Be one of the processes of ``place`` meanwhile: gloo on the host, and NCCL between GPUs."""
    if place.world == 1:
        yield
        return
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
    where = f"tcp://{place.master}:{place.port}"
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        init_method=None if "MASTER_PORT" in os.environ else where,
        rank=place.rank,
        world_size=place.world,
        timeout=TIMEOUT,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def told_by_first(text: str | None) -> str:
    """What the first process has; the others give None."""
    told = [text]
    if dist.is_initialized():
        dist.broadcast_object_list(told, 0)
    assert told[0] is not None
    return told[0]


def torchrun_command(processes: int, arguments: Sequence[str]) -> list[str]:
    """The command line that starts ``memplan`` with these arguments in so many processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "memplan", *arguments]
