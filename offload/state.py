"""Where a unit's numbers are: its buffers in each tier, made once, before the first step."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from offload.arena import Arena
from offload.plan import Plan, Precision, StateFormat, Tier
from offload.residency import MOMENT_BYTES, chunks, mirrored, state_bytes
from offload.store import Extent, Store
from offload.unit import Unit


class OptimizerState(NamedTuple):
    """Optimizer state of a span of elements: what the optimizer keeps of them, and in bf16 what masters have beyond it.

    ``moments`` are fp32, in the order of ``OptimizerKind.moments``; the remainder exists in bf16 only.
    """

    moments: tuple[torch.Tensor, ...]
    remainder: torch.Tensor | None

    def span(self, start: int, stop: int) -> "OptimizerState":
        """A part of it."""
        remainder = None if self.remainder is None else self.remainder[start:stop]
        return OptimizerState(tuple(m[start:stop] for m in self.moments), remainder)

    def tensors(self) -> list[torch.Tensor]:
        """All of it, in the same order for every state of a format."""
        return [*self.moments, *([] if self.remainder is None else [self.remainder])]


def carve_state(buffer: torch.Tensor, elements: int, form: StateFormat) -> OptimizerState:
    """The state of ``elements`` in a uint8 buffer: moments, one kind after the other, then remainders."""
    count = len(form.optimizer.moments)
    end = elements * MOMENT_BYTES * count
    moments = buffer[:end].view(torch.float32).view(count, elements)
    remainder = None
    if form.precision is Precision.BF16:
        remainder = buffer[end : end + 2 * elements].view(torch.int16)
    return OptimizerState(tuple(moments), remainder)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Of weights and gradients."""
    return torch.bfloat16 if precision is Precision.BF16 else torch.float32


@dataclass(eq=False)
class UnitState:
    """The buffers of one unit; ``None`` where its placement has none.

    Weights and gradients are in the weight dtype; ``*_extents`` hold one extent a chunk of ``spans``.
    """

    unit: Unit
    spans: list[tuple[int, int]]
    """Chunks of the trainable elements, in which state is updated and streamed."""
    weight_spans: list[tuple[int, int]]
    """Chunks of all elements, in which weights are read from the NVMe tier."""
    device_weights: torch.Tensor | None = None
    device_gradients: torch.Tensor | None = None
    device_state: OptimizerState | None = None
    host_weights: torch.Tensor | None = None
    """Of all elements where the weights live on the host; of the trainable ones where they are a mirror."""
    host_gradients: torch.Tensor | None = None
    host_state: OptimizerState | None = None
    weight_extents: list[Extent] | None = None
    state_extents: list[Extent] | None = None


def allocate(unit: Unit, plan: Plan, device: torch.device, arena: Arena, store: Store | None) -> UnitState:
    """The buffers of a unit, zero, in the tiers of the plan: what ``residency.footprint`` counts."""
    place, form = unit.placement, plan.state_format
    dtype, trainable, all_elements = weight_dtype(form.precision), unit.shape.trainable_elements, unit.shape.elements

    def on_device(elements: int) -> torch.Tensor:
        return torch.zeros(elements, dtype=dtype, device=device)

    def on_host(elements: int) -> torch.Tensor:
        return arena.take(elements * dtype.itemsize).view(dtype)

    state = UnitState(
        unit,
        chunks(trainable, plan.buckets.update_elements),
        chunks(all_elements, plan.buckets.update_elements),
    )
    if place.parameters is Tier.GPU:
        state.device_weights = on_device(all_elements)
        if mirrored(place):
            state.host_weights = on_host(trainable)
    elif place.parameters is Tier.HOST:
        state.host_weights = on_host(all_elements)
    else:
        state.weight_extents = [_extent(store, (b - a) * dtype.itemsize) for a, b in state.weight_spans]
    if place.gradients is Tier.GPU:
        state.device_gradients = on_device(trainable)
    else:
        state.host_gradients = on_host(trainable)
    size = state_bytes(trainable, form)
    if place.optimizer is Tier.GPU:
        state.device_state = carve_state(torch.zeros(size, dtype=torch.uint8, device=device), trainable, form)
    elif place.optimizer is Tier.HOST or not size:  # where there is no state, it is nowhere
        state.host_state = carve_state(arena.take(size), trainable, form)
    else:
        state.state_extents = [_extent(store, state_bytes(b - a, form)) for a, b in state.spans]
    return state


def _extent(store: Store | None, size_bytes: int) -> Extent:
    assert store is not None, "an extent is needed, so the footprint counted one and a store was made"
    return store.take(size_bytes)
