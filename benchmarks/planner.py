"""Plans beside what they turn out to be: peaks of every tier, seconds of a step, and which batches fit.

    python -m benchmarks.planner --calibration calibration.json --nvme DIR

Every model is planned for budgets from ample to tight, and every plan is trained for a few steps by the engine with the
allocator capped at the budget. ``batches`` then finds the largest micro-batch that each plan's placements really allow,
and compares what the planner said of every batch size up to twice that. ``--predict`` measures nothing: today's code
predicts the plans in ``results`` again, and says which of their batches it would allow.
"""

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import save
from benchmarks.planned_again import GIB, allow_again, allowed_by_margin, line, predict_again, setup_of, summary
from benchmarks.planned_models import Model, chosen_models, model_named, profiled
from benchmarks.planned_runs import largest_batch, run_plan
from memplan.errors import NothingFits
from memplan.machine import Machine, detect
from memplan.rates import Rates
from memplan.search import plan
from offload.plan import Plan
from profiler.profile import ModelProfile

SHARES = (1.05, 0.6, 0.4, 0.25)
"""GPU budgets, of what the plan with everything on the GPU takes."""
LITTLE_GPU_BYTES, LITTLE_HOST_BYTES, LITTLE_BESIDE_BYTES = 7, 6, GIB
"""Budgets for a parameter on the GPU and on the host, and on the GPU beside that, which together do not hold a model's
state."""
BATCHES_AT = "0.4 of resident"
"""Of them, where the largest batch is looked for."""


def machines(base: Machine, profile: ModelProfile, resident: Plan) -> Iterator[tuple[str, Machine]]:
    """The base machine with less and less of a GPU and no disk, then one that holds the model with its disk only."""
    without = replace(base, nvme_bytes=0, nvme_dir=None)
    for share in SHARES:
        yield (
            f"{share} of resident",
            replace(without, gpu_bytes=int(resident.prediction.gpu_upper_bytes * share)),
        )
    if base.nvme_dir is not None:
        elements = profile.parameter_elements
        gpu, host = LITTLE_GPU_BYTES * elements + LITTLE_BESIDE_BYTES, LITTLE_HOST_BYTES * elements
        yield "little of both, and NVMe", replace(base, gpu_bytes=gpu, host_bytes=host)


def predicted(found: Plan) -> dict[str, Any]:
    """What the plan says, in short."""
    p = found.prediction
    tiers = {
        tier: sum(tier in (x.parameters, x.gradients, x.optimizer) for x in found.placements)
        for tier in ("host", "nvme")
    }
    return {
        "gpu_peak_bytes": p.gpu_peak_bytes,
        "gpu_upper_bytes": p.gpu_upper_bytes,
        "host_bytes": p.host_bytes,
        "nvme_bytes": p.nvme_bytes,
        "seconds": p.step_seconds,
        "bottleneck": p.bottleneck,
        "lanes": p.lane_seconds,
        "micro_batch": found.micro_batch_size,
        "recompute": len(found.recompute),
        "loss_chunks": found.loss_chunks,
        "units_on": tiers,
    }


def profiles_of(chosen: list[Model], calibration: Path, sizes: list[int]) -> dict[tuple[str, int], ModelProfile]:
    """By model and batch size, 0 being the model's own; made side by side, for nothing is timed meanwhile."""
    keys = list(product((m.name for m in chosen), sizes))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        made = pool.map(_profile, *zip(*keys, strict=True), [calibration] * len(keys))
        return dict(zip(keys, map(ModelProfile.from_dict, made), strict=True))


def _profile(name: str, size: int, calibration: Path) -> dict[str, Any]:
    model = model_named(name)
    return profiled(model, Rates.load(calibration), size or model.batch_size).to_dict()


def plans_part(args: argparse.Namespace, rates: Rates) -> list[dict[str, Any]]:
    """Every model and budget: planned, trained, compared."""
    rows = []
    base = detect(args.nvme)
    chosen = chosen_models(args.models)
    profiles = profiles_of(chosen, args.calibration, [0, args.most] if args.batches else [0])
    for model in chosen:
        profile = profiles[model.name, 0]
        if args.keep:
            profile.save(args.keep / f"{model.name.split()[0]}-profile.json")
        resident = plan(profile, replace(base, nvme_dir=None, nvme_bytes=0), rates, batch_size=model.batch_size)
        for name, machine in machines(base, profile, resident):
            row: dict[str, Any] = {"model": model.name, "budget": name, "gpu_budget_bytes": machine.gpu_bytes}
            try:
                found = plan(profile, machine, rates, batch_size=model.batch_size)
            except NothingFits as error:
                rows.append({**row, "refused": str(error)})
                print(f"{model.name:16} {name:28} refused: {error}", flush=True)
                continue
            row["predicted"], row["setup"] = predicted(found), setup_of(found)
            row["measured"] = run_plan(model, found)
            if args.keep:
                found.save(args.keep / f"{model.name.split()[0]}-{name.replace(' ', '-')}-plan.json")
            if args.batches and name == BATCHES_AT and row["measured"]["out_of_memory"] is None:
                row["batches"] = batches_row(model, profiles[model.name, args.most], rates, found)
            rows.append(row)
            print(line(row), flush=True)
        save("planner", rows, summary=summary(rows))  # what is measured stays, should the time end
    return rows


def batches_row(model: Model, larger: ModelProfile, rates: Rates, found: Plan) -> dict[str, Any]:
    """The largest batch that runs and the largest that the planner allows, from a profile of larger batches."""
    most = larger.batch_size
    real = largest_batch(model, found, most)
    allowed = allowed_by_margin(larger, rates, setup_of(found), found.budget.gpu_bytes)
    return {"largest_that_runs": real, **allowed, "most": most}


def main() -> None:
    """Run the parts, print lines, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--nvme", type=Path)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--batches", action="store_true", help="find the largest batch of every plan, too")
    parser.add_argument("--most", type=int, default=256, help="the largest batch to try")
    parser.add_argument("--keep", type=Path, help="a directory for the profiles and plans")
    parser.add_argument("--predict", action="store_true", help="predict what was measured again; no GPU")
    args = parser.parse_args()
    rates = Rates.load(args.calibration)
    if args.predict:
        predict_again(rates)
        allow_again(rates)
        return
    rows = plans_part(args, rates)
    print(summary(rows))


if __name__ == "__main__":
    main()
