"""Plans that were measured, as the planner prices them now: needs no GPU, but the transformers that they ran with."""

import json
from dataclasses import astuple
from typing import Any

from benchmarks.common import RESULTS, spread
from benchmarks.planned_models import model_named, profiled
from memplan.activations import ACTIVATION_MARGIN, FIXED_MARGIN_BYTES, Way
from memplan.candidates import FamilySearch
from memplan.machine import Machine
from memplan.memory import Counts
from memplan.planned import counts_of
from memplan.problem import Family
from memplan.rates import Rates
from memplan.search import problem_of
from memplan.sharding import Sharding
from offload.plan import Buckets, Plan, Tier
from profiler.profile import ModelProfile

GIB = 1 << 30
MACHINE = Machine("cuda", 1, "NVIDIA H200", 140 * GIB, 100 * GIB, None, 0, None, 16)
"""What predictions are made for where none of it is here."""
MARGINS_MIB = (32, 64, 96, 128, 160, 192)


def setup_of(found: Plan) -> dict[str, Any]:
    """What a prediction can be made from again."""
    return {
        "counts": list(astuple(counts_of(found))),
        "micro_batch": found.micro_batch_size,
        "accumulation": found.gradient_accumulation_steps,
        "recompute": len(found.recompute),
        "checkpoints": found.checkpoints.value,
        "loss_chunks": found.loss_chunks,
        "buckets": [found.buckets.prefetch_units, found.buckets.update_elements, found.buckets.update_slots],
        "gpu_update_share": found.gpu_update_share,
    }


def restored(
    profile: ModelProfile, rates: Rates, setup: dict[str, Any], micro_batch: int, accumulation: int
) -> tuple[FamilySearch, Counts]:
    """A setup as the planner prices it today, with any micro-batch."""
    problem = problem_of(profile, MACHINE, rates, micro_batch * accumulation, None)
    way = Way(micro_batch, setup["recompute"], Tier(setup["checkpoints"]), setup["loss_chunks"])
    buckets = Buckets(
        **dict(zip(("prefetch_units", "update_elements", "update_slots"), setup["buckets"], strict=False))
    )
    return FamilySearch(problem, Family(Sharding(0, 1), way, accumulation), buckets), Counts(*setup["counts"])


def allowed_by_margin(profile: ModelProfile, rates: Rates, setup: dict[str, Any], gpu_bytes: int) -> dict[str, Any]:
    """The largest micro-batch for which the planner thinks that these placements fit; 0 where none does.

    Also what it would be with other fixed margins. The update has its least slots, as nobody would refuse a batch for
    what only fills the room that is left.
    """
    least = setup["buckets"][:2]
    uppers = []
    for micro_batch in range(1, profile.batch_size + 1):
        family, counts = restored(profile, rates, {**setup, "buckets": least}, micro_batch, 1)
        uppers.append(family.gpu_upper_bytes(counts))
    fixed = FIXED_MARGIN_BYTES["cuda"]

    def largest(margin: int) -> int:
        return max((b for b, upper in enumerate(uppers, 1) if upper - fixed + margin <= gpu_bytes), default=0)

    return {"largest_allowed": largest(fixed), "with_margin_mib": {m: largest(m << 20) for m in MARGINS_MIB}}


def predict_again(rates: Rates) -> None:
    """The plans that were measured, predicted by today's code: needs no GPU, but the same transformers."""
    path = RESULTS / "planner.json"
    data = json.loads(path.read_text())
    profiles: dict[str, ModelProfile] = {}
    for row in data["rows"]:
        model, s = model_named(row["model"]), row["setup"]
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
            profiles[key] = profiled(model_named(row["model"]), rates, row["batches"]["most"])
        again = allowed_by_margin(profiles[key], rates, row["setup"], row["gpu_budget_bytes"])
        row["batches"]["largest_allowed_again"] = again["largest_allowed"]
        print(f"{row['model']:16} {row['budget']:28} {row['batches']}", flush=True)
    data["summary"]["batches_again"] = refusals(data["rows"], "largest_allowed_again") | {
        "activation_margin": ACTIVATION_MARGIN,
        "fixed_margin_bytes": FIXED_MARGIN_BYTES["cuda"],
    }
    print(data["summary"]["batches_again"])
    path.write_text(json.dumps(data, indent=1) + "\n")


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
