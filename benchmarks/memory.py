"""What training steps really take on this machine's GPU, and what the profiler says they take.

    python -m benchmarks.memory [--only PATTERN] [--out FILE] [--traces DIR]
    python -m benchmarks.memory --predict [--only PATTERN] [--hide-held-out]

The first measures every configuration of the zoo, each in a process of its own, and writes memory-measured.json after
every one. The second needs no GPU: it reads that file, predicts every configuration, prints the errors and writes
memory.json.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

# Asked through the driver's library, whether there is a GPU does not initialise CUDA, which no fork would survive.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import numpy as np
import torch
import transformers

from benchmarks import prediction
from benchmarks.allocations import packed, record_step
from benchmarks.building import batch_of, build_real
from benchmarks.children import Failure, in_children
from benchmarks.common import RESULTS, host
from benchmarks.zoo import CONFIGURATIONS, Configuration
from profiler.contract import forward_with
from profiler.measure import TrainingLoop, measure_step

SECONDS_A_CHILD = 60.0
BUILT_TOGETHER = 14
PREPARED_AHEAD = 4
TOGETHER = 3
"""Children on the device at once where nothing but the allocator's own figures counts."""
TIMED_STEPS = 10
TRACES = "traces.jsonl.gz"
Row = dict[str, Any]


def main() -> None:
    """Measure, or predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="configurations whose name this is found in")
    parser.add_argument("--out", type=Path, help="where to write")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="record one step's allocations of each, too")
    parser.add_argument("--predict", action="store_true", help="predict what was measured")
    parser.add_argument("--hide-held-out", action="store_true", help="leave the held-out rows out")
    args = parser.parse_args()
    chosen = [c for c in CONFIGURATIONS if re.search(args.only, c.name)]
    if args.predict:
        chosen = [c for c in chosen if not (args.hide_held_out and c.held_out)]
        measured = RESULTS / "memory-measured.json"
        prediction.main(chosen, json.loads(measured.read_text()), args.out or RESULTS / "memory.json")
    else:
        measure(chosen, args.out or RESULTS / "memory-measured.json", args.traces)


def measure(chosen: list[Configuration], out: Path, traces: Path | None) -> None:
    """Two passes over the configurations: one alone on the device, one for expandable segments."""
    began = time.monotonic()
    rows = {c.name: _described(c) for c in chosen}
    if traces is not None:
        traces.mkdir(parents=True, exist_ok=True)
        (traces / TRACES).unlink(missing_ok=True)
    for configuration, result in _alone(chosen, traces is not None):
        row = rows[configuration.name]
        if isinstance(result, Failure):
            row["error"] = result.text
        else:
            row["measured"], line = result
            if traces is not None:
                with (traces / TRACES).open("ab") as file:
                    file.write(line)
        _write(out, rows)
        print(f"{time.monotonic() - began:6.1f} s  {_line(row)}", flush=True)
    works = [c for c in chosen if "error" not in rows[c.name]]
    for configuration, result in in_children(works, _expandably, TOGETHER, PREPARED_AHEAD, SECONDS_A_CHILD):
        name = "expandable_error" if isinstance(result, Failure) else "expandable_reserved_bytes"
        rows[configuration.name][name] = result.text if isinstance(result, Failure) else result
        _write(out, rows)
    failed = sum("error" in row or "expandable_error" in row for row in rows.values())
    print(f"{len(rows)} configurations, {failed} failed, {time.monotonic() - began:.0f} s: {out}")


def _alone(chosen: list[Configuration], traced: bool) -> Iterator[tuple[Configuration, Any]]:
    """One after the other, in groups that are built before the first one runs: building takes cores from a step."""
    for start in range(0, len(chosen), BUILT_TOGETHER):
        group = chosen[start : start + BUILT_TOGETHER]
        built = multiprocessing.get_context("fork").Barrier(len(group), timeout=SECONDS_A_CHILD)
        yield from in_children(group, partial(_natively, traced, built), 1, len(group), SECONDS_A_CHILD)


def _natively(
    traced: bool, built: Barrier, configuration: Configuration, turn: Callable[[], None]
) -> tuple[Row, bytes]:
    lines: list[bytes] = []

    def record(loop: TrainingLoop) -> None:
        lines.append(packed(configuration.name, record_step(loop)))

    def turn_when_all_are_built() -> None:
        built.wait()
        turn()

    measured = _step(configuration, turn_when_all_are_built, timed_steps=TIMED_STEPS, then=record if traced else None)
    return measured, b"".join(lines)


def _expandably(configuration: Configuration, turn: Callable[[], None]) -> int:
    def turn_and_set() -> None:
        turn()
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")

    def check(_: TrainingLoop) -> None:
        if not torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]:
            raise RuntimeError("the allocator did not take expandable_segments:True")

    return _step(configuration, turn_and_set, timed_steps=0, then=check)["reserved_bytes"]


def _step(configuration: Configuration, turn: Callable[[], None], **how: Any) -> Row:
    torch.set_num_threads(4)
    model, batch = build_real(configuration), batch_of(configuration)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(2)
    turn()
    forward = forward_with(configuration.loss)
    ways = (configuration.precision, configuration.optimizer, configuration.clip)
    return asdict(measure_step(model, batch, forward, *ways, **how))


def _described(configuration: Configuration) -> Row:
    return {
        key: getattr(configuration, key)
        for key in ("name", "architecture", "precision", "optimizer", "clip", "held_out")
    }


def _write(out: Path, rows: dict[str, Row]) -> None:
    gpus = {row["measured"]["device"] for row in rows.values() if "measured" in row}
    facts = {"gpu": ", ".join(sorted(gpus)), **host(), "transformers": transformers.__version__}
    out.parent.mkdir(parents=True, exist_ok=True)
    done = [row for row in rows.values() if "measured" in row or "error" in row]
    text = json.dumps({"benchmark": "memory-measured", "machine": facts, "rows": done}, indent=1)
    aside = out.with_suffix(".part")
    aside.write_text(text + "\n")
    aside.replace(out)


def _line(row: Row) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    measured = row["measured"]
    peak, reserved = max(measured["steady_bytes"].values()) / 2**30, measured["reserved_bytes"] / 2**30
    seconds = measured["step_seconds"]
    return f"{row['name']}: {peak:.2f} GiB allocated, {reserved:.2f} reserved, {seconds * 1e3:.0f} ms"


if __name__ == "__main__":
    main()
