"""The profiler's predictions beside what was measured."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.building import batch_of, build_abstract
from benchmarks.children import Failure, in_children
from benchmarks.common import spread
from benchmarks.zoo import Configuration
from profiler import ModelProfile, profile_model
from profiler.events import PHASES

PROCESSES = 2
SECONDS_A_CHILD = 300.0
WORST_SHOWN = 8
DEVICE = "h200"
"""For what NVML shows, context included; seconds are those of benchmarks.step_time, which a calibration needs."""
Row = dict[str, Any]


def main(chosen: Sequence[Configuration], measured: Row, out: Path) -> None:
    """Predict what was measured, print a table and a summary, and write the rows to ``out``."""
    rows = {row["name"]: row for row in measured["rows"]}
    known = [c for c in chosen if "measured" in rows.get(c.name, {})]
    for configuration in chosen:
        if configuration not in known:
            print(f"{configuration.name} was not measured: {rows.get(configuration.name, {}).get('error', 'no row')}")
    for configuration, result in in_children(known, _predict, PROCESSES, 0, SECONDS_A_CHILD):
        row = rows[configuration.name]
        row["predicted"] = {"error": result.text} if isinstance(result, Failure) else result
        row["errors"] = {} if isinstance(result, Failure) else errors(row)
        print(_line(row), flush=True)
    joined = [rows[c.name] for c in known]
    for title, part in _parts(joined):
        print(f"\n{title}: {len(part)} configurations of {len({r['architecture'] for r in part})} architectures")
        print("\n".join(summary(part)))
    out.write_text(json.dumps({**measured, "benchmark": "memory", "rows": joined}, indent=1) + "\n")
    print(f"\n{out}")


def _predict(configuration: Configuration, turn: Callable[[], None]) -> Row:
    turn()
    model, batch = build_abstract(configuration), batch_of(configuration)
    start = time.perf_counter()
    profile = profile_model(
        model,
        batch,
        loss=configuration.loss,
        precision=configuration.precision,
        optimizer=configuration.optimizer,
        clip=configuration.clip,
        device=DEVICE,
    )
    seconds = time.perf_counter() - start
    return {**predicted_figures(profile), "assumptions": profile.assumptions, "profiling_seconds": round(seconds, 2)}


def predicted_figures(profile: ModelProfile) -> Row:
    """The figures of a profile that were measured too."""
    peaks = profile.peaks
    return {
        "steady_bytes": {phase: getattr(peaks, f"{phase}_bytes") for phase in PHASES},
        "allocated_bytes": peaks.overall_bytes,
        "reserved_bytes": peaks.reserved_bytes,
        "expandable_reserved_bytes": peaks.reserved_expandable_bytes,
        "nvml_bytes": profile.device_bytes,
        "first_bytes": profile.first_peaks.overall_bytes,
    }


def measured_figures(row: Row) -> Row:
    """What was measured, under the names of the predicted figures."""
    measured = row["measured"]
    return {
        "allocated_bytes": max(measured["steady_bytes"].values()),
        "reserved_bytes": measured["reserved_bytes"],
        "expandable_reserved_bytes": row.get("expandable_reserved_bytes"),
        "nvml_bytes": measured["nvml_bytes"],
        "first_bytes": max(measured["first_bytes"].values()),
    }


def errors(row: Row) -> Row:
    """Predicted over measured, less one, of every figure that both have; and whether the peak's phase is right."""
    predicted, measured = row["predicted"], measured_figures(row)
    both = [name for name in measured if measured[name] and predicted.get(name)]
    return {
        **{name: round(predicted[name] / measured[name] - 1, 4) for name in both},
        "phase_right": _peak_phase(predicted["steady_bytes"]) == _peak_phase(row["measured"]["steady_bytes"]),
    }


def _peak_phase(peaks: dict[str, int | None]) -> str:
    return max(PHASES, key=lambda phase: peaks.get(phase) or 0)


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines: each figure's errors over the rows, the share of right phases, and the rows that are worst."""
    lines = []
    for name in ("allocated", "reserved", "expandable_reserved", "nvml", "first"):
        key = f"{name}_bytes"
        found = [row["errors"][key] for row in rows if key in row["errors"]]
        if found:
            median, high, worst = spread(found)
            lines.append(
                f"  {name:20} median {median:7.2%}   95th percentile {high:7.2%}   worst {worst:7.2%}   ({len(found)})"
            )
    predicted = [row for row in rows if row["errors"]]
    right = sum(row["errors"]["phase_right"] for row in predicted)
    lines.append(f"  the phase of the peak is right in {right} of {len(predicted)}")
    refused = [row for row in rows if not row["errors"]]
    lines += [f"  refused: {row['name']}: {row['predicted']['error'][:200]}" for row in refused]
    furthest = sorted(predicted, key=lambda row: -abs(row["errors"]["allocated_bytes"]))[:WORST_SHOWN]
    return lines + [f"  worst: {row['name']} {row['errors']['allocated_bytes']:+.2%}" for row in furthest]


def _parts(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    tuned, held_out = [r for r in rows if not r["held_out"]], [r for r in rows if r["held_out"]]
    return [(title, part) for title, part in (("Tuning set", tuned), ("Held-out set", held_out)) if part]


def _line(row: Row) -> str:
    if not row["errors"]:
        return f"{row['name']:48} {row['predicted']['error'][:150]}"
    found = row["errors"]
    figures = " ".join(
        f"{name.rpartition('_')[0]} {found[name]:+.1%}" for name in measured_figures(row) if name in found
    )
    phases = "/".join(_peak_phase(row[side]["steady_bytes"]) for side in ("predicted", "measured"))
    gib = max(row["measured"]["steady_bytes"].values()) / 2**30
    return f"{row['name']:48} {gib:6.2f} GiB  {figures}  {phases}  {row['predicted']['profiling_seconds']:.1f} s"
