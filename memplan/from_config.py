"""A DeepSpeed configuration that a person already has: what it costs, whether it fits, and what would be better."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from memplan.activations import Way, largest_batch
from memplan.changes import Change, changes, troubles, unmended
from memplan.configs.carried import carried
from memplan.configs.deepspeed import ds_config
from memplan.engines.deepspeed import DeepSpeed
from memplan.engines.deepspeed_memory import deepspeed_held
from memplan.engines.deepspeed_setup import DeepSpeedSetup
from memplan.engines.deepspeed_sizes import sizes_of
from memplan.engines.deepspeed_traffic import deepspeed_traffic
from memplan.engines.plans import plan_of_setup, plan_whole
from memplan.engines.whole import Priced, Setup, WholeEngine, price
from memplan.errors import NothingFits, PlanningError
from memplan.formatting import format_bytes
from memplan.given_config import MICRO, STEPS, TRAIN, GivenConfig
from memplan.levers import LEAST_SPEEDUP
from memplan.lint.config import DsConfig
from memplan.lint.kinds import shown
from memplan.lint.precision import WIDTHS
from memplan.lint.rules import errors_in
from memplan.lint.view import Facts
from memplan.machine import Machine
from memplan.problem import Family, Problem
from memplan.rates import Rates
from memplan.search import plan, problem_of
from memplan.sharding import Sharding
from memplan.spans import Timeline
from memplan.unpriced import unpriced
from offload.plan import Buckets, Plan, Target, Tier
from profiler.profile import ModelProfile

TIERS = {"none": Tier.GPU, "cpu": Tier.HOST, "nvme": Tier.NVME}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Verdict:
    """What was found out about a configuration."""

    theirs: Plan
    """The configuration as it is, priced."""
    step: Timeline | None
    """Its step as events; ``None`` where the CPU computes."""
    errors: tuple[str, ...]
    """What the linter finds that stops it, or makes it another one than is written, one sentence each."""
    shortages: tuple[str, ...]
    """What it is short of, one sentence each; empty where it fits."""
    remarks: tuple[str, ...]
    better: Plan | None
    """The best for DeepSpeed on this machine; ``None`` where nothing fits."""
    config: Mapping[str, Any] | None
    """The better one as DeepSpeed reads it, with everything of the person's that a plan does not decide."""
    changes: tuple[Change, ...]
    """From theirs to the better one."""
    engine: WholeEngine
    """DeepSpeed as it was priced and searched."""
    own: Plan | None
    """The best for memplan's engine."""


def judge(profile: ModelProfile, machine: Machine, rates: Rates, given: GivenConfig) -> Verdict:
    """Price a configuration and plan anew beside it.

    The profile must be in the configuration's precision and know its micro-batch. Whether blocks are recomputed, and
    whether the model is built under ``deepspeed.zero.Init``, is not in the file: the plainest way that fits is taken.
    """
    given = given.for_model(profile)
    values = given.values
    batch, micro, steps = values.batch_sizes(machine.gpus)
    problem = problem_of(profile, machine, rates, batch, given.precision, Target.DEEPSPEED)
    none_and_all = dict.fromkeys((0, len(profile.blocks)))
    ways = [way for recomputed in none_and_all if problem.knows(way := Way(micro, recomputed))]
    if not ways:
        raise PlanningError(
            f"the profile knows micro-batches up to {largest_batch(profile)} and the configuration has {micro}: profile"
            f" the model with --batch-size {micro}"
        )
    engine = _engine(given)
    tried = [
        (_priced(problem, engine, values, way, steps, zero_init), zero_init)
        for way in ways
        for zero_init in ((False, True) if values.stage == 3 else (False,))
    ]
    theirs, zero_init = min(tried, key=lambda t: sum(t[0].shortage(problem).values()))
    shortages = tuple(_shortages(problem, theirs))
    mine = plan_of_setup(problem, theirs, machine)
    disk = values.offload_optimizer.nvme_path or values.offload_param.nvme_path
    if disk and mine.nvme_dir:
        mine = replace(mine, nvme_dir=disk)
    facts = Facts(gpus=machine.gpus, parameter_elements=tuple(p.elements for p in profile.parameters))
    errors = tuple(_errors(given, facts))
    better, config, changed = _better(problem, machine, engine, given, mine, facts, sound=not shortages and not errors)
    anew = config if better is not mine else None
    return Verdict(
        theirs=mine,
        step=theirs.timeline if problem.device != "cpu" else None,
        errors=errors,
        shortages=shortages,
        remarks=(
            *_remarks(problem, given, theirs, zero_init),
            *(troubles(given, anew, facts) if anew is not None else ()),
        ),
        better=better,
        config=config,
        changes=changed,
        engine=engine,
        own=_best_for_memplan(profile, machine, rates, batch),
    )


def _better(
    problem: Problem, machine: Machine, engine: DeepSpeed, given: GivenConfig, mine: Plan, facts: Facts, *, sound: bool
) -> tuple[Plan | None, dict[str, Any] | None, tuple[Change, ...]]:
    """The best for DeepSpeed, as a change of what is given, and the keys that it changes.

    What is ``sound`` and as fast, as far as rates are known, stays: also for sizes between those that are searched.
    """
    found = _best_for_deepspeed(problem, machine, engine)
    if found is not None:
        config = carried(ds_config(found)[0], given.document.root)
        changed = (*changes(given, config, machine.gpus), *unmended(given, config, facts))
        if not sound or not changed or _seconds(found) * LEAST_SPEEDUP < _seconds(mine):
            return found, config, changed
    if not sound:
        return None, None, ()
    sizes = dict(zip((TRAIN, MICRO, STEPS), given.values.batch_sizes(machine.gpus), strict=True))
    return mine, {**given.document.root, **sizes}, ()


def _engine(given: GivenConfig) -> DeepSpeed:
    """DeepSpeed with the types of gradients that decide how a model trains: a better configuration keeps them."""

    def size(name: str | None) -> int | None:
        return next((BYTES[width] for width, names in WIDTHS.items() if name in names), None)

    return DeepSpeed(
        accumulated_bytes=size(given.values.grad_accum_dtype),
        communicated_bytes=size(given.view.value("communication_data_type")),
        loss_scaled=given.values.precision == "fp16",
    )


def _priced(problem: Problem, engine: DeepSpeed, c: DsConfig, way: Way, steps: int, zero_init: bool) -> Priced:
    hpz = min(c.hpz_partition_size, problem.gpus)  # as DeepSpeed takes a size that is larger
    if c.stage < 3 or hpz < 1 or problem.gpus % hpz:
        hpz = 1
    optimizer = TIERS[c.offload_optimizer.device]
    if c.stage in (1, 2) and optimizer is Tier.NVME:
        optimizer = Tier.HOST
    setup = Setup(
        Family(Sharding(c.stage, problem.gpus, problem.nodes, hpz if hpz > 1 else 0), way, steps),
        Buckets(
            reduce_elements=c.reduce_bucket_elements,
            gather_elements=c.prefetch_bucket_elements if c.stage == 3 else c.allgather_bucket_elements,
            update_elements=max(1, c.sub_group_elements),
            persistence_elements=c.persistence_threshold_elements,
            live_elements=c.max_live_elements,
        ),
        TIERS[c.offload_param.device],
        optimizer,
        1 - c.offload_optimizer_ratio if c.stage == 3 and c.offload_optimizer.device == "cpu" else 0.0,
    )
    details = replace(
        engine.setup_of(problem, setup),
        overlap_comm=c.overlap_comm,
        contiguous_gradients=c.contiguous_gradients,
        param_buffer_count=c.offload_param.buffer_count,
        param_buffer_elements=c.offload_param_buffer_elements,
        max_in_cpu_elements=c.offload_param_max_in_cpu_elements,
        optimizer_buffer_count=c.offload_optimizer.buffer_count,
        pin_memory=any(o.pin_memory for o in (c.offload_optimizer, c.offload_param) if o.device != "none"),
        hpz=hpz,
        zero_init=zero_init,
    )
    return _priced_setup(problem, setup, details, steps)


def _priced_setup(problem: Problem, setup: Setup, details: DeepSpeedSetup, steps: int) -> Priced:
    profile = problem.profile
    kept = sizes_of(profile.parameters, details).kept
    held = deepspeed_held(profile.parameters, details, steps)
    traffic = deepspeed_traffic(details, profile.trainable_elements, profile.parameter_elements, steps, kept)
    return price(problem, setup, held, traffic, DeepSpeed.update_seconds)


def _best_for_deepspeed(problem: Problem, machine: Machine, engine: DeepSpeed) -> Plan | None:
    try:
        return plan_whole(problem, machine, engine)
    except NothingFits:
        return None


def _best_for_memplan(profile: ModelProfile, machine: Machine, rates: Rates, batch: int) -> Plan | None:
    try:
        return plan(profile, machine, rates, batch_size=batch)
    except NothingFits:
        return None


def _seconds(plan: Plan) -> float:
    return float("inf") if plan.prediction.step_seconds is None else plan.prediction.step_seconds


def _errors(given: GivenConfig, facts: Facts) -> Iterator[str]:
    for finding in errors_in(given.filled, facts):
        yield f"Line {finding.line}, {finding.path}: {finding.message}."


def _shortages(problem: Problem, priced: Priced) -> Iterator[str]:
    for tier, size in priced.shortage(problem).items():
        has = getattr(problem.budget, f"{tier}_bytes")
        needs = format_bytes(has + size)
        yield f"It does not fit: the {tier} tier needs {needs} of {format_bytes(has)}, short {format_bytes(size)}."


def _remarks(problem: Problem, given: GivenConfig, priced: Priced, zero_init: bool) -> Iterator[str]:
    c = given.values
    otherwise = "be short of more" if priced.shortage(problem) else "not fit"
    if priced.setup.family.way.recomputed_blocks:
        yield (
            f"Without gradient checkpointing it would {otherwise}; the figures are with all "
            f"{len(problem.profile.blocks)} blocks recomputed (model.gradient_checkpointing_enable())."
        )
    else:
        yield "The figures are without gradient checkpointing, which the file does not tell of."
    if zero_init:
        yield (
            f"Attaching is counted under deepspeed.zero.Init; with the whole model on every rank it would {otherwise}."
        )
    elif c.stage == 3:
        yield "Attaching is counted with the whole model on every rank; deepspeed.zero.Init avoids that."
    if c.precision == "fp16":
        yield "fp16 is counted as bf16: the same bytes."
    if c.stage in (1, 2) and c.offload_optimizer.device == "nvme":
        yield f"At ZeRO stage {c.stage} nvme means cpu for DeepSpeed, and is counted so."
    if given.fills:
        fills = ", ".join(f"{key} {_number(n)}" for key, n in given.fills.items())
        yield f'"auto" is counted as Hugging Face fills it in: {fills}.'
    if given.unknown:
        yield (
            f'{" and ".join(given.unknown)} "auto" depends on the hidden size of the model, which is not known here: '
            "DeepSpeed's default is counted."
        )
    yield from unpriced(given.view)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shown(value)
