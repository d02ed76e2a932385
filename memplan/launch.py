"""Processes of one training: which of them this one is, how they come together, and what they tell each other.

torchrun, and Kubernetes' PyTorchJob as it, set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Slurm sets
names of its own, which are read where those are missing.
"""

import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from memplan.errors import LaunchError
from offload import watchdog
from offload.errors import RankLost
from offload.ranks import CONNECTIONS, local_index

JOINING = timedelta(minutes=10)
"""In which all processes must have started."""
LATE_SECONDS = 15.0
"""After which people are told of those that have not."""
ASKING_SECONDS = 0.02
SESSION = "memplan/session"
"""Where the first process leaves the word of ``met``, for who started them."""
SLURM_PORTS = 15000, 20000
"""Between which the port of a Slurm job is, by its number: every process finds the same one."""


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """Processes on this node."""
    master: str = "127.0.0.1"
    port: int = 0
    restarts: int = 0
    """How often torchrun, or ``--nproc``, has started them again."""
    max_restarts: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> "Place":
        """From the environment; alone where it says nothing. Raises LaunchError where it contradicts itself."""
        if "RANK" in environment or "WORLD_SIZE" in environment:
            names = {"rank": "RANK", "world": "WORLD_SIZE", "port": "MASTER_PORT"}
            found = _numbers(environment, names)
            # PyTorchJob says nothing of a pod's processes where it has one in each.
            local = _number(environment, "LOCAL_RANK", 0)
            beside = _number(environment, "LOCAL_WORLD_SIZE", found["world"] if environment.get("LOCAL_RANK") else 1)
            restarts = [_number(environment, f"TORCHELASTIC_{n}", 0) for n in ("RESTART_COUNT", "MAX_RESTARTS")]
            master = _text(environment, "MASTER_ADDR")
            place = cls(**found, local_rank=local, local_world=beside, master=master)
            place = replace(place, restarts=restarts[0], max_restarts=restarts[1])
        elif "SLURM_PROCID" in environment and _number(environment, "SLURM_NTASKS", 1) > 1:
            names = {"rank": "SLURM_PROCID", "world": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"}
            first, last = SLURM_PORTS
            usual = first + _number(environment, "SLURM_JOB_ID", 0) % (last - first)
            port = _number(environment, "MASTER_PORT", usual)
            if not (master := environment.get("MASTER_ADDR") or environment.get("SLURM_LAUNCH_NODE_IPADDR", "")):
                raise LaunchError(
                    f"this is a Slurm job of {environment['SLURM_NTASKS']} tasks, and nothing says where the first one "
                    "is; start all of them by srun, set MASTER_ADDR, or name --nproc for processes on this node alone"
                )
            tasks = _tasks_here(environment)
            place = cls(**_numbers(environment, names), local_world=tasks, master=master, port=port)
            even = re.fullmatch(r"\d+\(x\d+\)", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
            round_robin = environment.get("SLURM_DISTRIBUTION", "").startswith("cyclic") and 1 < tasks < place.world
            if round_robin or (even and tasks and place.rank % tasks != place.local_rank):
                raise LaunchError(
                    f"Slurm's task {place.rank} is number {place.local_rank} of the {tasks} of its node; tasks of a "
                    "node must follow one another, for shards stay within it: srun --distribution=block"
                )
        else:
            return cls()
        if not 0 <= place.rank < place.world or not 0 <= place.local_rank < place.local_world <= place.world:
            raise LaunchError(
                f"the environment says rank {place.rank} (local {place.local_rank} of {place.local_world}) of "
                f"{place.world}; start the processes by torchrun, or set RANK, WORLD_SIZE, LOCAL_RANK and "
                "LOCAL_WORLD_SIZE so that ranks count from 0"
            )
        return place

    @property
    def nodes(self) -> int:
        """Nodes with as many processes each."""
        return self.world // self.local_world

    @property
    def speaks(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0


ALONE = Place()


def _numbers(environment: Mapping[str, str], names: Mapping[str, str]) -> dict[str, int]:
    for name in names.values():
        _text(environment, name)
    return {field: _number(environment, name, 0) for field, name in names.items()}


def _number(environment: Mapping[str, str], name: str, usual: int) -> int:
    """The environment's, or the usual one where it says none."""
    if not (text := environment.get(name)):
        return usual
    if not text.isdigit():
        raise LaunchError(f"{name} is {text!r}; it must be a number from 0 on")
    return int(text)


def _tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of a node, the most where nodes differ: Slurm writes ``4(x2),3`` for three nodes."""
    if listed := re.findall(r"(?:^|,)(\d+)", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        return max(map(int, listed))
    return _number(environment, "SLURM_NTASKS_PER_NODE", _number(environment, "SLURM_NTASKS", 1))


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise LaunchError(f"{name} is not set, though others of its kind are; start the processes by torchrun")
    return environment[name]


@contextmanager
def joined(place: Place, timeout_seconds: float = watchdog.TIMEOUT_SECONDS) -> Iterator[None]:
    """Be one of the processes of ``place`` meanwhile: gloo on the host, and NCCL between GPUs.

    What is raised inside ends all of them, and is raised on where it came first; the others end without a word.
    """
    if place.world == 1:
        yield
        return
    os.environ.update({name: value for name, value in CONNECTIONS.items() if name not in os.environ})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
    where = f"tcp://{place.master}:{place.port}"
    if device == "cuda":
        torch.cuda.set_device(local_index())
    try:
        # What torchrun sets also tells that the store is its own; Slurm sets none of it, and a person may set a part.
        whole = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        with _telling_who_is_late(place):
            store, _, _ = next(dist.rendezvous("env://" if whole else where, place.rank, place.world))
        shared = dist.PrefixStore(met(store, place), store)
        backends = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(
            backends, store=dist.PrefixStore("torch", shared), rank=place.rank, world_size=place.world, timeout=JOINING
        )
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise LaunchError(f"rank {place.rank} did not come together with the others at {where}: {said}") from error
    dog = watchdog.begin(shared, timeout_seconds, listen=True)
    try:
        with _speaking_together(dog):
            yield
            with dog.inside("start", "end of training"):
                dist.barrier(_group())
    except BaseException as error:
        if not blamed(error):
            dog.be_ended()
        vars(error)["rank"] = f"{dog.name}: "  # for whoever tells people of it
        if place.speaks:  # the store may be this one's: the others read of it before it goes
            time.sleep(2 * watchdog.BEAT_SECONDS)
        watchdog.end()
        raise
    watchdog.end()
    dist.destroy_process_group()


def met(store: dist.Store, place: Place) -> str:
    """A word that these processes have in common, and no others that used the same store before.

    torchrun starts processes again with a store in which the addresses of those before still are, and counts restarts
    on each node by itself. So each process asks under a word of its own, and the first one answers all that it finds,
    until those of its own time have said that they have the answer.
    """
    mine = uuid.uuid4().hex
    if place.speaks:
        store.set(SESSION, mine)
        missing, began, told = list(range(1, place.world)), time.monotonic(), _told_who_is_late.is_set()
        while missing:
            for asking in (key for rank in missing if store.check([key := f"memplan/asks/{rank}"])):
                store.set(f"memplan/answer/{store.get(asking).decode()}", mine)
            missing = [rank for rank in missing if not store.check([f"memplan/has/{mine}/{rank}"])]
            waited = time.monotonic() - began
            if missing and waited > LATE_SECONDS and not told:
                told = _tell_who_is_late(missing)
            if waited > JOINING.total_seconds():
                late = ", ".join(map(str, missing))
                raise LaunchError(f"of {place.world} processes these did not come within {JOINING}: rank {late}")
            time.sleep(ASKING_SECONDS)
        return mine
    answer = f"memplan/answer/{mine}"
    store.set(f"memplan/asks/{place.rank}", mine)
    store.wait([answer], JOINING)
    session = store.get(answer).decode()
    store.set(f"memplan/has/{session}/{place.rank}", "")
    return session


_told_who_is_late = threading.Event()


def _tell_who_is_late(ranks: list[int]) -> bool:
    """Once: the wait itself is long, and whoever died before may have said so where nobody looks."""
    late, they = f"rank {ranks[0]}", "it is"
    if len(ranks) > 1:
        late, they = f"ranks {', '.join(map(str, ranks))}", "they are"
    said = f"rank 0 waits for {late} to come: look whether {they} running"
    print(f"memplan: {said}", file=sys.stderr, flush=True)
    _told_who_is_late.set()
    return True


@contextmanager
def _telling_who_is_late(place: Place) -> Iterator[None]:
    """Tell of those who have not come, while torch waits for all to come to a store that is this process's own."""

    def look() -> None:
        with suppress(Exception):  # the store may be over just now, and what ends it is told by who waits
            timeout = timedelta(seconds=LATE_SECONDS)
            store = dist.TCPStore(place.master, place.port, timeout=timeout, wait_for_workers=False)
            if missing := [r for r in range(1, place.world) if not store.check([f"memplan/asks/{r}"])]:
                _tell_who_is_late(missing)

    _told_who_is_late.clear()
    timer = threading.Timer(LATE_SECONDS, look)
    timer.daemon = True
    if place.speaks:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def blamed(error: BaseException) -> bool:
    """Tell the other processes that this one ends by an error; whether it is the first to, and must tell people why."""
    dog = watchdog.current()
    if dog is None:
        return True
    return not isinstance(error, RankLost) and dog.blames(str(error) or type(error).__name__)


_groups: list[dist.ProcessGroup] = []


@contextmanager
def _speaking_together(dog: watchdog.Watchdog) -> Iterator[None]:
    """With a group for what is told before and between steps: there is more patience than with joining."""
    _groups.append(dist.new_group(timeout=dog.backstop("start"), backend="gloo"))
    try:
        yield
    finally:
        _groups.pop()


def _group() -> dist.ProcessGroup:
    return _groups[-1]


def told_by_first(text: str | None) -> str:
    """What the first process has; the others give None."""
    told = [text]
    if (dog := watchdog.current()) is not None:
        with dog.inside("start", "what rank 0 tells"):
            dist.broadcast_object_list(told, 0, group=_group())
    assert told[0] is not None
    return told[0]


def were_restarted(place: Place) -> bool:
    """Whether a launcher started these processes again: torchrun counts only on the node where one had failed."""
    if (dog := watchdog.current()) is None:
        return place.restarts > 0
    told = torch.tensor(place.restarts)
    with dog.inside("start", "count of restarts"):
        dist.all_reduce(told, dist.ReduceOp.MAX, group=_group())
    return told.item() > 0


def all_agree(here: bool) -> bool:
    """Whether it is so for every process; none goes on before all have said."""
    if (dog := watchdog.current()) is None:
        return here
    told = torch.tensor(int(here))
    with dog.inside("start", "whether models have room"):
        dist.all_reduce(told, dist.ReduceOp.MIN, group=_group())
    return bool(told.item())


def together(loss: float, stop: bool) -> tuple[float, bool]:
    """The mean of what all processes have of a loss, and whether any of them wants to stop."""
    if (dog := watchdog.current()) is None:
        return loss, stop
    told = torch.tensor([loss, float(stop)], dtype=torch.float64)
    with dog.inside("loss", "mean of the loss"):
        dist.all_reduce(told, group=_group())
    return float(told[0]) / dog.world, bool(told[1] > 0)
