"""A second opinion on a finished plan: its bytes counted from the placements alone, unit by unit.

The arithmetic is written apart from ``offload.residency`` on purpose: a mistake in one is a difference between both.
"""

from collections.abc import Sequence
from itertools import groupby
from math import ceil

from memplan.formatting import format_bytes
from offload.plan import Placement, Plan, Precision, Tier
from offload.residency import UnitShape

PAGE = 4096


def audit(plan: Plan, shapes: Sequence[UnitShape]) -> list[str]:
    """What does not add up, one sentence each; empty for a sound plan.

    ``shapes`` are the units of the model, in any order. Plans for several GPUs are checked against their budget only:
    each rank then holds shards, which the placements do not show.
    """
    known = {s.name: s for s in shapes}
    problems = [f"unit {p.unit!r} of the plan is not in the model" for p in plan.placements if p.unit not in known]
    placed = {p.unit for p in plan.placements}
    problems += [f"unit {s.name!r} of the model is not in the plan" for s in shapes if s.name not in placed]
    if problems:
        return problems
    if plan.gpus == 1:
        units = [(known[p.unit], p) for p in plan.placements]
        host, nvme = _host_bytes(plan, units), _nvme_bytes(plan, units)
        problems += _differs("host", host, plan.prediction.host_bytes)
        problems += _differs("nvme", nvme, plan.prediction.nvme_bytes)
        state = _gpu_state_bytes(plan, units)
        if state > plan.prediction.gpu_peak_bytes:
            problems.append(
                f"model state on the gpu takes {format_bytes(state)}, more than the predicted peak of "
                f"{format_bytes(plan.prediction.gpu_peak_bytes)}"
            )
    for tier, used, budget in (
        ("gpu", plan.prediction.gpu_peak_bytes, plan.budget.gpu_bytes),
        ("host", plan.prediction.host_bytes, plan.budget.host_bytes),
        ("nvme", plan.prediction.nvme_bytes, plan.budget.nvme_bytes),
    ):
        if used > budget:
            problems.append(f"the {tier} tier holds {format_bytes(used)}, over its budget of {format_bytes(budget)}")
    return problems


def _differs(tier: str, counted: int, predicted: int) -> list[str]:
    if counted == predicted:
        return []
    return [f"the {tier} tier is predicted to hold {predicted} bytes, but the placements add up to {counted}"]


def _sizes(precision: Precision) -> tuple[int, int]:
    """Bytes an element of a weight (and a gradient), and of the rest of the optimizer's state."""
    return (2, 2 + 4 + 4) if precision is Precision.BF16 else (4, 4 + 4)


def _pages(size: int) -> int:
    return ceil(size / PAGE) * PAGE


def _host_bytes(plan: Plan, units: Sequence[tuple[UnitShape, Placement]]) -> int:
    weight, rest = _sizes(plan.precision)
    total = largest_update = largest_read = 0
    for shape, p in units:
        trained, chunk = shape.trainable_elements, min(shape.trainable_elements, plan.buckets.update_elements)
        extents = []
        if p.parameters is Tier.HOST:
            extents.append(shape.elements * weight)
        elif p.parameters is Tier.GPU and p.optimizer in (Tier.HOST, Tier.NVME):
            extents.append(trained * weight)  # the host's copy of the weights it updates
        if p.gradients is Tier.HOST:
            extents.append(trained * weight)
        if p.optimizer is Tier.HOST:
            extents.append(trained * rest)
        total += sum(map(_pages, extents))
        brought = []
        if p.optimizer is not Tier.GPU and p.gradients is Tier.GPU:
            brought.append(chunk * weight)
        if p.optimizer is Tier.NVME:
            brought.append(chunk * rest)
        if p.parameters is Tier.NVME:
            read = min(shape.elements, plan.buckets.update_elements) * weight
            brought.append(read if trained else 0)
            largest_read = max(largest_read, _pages(read))
        largest_update = max(largest_update, sum(map(_pages, brought)))
    return total + 3 * largest_update + 3 * largest_read


def _nvme_bytes(plan: Plan, units: Sequence[tuple[UnitShape, Placement]]) -> int:
    weight, rest = _sizes(plan.precision)
    chunk, total = plan.buckets.update_elements, 0
    for shape, p in units:
        for on_disk, elements, size in (
            (p.optimizer is Tier.NVME, shape.trainable_elements, rest),
            (p.parameters is Tier.NVME, shape.elements, weight),
        ):
            if on_disk:
                whole, part = divmod(elements, chunk)
                total += whole * _pages(chunk * size) + _pages(part * size)
    return total


def _gpu_state_bytes(plan: Plan, units: Sequence[tuple[UnitShape, Placement]]) -> int:
    """What stays, the slots through which the others pass, and the largest gradient on its way."""
    weight, rest = _sizes(plan.precision)
    elements = 0
    for shape, p in units:
        elements += weight * shape.elements * (p.parameters is Tier.GPU or not shape.name)
        elements += weight * shape.trainable_elements * (p.gradients is Tier.GPU)
        elements += rest * shape.trainable_elements * (p.optimizer is Tier.GPU)
    passing = sorted(s.elements for s, p in units if p.parameters is not Tier.GPU and s.name)
    gathering = sorted(s.trainable_elements for s, p in units if p.gradients is not Tier.GPU)
    slots = sum(size * min(len(list(alike)), plan.buckets.prefetch_units + 1) for size, alike in groupby(passing))
    slots += sum(size * min(len(list(alike)), 2) for size, alike in groupby(gathering))
    return elements + weight * (slots + max((s.largest_elements for s, _ in units), default=0))
