"""A unit's numbers as whole tensors on the host: how a model enters the tiers, and how checkpoints are made of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from offload.arena import page_aligned
from offload.optimizer import join_master, split_master_
from offload.plan import OptimizerKind, Precision, StateFormat
from offload.state import OptimizerState, UnitState, carve_state, weight_dtype
from offload.store import Extent, Store


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
    trainable = contents.trainable_elements
    flat = torch.zeros(len(contents.weights), dtype=weight_dtype(precision))
    if precision is not Precision.BF16:
        return flat.copy_(contents.weights), None
    remainder = torch.zeros(trainable, dtype=torch.int16)
    split_master_(contents.weights[:trainable], flat[:trainable], remainder)
    flat[trainable:] = contents.weights[trainable:]
    return flat, remainder


def write(state: UnitState, contents: Contents, form: StateFormat, store: Store | None) -> None:
    """Put a unit's numbers where they live."""
    flat, remainder = split(contents, form.precision)
    if state.device_weights is not None:
        state.device_weights.copy_(flat)
    if state.host_weights is not None:
        state.host_weights.copy_(flat[: len(state.host_weights)])
    if state.weight_extents is not None:
        for (a, b), extent in zip(state.weight_spans, state.weight_extents, strict=True):
            assert store is not None
            raw = page_aligned(extent.size_bytes)
            raw[: (b - a) * flat.itemsize].view(flat.dtype).copy_(flat[a:b])
            store.write(extent, raw).result()
    source = OptimizerState(tuple(contents.moments.values()), remainder)
    for a, b, target, stored in _state_spans(state, form):
        _copy_state(target, source.span(a, b))
        if stored is not None:
            assert store is not None
            store.write(*stored).result()


def read(state: UnitState, form: StateFormat, store: Store | None) -> Contents:
    """A unit's numbers from where they live; no update of it may be under way."""
    trainable, contents = state.unit.shape.trainable_elements, Contents.zeros(state, form.optimizer)
    flat = torch.zeros(len(contents.weights), dtype=weight_dtype(form.precision))
    remainder = torch.zeros(trainable, dtype=torch.int16) if form.precision is Precision.BF16 else None
    if state.weight_extents is not None:
        for (a, b), extent in zip(state.weight_spans, state.weight_extents, strict=True):
            assert store is not None
            raw = page_aligned(extent.size_bytes)
            store.read(extent, raw).result()
            flat[a:b] = raw[: (b - a) * flat.itemsize].view(flat.dtype)
    elif state.device_weights is not None:
        flat.copy_(state.device_weights)
    else:
        assert state.host_weights is not None
        flat.copy_(state.host_weights)
    target = OptimizerState(tuple(contents.moments.values()), remainder)
    for a, b, source, stored in _state_spans(state, form):
        if stored is not None:
            assert store is not None
            store.read(*stored).result()
        _copy_state(target.span(a, b), source)
    contents.weights.copy_(flat)
    if remainder is not None:
        contents.weights[:trainable] = join_master(flat[:trainable], remainder)
    return contents


def _state_spans(
    state: UnitState, form: StateFormat
) -> Iterator[tuple[int, int, OptimizerState, tuple[Extent, torch.Tensor] | None]]:
    """Spans of the optimizer state as (start, stop, tensors, (their extent, its bytes) where they are stored)."""
    if state.state_extents is None:
        whole = state.device_state if state.device_state is not None else state.host_state
        assert whole is not None
        yield 0, state.unit.shape.trainable_elements, whole, None
        return
    for (a, b), extent in zip(state.spans, state.state_extents, strict=True):
        raw = page_aligned(extent.size_bytes)
        yield a, b, carve_state(raw, b - a, form), (extent, raw)


def _copy_state(target: OptimizerState, source: OptimizerState) -> None:
    for t, s in zip(target.tensors(), source.tensors(), strict=True):
        t.copy_(s)


def from_model(state: UnitState, optimizer: OptimizerKind) -> Contents:
    """The numbers that the model's parameters hold now, with no moments yet."""
    contents = Contents.zeros(state, optimizer)
    for field in state.unit.fields:
        field.view(contents.weights).copy_(field.parameter.detach())
    return contents


def named(state: UnitState, contents: Contents) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter name, {what: tensor of the parameter's shape}) for every parameter of the unit."""
    for field in state.unit.fields:
        tensors = {"weight": field.view(contents.weights)}
        if field.trainable:
            tensors |= {name: field.view(moments) for name, moments in contents.moments.items()}
        yield field.name, tensors
