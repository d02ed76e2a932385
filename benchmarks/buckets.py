"""Seconds of many small collectives beside those of one as large as all of them: what joining units would gain.

    python -m benchmarks.buckets [--ranks 2] [--elements 33554432] [--rounds 7] [--out FILE]

Each rank is a process with one thread, over gloo and fp32; what a unit's reduce-scatter and gather do in ZeRO's stages
2 and 3. The median of the rounds, of the slowest rank.
"""

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.common import RESULTS, host
from offload.ranks import _gather, _reduce_scatter

UNIT_ELEMENTS = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22)
MOST_CALLS = 1024
"""Of one size in a round."""


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--elements", type=int, default=1 << 25, help="of all units together, at most")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "buckets.json", help="where to write")
    args = parser.parse_args()
    results: Any = mp.get_context("spawn").SimpleQueue()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (args.ranks, port, args.elements, args.rounds, results), nprocs=args.ranks)
    rows = results.get()
    for row in rows:
        print(
            f"{row['collective']:>14} {row['count']:5} of {row['unit_elements']:8} elements"
            f" {row['many_seconds'] * 1e3:9.2f} ms, one of all {row['one_seconds'] * 1e3:9.2f} ms"
        )
    args.out.write_text(json.dumps({"machine": host(), "ranks": args.ranks, "rows": rows}, indent=1) + "\n")


def _rank(rank: int, world: int, port: int, elements: int, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo")
    rows = []
    for unit in UNIT_ELEMENTS:
        count = min(MOST_CALLS, elements // unit)
        whole = torch.zeros(unit * count)
        units = list(whole.split(unit))
        for name, collective in (("reduce-scatter", _reduce), ("gather", _bring)):
            many = _seconds(lambda units=units, c=collective: [c(u, rank, world) for u in units], rounds)
            one = _seconds(lambda whole=whole, c=collective: c(whole, rank, world), rounds)
            rows.append(
                {
                    "collective": name,
                    "unit_elements": unit,
                    "count": count,
                    "many_seconds": many,
                    "one_seconds": one,
                }
            )
    if rank == 0:
        results.put(rows)
    dist.destroy_process_group()


def _own(whole: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    size = len(whole) // world
    return whole[rank * size : (rank + 1) * size]


def _reduce(whole: torch.Tensor, rank: int, world: int) -> None:
    _reduce_scatter(_own(whole, rank, world), whole)


def _bring(whole: torch.Tensor, rank: int, world: int) -> None:
    _gather(whole, _own(whole, rank, world))


def _seconds(work: Callable[[], object], rounds: int) -> float:
    """The median, of the slowest rank."""
    work()
    found = []
    for _ in range(rounds):
        dist.barrier()
        began = time.perf_counter()
        work()
        slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(slowest.item())
    return statistics.median(found)


if __name__ == "__main__":
    main()
