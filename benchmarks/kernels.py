"""Where the time of real training steps goes on this machine's GPU: kernels by operation, and the CPU by phase.

    python -m benchmarks.kernels --only PATTERN [--out FILE]

Every configuration runs in a process of its own. Its row has the seconds of a step, the seconds that the CPU takes in
each phase to issue it (the step is waited for at its end only), and every operation with its kernels' seconds a step.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

# Asked through the driver's library, whether there is a GPU does not initialise CUDA, which no fork would survive.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.building import batch_of, build_real
from benchmarks.children import Failure, in_children
from benchmarks.common import RESULTS, host
from benchmarks.zoo import CONFIGURATIONS, Configuration
from profiler.contract import forward_with
from profiler.measure import TrainingLoop

SECONDS_A_CHILD = 60.0
WARM_STEPS, TIMED_STEPS = 3, 8
LISTED = 80
"""The operations that take most are listed by the shapes of their inputs too, so many."""
ANNOTATION = "phase "
Row = dict[str, Any]


def main() -> None:
    """Profile and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="configurations whose name this is found in")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json", help="where to write")
    args = parser.parse_args()
    began, rows = time.monotonic(), []
    chosen = [c for c in CONFIGURATIONS if re.search(args.only, c.name)]
    # All are built before the first one runs: building takes the cores that issue operations.
    built = multiprocessing.get_context("fork").Barrier(len(chosen), timeout=SECONDS_A_CHILD)
    for configuration, result in in_children(chosen, partial(_profiled, built), 1, len(chosen), SECONDS_A_CHILD):
        row = {"error": result.text} if isinstance(result, Failure) else result
        rows.append({"name": configuration.name, **row})
        args.out.write_text(json.dumps({"benchmark": "kernels", "machine": host(), "rows": rows}, indent=1) + "\n")
        print(f"{time.monotonic() - began:6.1f} s  {_line(rows[-1])}", flush=True)


def _profiled(built: Barrier, configuration: Configuration, turn: Callable[[], None]) -> Row:
    torch.set_num_threads(2)
    try:
        model, batch = build_real(configuration), batch_of(configuration)
    finally:
        built.wait()
    turn()
    forward = forward_with(configuration.loss)
    ways = configuration.precision, configuration.optimizer, configuration.clip
    loop = TrainingLoop(model, batch, forward, *ways)
    for _ in range(WARM_STEPS):
        loop.step()
    timed = [_timed(loop) for _ in range(TIMED_STEPS)]
    events = _events(loop)
    seconds = sum(k.duration for e in events for k in e.kernels if k.name != e.name) / 1e6
    return {
        "gpu": torch.cuda.get_device_name(),
        "step_seconds": statistics.median(t["step_seconds"] for t in timed),
        "device_seconds": seconds,
        "host_seconds": {p: statistics.median(t[p] for t in timed) for p in timed[0] if p != "step_seconds"},
        "operations": _operations(events),
    }


def _timed(loop: TrainingLoop) -> dict[str, float]:
    """Seconds of one step, and of its phases on the CPU, which does not wait for the device in between."""
    torch.cuda.synchronize()
    taken: dict[str, float] = {}
    began = last = time.perf_counter()

    def ended(phase: str) -> None:
        nonlocal last
        now = time.perf_counter()
        taken[phase], last = now - last, now

    loop.step(ended)
    torch.cuda.synchronize()
    return {**taken, "step_seconds": time.perf_counter() - began}


def _events(loop: TrainingLoop) -> list[FunctionEvent]:
    """Of one step, each phase annotated with its name once it has ended."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as found:
        loop.step(_annotated)
        torch.cuda.synchronize()
    return list(found.events())


def _annotated(phase: str) -> None:
    with record_function(ANNOTATION + phase):
        pass


def _operations(events: list[FunctionEvent]) -> list[Row]:
    """Operations by phase and name, and the largest by their inputs' shapes too, with calls and seconds."""
    cpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    cpu.sort(key=lambda e: e.time_range.start)
    whole: defaultdict[tuple[str, str], list[Any]] = defaultdict(lambda: [0, 0.0, defaultdict(float)])
    shaped: defaultdict[tuple[str, str, str], list[Any]] = defaultdict(lambda: [0, 0.0, defaultdict(float)])
    phase = ""
    for event in reversed(cpu):  # a phase's annotation comes after it
        if event.name.startswith(ANNOTATION):
            phase = event.name.removeprefix(ANNOTATION)
            continue
        kernels = [k for k in event.kernels if k.name != event.name]  # the device's copy of an annotation is none
        if not kernels and not event.name.startswith("aten::"):
            continue
        for row in (whole[phase, event.name], shaped[phase, event.name, str(event.input_shapes)]):
            row[0] += 1
            for kernel in kernels:
                row[1] += kernel.duration / 1e6
                row[2][kernel.name[:100]] += kernel.duration / 1e6
    largest = sorted(shaped.items(), key=lambda item: -item[1][1])[:LISTED]
    return [
        {
            **dict(zip(("phase", "name", "shapes"), key, strict=False)),
            "calls": calls,
            "seconds": seconds,
            "kernels": dict(kernels),
        }
        for key, (calls, seconds, kernels) in [*whole.items(), *largest]
    ]


def _line(row: Row) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    step, device, issue = row["step_seconds"], row["device_seconds"], sum(row["host_seconds"].values())
    return f"{row['name']}: step {step * 1e3:.1f} ms, kernels {device * 1e3:.1f} ms, CPU {issue * 1e3:.1f} ms"


if __name__ == "__main__":
    main()
