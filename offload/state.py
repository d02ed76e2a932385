"""Where a unit's numbers are: its buffers in each tier, made once, before the first step."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from offload.arena import Arena
from offload.plan import Plan, Precision, Tier
from offload.residency import chunks, mirrored, state_bytes
from offload.store import Extent, Store
from offload.unit import Unit


class AdamState(NamedTuple):
    """Optimizer state of a span of elements; the remainder exists in bf16 only, the master in fp16 only."""

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    remainder: torch.Tensor | None
    master: torch.Tensor | None = None

    def span(self, start: int, stop: int) -> "AdamState":
        """A part of it."""
        rest = (None if t is None else t[start:stop] for t in (self.remainder, self.master))
        return AdamState(self.exp_avg[start:stop], self.exp_avg_sq[start:stop], *rest)


def carve_state(buffer: torch.Tensor, elements: int, precision: Precision) -> AdamState:
    """The state of ``elements`` in a uint8 buffer: first moments, second moments, remainders or masters."""
    moments = buffer[: elements * 8].view(torch.float32)
    remainder = master = None
    if precision is Precision.BF16:
        remainder = buffer[elements * 8 : elements * 10].view(torch.int16)
    if precision is Precision.FP16:
        master = buffer[elements * 8 : elements * 12].view(torch.float32)
    return AdamState(moments[:elements], moments[elements:], remainder, master)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Of weights and gradients."""
    return {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}.get(precision, torch.float32)


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
    device_state: AdamState | None = None
    host_weights: torch.Tensor | None = None
    """Of all elements where the weights live on the host; of the trainable ones where they are a mirror."""
    host_gradients: torch.Tensor | None = None
    host_state: AdamState | None = None
    weight_extents: list[Extent] | None = None
    state_extents: list[Extent] | None = None


def allocate(unit: Unit, plan: Plan, device: torch.device, arena: Arena, store: Store | None) -> UnitState:
    """The buffers of a unit, zero, in the tiers of the plan: what ``residency.footprint`` counts."""
    place, precision = unit.placement, plan.precision
    dtype, trainable, all_elements = weight_dtype(precision), unit.shape.trainable_elements, unit.shape.elements

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
    size = trainable * state_bytes(precision)
    if place.optimizer is Tier.GPU:
        state.device_state = carve_state(torch.zeros(size, dtype=torch.uint8, device=device), trainable, precision)
    elif place.optimizer is Tier.HOST:
        state.host_state = carve_state(arena.take(size), trainable, precision)
    else:
        state.state_extents = [_extent(store, (b - a) * state_bytes(precision)) for a, b in state.spans]
    return state


def _extent(store: Store | None, size_bytes: int) -> Extent:
    assert store is not None, "an extent is needed, so the footprint counted one and a store was made"
    return store.take(size_bytes)
