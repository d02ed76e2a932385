"""Where a unit's numbers are: its buffers in each tier, made once, before the first step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from offload.arena import Arena
from offload.plan import MOMENT_BLOCK_ELEMENTS, MomentFormat, Plan, Precision, StateFormat, Tier
from offload.ranks import Ranks
from offload.residency import chunks, mirrored, state_bytes
from offload.shards import ALONE, Shards
from offload.store import Extent, Store
from offload.unit import Unit


class OptimizerState(NamedTuple):
    """Optimizer state of a span of elements: what the optimizer keeps of them, and what masters have beyond weights.

    ``moments`` are in the order of ``OptimizerKind.moments``; the remainder exists in bf16 only, the master, of fp32,
    in fp16 only. Moments in 8 bits have fp32 ``scales``, one a block: such a span begins with a block.
    """

    moments: tuple[torch.Tensor, ...]
    remainder: torch.Tensor | None
    master: torch.Tensor | None = None
    scales: tuple[torch.Tensor, ...] = ()

    def span(self, start: int, stop: int) -> "OptimizerState":
        """A part of it."""
        part = self._replace(scales=()).each(lambda tensor: tensor[start:stop])
        if not self.scales:
            return part
        assert start % MOMENT_BLOCK_ELEMENTS == 0, "a block is never cut"
        blocks = slice(start // MOMENT_BLOCK_ELEMENTS, -(-stop // MOMENT_BLOCK_ELEMENTS))
        return part._replace(scales=tuple(scale[blocks] for scale in self.scales))

    def each(self, make: Callable[[torch.Tensor], torch.Tensor]) -> "OptimizerState":
        """The same of what ``make`` makes of its tensors."""
        remainder, master = (None if t is None else make(t) for t in (self.remainder, self.master))
        return OptimizerState(tuple(map(make, self.moments)), remainder, master, tuple(map(make, self.scales)))

    def tensors(self) -> list[torch.Tensor]:
        """All of it, in the same order for every state of a format."""
        return [*self.moments, *(t for t in (self.remainder, self.master) if t is not None), *self.scales]


def carve_state(buffer: torch.Tensor, elements: int, form: StateFormat) -> OptimizerState:
    """The state of ``elements`` in a uint8 buffer. Zeros are a state whose moments are zero.

    Moments, one kind after the other, then remainders or masters, then scales: but what has wider numbers comes first,
    so that whatever begins at a multiple of its size where the buffer does.
    """
    names = form.optimizer.moments
    pieces = [(moment_dtype(name, form), elements) for name in names]
    pieces += [(dtype, elements) for dtype in _REST.get(form.precision, ())]
    if form.moments is MomentFormat.EIGHT_BIT:
        pieces += [(torch.float32, -(-elements // MOMENT_BLOCK_ELEMENTS))] * len(names)
    found: dict[int, torch.Tensor] = {}
    end = 0
    for i, (dtype, count) in sorted(enumerate(pieces), key=lambda item: -item[1][0].itemsize):
        start, end = end, end + count * dtype.itemsize
        found[i] = buffer[start:end].view(dtype)
    tensors = [found[i] for i in range(len(pieces))]
    moments, rest = tensors[: len(names)], tensors[len(names) :]
    remainder = rest.pop(0) if form.precision is Precision.BF16 else None
    master = rest.pop(0) if form.precision is Precision.FP16 else None
    return OptimizerState(tuple(moments), remainder, master, tuple(rest))


_REST = {Precision.BF16: (torch.int16,), Precision.FP16: (torch.float32,)}
"""Remainders, or masters."""


def moment_dtype(name: str, form: StateFormat) -> torch.dtype:
    """Of a moment's numbers. In 8 bits it tells their map: that of signed numbers, or that of squares."""
    if form.moments is MomentFormat.EIGHT_BIT:
        return torch.uint8 if name in form.optimizer.squares else torch.int8
    return torch.bfloat16 if form.moments is MomentFormat.BF16 else torch.float32


def weight_dtype(precision: Precision) -> torch.dtype:
    """Of weights and gradients."""
    return {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}.get(precision, torch.float32)


@dataclass(eq=False)
class UnitState:
    """The buffers that one rank has of a unit; ``None`` where its placement has none.

    Weights and gradients are in the weight dtype; ``*_extents`` hold one extent a chunk of ``spans``. Of a unit that is
    divided over ranks every buffer holds this rank's part, or all of it: [Note: sharding] in ``offload.shards``.
    """

    unit: Unit
    spans: list[tuple[int, int]]
    """Chunks of the optimizer state that this rank has, in which it is updated and streamed."""
    weight_spans: list[tuple[int, int]]
    """Chunks of the weights that this rank keeps, in which they are read from the NVMe tier."""
    device_weights: torch.Tensor | None = None
    device_gradients: torch.Tensor | None = None
    device_state: OptimizerState | None = None
    host_weights: torch.Tensor | None = None
    """Those that are kept where the weights live on the host; where they are a mirror, those that are updated here."""
    host_gradients: torch.Tensor | None = None
    host_state: OptimizerState | None = None
    weight_extents: list[Extent] | None = None
    state_extents: list[Extent] | None = None
    ranks: Ranks | None = None
    """Those that share the unit; ``None`` where there is one."""

    @property
    def shards(self) -> Shards:
        """How it is divided over them."""
        return self.ranks.shards if self.ranks is not None else ALONE

    @property
    def on_device(self) -> bool:
        """Whether all its weights lie on the device always."""
        return self.shards.on_device(self.unit.placement.parameters)

    @property
    def updated(self) -> slice:
        """The unit's elements that this rank updates."""
        size = self.shards.state(self.unit.shape.trainable_elements)
        divided = self.ranks is not None and size < self.unit.shape.trainable_elements
        start = self.ranks.position * size if self.ranks is not None and divided else 0
        return slice(start, start + size)

    @property
    def kept_weights(self) -> list[slice]:
        """The unit's elements whose weights this rank keeps, in the order in which it does."""
        shape = self.unit.shape
        if self.ranks is None or self.shards.whole_weights(self.unit.placement.parameters):
            return [slice(0, shape.elements)]
        frozen = shape.frozen_elements // self.shards.group
        start = shape.trainable_elements + self.ranks.position * frozen
        return [self.updated, slice(start, start + frozen)]

    def places(self, flat: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
        """Where in a flat buffer of the whole unit the kept weights from ``start`` to ``stop`` belong."""
        found, before = [], 0
        for part in self.kept_weights:
            size = part.stop - part.start
            a, b = max(start - before, 0), min(stop - before, size)
            if a < b:
                found.append(flat[part.start + a : part.start + b])
            before += size
        return found

    def part(self) -> "UnitState":
        """The same buffers as the update sees them: only what this rank updates, from its first element on."""
        if self.ranks is None:
            return self
        here, placement = self.updated, self.unit.placement

        def own(kept: torch.Tensor | None, *, whole: bool) -> torch.Tensor | None:
            # What is divided already begins with it.
            return None if kept is None else kept[here] if whole else kept[: here.stop - here.start]

        weights, gradients = self.shards.whole_weights(placement.parameters), self.shards.whole_gradients()
        return replace(
            self,
            device_weights=own(self.device_weights, whole=weights),
            host_weights=own(self.host_weights, whole=weights and not mirrored(placement)),
            device_gradients=own(self.device_gradients, whole=gradients),
            host_gradients=own(self.host_gradients, whole=gradients),
        )


def allocate(
    unit: Unit, plan: Plan, device: torch.device, arena: Arena, store: Store | None, ranks: Ranks | None = None
) -> UnitState:
    """The buffers of a unit, zero, in the tiers of the plan: what ``residency.footprint`` counts."""
    place, form, shards = unit.placement, plan.state_format, Shards.of(plan)
    dtype, name = weight_dtype(form.precision), f"unit {unit.name}" if unit.name else "the root unit"
    weights = shards.weights(unit.shape.elements, place.parameters)
    gradients = shards.gradients(unit.shape.trainable_elements)
    updated = shards.state(unit.shape.trainable_elements)

    def on_device(elements: int) -> torch.Tensor:
        return torch.zeros(elements, dtype=dtype, device=device)

    def on_host(elements: int) -> torch.Tensor:
        return arena.take(elements * dtype.itemsize).view(dtype)

    state = UnitState(
        unit,
        chunks(updated, plan.buckets.update_elements),
        chunks(weights, plan.buckets.update_elements),
        ranks=ranks,
    )
    if place.parameters is Tier.GPU:
        state.device_weights = on_device(weights)
        if mirrored(place):
            state.host_weights = on_host(updated)
    elif place.parameters is Tier.HOST:
        state.host_weights = on_host(weights)
    else:
        state.weight_extents = [
            _extent(store, (b - a) * dtype.itemsize, f"weights of {name}") for a, b in state.weight_spans
        ]
    if place.gradients is Tier.GPU:
        state.device_gradients = on_device(gradients)
    else:
        state.host_gradients = on_host(gradients)
    size = state_bytes(updated, form)
    if place.optimizer is Tier.GPU:
        state.device_state = carve_state(torch.zeros(size, dtype=torch.uint8, device=device), updated, form)
    elif place.optimizer is Tier.HOST or not size:  # where there is no state, it is nowhere
        state.host_state = carve_state(arena.take(size), updated, form)
    else:
        state.state_extents = [
            _extent(store, state_bytes(b - a, form), f"optimizer state of {name}") for a, b in state.spans
        ]
    return state


def _extent(store: Store | None, size_bytes: int, of: str) -> Extent:
    assert store is not None, "an extent is needed, so the footprint counted one and a store was made"
    return store.take(size_bytes, of)
