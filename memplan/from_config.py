"""A DeepSpeed configuration that a person already has: what it costs, whether it fits, and what would be better."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any

from memplan.activations import Way, largest_batch
from memplan.configs.deepspeed import ds_config
from memplan.engines.deepspeed import DeepSpeed
from memplan.engines.deepspeed_memory import deepspeed_held
from memplan.engines.deepspeed_traffic import deepspeed_traffic
from memplan.engines.plans import plan_of_setup
from memplan.engines.whole import Priced, Setup, price
from memplan.errors import NothingFits, PlanningError
from memplan.formatting import format_bytes
from memplan.lint.config import DsConfig, ds_config_of
from memplan.lint.document import Document, parse_document, read_document
from memplan.lint.view import View
from memplan.machine import Machine
from memplan.problem import Family, Problem
from memplan.rates import Rates
from memplan.search import plan, problem_of
from memplan.sharding import Sharding
from offload.plan import Buckets, Plan, Precision, Target, Tier
from profiler.profile import ModelProfile

TIERS = {"none": Tier.GPU, "cpu": Tier.HOST, "nvme": Tier.NVME}
PRECISIONS = {"fp32": Precision.FP32, "bf16": Precision.BF16, "fp16": Precision.BF16, "autocast": Precision.AMP}
"""fp16 takes the bytes of bf16."""
PLANNED = ("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys and sections that a plan is about."""


@dataclass(frozen=True)
class Change:
    """A key that the better configuration has otherwise."""

    key: str
    theirs: str
    better: str


@dataclass(frozen=True)
class Verdict:
    """What was found out about a configuration."""

    theirs: Plan
    """The configuration as it is, priced."""
    shortages: tuple[str, ...]
    """What it is short of, one sentence each; empty where it fits."""
    remarks: tuple[str, ...]
    better: Plan | None
    """The best for DeepSpeed on this machine; ``None`` where nothing fits."""
    changes: tuple[Change, ...]
    """From theirs to the better one."""
    own: Plan | None
    """The best for memplan's engine."""


@dataclass(frozen=True)
class GivenConfig:
    """A configuration file, read."""

    document: Document
    values: DsConfig

    @classmethod
    def read(cls, path: Path) -> "GivenConfig":
        """Raises ConfigError for a file that is no configuration of DeepSpeed."""
        document = read_document(path)
        return cls(document, ds_config_of(View(document)))

    @property
    def precision(self) -> Precision:
        """What a profile has to be made in."""
        return PRECISIONS[self.values.precision]

    def batch_size(self, machine: Machine) -> int:
        """Samples of one optimizer step."""
        return self.values.batch_sizes(machine.gpus)[0]


def judge(profile: ModelProfile, machine: Machine, rates: Rates, given: GivenConfig) -> Verdict:
    """Price a configuration and plan anew beside it.

    The profile must be in the configuration's precision and know its micro-batch. Whether blocks are recomputed, and
    whether the model is built under ``deepspeed.zero.Init``, is not in the file: the plainest way that fits is taken.
    """
    batch, micro, steps = given.values.batch_sizes(machine.gpus)
    problem = problem_of(profile, machine, rates, batch, given.precision, Target.DEEPSPEED)
    if micro > largest_batch(profile):
        raise PlanningError(
            f"the profile knows micro-batches up to {largest_batch(profile)} and the configuration has {micro}: profile"
            f" the model with --batch-size {micro}"
        )
    tried = [
        (_priced(problem, given.values, Way(micro, blocks), steps, zero_init), zero_init)
        for blocks in _recomputed(problem)
        for zero_init in ((False, True) if given.values.stage == 3 else (False,))
    ]
    theirs, zero_init = min(tried, key=lambda t: sum(t[0].shortage(problem).values()))
    shortages = tuple(_shortages(problem, theirs))
    mine = plan_of_setup(problem, theirs, machine)
    if given.values.offload_optimizer.nvme_path:
        mine = replace(mine, nvme_dir=given.values.offload_optimizer.nvme_path)
    better = _best(profile, machine, rates, batch, Target.DEEPSPEED)
    if not shortages and (better is None or _seconds(mine) < _seconds(better)):
        better = mine  # sizes of buckets between those that are searched
    return Verdict(
        theirs=mine,
        shortages=shortages,
        remarks=tuple(_remarks(problem, given.values, theirs, zero_init)),
        better=better,
        changes=tuple(_changes(given.document, better)) if better not in (None, mine) else (),
        own=_best(profile, machine, rates, batch, Target.MEMPLAN),
    )


def _recomputed(problem: Problem) -> list[int]:
    known = {p.recompute for p in problem.profile.activations}
    return [0, len(problem.profile.blocks)] if True in known and problem.profile.blocks else [0]


def _priced(problem: Problem, c: DsConfig, way: Way, steps: int, zero_init: bool) -> Priced:
    hierarchical = c.hpz_partition_size > 1 and c.hpz_partition_size == problem.gpus_per_node
    sharding = Sharding(c.stage, problem.gpus, problem.nodes, problem.gpus_per_node if hierarchical else 0)
    setup = Setup(
        Family(sharding, way, steps),
        Buckets(
            reduce_elements=c.reduce_bucket_elements,
            gather_elements=c.prefetch_bucket_elements if c.stage == 3 else c.allgather_bucket_elements,
            update_elements=c.sub_group_elements,
            persistence_elements=c.persistence_threshold_elements,
            live_elements=c.max_live_elements,
        ),
        TIERS[c.offload_param.device],
        TIERS[c.offload_optimizer.device],
        1 - c.offload_optimizer_ratio if c.stage == 3 and c.offload_optimizer.device == "cpu" else 0.0,
    )
    details = replace(
        DeepSpeed.setup_of(problem, setup),
        overlap_comm=c.overlap_comm,
        contiguous_gradients=c.contiguous_gradients,
        param_buffer_count=c.offload_param.buffer_count,
        param_buffer_elements=c.offload_param_buffer_elements,
        optimizer_buffer_count=c.offload_optimizer.buffer_count,
        pin_memory=c.offload_optimizer.pin_memory or c.offload_param.pin_memory,
        zero_init=zero_init,
    )
    parameters, profile = problem.profile.parameters, problem.profile
    held = deepspeed_held(parameters, details, steps)
    traffic = deepspeed_traffic(details, profile.trainable_elements, profile.parameter_elements, steps)
    return price(problem, setup, held, traffic, DeepSpeed.update_seconds)


def _best(profile: ModelProfile, machine: Machine, rates: Rates, batch: int, target: Target) -> Plan | None:
    try:
        return plan(profile, machine, rates, batch_size=batch, target=target)
    except NothingFits:
        return None


def _seconds(plan: Plan) -> float:
    return float("inf") if plan.prediction.step_seconds is None else plan.prediction.step_seconds


def _shortages(problem: Problem, priced: Priced) -> Iterator[str]:
    for tier, size in priced.shortage(problem).items():
        has = getattr(problem.budget, f"{tier}_bytes")
        needs = format_bytes(has + size)
        yield f"It does not fit: the {tier} tier needs {needs} of {format_bytes(has)}, short {format_bytes(size)}."


def _remarks(problem: Problem, c: DsConfig, priced: Priced, zero_init: bool) -> Iterator[str]:
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


def _changes(document: Document, better: Plan) -> Iterator[Change]:
    config, _ = ds_config(better)
    theirs, mine = View(document), View(parse_document(dumps(config)))
    for dotted in _leaves(config):
        if dotted.split(".")[0] not in PLANNED or _idle(dotted, mine):
            continue
        has, wants = theirs.value(dotted), mine.value(dotted)
        if has != wants:
            note = "" if theirs.written(dotted) else " (default)"
            yield Change(dotted, f"{_text(has)}{note}", _text(wants))


def _idle(dotted: str, view: View) -> bool:
    """Whether a key is about offloading that does not take place."""
    section = dotted.split(".")[1] if dotted.count(".") == 2 else ""
    what = {"offload_param": view.device("offload_param"), "offload_optimizer": view.device("offload_optimizer")}
    return what.get(section) == "none" and not dotted.endswith(".device")


def _leaves(config: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in config.items():
        path = f"{above}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.")
        else:
            yield path


def _text(value: Any) -> str:
    return "not written" if value is None else f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)
