"""``plan``: from a profile, a machine and its rates to the plan with the highest predicted throughput that fits."""

from dataclasses import replace

from memplan.activations import ways_of
from memplan.bounds import cpu_lanes
from memplan.candidates import Candidate, FamilySearch, feasible, search
from memplan.engines.plans import plan_whole
from memplan.errors import NothingFits, PlanningError
from memplan.explain import alternatives_to, reasons_for
from memplan.family_plan import family_plan
from memplan.formatting import format_bytes
from memplan.machine import Machine
from memplan.memory import chain_order, placements_of
from memplan.pipeline import timeline
from memplan.problem import Problem, profiled_optimizer
from memplan.rates import PLANNED, Rates
from memplan.sizes import MOST_PARAMETERS, MOST_SAMPLES, OPTIONS, grain_of, size_text
from memplan.spans import LANES
from memplan.units import units_of
from offload.plan import (
    Buckets,
    Budget,
    MadeFor,
    MomentFormat,
    OptimizerKind,
    Plan,
    Precision,
    Prediction,
    StateFormat,
    Target,
    Tier,
)
from offload.residency import streamed_slot_bytes
from profiler.profile import ModelProfile


def plan(
    profile: ModelProfile,
    machine: Machine,
    rates: Rates,
    *,
    batch_size: int,
    precision: Precision | None = None,
    target: Target = Target.MEMPLAN,
    optimizer: OptimizerKind | None = None,
    moments: MomentFormat | None = None,
) -> Plan:
    """The plan with the highest predicted throughput that is sure to fit, for the engine that will run it.

    ``batch_size`` is the samples of one optimizer step over all GPUs. ``precision`` only says what the caller expects
    the profile to be in. ``optimizer`` is by default the profile's, as far as the engine has it; ``moments`` are kept
    in fp32 unless another format is wished. Raises PlanningError where profile and wishes contradict each other,
    NothingFits where no candidate fits.
    """
    problem = problem_of(profile, machine, rates, batch_size, precision, target, optimizer, moments)
    if target is not Target.MEMPLAN:
        return plan_whole(problem, machine)
    found = search(problem)
    if not found:
        raise _nothing_fits(problem, machine)
    chosen = replace(found[0], buckets=with_more_slots(problem, found[0]))
    best = plan_of(problem, chosen, machine)
    reasons = reasons_for(problem, chosen, best.prediction, machine)
    return replace(best, reasons=reasons, alternatives=alternatives_to(problem, found))


def plan_of(problem: Problem, candidate: Candidate, machine: Machine) -> Plan:
    """A candidate as a plan."""
    return family_plan(
        problem,
        candidate.family,
        machine,
        placements=placements_of(problem.shapes, chain_order(problem.shapes), candidate.counts),
        buckets=candidate.buckets,
        prediction=predict(problem, candidate),
        gpu_update_share=problem.gpu_update_share if _state_on_host(candidate) else 0.0,
        on_meta=problem.on_meta,
    )


def with_more_slots(problem: Problem, candidate: Candidate) -> Buckets:
    """The candidate's buckets, with what room is left on the GPU as slots for state that comes ahead of its update.

    No more than the GPU's share fills: the engine's steps are then as predicted, or faster.
    """
    if not problem.gpu_update_share or not _state_on_host(candidate):
        return candidate.buckets
    buckets, counts = candidate.buckets, candidate.counts
    family = FamilySearch(problem, candidate.family, buckets)
    room = problem.budget.gpu_bytes - family.gpu_upper_bytes(counts)
    on_host = int(family.tables.state_elements[counts.state] - family.tables.state_elements[counts.nvme_state])
    filled = -(-round(problem.gpu_update_share * on_host) // buckets.update_elements)
    more = min(room // streamed_slot_bytes(buckets.update_elements, problem.form), filled)
    return replace(buckets, update_slots=buckets.update_slots + max(0, int(more)))


def _state_on_host(candidate: Candidate) -> bool:
    return candidate.counts.state > candidate.counts.nvme_state


def predict(problem: Problem, candidate: Candidate) -> Prediction:
    """What to expect of a candidate: bytes of one GPU, and of one node's host memory and NVMe."""
    family = FamilySearch(problem, candidate.family, candidate.buckets)
    counts = candidate.counts
    busy = _busy_seconds(problem, candidate)
    state, activations = int(family.tables.gpu_bytes(counts)), family.activations
    beside = family.beside_forward_bytes if _state_on_host(candidate) else 0
    host = family.host_bytes(counts)
    phases = {
        "gpu": {
            "attach": state,
            **{
                name: state + size + (beside if name == "forward" else 0)
                for name, size in activations.phase_bytes.items()
            },
            "step": state + family.update_bytes,
        },
        "host": {"attach": family.attach_bytes(counts), **dict.fromkeys((*activations.phase_bytes, "step"), host)},
    }
    if activations.host_bytes:
        phases["host"]["checkpoints"] = activations.host_bytes * problem.gpus_per_node
    return Prediction(
        gpu_peak_bytes=family.gpu_peak_bytes(counts),
        host_bytes=host,
        pinned_bytes=host if problem.device == "cuda" else 0,
        nvme_bytes=family.nvme_bytes(counts),
        step_seconds=candidate.seconds,
        bottleneck=max(busy, key=busy.__getitem__),
        lane_seconds=busy,
        gpu_upper_bytes=family.gpu_upper_bytes(counts),
        host_upper_bytes=family.host_upper_bytes(counts),
        step_seconds_range=(
            candidate.seconds * (1 - problem.rates.spread),
            candidate.seconds * (1 + problem.rates.spread),
        ),
        phases=phases,
        made_for=_made_for(problem, candidate, state),
    )


def _made_for(problem: Problem, candidate: Candidate, state_bytes: int) -> MadeFor:
    """What a prediction holds for: what activations follow from, and what they take beside the model's state."""
    way, family = candidate.family.way, FamilySearch(problem, candidate.family, candidate.buckets)
    return MadeFor(
        device=problem.device,
        precision=problem.precision,
        micro_batch_size=way.micro_batch_size,
        recompute=problem.profile.blocks[: way.recomputed_blocks],
        checkpoints=way.checkpoints,
        loss_chunks=way.loss_chunks,
        activation_bytes=family.gpu_peak_bytes(candidate.counts) - state_bytes,
        activation_upper_bytes=family.gpu_upper_bytes(candidate.counts) - state_bytes,
        checkpoint_bytes=family.activations.host_bytes,
        batch_elements=problem.profile.sample_elements * way.micro_batch_size,
    )


def _busy_seconds(problem: Problem, candidate: Candidate) -> dict[str, float]:
    """Busy seconds of every lane that does something, in one step."""
    work = problem.work(candidate.family, candidate.buckets)
    if problem.device != "cpu":
        return timeline(work, candidate.counts).busy_seconds
    lanes = cpu_lanes(work, candidate.counts)
    return {lane: float(lanes[lane]) for lane in LANES if lane in lanes and lanes[lane] > 0}


def problem_of(
    profile: ModelProfile,
    machine: Machine,
    rates: Rates,
    batch_size: int,
    precision: Precision | None,
    target: Target = Target.MEMPLAN,
    optimizer: OptimizerKind | None = None,
    moments: MomentFormat | None = None,
) -> Problem:
    """What is to be searched; raises PlanningError where profile and wishes contradict each other."""
    profiled = precision_of(profile)
    if precision is not None and precision is not profiled:
        raise PlanningError(
            f"the profile was made in {profiled.value}; profile again with --precision {precision.value} to plan for it"
        )
    measured = (rates.compute_flops_per_second, rates.cpu_update_seconds, rates.gpu_update_seconds)
    if any(profiled not in rate for rate in measured):
        raise PlanningError(f"the rates say nothing about {profiled.value}; measure them in that precision")
    check_wishes(machine, batch_size, target)
    if not ways_of(profile):
        raise PlanningError("the profile says nothing about activations; make it again with this version")
    if profile.parameter_elements > MOST_PARAMETERS:
        raise PlanningError(
            f"{profile.model} has {profile.parameter_elements:.3g} parameters; at most {MOST_PARAMETERS:.3g} can be "
            "planned for"
        )
    shapes = units_of(profile)
    if not any(s.trainable_elements for s in shapes):
        raise PlanningError(f"{profile.model} has no parameter that is trained")
    trained_with = optimizer_of(profile, target, optimizer)
    if machine.inter_node_bytes_per_second is not None:
        # A calibration is of one node and knows nothing of it.
        rates = replace(rates, inter_node_bytes_per_second=machine.inter_node_bytes_per_second)
    return Problem(
        profile=profile,
        shapes=shapes,
        device=machine.device,
        gpus=machine.gpus,
        nodes=machine.nodes,
        budget=Budget(machine.gpu_bytes, machine.host_bytes, machine.nvme_bytes),
        rates=rates,
        form=StateFormat(profiled, trained_with, moments_of(target, trained_with, moments)),
        gpu_batch_size=batch_size // machine.gpus,
        target=target,
    )


def check_wishes(machine: Machine, batch_size: int, target: Target) -> None:
    """What can be refused before anything is measured or profiled; raises PlanningError."""
    if batch_size < 1:
        raise PlanningError(f"the batch size is {batch_size}; it must be at least 1")
    if batch_size > MOST_SAMPLES:
        raise PlanningError(f"the batch size is {batch_size}; at most {MOST_SAMPLES:,} samples can be planned for")
    if batch_size % machine.gpus:
        raise PlanningError(f"a batch of {batch_size} can not be divided evenly over {machine.gpus} GPUs")
    if target is not Target.MEMPLAN and machine.device == "cpu":
        raise PlanningError(f"{target} is planned for GPUs only: describe a machine that has some, --machine h100-80gb")


def precision_of(profile: ModelProfile) -> Precision:
    """The profile's, of those that are planned for; raises PlanningError."""
    if profile.precision not in PLANNED:
        known = ", ".join(PLANNED)
        raise PlanningError(f"the profile's precision is {profile.precision}; plans are made for one of {known}")
    return Precision(profile.precision)


def optimizer_of(profile: ModelProfile, target: Target, wished: OptimizerKind | None) -> OptimizerKind:
    """What will train: what was wished, or the profile's where memplan's engine has it, or AdamW.

    Raises PlanningError for a wish that other engines' plans do not count.
    """
    if target is not Target.MEMPLAN:
        if wished not in (None, OptimizerKind.ADAMW):
            raise PlanningError(f"plans for {target} count the state of AdamW; leave --optimizer {wished} out")
        return OptimizerKind.ADAMW
    return wished or profiled_optimizer(profile) or OptimizerKind.ADAMW


def moments_of(target: Target, optimizer: OptimizerKind, wished: MomentFormat | None) -> MomentFormat:
    """How moments are stored: in fp32, unless a person names another format. Raises PlanningError where none can be."""
    if wished in (None, MomentFormat.FP32):
        return MomentFormat.FP32
    if target is not Target.MEMPLAN:
        raise PlanningError(
            f"plans for {target} count moments in fp32; leave --moments {wished} out, or plan for memplan's engine"
        )
    if not optimizer.moments:
        raise PlanningError(f"{optimizer} keeps no moments; leave --moments {wished} out")
    return MomentFormat(wished)


def _nothing_fits(problem: Problem, machine: Machine) -> NothingFits:
    """What is short, and what would do."""
    context = {Tier.GPU: machine.context_bytes}

    def need_of(of: Problem, tier: Tier) -> int | None:
        return smallest_budget(of, tier, context.get(tier, 0))

    def option(tier: Tier, need: int) -> str:
        return OPTIONS[tier].format(size_text(need + context.get(tier, 0)))

    wanted, start = problem, None
    if problem.attach_bytes(0) * problem.gpus_per_node > problem.budget.host_bytes:
        # The host has no room for the start, whatever the other tiers have.
        start = need_of(problem.with_budget(Tier.GPU, 1 << 60), Tier.HOST)
    needs = {tier: need for tier in Tier if (need := need_of(problem, tier)) is not None}
    if not needs and start is not None:  # and with that room the GPU is too small as well
        wanted = problem.with_budget(Tier.HOST, start)
        needs = {tier: need for tier in Tier if (need := need_of(wanted, tier)) is not None}
    more = "" if wanted is problem else f" {option(Tier.HOST, wanted.budget.host_bytes)}"
    short = {tier: need - getattr(problem.budget, f"{tier.value}_bytes") for tier, need in needs.items()}
    tiers = sorted(needs, key=lambda tier: short[tier])
    changes = [option(tier, needs[tier]) + more for tier in tiers]
    if tiers == [Tier.GPU]:
        # No other tier helps alone, but a larger host tier may make a smaller GPU do.
        gpu = need_of(problem.with_budget(Tier.HOST, 1 << 60), Tier.GPU)
        if gpu is not None and gpu < needs[Tier.GPU]:
            host = need_of(problem.with_budget(Tier.GPU, gpu), Tier.HOST)
            if host is not None:
                changes.append(f"{option(Tier.GPU, gpu)} {option(Tier.HOST, host)}")
    named, shortage = tiers[0], short[tiers[0]]
    why = "even with everything offloaded that has room elsewhere"
    if any(p.recompute for p in problem.profile.activations):
        why += ", recompute"
    why += " and micro-batch 1"
    if start is not None and needs.get(Tier.HOST, start) == start:
        named, shortage = Tier.HOST, start - problem.budget.host_bytes
        why = "at the start, when every process has a unit of its model on the way into the tiers"
    return NothingFits(
        f"Nothing fits: the {named.value} tier is short {format_bytes(shortage)} {why}; "
        f"smallest change: {' or '.join(changes)}{_offer(wanted)}",
        named.value,
        shortage,
        tuple(changes),
    )


def _offer(problem: Problem) -> str:
    """What would fit with other numbers: that is never chosen, only named."""
    if not problem.form.optimizer.moments:
        return ""
    formats = [*MomentFormat]
    for moments in formats[formats.index(problem.form.moments) + 1 :]:
        # What a problem knows depends on its format, so it is made anew.
        if feasible(replace(problem, form=replace(problem.form, moments=moments))):
            return f"; it would fit with --moments {moments}, which changes the numbers that training makes"
    return ""


def smallest_budget(problem: Problem, tier: Tier, reserve: int = 0) -> int | None:
    """The smallest budget of one tier with which something fits, the others as they are; ``None`` if none would do.

    Rounded up so that with ``reserve`` it is a size that ``size_text`` writes exactly.
    """
    if not feasible(problem.with_budget(tier, 1 << 60)):
        return None
    low = int(getattr(problem.budget, f"{tier.value}_bytes"))
    high = max(2 * low, 1 << 20)
    while not feasible(problem.with_budget(tier, high)):
        low, high = high, 2 * high
    grain = grain_of(high)
    low, high = (low + reserve) // grain, -(-(high + reserve) // grain)
    while high - low > 1:
        middle = (low + high) // 2
        if feasible(problem.with_budget(tier, middle * grain - reserve)):
            high = middle
        else:
            low = middle
    return high * grain - reserve
