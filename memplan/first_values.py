"""Where the values come from that training starts with, and how its model is built for that."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import psutil
from torch import nn

from memplan.formatting import format_bytes
from memplan.launch import all_agree
from memplan.start import BUILT_BYTES, have_room, room_bytes
from offload.on_meta import on_meta
from offload.plan import Plan
from offload.weight_files import files_of
from profiler.contract import ModelSource
from profiler.errors import SourceError


@dataclass(frozen=True)
class Start:
    """A model as training finds it."""

    model: nn.Module
    weights: Path | None
    """Safetensors files to read its values from; otherwise they are its own, or made by its own initialisation."""
    remark: str | None
    """What a person should know of it."""


def start_of(source: ModelSource, plan: Plan, *, resume: bool) -> Start:
    """Build the model of a source: without memory where its values will come from files, or where there is no room.

    Room is what the plan says, and what is there now, on every node. What is on meta then, the engine makes real unit
    by unit. A resumed run has its values from its checkpoint.
    """
    weights = None if resume or source.folder is None or not files_of(source.folder) else source.folder
    # Asked before anybody builds, and of all: processes take the units in the order of how their models were built.
    whole = all_agree(has_room(plan))
    if weights is None and whole:
        return Start(source.build(), None, None if resume else _random(source))
    remarks = [f"starting from the weights in {weights}" if weights else None if resume else _random(source)]
    how = "it is made unit by unit"
    if (model := _built_on_meta(source)) is None:
        model = source.build()
        how = "it is built there all the same, for its code reads numbers, of which there are none on meta"
    elif not any(parameter.is_meta for parameter in model.parameters()):
        whole = True  # so small that nothing of it went to meta
    if not whole:
        remarks.append(f"{_described(plan)} in fp32, is too large for the host: {how}")
    return Start(model, weights, "; ".join(filter(None, remarks)) or None)


def whole_bytes(plan: Plan) -> int:
    """Of the plan's model in fp32."""
    return sum(prod(shape) for shape in plan.parameter_shapes.values()) * BUILT_BYTES


def has_room(plan: Plan) -> bool:
    """Whether every process of this node may build the model whole."""
    processes = plan.gpus // plan.nodes
    room = min(room_bytes(plan.budget, plan.device, processes), psutil.virtual_memory().available)
    return not plan.on_meta and have_room(processes, whole_bytes(plan), 0, room)


def _described(plan: Plan) -> str:
    processes = plan.gpus // plan.nodes
    which = "the model" if processes == 1 else f"the model of each of {processes} processes"
    return f"{which}, {format_bytes(whole_bytes(plan))}"


def _built_on_meta(source: ModelSource) -> nn.Module | None:
    """None where it reads numbers while it builds."""
    try:
        with on_meta():
            return source.build()
    except SourceError:
        return None


def _random(source: ModelSource) -> str | None:
    return f"starting from random weights: {source.without_weights}" if source.without_weights else None
