"""Collectives between this node's GPUs by size: one process a GPU, through torch.distributed.

Run as a module, this is one of those processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from memplan.calibrate.parts import Part, best_seconds, gigabytes
from memplan.errors import MachineError
from memplan.formatting import format_bytes
from memplan.rates import Curve

TIMEOUT_SECONDS = 60


def collectives(gpus: int, sizes: Sequence[int], backend: str = "nccl") -> Part:
    """Bytes that each GPU sends a second in all-gather and reduce-scatter, by the bytes of the whole tensor.

    The environment goes to the processes as it is, NCCL's settings in it. Raises MachineError where one of them fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting, result = Path(folder) / "meeting", Path(folder) / "result.json"
        command = [sys.executable, "-m", __name__, str(meeting), str(result), str(gpus), backend, *map(str, sizes)]
        processes = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for rank in range(gpus)
        ]
        _wait(processes)
        found = json.loads(result.read_text())
    sent = (gpus - 1) / gpus
    rows = [("whole tensor", "all-gather", "reduce-scatter")]
    curve = []
    for size, (gather, scatter) in zip(sizes, found, strict=True):
        curve.append(2 * sent * size / (gather + scatter))
        rows.append((format_bytes(size), gigabytes(sent * size / gather), gigabytes(sent * size / scatter)))
    return Part({"collective": Curve(tuple(sizes), tuple(curve))}, {f"each of {gpus} GPUs sends": tuple(rows)})


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until all have ended well; raises MachineError, with the last line of the first that did not."""
    try:
        for process in processes:
            _, said = process.communicate(timeout=TIMEOUT_SECONDS)
            if process.returncode:
                lines = said.decode(errors="replace").strip().splitlines() or ["it said nothing"]
                raise MachineError(f"a process of the collectives ended with {process.returncode}: {lines[-1]}")
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"the collectives took longer than {TIMEOUT_SECONDS} s") from error
    finally:
        for process in processes:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def _measure(sizes: Sequence[int], ranks: int, device: str) -> list[tuple[float, float]]:
    found = []
    for size in sizes:
        whole = torch.zeros(size // 4 // ranks * ranks, device=device)
        part = torch.zeros(len(whole) // ranks, device=device)
        gather = best_seconds(partial(dist.all_gather_into_tensor, whole, part), device, repeats=5)
        scatter = best_seconds(partial(dist.reduce_scatter_tensor, part, whole), device, repeats=5)
        found.append((gather, scatter))
    return found


def main() -> None:
    """One rank; the first one writes seconds of all-gather and reduce-scatter for each size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("meeting")
    parser.add_argument("result", type=Path)
    parser.add_argument("ranks", type=int)
    parser.add_argument("backend")
    parser.add_argument("sizes", type=int, nargs="+")
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args()
    device = "cuda" if args.backend == "nccl" else "cpu"
    if device == "cuda":
        torch.cuda.set_device(args.rank)
    dist.init_process_group(args.backend, f"file://{args.meeting}", world_size=args.ranks, rank=args.rank)
    found = _measure(args.sizes, args.ranks, device)
    if args.rank == 0:
        args.result.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
