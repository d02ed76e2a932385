"""What the allocator was asked for during one training step, in a form small enough to keep for many models."""

import gzip
import json
from typing import Any

import torch

from profiler.measure import TrainingLoop

LARGEST_RECORD_BYTES = 60_000
_MOST_ENTRIES = 2_000_000


def record_step(loop: TrainingLoop) -> list[int | str | list[int]]:
    """One more step of a warm loop. The events in order:

    a positive number is an allocation of so many bytes, -n ends the n-th allocation (from 1), ``[n]`` ends one of n
    bytes from before the step, ``["segment", n]`` asks the driver for n bytes, and a string is the phase that just
    ended.
    """
    memory, device = torch.cuda.memory, torch.cuda.current_device()
    marks: list[tuple[int, str]] = []

    def trace() -> list[dict[str, Any]]:
        return memory._snapshot()["device_traces"][device]

    memory._record_memory_history("all", context=None, stacks="python", max_entries=_MOST_ENTRIES)
    try:
        loop.step(lambda phase: marks.append((len(trace()), phase)))
        torch.cuda.synchronize()
        entries = trace()
    finally:
        memory._record_memory_history(enabled=None)
    return compact(entries, marks)


def compact(entries: list[dict[str, Any]], marks: list[tuple[int, str]]) -> list[Any]:
    """The events of a snapshot's trace; ``marks`` are (number of entries before, phase)."""
    events: list[Any] = []
    numbers: dict[int, int] = {}
    made, left = 0, list(marks)
    for position, entry in enumerate(entries):
        while left and left[0][0] <= position:
            events.append(left.pop(0)[1])
        if entry["action"] == "alloc":
            made += 1
            numbers[entry["addr"]] = made
            events.append(entry["size"])
        elif entry["action"] == "free_completed":
            number = numbers.pop(entry["addr"], None)
            events.append([entry["size"]] if number is None else -number)
        elif entry["action"] in ("segment_alloc", "segment_map"):
            events.append(["segment", entry["size"]])
    return events + [phase for _, phase in left]


def packed(name: str, events: list[Any]) -> bytes:
    """A line of a gzip'd file of JSON lines; of what is too long the beginning, with a mark."""
    while True:
        line = gzip.compress((json.dumps([name, events], separators=(",", ":")) + "\n").encode(), mtime=0)
        if len(line) <= LARGEST_RECORD_BYTES:
            return line
        events = [*events[: len(events) * LARGEST_RECORD_BYTES * 9 // (len(line) * 10)], "cut short"]
