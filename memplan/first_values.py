"""Where the values come from that training starts with, and how its model is built for that."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
from torch import nn

from memplan.formatting import format_bytes
from offload.on_meta import on_meta
from offload.plan import Plan
from offload.weight_files import files_of
from profiler.contract import ModelSource
from profiler.errors import SourceError

MASTER_BYTES = 4


@dataclass(frozen=True)
class Start:
    """A model as training finds it."""

    model: nn.Module
    weights: Path | None
    """Safetensors files to read its values from; otherwise they are its own, or made by its own initialisation."""
    remark: str | None
    """What a person should know of it."""


def start_of(source: ModelSource, plan: Plan, *, resume: bool) -> Start:
    """Build the model of a source: without memory where its values will come from files, or where it has no room.

    What is on meta then, the engine makes real unit by unit. A resumed run has its values from its checkpoint.
    """
    weights = None if resume or source.folder is None or not files_of(source.folder) else source.folder
    size = whole_bytes(plan)
    if weights is None and size <= room_bytes(plan):
        return Start(source.build(), None, None if resume else _random(source))
    model = _built_on_meta(source)
    if weights is not None:
        return Start(model, weights, f"starting from the weights in {weights}")
    remarks = [] if resume else [_random(source)]
    if any(parameter.is_meta for parameter in model.parameters()):
        remarks.append(f"the model, {format_bytes(size)} in fp32, is too large for the host: it is made unit by unit")
    return Start(model, None, "; ".join(filter(None, remarks)) or None)


def whole_bytes(plan: Plan) -> int:
    """Of the plan's model in fp32."""
    return sum(prod(shape) for shape in plan.parameter_shapes.values()) * MASTER_BYTES


def room_bytes(plan: Plan) -> int:
    """Host memory that a model may take before it is taken over; where the CPU computes, the GPU tier is part of it."""
    tiers = plan.budget.host_bytes + (plan.budget.gpu_bytes if plan.device == "cpu" else 0)
    return min(tiers, psutil.virtual_memory().available)


def _built_on_meta(source: ModelSource) -> nn.Module:
    try:
        with on_meta():
            return source.build()
    except SourceError:  # it reads numbers while it builds
        return source.build()


def _random(source: ModelSource) -> str | None:
    return f"starting from random weights: {source.without_weights}" if source.without_weights else None
