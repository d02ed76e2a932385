"""Plans for engines that move whole tiers: the best setup as a Plan, why, and what else there was."""

from collections.abc import Sequence
from dataclasses import replace

from memplan.engines.deepspeed import DeepSpeed
from memplan.engines.fsdp2 import FSDP2
from memplan.engines.whole import Priced, WholeEngine, fitting, least_short, price_all
from memplan.errors import NothingFits
from memplan.explain import describe_family, step_reason
from memplan.family_plan import family_plan
from memplan.formatting import format_bytes
from memplan.machine import Machine
from memplan.problem import Problem
from memplan.sizes import OPTIONS, grain_of, size_text
from offload.plan import Alternative, Plan, Prediction, Target, Tier
from offload.residency import aligned

ENGINES: dict[Target, WholeEngine] = {Target.DEEPSPEED: DeepSpeed(), Target.FSDP2: FSDP2()}
SPREAD = 0.3
"""How far off a step may be, as a share of it, beside what the rates themselves may be off."""
ALTERNATIVES = 4
UPDATE_REMARK = "{}'s own update on the CPU was taken from steps measured on 16 cores: its steps are rough."


def plan_whole(problem: Problem, machine: Machine, engine: WholeEngine | None = None) -> Plan:
    """The fastest setup that fits; raises NothingFits. ``engine`` is by default the target's."""
    everything = price_all(problem, engine or ENGINES[problem.target])
    found = fitting(problem, everything)
    if not found:
        raise _nothing_fits(problem, least_short(problem, everything), machine)
    best = found[0]
    others = [_alternative(problem, p, best) for p in _different(found)[1:ALTERNATIVES]]
    resident = min((p for p in everything if not p.setup.depth), key=lambda p: p.gpu_upper_bytes)
    if resident.shortage(problem):
        others.insert(0, _alternative(problem, resident, best))
    return replace(plan_of_setup(problem, best, machine), reasons=_reasons(problem, best), alternatives=tuple(others))


def plan_of_setup(problem: Problem, priced: Priced, machine: Machine) -> Plan:
    """A priced setup as a plan."""
    setup, seconds = priced.setup, priced.timeline.seconds
    busy = priced.timeline.busy_seconds
    spread = SPREAD + problem.rates.spread
    return family_plan(
        problem,
        setup.family,
        machine,
        placements=setup.placements(problem),
        buckets=setup.buckets,
        gpu_update_share=setup.gpu_update_share,
        prediction=Prediction(
            gpu_peak_bytes=priced.gpu_peak_bytes,
            host_bytes=priced.held.host_peak_bytes,
            pinned_bytes=priced.held.pinned_bytes,
            nvme_bytes=priced.held.nvme_bytes,
            step_seconds=seconds,
            bottleneck=max(busy, key=busy.__getitem__),
            lane_seconds=busy,
            gpu_upper_bytes=priced.gpu_upper_bytes,
            host_upper_bytes=priced.held.host_peak_bytes,
            step_seconds_range=(seconds * (1 - min(0.9, spread)), seconds * (1 + spread)),
            phases={"gpu": dict(priced.gpu_phases), "host": dict(priced.held.host)},
        ),
    )


def describe_setup(problem: Problem, priced: Priced) -> str:
    """One line."""
    setup = priced.setup
    places = (("parameters", setup.parameters), ("optimizer state", setup.optimizer))
    away = [f"{what} on {tier}" for what, tier in places if tier is not Tier.GPU]
    if setup.gpu_update_share:
        away[-1] += f", {setup.gpu_update_share:.0%} of it on the GPU"
    return ", ".join([describe_family(problem, setup.family), *(away or ["everything on gpu"])])


def _different(found: Sequence[Priced]) -> list[Priced]:
    """The best of each stage and place, so that alternatives are not one setup with other buffers."""
    kinds: dict[object, Priced] = {}
    for priced in found:
        s = priced.setup
        kinds.setdefault((s.family.sharding, s.parameters, s.optimizer, s.family.way.recomputed_blocks > 0), priced)
    return list(kinds.values())


def _reasons(problem: Problem, best: Priced) -> tuple[str, ...]:
    busy = best.timeline.busy_seconds
    held = best.held
    return (
        f"{describe_setup(problem, best)}: the fastest way in which {problem.target} fits.",
        f"On each GPU at most {format_bytes(best.gpu_upper_bytes)} are expected, of "
        f"{format_bytes(problem.budget.gpu_bytes)}; without activations {format_bytes(held.gpu_peak_bytes)}.",
        f"On the host {format_bytes(held.host_peak_bytes)} of {format_bytes(problem.budget.host_bytes)}, with "
        f"{problem.target}'s copies and buffers, {format_bytes(held.pinned_bytes)} of it pinned.",
        step_reason(best.timeline.seconds, busy),
        *([UPDATE_REMARK.format(problem.target)] if busy.get("cpu_update") else []),
        problem.rates.source,
    )


def _alternative(problem: Problem, priced: Priced, best: Priced) -> Alternative:
    short = priced.shortage(problem)
    if short:
        tier = max(short, key=short.__getitem__)
        why_not = f"does not fit: short {format_bytes(short[tier])} in the {tier} tier"
    else:
        why_not = f"slower by {100 * (priced.timeline.seconds / best.timeline.seconds - 1):.1f} %"
    return Alternative(
        description=describe_setup(problem, priced),
        step_seconds=priced.timeline.seconds,
        gpu_peak_bytes=priced.gpu_peak_bytes,
        host_bytes=priced.held.host_peak_bytes,
        nvme_bytes=priced.held.nvme_bytes,
        why_not=why_not,
    )


def _nothing_fits(problem: Problem, nearest: Priced, machine: Machine) -> NothingFits:
    """What is short, and sizes with which the nearest setup fits: rounded up, as a person would write them."""
    short = nearest.shortage(problem)
    wanted = []
    for tier, shortage in short.items():
        size = getattr(problem.budget, f"{tier.value}_bytes") + shortage
        size += machine.context_bytes if tier is Tier.GPU else 0
        wanted.append(OPTIONS[tier].format(size_text(aligned(size, grain_of(size)))))
    shortages = [f"{format_bytes(size)} more in the {tier.value} tier" for tier, size in short.items()]
    tier = max(short, key=short.__getitem__)
    return NothingFits(
        f"Nothing fits with {problem.target}: nearest is {describe_setup(problem, nearest)}, and it needs "
        f"{' and '.join(shortages)}: {' '.join(wanted)}",
        tier.value,
        short[tier],
        (" ".join(wanted),),
    )
