"""Work in child processes that are forked from a parent with everything imported and CUDA untouched."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

Work = Callable[[Any, Callable[[], None]], Any]
"""``work(job, turn)`` prepares, calls ``turn()`` to wait for the device, and returns what the parent is to know."""


@dataclass(frozen=True)
class Failure:
    """What went wrong in a child."""

    text: str


@dataclass
class _Child:
    job: Any
    process: BaseProcess
    pipe: Connection
    since: float
    ready: bool = False
    running: bool = False


def in_children(
    jobs: Sequence[Any], work: Work, at_once: int, preparing: int, seconds: float
) -> Iterator[tuple[Any, Any]]:
    """(job, result or Failure) of every job, as they end.

    ``at_once`` children have their turn at a time, while ``preparing`` more get ready for theirs. A child that takes
    more than ``seconds`` to prepare, or for its turn, is killed. A turn ends when its process has ended.
    """
    waiting, children = list(jobs), list[_Child]()
    while waiting or children:
        while waiting and len(children) < at_once + preparing:
            children.append(_started(waiting.pop(0), work))
        for child in children:
            if child.ready and not child.running and sum(c.running for c in children) < at_once:
                child.running, child.since = True, time.monotonic()
                child.pipe.send(None)
        wait([child.pipe for child in children], timeout=0.5)
        for child in list(children):
            result = _heard(child, seconds)
            if result is not None:
                child.process.kill()  # it has ended, is ending, or must
                child.process.join()
                child.pipe.close()
                children.remove(child)
                yield child.job, result


def _started(job: Any, work: Work) -> _Child:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(work, job, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Child(job, process, ours, time.monotonic())


def _run(work: Work, job: Any, pipe: Connection) -> None:
    def turn() -> None:
        pipe.send(("ready", None))
        pipe.recv()

    try:
        result = work(job, turn)
    except Exception as error:  # noqa: BLE001 - whatever it is becomes a row, and the run goes on
        result = Failure(f"{type(error).__name__}: {error}")
    pipe.send(("result", result))
    os._exit(0)  # the driver frees the device; nothing here is worth tearing down


def _heard(child: _Child, seconds: float) -> Any:
    """The child's result or Failure; ``None`` while there is none."""
    try:
        while child.pipe.poll():
            kind, value = child.pipe.recv()
            if kind == "result":
                return value
            child.ready, child.since = True, time.monotonic()
    except (EOFError, OSError):
        child.process.join(1)
        return Failure(f"the process ended with exit code {child.process.exitcode}")
    waits_for_its_turn = child.ready and not child.running
    if not waits_for_its_turn and time.monotonic() - child.since > seconds:
        return Failure(f"took more than {seconds:.0f} s {'on the device' if child.running else 'to prepare'}")
    return None
