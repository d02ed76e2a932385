"""A finished plan as the candidate that it stands for, and its step as events."""

from memplan.activations import Way
from memplan.engines.plans import ENGINES
from memplan.engines.whole import Setup, WholeEngine, price
from memplan.machine import Machine
from memplan.memory import Counts
from memplan.pipeline import timeline
from memplan.problem import Family, Problem
from memplan.rates import Rates
from memplan.search import problem_of
from memplan.sharding import Sharding
from memplan.spans import Timeline
from offload.plan import Plan, Target, Tier
from profiler.profile import ModelProfile


def batch_size_of(plan: Plan) -> int:
    """Samples of one optimizer step over all GPUs."""
    return plan.micro_batch_size * plan.gradient_accumulation_steps * plan.gpus


def family_of(plan: Plan) -> Family:
    """How the plan divides, recomputes and accumulates."""
    return Family(
        Sharding(plan.zero_stage, plan.gpus, plan.nodes, plan.shard_gpus),
        Way(plan.micro_batch_size, len(plan.recompute), plan.checkpoints, plan.loss_chunks),
        plan.gradient_accumulation_steps,
    )


def counts_of(plan: Plan) -> Counts:
    """How many units keep what off the GPU, and on NVMe."""
    p = plan.placements
    return Counts(
        state=sum(x.optimizer is not Tier.GPU for x in p),
        gradients=sum(x.gradients is not Tier.GPU for x in p),
        parameters=sum(x.parameters is not Tier.GPU for x in p),
        nvme_state=sum(x.optimizer is Tier.NVME for x in p),
        nvme_parameters=sum(x.parameters is Tier.NVME for x in p),
    )


def timeline_of(
    profile: ModelProfile, machine: Machine, rates: Rates, plan: Plan, engine: WholeEngine | None = None
) -> Timeline | None:
    """One step of the plan as events; ``None`` where the CPU computes, since its lanes share the cores.

    ``engine`` is by default the target's.
    """
    if plan.device == "cpu":
        return None
    wishes = plan.precision, plan.target, plan.optimizer, plan.moments
    problem = problem_of(profile, machine, rates, batch_size_of(plan), *wishes)
    if plan.target is not Target.MEMPLAN:
        return _whole_timeline(problem, plan, engine or ENGINES[plan.target])
    return timeline(problem.work(family_of(plan), plan.buckets), counts_of(plan))


def _whole_timeline(problem: Problem, plan: Plan, engine: WholeEngine) -> Timeline:
    """Of an engine that moves whole tiers: all units are placed alike."""
    placement = plan.placements[0]
    setup = Setup(family_of(plan), plan.buckets, placement.parameters, placement.optimizer, plan.gpu_update_share)
    held, traffic = engine.held(problem, setup), engine.traffic(problem, setup)
    return price(problem, setup, held, traffic, engine.update_seconds).timeline
