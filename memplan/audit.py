"""A second opinion on a finished plan: its bytes counted from the placements alone, unit by unit.

The arithmetic is written apart from ``offload.residency`` on purpose: a mistake in one is a difference between both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil

from torch import nn

from memplan.formatting import format_bytes
from offload.errors import PlanError
from offload.plan import MadeFor, Placement, Plan, Precision, Target, Tier
from offload.residency import UnitShape
from offload.unit import check_model, partition

PAGE = 4096
PASS = ("device", "precision", "micro_batch_size", "recompute", "checkpoints", "loss_chunks")
"""What activations follow from, by its names in a plan and in what its prediction was made for."""
UNAUDITED = (
    "the plan does not say what its prediction was made for, so its activations could not be audited; memplan plan "
    "makes plans that do"
)
"""Of a plan without ``made_for``."""


@dataclass(frozen=True)
class _Rank:
    """What one rank has of one unit, in elements."""

    name: str
    placement: Placement
    weights: int
    gradients: int
    state: int
    whole_weights: int
    whole_trained: int


def audit(plan: Plan, shapes: Sequence[UnitShape]) -> list[str]:
    """What does not add up, one sentence each; empty for a sound plan.

    ``shapes`` are the units of the model, in any order. The bytes of plans for other engines than memplan's are checked
    against their budget only: they are not unit by unit.
    """
    known = {s.name: s for s in shapes}
    problems = [f"unit {p.unit!r} of the plan is not in the model" for p in plan.placements if p.unit not in known]
    placed = {p.unit for p in plan.placements}
    problems += [f"unit {s.name!r} of the model is not in the plan" for s in shapes if s.name not in placed]
    if problems:
        return problems
    start = 0
    if plan.target is Target.MEMPLAN:
        ranks = [_rank(plan, known[p.unit], p) for p in plan.placements]
        problems += _other_pass(plan) + _miscounted(plan, ranks)
        if plan.device == "cuda":
            # However models are built, the tiers fill while each process has a unit on its way.
            start = plan.gpus // plan.nodes * (_host_bytes(plan, ranks) + _passing_bytes(ranks))
    return problems + _unfit(plan, start)


def check_plan(plan: Plan, model: nn.Module) -> None:
    """Raise PlanError for a plan of another model, or one that does not add up."""
    check_model(plan, model)
    shapes = []
    for unit in partition(model, plan.placements):
        # Plans count whole tensors, also where tensor parallelism divides them.
        sizes: dict[bool, list[int]] = {True: [], False: []}
        for field in unit.fields:
            sizes[field.trainable].append(field.whole_shape.numel())
        shapes.append(UnitShape.of(unit.name, sizes[True], sizes[False]))
    if problems := audit(plan, shapes):
        raise PlanError(f"the plan does not add up: {problems[0]}; or make it again with memplan plan")


def _other_pass(plan: Plan) -> list[str]:
    """Activations are not in the placements: they are as predicted only for what the prediction was made for."""
    made = plan.prediction.made_for
    for key in PASS if made is not None else ():
        now, then = getattr(plan, key), getattr(made, key)
        if now != then:
            if key == "recompute":
                others = "other ones" if len(now) == len(then) else len(then)
                now, then = f"of {len(now)} modules", f"that of {others}"
            return [
                f"{key} is {now}, but the prediction was made for {then}, and what a step holds follows from that: "
                "change it back"
            ]
    return []


def _miscounted(plan: Plan, ranks: Sequence[_Rank]) -> list[str]:
    """Predictions that are not what the placements add up to, with the activations that were predicted beside them."""
    expected, made = plan.prediction, _made_for(plan)
    of_node = plan.gpus // plan.nodes
    host = of_node * (_host_bytes(plan, ranks) + made.checkpoint_bytes)
    problems = _differs("host", host, expected.host_bytes)
    problems += _differs("nvme", of_node * _nvme_bytes(plan, ranks), expected.nvme_bytes)
    state = _gpu_state_bytes(plan, ranks)
    for key, beside in (("gpu_peak_bytes", made.activation_bytes), ("gpu_upper_bytes", made.activation_upper_bytes)):
        if (predicted := getattr(expected, key)) < state + beside:
            problems.append(
                f"prediction.{key} is {predicted}, but model state on the gpu takes {state} bytes and activations "
                f"{beside}: if you changed the plan by hand, write {state + beside} there"
            )
    return problems


def _made_for(plan: Plan) -> MadeFor:
    """What the prediction says of activations: plans of before that was kept say it by their phases, if at all."""
    p = plan.prediction
    if p.made_for is not None:
        return p.made_for
    attach = p.phases.get("gpu", {}).get("attach")
    peak, upper = (0 if attach is None else max(0, size - attach) for size in (p.gpu_peak_bytes, p.gpu_upper_bytes))
    checkpoints = p.phases.get("host", {}).get("checkpoints", 0) // (plan.gpus // plan.nodes)
    return MadeFor(
        **{key: getattr(plan, key) for key in PASS},
        activation_bytes=peak,
        activation_upper_bytes=upper,
        checkpoint_bytes=checkpoints,
    )


def _unfit(plan: Plan, start_bytes: int) -> list[str]:
    """The most to expect is no less than what is expected, and within the budget; so is a node's host at the start."""
    p, budget = plan.prediction, plan.budget
    problems = []
    for key, least in (("gpu_upper_bytes", p.gpu_peak_bytes), ("host_upper_bytes", p.host_bytes)):
        if (upper := getattr(p, key)) < least:
            problems.append(f"prediction.{key} is {upper}, below the {least} that are expected: write at least that")
    for tier, used, allowed in (
        ("gpu", max(p.gpu_peak_bytes, p.gpu_upper_bytes), budget.gpu_bytes),
        ("host", max(p.host_bytes, p.host_upper_bytes, start_bytes), budget.host_bytes),
        ("nvme", p.nvme_bytes, budget.nvme_bytes),
    ):
        if used > allowed:
            problems.append(
                f"the {tier} tier holds up to {format_bytes(used)}, over its budget of {format_bytes(allowed)}"
            )
    return problems


def _rank(plan: Plan, shape: UnitShape, placement: Placement) -> _Rank:
    """ZeRO's stages divide state, then gradients, then weights, over the ranks that share one copy.

    Weights off the GPU are divided from stage 1 on. Parts are equal, and multiples of 64 elements.
    """
    group = plan.shard_gpus or plan.gpus
    padding = 64 * group if plan.zero_stage >= 1 else 64
    trained, frozen = (ceil(n / padding) * padding for n in (shape.trainable_elements, shape.frozen_elements))
    parts = [group if plan.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    return _Rank(
        shape.name,
        placement,
        weights=(trained + frozen) // parts[2 if placement.parameters is Tier.GPU else 0],
        gradients=trained // parts[1],
        state=trained // parts[0],
        whole_weights=trained + frozen,
        whole_trained=trained,
    )


def _passing_bytes(ranks: Sequence[_Rank]) -> int:
    """Of the largest unit on its way into the tiers: twice, in fp32."""
    return 2 * 4 * max(r.whole_weights for r in ranks)


def _differs(tier: str, counted: int, predicted: int) -> list[str]:
    if counted == predicted:
        return []
    return [
        f"the {tier} tier is predicted to hold {predicted} bytes, but the placements add up to {counted}: if you "
        f"changed them by hand, write that into prediction.{tier}_bytes"
    ]


def _sizes(plan: Plan) -> tuple[int, float]:
    """Bytes an element of a weight (and a gradient), and of the rest of the optimizer's state.

    In 8 bits, 64 moments have a scale of 4 bytes, a sixteenth of a byte each: counts are multiples of 64, so products
    are whole, and floats hold them exactly.
    """
    moments = {"adamw": 2, "adam": 2, "lion": 1, "sgd": 0, "sgd-momentum": 1, "adagrad": 1}[plan.optimizer]
    weight, rest = {Precision.BF16: (2, 2), Precision.FP16: (2, 4)}.get(plan.precision, (4, 0))
    each = {"fp32": 4, "bf16": 2, "8bit": 1 + 4 / 64}[plan.moments]
    return weight, rest + each * moments


def _pages(size: float) -> int:
    return ceil(size / PAGE) * PAGE


def _host_bytes(plan: Plan, ranks: Sequence[_Rank]) -> int:
    weight, rest = _sizes(plan)
    total = largest_update = largest_read = 0
    for r in ranks:
        p, chunk = r.placement, min(r.state, plan.buckets.update_elements)
        extents: list[float] = []
        if p.parameters is Tier.HOST:
            extents.append(r.weights * weight)
        elif p.parameters is Tier.GPU and p.optimizer in (Tier.HOST, Tier.NVME):
            extents.append(r.state * weight)  # the host's copy of the weights it updates
        if p.gradients is Tier.HOST:
            extents.append(r.gradients * weight)
        if p.optimizer is Tier.HOST:
            extents.append(r.state * rest)
        total += sum(map(_pages, extents))
        brought: list[float] = []
        if p.optimizer is not Tier.GPU and p.gradients is Tier.GPU:
            brought.append(chunk * weight)
        if p.optimizer is Tier.NVME:
            brought.append(chunk * rest)
        if p.parameters is Tier.NVME:
            read = min(r.weights, plan.buckets.update_elements) * weight
            brought.append(read if r.state else 0)
            largest_read = max(largest_read, _pages(read))
        largest_update = max(largest_update, sum(map(_pages, brought)))
    return total + 3 * largest_update + 3 * largest_read


def _nvme_bytes(plan: Plan, ranks: Sequence[_Rank]) -> int:
    weight, rest = _sizes(plan)
    chunk, total = plan.buckets.update_elements, 0
    for r in ranks:
        for on_disk, elements, size in (
            (r.placement.optimizer is Tier.NVME, r.state, rest),
            (r.placement.parameters is Tier.NVME, r.weights, weight),
        ):
            if on_disk:
                whole, part = divmod(elements, chunk)
                total += whole * _pages(chunk * size) + _pages(part * size)
    return total


def _gpu_state_bytes(plan: Plan, ranks: Sequence[_Rank]) -> int:
    """What stays, and the slots through which the others pass."""
    weight, rest = _sizes(plan)
    elements, ring = 0.0, plan.buckets.prefetch_units + 1
    for r in ranks:
        elements += weight * r.weights * (r.placement.parameters is Tier.GPU)
        elements += weight * r.gradients * (r.placement.gradients is Tier.GPU)
        elements += rest * r.state * (r.placement.optimizer is Tier.GPU)
    # Whole weights and whole gradients have slots where the rank does not keep them whole on the GPU.
    come = [r for r in ranks if r.placement.parameters is not Tier.GPU or r.weights < r.whole_weights]
    go = [r for r in ranks if r.placement.gradients is not Tier.GPU or r.gradients < r.whole_trained]
    slots = _rings([r.whole_weights for r in come if r.name], ring)
    slots += sum(r.whole_weights for r in come if not r.name) + _rings([r.whole_trained for r in go], 2)
    streamed = plan.gpu_update_share > 0 and any(r.placement.optimizer is Tier.HOST for r in ranks)
    ring_of_update = plan.buckets.update_slots * plan.buckets.update_elements * (2 * weight + rest) if streamed else 0
    return int(elements + weight * slots + ring_of_update)


def _rings(sizes: Sequence[int], places: int) -> int:
    """Elements of slots that units of one size share."""
    return sum(size * min(len(list(alike)), places) for size, alike in groupby(sorted(sizes)))
