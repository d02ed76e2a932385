"""What a measurement is given (how much work, for how long) and what it gives (rates, and a table for people)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from memplan.host import host_memory
from offload.plan import Buckets

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Rows = tuple[tuple[str, ...], ...]
"""Cells of a table, the first row being its head."""


@dataclass(frozen=True)
class Part:
    """What one measurement found."""

    rates: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Rates``."""
    tables: Mapping[str, Rows] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    """What could not be measured, or not as usual, a sentence each."""


@dataclass(frozen=True)
class Effort:
    """How much is moved and updated, and for how long."""

    link_bytes: tuple[int, ...] = tuple(64 * KIB * 4**n for n in range(7))
    """Sizes of one transfer, up to all that is pinned for one direction."""
    update_elements: int = 1 << 26
    """Of the state on the host, larger than any cache."""
    repeat_seconds: float = 0.3
    """What is repeated is repeated for so long."""
    disk_bytes: int = GIB
    disk_blocks: tuple[int, ...] = (MIB, 4 * MIB, 8 * MIB, 16 * MIB)
    disk_depths: tuple[int, ...] = (1, 4, 8, 16)
    disk_seconds: float = 2.0
    """Of the table; the runtime's own store takes about two more."""
    collective_bytes: tuple[int, ...] = tuple(MIB * 4**n for n in range(5))
    seconds: float = 47.0
    """Everything together, without the interpreter's start; the kernels' grids get what the others leave."""

    @classmethod
    def of(cls, device: torch.device) -> "Effort":
        """As much as this machine's free memory allows; less where the CPU computes, for its caches are all it has."""
        spare = host_memory().available_bytes // 4
        chunk = Buckets().update_elements
        if device.type == "cpu":
            return cls(tuple(64 * KIB * 4**n for n in range(6)), chunk, disk_bytes=min(GIB // 4, spare))
        elements = min(1 << 26, spare // 24 // chunk * chunk)
        return cls(update_elements=max(chunk, elements), disk_bytes=min(GIB, spare))


def best_seconds(work: Callable[[], object], device: str = "cpu", repeats: int = 3) -> float:
    """The shortest of a few runs after a first one that warms up."""
    work()
    wait_for(device)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


def wait_for(device: str) -> None:
    """Until everything that the device was given is done; the CPU has no queue."""
    if device == "cuda":
        torch.cuda.synchronize()


def gigabytes(bytes_per_second: float) -> str:
    """``55.4 GB/s``."""
    return f"{bytes_per_second / 1e9:.3g} GB/s"


def nanoseconds(seconds: float) -> str:
    """``0.34 ns``, as elements of state are counted."""
    return f"{seconds * 1e9:.3g} ns"
