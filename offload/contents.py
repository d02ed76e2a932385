"""A unit's numbers as whole tensors on the host: how a model enters the tiers, and how checkpoints are made of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from offload.arena import page_aligned
from offload.dtensors import local_of
from offload.moments import move
from offload.optimizer import join_master, split_master_
from offload.plan import OptimizerKind, Precision, StateFormat
from offload.residency import chunks, mirrored
from offload.state import OptimizerState, UnitState, carve_state, weight_dtype
from offload.store import Extent, Store

SPLIT_ELEMENTS = 1 << 20
"""Masters that are split at a time: the host may have little room beside the tiers."""


@dataclass(eq=False)
class Contents:
    """Flat fp32 tensors of one unit on the host.

    ``weights`` holds all elements, the exact masters of the trainable ones first; the moments hold the trainable ones.
    """

    weights: torch.Tensor
    trainable_elements: int
    moments: dict[str, torch.Tensor]
    """By the names of ``OptimizerKind.moments``."""

    @classmethod
    def zeros(cls, state: UnitState, optimizer: OptimizerKind) -> "Contents":
        """Room for one unit's numbers."""
        shape = state.unit.shape
        moments = {name: torch.zeros(shape.trainable_elements) for name in optimizer.moments}
        return cls(torch.zeros(shape.elements), shape.trainable_elements, moments)


def split(contents: Contents, precision: Precision) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights as they are computed with, flat, and the remainders of the trainable ones (in bf16 only)."""
    if precision is not Precision.BF16:
        return contents.weights.to(weight_dtype(precision)), None
    trainable = contents.trainable_elements
    flat = torch.zeros(len(contents.weights), dtype=weight_dtype(precision))
    remainder = torch.zeros(trainable, dtype=torch.int16)
    for a, b in chunks(trainable, SPLIT_ELEMENTS):
        split_master_(contents.weights[a:b], flat[a:b], remainder[a:b])
    flat[trainable:] = contents.weights[trainable:]
    return flat, remainder


def write(state: UnitState, contents: Contents, form: StateFormat, store: Store | None) -> None:
    """Put a unit's numbers where they live."""
    flat, remainder = split(contents, form.precision)
    first, *others = [flat[part] for part in state.kept_weights]
    kept, updated = torch.cat((first, *others)) if others else first, state.updated
    if state.device_weights is not None:
        state.device_weights.copy_(kept)
    if state.host_weights is not None:
        state.host_weights.copy_(flat[updated] if mirrored(state.unit.placement) else kept)
    if state.weight_extents is not None:
        for (a, b), extent in zip(state.weight_spans, state.weight_extents, strict=True):
            assert store is not None
            raw = page_aligned(extent.size_bytes)
            raw[: (b - a) * flat.itemsize].view(flat.dtype).copy_(kept[a:b])
            store.write(extent, raw).result()
    source = _state_of(contents, remainder, form.precision).span(updated.start, updated.stop)
    for a, b, target, stored in _state_spans(state, form):
        move(target, source.span(a, b))
        if stored is not None:
            assert store is not None
            store.write(*stored).result()


def read(state: UnitState, form: StateFormat, store: Store | None) -> Contents:
    """A unit's numbers from where they live; no update of it may be under way. Ranks read together."""
    trainable, contents = state.unit.shape.trainable_elements, Contents.zeros(state, form.optimizer)
    kept, updated = _kept_weights(state, form.precision, store), state.updated
    flat = torch.zeros(len(contents.weights), dtype=weight_dtype(form.precision))
    remainder = torch.zeros(trainable, dtype=torch.int16) if form.precision is Precision.BF16 else None
    start = 0
    for part in state.kept_weights:
        flat[part] = kept[start : start + part.stop - part.start]
        start += part.stop - part.start
    contents.weights.copy_(flat)
    target = _state_of(contents, remainder, form.precision).span(updated.start, updated.stop)
    for a, b, source, stored in _state_spans(state, form):
        if stored is not None:
            assert store is not None
            store.read(*stored).result()
        move(target.span(a, b), source)
    if remainder is not None:
        contents.weights[updated] = join_master(flat[updated], remainder[updated])
    if state.ranks is not None and updated.stop - updated.start < trainable:
        for divided in (contents.weights[:trainable], *contents.moments.values()):
            state.ranks.gather_on_host(divided)
    if state.ranks is not None and len(kept) < len(flat):
        state.ranks.gather_on_host(contents.weights[trainable:])
    return contents


def _state_of(contents: Contents, remainder: torch.Tensor | None, precision: Precision) -> OptimizerState:
    """The state of all trainable elements, on these tensors; in fp16 with the weights as its masters."""
    master = contents.weights[: contents.trainable_elements] if precision is Precision.FP16 else None
    return OptimizerState(tuple(contents.moments.values()), remainder, master)


def _kept_weights(state: UnitState, precision: Precision, store: Store | None) -> torch.Tensor:
    """The weights that this rank keeps, on the host."""
    if state.weight_extents is None:
        weights = state.device_weights if state.device_weights is not None else state.host_weights
        assert weights is not None
        return weights.cpu()
    kept = torch.zeros(state.weight_spans[-1][1] if state.weight_spans else 0, dtype=weight_dtype(precision))
    for (a, b), extent in zip(state.weight_spans, state.weight_extents, strict=True):
        assert store is not None
        raw = page_aligned(extent.size_bytes)
        store.read(extent, raw).result()
        kept[a:b] = raw[: (b - a) * kept.itemsize].view(kept.dtype)
    return kept


def _state_spans(
    state: UnitState, form: StateFormat
) -> Iterator[tuple[int, int, OptimizerState, tuple[Extent, torch.Tensor] | None]]:
    """Spans of the optimizer state as (start, stop, tensors, (their extent, its bytes) where they are stored)."""
    if state.state_extents is None:
        whole = state.device_state if state.device_state is not None else state.host_state
        assert whole is not None
        yield 0, state.updated.stop - state.updated.start, whole, None
        return
    for (a, b), extent in zip(state.spans, state.state_extents, strict=True):
        raw = page_aligned(extent.size_bytes)
        yield a, b, carve_state(raw, b - a, form), (extent, raw)


def from_model(state: UnitState, optimizer: OptimizerKind) -> Contents:
    """The numbers that the model's parameters hold now, with moments that are zero and take no memory."""
    shape = state.unit.shape
    nothing = torch.zeros(()).expand(shape.trainable_elements)
    moments = dict.fromkeys(optimizer.moments, nothing)
    contents = Contents(torch.zeros(shape.elements), shape.trainable_elements, moments)
    for field in state.unit.fields:
        field.view(contents.weights).copy_(local_of(field.parameter).detach())
    return contents


def named(state: UnitState, contents: Contents) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter name, {what: tensor of the parameter's shape}) for every parameter of the unit."""
    for field in state.unit.fields:
        tensors = {"weight": field.view(contents.weights)}
        if field.trainable:
            tensors |= {name: field.view(moments) for name, moments in contents.moments.items()}
        yield field.name, tensors
