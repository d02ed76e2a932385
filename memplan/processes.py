"""Several processes of one training on this machine: started, watched, ended together, and started again.

In place of torchrun, which does the same and more, so that there is one sentence where it would print a traceback of
its own, and so that Ctrl-C reaches the training: it saves a checkpoint, which torchrun would not wait for.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.distributed as dist

from memplan.errors import LaunchError
from memplan.launch import SESSION
from memplan.options import BAD_INPUT, NOTHING_FITS
from memplan.progress import INTERRUPTED
from offload import watchdog
from offload.ranks import CONNECTIONS
from offload.watchdog import Verdict, Watchdog

POLL_SECONDS = 0.05
ENDING_SECONDS = 10.0
"""How long processes may take to end at SIGTERM, before SIGKILL."""
WELL = 0, INTERRUPTED
"""Exit codes of processes that ended as all were to."""
NO_RESTART = *WELL, BAD_INPUT, NOTHING_FITS
"""Exit codes that are what a person wanted, or would be the same again."""


def run_in_processes(count: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run ``memplan`` with these arguments in so many processes; the exit code of the first that failed, or theirs.

    Where one ends by a signal or in an error that may pass, all are started again, up to ``max_restarts`` times. Raises
    LaunchError where there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise LaunchError(f"--nproc is {count}, and this machine has {gpus} GPUs; each process needs one of its own")
    attempt = 0
    while True:
        started = _Attempt(count, arguments, attempt, max_restarts)
        code = started.run()
        if code in NO_RESTART or started.terminated or attempt == max_restarts:
            return code
        attempt += 1
        _say(f"starting again from the last checkpoint, {attempt} of {max_restarts} times")


def without_options(arguments: Sequence[str], *names: str) -> list[str]:
    """A command line without some options, each with one value."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if not skip and argument not in names and not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
        skip = not skip and argument in names
    return kept


@dataclass(frozen=True)
class _Ended:
    """A process that has ended: its rank, and its exit code, or the number of its signal below 0."""

    rank: int
    code: int

    @property
    def sentence(self) -> str:
        """For a person."""
        who = f"rank {self.rank} ({socket.gethostname()})"
        if self.code == -signal.SIGKILL:
            return f"{who} was ended by SIGKILL, as the system does where host memory runs out"
        if self.code < 0:
            return f"{who} was ended by {signal.Signals(-self.code).name}"
        return f"{who} ended with exit code {self.code}, without a word"


class _Attempt:
    """One start of all processes. The store is here, so that it outlives each of them."""

    def __init__(self, count: int, arguments: Sequence[str], attempt: int, max_restarts: int) -> None:
        self.terminated = False
        """Whether somebody ended this process, and by it all of them."""
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._store.port,
            # The names that torchrun gives these, for torch and for whoever looks at them.
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "TORCHELASTIC_RESTART_COUNT": attempt,
            "TORCHELASTIC_MAX_RESTARTS": max_restarts,
        }
        environment = {"OMP_NUM_THREADS": "1", **CONNECTIONS, **os.environ, **{k: str(v) for k, v in common.items()}}
        command = [sys.executable, "-m", "memplan", *arguments]
        self._processes = [
            subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(count)
        ]

    def run(self) -> int:
        """Wait for all of them; the exit code of the first that failed, or that of all: 0, or 130 if interrupted."""
        with self._signals():
            failed = self._first_failure()
            if failed is None:
                return max(process.returncode for process in self._processes)
            self._explain(Verdict(failed.rank, failed.sentence))
            for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
                for process in self._processes:
                    if process.poll() is None:
                        end(process)
                self._wait(ENDING_SECONDS)
        if self.terminated:
            return 128 + signal.SIGTERM
        return failed.code if failed.code > 0 else 128 - failed.code

    def _first_failure(self) -> _Ended | None:
        while True:
            codes = [process.poll() for process in self._processes]
            # Of several that ended at once, those that were killed can not have ended because of the others.
            for rank, code in sorted(enumerate(codes), key=lambda item: item[1] or 0):
                if code not in (None, *WELL):
                    return _Ended(rank, code)
            if None not in codes:
                return None
            time.sleep(POLL_SECONDS)

    def _explain(self, why: Verdict) -> None:
        """Why it is over, to a person and to the others, unless one of them has said so."""
        met = self._store.get(SESSION).decode() if self._store.check([SESSION]) else ""
        shared = watchdog.own_client(dist.PrefixStore(met, self._store))
        Watchdog(shared, rank=-1, world=0).say(why)

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.poll() is None for process in self._processes):
            time.sleep(POLL_SECONDS)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C reaches all processes of a terminal: they end by themselves. What else ends this one ends them."""

        def pass_on(number: int, _: FrameType | None) -> None:
            if not self.terminated:
                self.terminated = True
                self._explain(Verdict(None, f"the launcher was ended by {signal.Signals(number).name}"))
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(number)

        before = {
            signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
            signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say(sentence: str) -> None:
    print(f"memplan: {sentence}", file=sys.stderr, flush=True)
