"""Plans beside what they turn out to be: peaks of every tier, seconds of a step, and which batches fit.

    python -m benchmarks.planner --calibration calibration.json --nvme DIR

Every model is planned for budgets from ample to tight, and every plan is trained for a few steps by the engine with the
allocator capped at the budget. ``batches`` then finds the largest micro-batch that each plan's placements really allow,
and compares what the planner said of every batch size up to twice that. ``neighbours`` trains the candidates that the
planner ranked next, beside the one that it chose. ``--predict`` measures nothing: today's code predicts the plans in
``results`` again, and says which of their batches it would allow.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.common import RESULTS, save, spread
from benchmarks.planned_models import Model, build, models, profiled
from memplan.activations import ACTIVATION_MARGIN, FIXED_MARGIN_BYTES, Way
from memplan.candidates import FamilySearch, best_of, search
from memplan.errors import NothingFits
from memplan.machine import Machine, detect
from memplan.memory import Counts
from memplan.planned import counts_of
from memplan.problem import Family
from memplan.rates import Rates
from memplan.search import plan, plan_of, problem_of
from memplan.sharding import Sharding
from offload.engine import Engine
from offload.plan import Buckets, Plan, Tier
from profiler.profile import ModelProfile

GIB = 1 << 30
STEPS, WARM_UP = 6, 3
MACHINE = Machine("cuda", 1, "NVIDIA H200", 140 * GIB, 100 * GIB, None, 0, None, 16)
"""What predictions are made for where none of it is here."""
SHARES = (1.05, 0.75, 0.55, 0.4, 0.25)
"""GPU budgets, of what the plan with everything on the GPU takes."""
BATCHES_AT = (1.05, 0.4)
"""Of them, where the largest batch is looked for."""


@contextmanager
def capped(gpu_bytes: int) -> Iterator[None]:
    """The allocator may hold no more than this."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()  # what the run before left in cycles
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def machines(base: Machine, resident: Plan, host_bytes: int) -> Iterator[tuple[float, str, Machine]]:
    """The base machine with less of everything, step by step; with the tightest GPU the host is short too."""
    peak = resident.prediction.gpu_upper_bytes
    for share in SHARES:
        tight = share == SHARES[-1] and base.nvme_dir is not None
        host = int(resident.prediction.gpu_upper_bytes * 0.3) if tight else host_bytes
        yield (
            share,
            f"{share} of resident" + (", little host" if tight else ""),
            replace(base, gpu_bytes=int(peak * share), host_bytes=host, nvme_bytes=base.nvme_bytes if tight else 0),
        )


def run_plan(model: Model, found: Plan, steps: int = STEPS) -> dict[str, Any]:
    """Train by a plan for a few steps under its own budget."""
    torch.cuda.reset_peak_memory_stats()
    before = psutil.Process().memory_info().rss
    row: dict[str, Any] = {"out_of_memory": None}
    with capped(found.budget.gpu_bytes):
        row["gpu_before_bytes"] = torch.cuda.memory_allocated()
        network = build(model)
        built = psutil.Process().memory_info().rss
        engine = None
        try:
            engine = Engine(network, found, torch.optim.AdamW(network.parameters(), lr=1e-4), max_grad_norm=1.0)
            seconds, issued = [], []
            batches = [
                {k: v.cuda() for k, v in model.batch(found.micro_batch_size).items()}
                for _ in range(found.gradient_accumulation_steps)
            ]
            for step in range(steps):
                if step == WARM_UP:
                    retries = torch.cuda.memory_stats()["num_alloc_retries"]
                begun = time.perf_counter()
                for batch in batches:
                    loss = engine(**batch).loss
                    engine.backward(loss)
                    engine.step()
                issued.append(time.perf_counter() - begun)
                loss.item()
                seconds.append(time.perf_counter() - begun)
            held = engine.meter.peak_bytes()
            row |= {
                "seconds": statistics.median(seconds[WARM_UP:]),
                # Nearly all of the seconds where a step waits for the CPU; retries where it waits for the allocator.
                "issued_seconds": statistics.median(issued[WARM_UP:]),
                "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries,
                "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
                "gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
                "host_bytes": held.get("host", 0),
                "host_grown_bytes": psutil.Process().memory_info().rss - before,
                "model_built_bytes": built - before,
                "nvme_bytes": held.get("nvme", 0),
                "overflow_slots": engine.overflow_count,
            }
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error).splitlines()[0]
        except Exception as error:  # noqa: BLE001 - one failure must not end the others
            row["out_of_memory" if "memory" in str(error) else "failed"] = f"{type(error).__name__}: {error}"[:200]
        finally:
            if engine is not None:
                engine.close()
            del engine, network
    return row


def setup_of(found: Plan) -> dict[str, Any]:
    """What a prediction can be made from again."""
    return {
        "counts": list(astuple(counts_of(found))),
        "micro_batch": found.micro_batch_size,
        "accumulation": found.gradient_accumulation_steps,
        "recompute": len(found.recompute),
        "checkpoints": found.checkpoints.value,
        "loss_chunks": found.loss_chunks,
        "buckets": [found.buckets.prefetch_units, found.buckets.update_elements],
    }


def restored(
    profile: ModelProfile, rates: Rates, setup: dict[str, Any], micro_batch: int, accumulation: int
) -> tuple[FamilySearch, Counts]:
    """A setup as the planner prices it today, with any micro-batch."""
    problem = problem_of(profile, MACHINE, rates, micro_batch * accumulation, None)
    way = Way(micro_batch, setup["recompute"], Tier(setup["checkpoints"]), setup["loss_chunks"])
    prefetch_units, update_elements = setup["buckets"]
    buckets = Buckets(prefetch_units=prefetch_units, update_elements=update_elements)
    return FamilySearch(problem, Family(Sharding(0, 1), way, accumulation), buckets), Counts(*setup["counts"])


def predict_again(rates: Rates) -> None:
    """The plans that were measured, predicted by today's code: needs no GPU, but the same transformers."""
    path = RESULTS / "planner.json"
    data = json.loads(path.read_text())
    profiles: dict[str, ModelProfile] = {}
    for row in data["rows"]:
        model, s = _model(row["model"]), row["setup"]
        if model.name not in profiles:
            profiles[model.name] = profiled(model, rates, model.batch_size)
        family, counts = restored(profiles[model.name], rates, s, s["micro_batch"], s["accumulation"])
        row["predicted"] |= {
            "gpu_peak_bytes": family.gpu_peak_bytes(counts),
            "gpu_upper_bytes": family.gpu_upper_bytes(counts),
            "host_bytes": family.host_bytes(counts),
            "nvme_bytes": family.nvme_bytes(counts),
            "seconds": family.seconds_of(counts),
        }
        print(line(row), flush=True)
    data["summary"] = summary(data["rows"])
    print(data["summary"])
    path.write_text(json.dumps(data, indent=1) + "\n")


def allow_again(rates: Rates) -> None:
    """Which batches today's predictions and margins allow, of those that were measured; what was said then stays."""
    path = RESULTS / "planner.json"
    data = json.loads(path.read_text())
    profiles: dict[tuple[str, int], ModelProfile] = {}
    for row in data["rows"]:
        if "batches" not in row:
            continue
        key = row["model"], row["batches"]["most"]
        if key not in profiles:
            profiles[key] = profiled(_model(row["model"]), rates, row["batches"]["most"])
        row["batches"]["largest_allowed_again"] = largest_allowed(
            profiles[key], rates, row["setup"], row["gpu_budget_bytes"]
        )
        print(f"{row['model']:16} {row['budget']:28} {row['batches']}", flush=True)
    data["summary"]["batches_again"] = refusals(data["rows"], "largest_allowed_again") | {
        "activation_margin": ACTIVATION_MARGIN,
        "fixed_margin_bytes": FIXED_MARGIN_BYTES["cuda"],
    }
    print(data["summary"]["batches_again"])
    path.write_text(json.dumps(data, indent=1) + "\n")


def _model(name: str) -> Model:
    return next(model for model in models() if model.name == name)


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


def largest_allowed(profile: ModelProfile, rates: Rates, setup: dict[str, Any], gpu_bytes: int) -> int:
    """The largest micro-batch for which the planner thinks that these placements fit; 0 where none does."""

    def fits(micro_batch: int) -> bool:
        family, counts = restored(profile, rates, setup, micro_batch, 1)
        return family.gpu_upper_bytes(counts) <= gpu_bytes

    return max((b for b in range(1, profile.batch_size + 1) if fits(b)), default=0)


def largest_batch(model: Model, found: Plan, most: int) -> int:
    """The largest micro-batch that really runs with these placements, by bisection."""
    with capped(found.budget.gpu_bytes):
        network = build(model)
        engine = Engine(network, replace(found, gradient_accumulation_steps=1), max_grad_norm=1.0)
        try:
            low, high = found.micro_batch_size, most
            if not _runs(engine, model, low):
                return 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _runs(engine, model, middle) else (low, middle)
        finally:
            engine.close()
            del engine, network
    return low


def _runs(engine: Engine, model: Model, size: int) -> bool:
    try:
        for _ in range(2):
            engine.backward(engine(**{k: v.cuda() for k, v in model.batch(size).items()}).loss)
            engine.step()
        torch.cuda.synchronize()
    except Exception as error:
        if "memory" not in str(error):
            raise
        print(f"    {model.name}, batch {size}: {str(error)[:300]}", flush=True)
        engine.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        return False
    return True


def plans_part(args: argparse.Namespace, rates: Rates) -> list[dict[str, Any]]:
    """Every model and budget: planned, trained, compared."""
    rows = []
    base = detect(args.nvme)
    for model in models():
        if args.models and not any(name in model.name for name in args.models):
            continue
        begun = time.perf_counter()
        profile = profiled(model, rates, model.batch_size)
        took = time.perf_counter() - begun
        if args.keep:
            profile.save(args.keep / f"{model.name.split()[0]}-profile.json")
        resident = plan(profile, replace(base, nvme_dir=None, nvme_bytes=0), rates, batch_size=model.batch_size)
        for share, name, machine in machines(base, resident, base.host_bytes):
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
                found.save(args.keep / f"{model.name.split()[0]}-{share}-plan.json")
            if args.batches and share in BATCHES_AT and row["measured"]["out_of_memory"] is None:
                row["batches"] = batches_row(model, rates, found, args.most)
            rows.append(row)
            print(line(row), flush=True)
        print(f"  {model.name}: profiled in {took:.1f} s, all {time.perf_counter() - begun:.0f} s", flush=True)
    return rows


def batches_row(model: Model, rates: Rates, found: Plan, most: int) -> dict[str, Any]:
    """The largest batch that runs and the largest that the planner allows, from a profile of larger batches."""
    larger = profiled(model, rates, most)
    real = largest_batch(model, found, most)
    allowed = largest_allowed(larger, rates, setup_of(found), found.budget.gpu_bytes)
    return {"largest_that_runs": real, "largest_allowed": allowed, "most": most}


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    p, m = row["predicted"], row["measured"]
    head = f"{row['model']:16} {row['budget']:28}"
    if m.get("seconds") is None:
        return f"{head} {m}"
    gpu = 100 * (p["gpu_peak_bytes"] / m["gpu_peak_bytes"] - 1)
    step = 100 * (p["seconds"] / m["seconds"] - 1)
    batches = row.get("batches", {})
    tiers = " ".join(f"{t} {m[f'{t}_bytes'] / GIB:.2f} ({p[f'{t}_bytes'] / GIB:.2f})" for t in ("host", "nvme"))
    sizes = [m["gpu_reserved_bytes"], row["gpu_budget_bytes"], p["gpu_upper_bytes"], m["host_grown_bytes"]]
    reserved, budget, upper, grown = (f"{size / GIB:.2f}" for size in sizes)
    how = f"b{p['micro_batch']} r{p['recompute']} c{p['loss_chunks']} {p['units_on']} {batches or ''}"
    return (
        f"{head} gpu {m['gpu_peak_bytes'] / GIB:6.2f} ({gpu:+.1f} %) reserved {reserved} of {budget} upper {upper}  "
        f"{tiers} rss {grown}  step {m['seconds']:.3f} ({step:+.0f} %) {p['bottleneck']} {how}"
    )


def neighbours_part(args: argparse.Namespace, rates: Rates) -> list[dict[str, Any]]:
    """The chosen candidate and those ranked next, all trained."""
    rows = []
    base = detect(args.nvme)
    for model in models():
        if args.models and not any(name in model.name for name in args.models):
            continue
        profile = profiled(model, rates, model.batch_size)
        resident = plan(profile, base, rates, batch_size=model.batch_size)
        machine = replace(base, gpu_bytes=int(resident.prediction.gpu_upper_bytes * 0.5))
        problem = problem_of(profile, machine, rates, model.batch_size, None)
        found = search(problem)
        size = found[0].buckets.update_elements
        others = [best_of(problem, family, size) for family in problem.families()]
        ranked = sorted((c for c in others if c is not None), key=lambda c: c.rank)[: args.neighbours + 1]
        for place, candidate in enumerate(ranked):
            measured = run_plan(model, plan_of(problem, candidate, machine))
            rows.append(
                {"model": model.name, "rank": place, "predicted_seconds": candidate.seconds, "measured": measured}
            )
            print(
                f"{model.name} rank {place}: {candidate.seconds:.3f} {measured.get('seconds')} {candidate.family.way}"
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the whole."""
    done = _trained(rows)
    found: dict[str, Any] = {
        "plans": len([r for r in rows if "measured" in r]),
        "out_of_memory": len([r for r in rows if r.get("measured", {}).get("out_of_memory")]),
    }
    for name in ("gpu_peak_bytes", "host_bytes", "nvme_bytes", "seconds"):
        errors = [r["predicted"][name] / r["measured"][name] - 1 for r in done if r["measured"][name]]
        if errors:
            found[name] = dict(zip(("median", "p95", "worst"), (round(e, 4) for e in spread(errors)), strict=True))
    if any("batches" in r for r in done):
        found["batches"] = refusals(rows, "largest_allowed")
    return found


def refusals(rows: list[dict[str, Any]], allowed: str) -> dict[str, int]:
    """Batches up to twice the largest that runs: refused, refused that run, and plans that allow one that does not."""
    batches = [r["batches"] for r in _trained(rows) if "batches" in r]
    return {
        "refused": sum(min(2 * b["largest_that_runs"], b["most"]) - b[allowed] for b in batches),
        "wrongly": sum(max(0, b["largest_that_runs"] - b[allowed]) for b in batches),
        "allowed_wrongly": sum(b[allowed] > b["largest_that_runs"] for b in batches),
    }


def _trained(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if r.get("measured", {}).get("seconds") is not None]


def main() -> None:
    """Run the parts, print lines, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--nvme", type=Path)
    parser.add_argument("--models", nargs="*", default=[])
    parser.add_argument("--batches", action="store_true", help="find the largest batch of every plan, too")
    parser.add_argument("--most", type=int, default=128, help="the largest batch to try")
    parser.add_argument("--keep", type=Path, help="a directory for the profiles and plans")
    parser.add_argument("--predict", action="store_true", help="predict what was measured again; no GPU")
    parser.add_argument("--neighbours", type=int, default=0, help="train so many candidates beside the chosen one")
    args = parser.parse_args()
    rates = Rates.load(args.calibration)
    if args.predict:
        predict_again(rates)
        allow_again(rates)
        return
    if args.neighbours:
        rows = neighbours_part(args, rates)
        print(save("planner-neighbours", rows))
        return
    rows = plans_part(args, rates)
    print(summary(rows))
    print(save("planner", rows, summary=summary(rows)))


if __name__ == "__main__":
    main()
