"""Plans for engines that move whole tiers: the best setup as a Plan, why, and what else there was."""

from collections.abc import Sequence

from memplan.engines.deepspeed import DeepSpeed
from memplan.engines.fsdp2 import FSDP2
from memplan.engines.whole import Priced, WholeEngine, least_short, price_all
from memplan.errors import NothingFits
from memplan.formatting import format_bytes, format_seconds
from memplan.machine import Machine
from memplan.problem import Problem
from offload.plan import Alternative, Plan, Prediction, Target, Tier

ENGINES: dict[Target, WholeEngine] = {Target.DEEPSPEED: DeepSpeed(), Target.FSDP2: FSDP2()}
SPREAD = 0.3
"""How far off a step may be, as a share of it, beside what the rates themselves may be off."""
ALTERNATIVES = 4
UPDATE_REMARK = "{}'s own update on the CPU was taken from steps measured on 16 cores: its steps are rough."


def plan_whole(problem: Problem, machine: Machine) -> Plan:
    """The fastest setup that fits; raises NothingFits."""
    everything = price_all(problem, ENGINES[problem.target])
    fitting = sorted((p for p in everything if not p.shortage(problem)), key=lambda p: p.rank)
    if not fitting:
        raise _nothing_fits(problem, least_short(problem, everything))
    best = fitting[0]
    others = [_alternative(problem, p, best) for p in _different(fitting)[1:ALTERNATIVES]]
    resident = min((p for p in everything if not p.setup.depth), key=lambda p: p.gpu_upper_bytes)
    if resident.shortage(problem):
        others.insert(0, _alternative(problem, resident, best))
    return plan_of_setup(problem, best, machine, _reasons(problem, best), tuple(others))


def plan_of_setup(
    problem: Problem,
    priced: Priced,
    machine: Machine,
    reasons: tuple[str, ...] = (),
    alternatives: tuple[Alternative, ...] = (),
) -> Plan:
    """A priced setup as a plan."""
    setup, seconds = priced.setup, priced.timeline.seconds
    way, sharding = setup.family.way, setup.family.sharding
    busy = priced.timeline.busy_seconds
    spread = SPREAD + problem.rates.spread
    host = dict(priced.held.host)
    return Plan(
        model=problem.profile.model,
        parameter_shapes={p.name: p.shape for p in problem.profile.parameters},
        precision=problem.precision,
        device=problem.device,
        gpus=problem.gpus,
        zero_stage=sharding.zero_stage,
        placements=setup.placements(problem),
        buckets=setup.buckets,
        micro_batch_size=way.micro_batch_size,
        gradient_accumulation_steps=setup.family.micro_batches,
        recompute=problem.profile.blocks[: way.recomputed_blocks],
        budget=problem.budget,
        prediction=Prediction(
            gpu_peak_bytes=priced.gpu_peak_bytes,
            host_bytes=priced.host_bytes(problem),
            pinned_bytes=priced.held.pinned_bytes,
            nvme_bytes=priced.held.nvme_bytes,
            step_seconds=seconds,
            bottleneck=max(busy, key=busy.__getitem__),
            lane_seconds=busy,
            gpu_upper_bytes=priced.gpu_upper_bytes,
            host_upper_bytes=priced.host_bytes(problem),
            step_seconds_range=(seconds * (1 - min(0.9, spread)), seconds * (1 + spread)),
            phases={"gpu": dict(priced.gpu_phases), "host": host},
        ),
        nvme_dir=str(machine.nvme_dir or "/mnt/nvme") if Tier.NVME in (setup.parameters, setup.optimizer) else None,
        target=problem.target,
        nodes=problem.nodes,
        shard_gpus=sharding.shard_gpus,
        checkpoints=way.checkpoints,
        loss_chunks=way.loss_chunks,
        gpu_update_share=setup.gpu_update_share,
        reasons=reasons,
        alternatives=alternatives,
    )


def describe_setup(problem: Problem, priced: Priced) -> str:
    """One line."""
    setup = priced.setup
    way, sharding = setup.family.way, setup.family.sharding
    blocks = len(problem.profile.blocks)
    places = (("parameters", setup.parameters), ("optimizer state", setup.optimizer))
    away = [f"{what} on {tier}" for what, tier in places if tier is not Tier.GPU]
    if setup.gpu_update_share:
        away[-1] += f", {setup.gpu_update_share:.0%} of it on the GPU"
    how = {0: "no recompute", blocks: "recompute"}
    return ", ".join(
        [
            f"ZeRO stage {sharding.zero_stage}" + (" within each node" if sharding.shard_gpus else ""),
            f"micro-batch {way.micro_batch_size} x {setup.family.micro_batches}",
            how.get(way.recomputed_blocks, f"recompute {way.recomputed_blocks} of {blocks}"),
            *(away or ["everything on gpu"]),
        ]
    )


def _different(found: Sequence[Priced]) -> list[Priced]:
    """The best of each stage and place, so that alternatives are not one setup with other buffers."""
    kinds: dict[object, Priced] = {}
    for priced in found:
        s = priced.setup
        kinds.setdefault((s.family.sharding, s.parameters, s.optimizer, s.family.way.recomputed_blocks > 0), priced)
    return list(kinds.values())


def _reasons(problem: Problem, best: Priced) -> tuple[str, ...]:
    busy = best.timeline.busy_seconds
    lane = max(busy, key=busy.__getitem__)
    held = best.held
    return (
        f"{describe_setup(problem, best)}: the fastest way in which {problem.target} fits.",
        f"On each GPU at most {format_bytes(best.gpu_upper_bytes)} are expected, of "
        f"{format_bytes(problem.budget.gpu_bytes)}; without activations {format_bytes(held.gpu_peak_bytes)}.",
        f"On the host {format_bytes(best.host_bytes(problem))} of {format_bytes(problem.budget.host_bytes)}, with "
        f"{problem.target}'s copies and buffers, {format_bytes(held.pinned_bytes)} of it pinned.",
        f"A step is expected to take {format_seconds(best.timeline.seconds)}; the busiest lane is "
        f"{lane.replace('_', ' ')}, with {format_seconds(busy[lane])}.",
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
        host_bytes=priced.host_bytes(problem),
        nvme_bytes=priced.held.nvme_bytes,
        why_not=why_not,
    )


def _nothing_fits(problem: Problem, nearest: Priced) -> NothingFits:
    short = nearest.shortage(problem)
    options = {Tier.GPU: "--gpu-memory", Tier.HOST: "--host-memory", Tier.NVME: "--nvme"}
    wanted = [f"{format_bytes(size)} more in {options[tier]}" for tier, size in short.items()]
    tier = max(short, key=short.__getitem__)
    return NothingFits(
        f"Nothing fits with {problem.target}: nearest is {describe_setup(problem, nearest)}, and it needs "
        f"{' and '.join(wanted)}",
        tier.value,
        short[tier],
        tuple(wanted),
    )
