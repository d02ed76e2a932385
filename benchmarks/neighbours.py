"""The plan that is chosen beside the candidates that the planner ranked next, all of them trained.

    python -m benchmarks.neighbours --calibration calibration.json --models vit llama

Each model is planned for a GPU of half of what it takes there. The chosen plan and the next candidates run once, in
the order of their ranks; then the chosen one and the fastest of them run again in turn, for the least of many times
that vary is not the time of its candidate. What is compared is each one's median.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import save
from benchmarks.planned_models import Model, chosen_models, profiled
from benchmarks.planned_runs import run_plan
from memplan.candidates import best_of, in_order, search
from memplan.machine import detect
from memplan.rates import Rates
from memplan.search import plan, plan_of, problem_of, with_more_slots
from offload.plan import Plan

SHARE = 0.5
"""Of the GPU memory that a model takes with everything there."""
FASTEST, AGAIN = 4, 2
"""How many of the candidates run again, and how often."""


def candidates(model: Model, rates: Rates, count: int) -> Iterator[tuple[dict[str, Any], Plan]]:
    """The chosen one and so many more, in order: a row to fill, and the plan."""
    profile = profiled(model, rates, model.batch_size)
    base = detect(None)
    resident = plan(profile, base, rates, batch_size=model.batch_size)
    machine = replace(base, gpu_bytes=int(resident.prediction.gpu_upper_bytes * SHARE))
    problem = problem_of(profile, machine, rates, model.batch_size, None)
    elements = search(problem)[0].buckets.update_elements
    fitting = [c for family in problem.families() if (c := best_of(problem, family, elements)) is not None]
    for rank, candidate in enumerate(in_order(fitting, min(c.seconds for c in fitting))[: count + 1]):
        chosen = replace(candidate, buckets=with_more_slots(problem, candidate))
        row = {"model": model.name, "rank": rank, "way": str(candidate.family.way), "runs": []}
        yield row | {"predicted_seconds": candidate.seconds}, plan_of(problem, chosen, machine)


def seconds_of(row: dict[str, Any]) -> float:
    """The median of a candidate's runs; no end of time where one failed."""
    taken = [run.get("seconds") for run in row["runs"]]
    return float("inf") if None in taken or not taken else median(taken)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By model: how much longer the chosen one takes than the fastest of all that ran as often."""
    found = {}
    done = [row for row in rows if row["runs"]]
    for name in {row["model"]: None for row in done}:
        own = [row for row in done if row["model"] == name]
        most = max(len(row["runs"]) for row in own)
        best = min((row for row in own if len(row["runs"]) == most), key=seconds_of)
        found[name] = {
            "chosen_seconds": seconds_of(own[0]),
            "best_seconds": seconds_of(best),
            "best_rank": best["rank"],
            "candidates_that_ran": len(own) - 1,
            "behind": round(seconds_of(own[0]) / seconds_of(best) - 1, 4),
        }
    return found


def measure(model: Model, ranked: list[tuple[dict[str, Any], Plan]]) -> Iterator[None]:
    """Fill the rows' runs, one at a time."""

    def run(at: int) -> None:
        row, found = ranked[at]
        row["runs"].append(run_plan(model, found))
        predicted, taken = row["predicted_seconds"], row["runs"][-1].get("seconds")
        print(f"{model.name} rank {at}: predicted {predicted:.3f}, took {taken} {row['way']}", flush=True)

    run_plan(model, ranked[0][1])  # the first one of a process is slower
    for at in range(len(ranked)):
        yield run(at)
    fastest = sorted(range(1, len(ranked)), key=lambda at: seconds_of(ranked[at][0]))[:FASTEST]
    for at in (0, *fastest) * AGAIN:
        yield run(at)


def main() -> None:
    """Run them, print lines, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--candidates", type=int, default=20, help="beside the chosen one")
    args = parser.parse_args()
    rates = Rates.load(args.calibration)
    rows: list[dict[str, Any]] = []
    for model in chosen_models(args.models):
        ranked = list(candidates(model, rates, args.candidates))
        rows += [row for row, _ in ranked]
        for _ in measure(model, ranked):
            save("planner-neighbours", rows, summary=summary(rows))
    print(summary(rows))


if __name__ == "__main__":
    main()
