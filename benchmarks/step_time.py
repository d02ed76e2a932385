"""The predicted seconds of training steps beside the measured ones.

    python -m benchmarks.step_time [--only PATTERN] [--hide-held-out] [--calibration FILE | --assumed] [--out FILE]

Needs no GPU: steps were measured by benchmarks.memory (memory-measured.json), the device by benchmarks.calibrate.
Prints every configuration, then the errors by architecture and by what bounds the predicted step.
"""

import argparse
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.building import batch_of, build_abstract
from benchmarks.children import Failure, in_children
from benchmarks.common import RESULTS, spread
from benchmarks.prediction import PROCESSES, SECONDS_A_CHILD
from benchmarks.zoo import CONFIGURATIONS, Configuration
from profiler.calibration import Calibration
from profiler.contract import forward_with
from profiler.layers import repeated_blocks
from profiler.roofline import LAUNCH, StepTime, step_time
from profiler.runs import runs_of
from profiler.timed import Target, find_target
from profiler.trace import trace_step

CALIBRATION = RESULTS / "calibration-h200.json"
Row = dict[str, Any]


def main() -> None:
    """Predict, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="configurations whose name this is found in")
    parser.add_argument("--hide-held-out", action="store_true", help="leave the held-out configurations out")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="what benchmarks.calibrate wrote")
    parser.add_argument("--assumed", action="store_true", help="with what is assumed where nothing was measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "step-time.json", help="where to write")
    args = parser.parse_args()
    measured = json.loads((RESULTS / "memory-measured.json").read_text())
    target = find_target(measured["machine"]["gpu"], None if args.assumed else args.calibration)
    assert target is not None
    seconds = {row["name"]: row["measured"]["step_seconds"] for row in measured["rows"] if "measured" in row}
    chosen = [
        c
        for c in CONFIGURATIONS
        if re.search(args.only, c.name) and c.name in seconds and not (args.hide_held_out and c.held_out)
    ]
    rows = []
    for configuration, result in in_children(chosen, partial(_predicted, target), PROCESSES, 0, SECONDS_A_CHILD):
        rows.append(_row(configuration, seconds[configuration.name], result))
        print(line(rows[-1]), flush=True)
    rows.sort(key=lambda row: row["name"])
    for text in summary(rows):
        print(text)
    args.out.write_text(json.dumps(_document(measured["machine"], target.calibration, rows), indent=1) + "\n")
    print(f"\n{args.out}")


def _predicted(target: Target, configuration: Configuration, turn: Callable[[], None]) -> StepTime:
    turn()
    model, batch = build_abstract(configuration), batch_of(configuration)
    blocks = repeated_blocks(model)
    forward = forward_with(configuration.loss)
    trace = trace_step(model, batch, forward, configuration.precision, blocks, False, runs_of(model, blocks))
    types = {path: type(module).__name__ for path, module in model.named_modules()}
    trained = [p for p in trace.parameters if p.has_gradient]
    ways = configuration.optimizer, configuration.clip, target.device, target.calibration
    return step_time(trace.events, trained, *ways, module_types=types)


def _row(configuration: Configuration, measured: float, result: StepTime | Failure) -> Row:
    row = {
        "name": configuration.name,
        "architecture": configuration.architecture,
        "held_out": configuration.held_out,
        "measured_seconds": measured,
    }
    if isinstance(result, Failure):
        return {**row, "failed": result.text}
    return {
        **row,
        "predicted_seconds": result.total_seconds,
        "error": round(result.total_seconds / measured - 1, 4),
        "bound": max(result.by_bound, key=lambda bound: result.by_bound[bound]),
        "by_bound": {name: round(s, 6) for name, s in result.by_bound.items() if name},
        "by_phase": {name: round(s, 6) for name, s in result.by_phase.items()},
    }


def line(row: Row) -> str:
    """A row as one line of text."""
    measured = row["measured_seconds"] * 1e3
    if "failed" in row:
        return f"{row['name']:44} measured {measured:7.1f} ms   {row['failed'][:120]}"
    waiting = row["by_bound"].get(LAUNCH, 0.0) / row["predicted_seconds"]
    predicted = row["predicted_seconds"] * 1e3
    return (
        f"{row['name']:44} measured {measured:7.1f} ms   predicted {predicted:7.1f} ms   {row['error']:+7.1%}"
        f"   {row['bound']:7} the device waits {waiting:4.0%}"
    )


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines: the errors of tuning and held-out set, by architecture and by what bounds the step."""
    lines = []
    for title, held_out in (("Tuning set", False), ("Held-out set", True)):
        part = [row for row in rows if row["held_out"] == held_out and "error" in row]
        if not part:
            continue
        lines += ["", f"{title}: {_figures(row['error'] for row in part)}"]
        for key in ("bound", "architecture"):
            groups = defaultdict(list)
            for row in part:
                groups[row[key]].append(row["error"])
            lines += [f"  {name:20} {_figures(errors)}" for name, errors in sorted(groups.items())]
    return lines


def _figures(errors: Iterable[float]) -> str:
    signed = list(errors)
    median, high, worst = spread(signed)
    return (
        f"median {median:6.1%}   95th percentile {high:6.1%}   worst {worst:6.1%}"
        f"   mean {statistics.mean(signed):+6.1%}   ({len(signed)})"
    )


def _document(machine: Row, calibration: Calibration, rows: list[Row]) -> Row:
    measured = {"device": calibration.device, **calibration.facts} if calibration.device else "assumed"
    return {"benchmark": "step-time", "machine": machine, "calibration": measured, "rows": rows}


if __name__ == "__main__":
    main()
