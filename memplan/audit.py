"""A second opinion on a finished plan: its bytes counted from the placements alone, unit by unit.

The arithmetic is written apart from ``offload.residency`` on purpose: a mistake in one is a difference between both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil

from memplan.formatting import format_bytes
from offload.plan import Placement, Plan, Precision, Target, Tier
from offload.residency import UnitShape

PAGE = 4096


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
    expected, more, start = plan.prediction, 0, 0
    if plan.target is Target.MEMPLAN:
        ranks = [_rank(plan, known[p.unit], p) for p in plan.placements]
        of_node = plan.gpus // plan.nodes
        host = of_node * (_host_bytes(plan, ranks) + _checkpoint_bytes(plan))
        problems += _differs("host", host, expected.host_bytes)
        problems += _differs("nvme", of_node * _nvme_bytes(plan, ranks), expected.nvme_bytes)
        state = _gpu_state_bytes(plan, ranks)
        if state > expected.gpu_peak_bytes:
            problems.append(
                f"model state on the gpu takes {format_bytes(state)}, more than the predicted peak of "
                f"{format_bytes(expected.gpu_peak_bytes)}"
            )
        # What somebody added by hand, as slots of the update, is there beside all that was predicted.
        more = max(0, state - expected.phases.get("gpu", {}).get("attach", state))
        # However models are built, the tiers fill while each process has a unit on its way.
        start = of_node * (_host_bytes(plan, ranks) + _passing_bytes(ranks)) if plan.device == "cuda" else 0
    for tier, used, budget in (
        ("gpu", max(expected.gpu_peak_bytes, expected.gpu_upper_bytes) + more, plan.budget.gpu_bytes),
        ("host", max(expected.host_bytes, expected.host_upper_bytes, start), plan.budget.host_bytes),
        ("nvme", expected.nvme_bytes, plan.budget.nvme_bytes),
    ):
        if used > budget:
            problems.append(
                f"the {tier} tier holds up to {format_bytes(used)}, over its budget of {format_bytes(budget)}"
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


def _checkpoint_bytes(plan: Plan) -> int:
    """Of the activations that wait on the host: what is left of the host's bytes beside the model's state."""
    return plan.prediction.phases.get("host", {}).get("checkpoints", 0) // (plan.gpus // plan.nodes)


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
