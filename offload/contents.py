"""A unit's numbers as whole tensors on the host: how a model enters the tiers, and how checkpoints are made of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from offload.arena import page_aligned
from offload.optimizer import join_master, split_master_
from offload.plan import Precision, Tier
from offload.residency import chunks, state_bytes
from offload.state import AdamState, UnitState, carve_state, weight_dtype
from offload.store import Extent, Store

SPLIT_ELEMENTS = 1 << 20
"""Masters that are split at a time: the host may have little room beside the tiers."""


@dataclass(eq=False)
class Contents:
    """Flat fp32 tensors of one unit on the host.

    ``weights`` holds all elements, the exact masters of the trainable ones first; the moments hold the trainable ones.
    """

    weights: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor

    @classmethod
    def zeros(cls, state: UnitState) -> "Contents":
        """Room for one unit's numbers."""
        shape = state.unit.shape
        return cls(torch.zeros(shape.elements), *(torch.zeros(shape.trainable_elements) for _ in range(2)))


def split(contents: Contents, precision: Precision) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights as they are computed with, flat, and the remainders of the trainable ones.

    In bf16 new tensors, otherwise the contents' own weights and None.
    """
    if precision is not Precision.BF16:
        return contents.weights, None
    trainable = len(contents.exp_avg)
    flat = torch.zeros(len(contents.weights), dtype=weight_dtype(precision))
    remainder = torch.zeros(trainable, dtype=torch.int16)
    for a, b in chunks(trainable, SPLIT_ELEMENTS):
        split_master_(contents.weights[a:b], flat[a:b], remainder[a:b])
    flat[trainable:] = contents.weights[trainable:]
    return flat, remainder


def write(state: UnitState, contents: Contents, precision: Precision, store: Store | None) -> None:
    """Put a unit's numbers where they live."""
    flat, remainder = split(contents, precision)
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
    source = AdamState(contents.exp_avg, contents.exp_avg_sq, remainder)
    for a, b, target, stored in _state_spans(state, precision):
        _copy_state(target, source.span(a, b))
        if stored is not None:
            assert store is not None
            store.write(*stored).result()


def read(state: UnitState, precision: Precision, store: Store | None) -> Contents:
    """A unit's numbers from where they live; no update of it may be under way."""
    trainable, contents = state.unit.shape.trainable_elements, Contents.zeros(state)
    flat = torch.zeros(len(contents.weights), dtype=weight_dtype(precision))
    remainder = torch.zeros(trainable, dtype=torch.int16) if precision is Precision.BF16 else None
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
    target = AdamState(contents.exp_avg, contents.exp_avg_sq, remainder)
    for a, b, source, stored in _state_spans(state, precision):
        if stored is not None:
            assert store is not None
            store.read(*stored).result()
        _copy_state(target.span(a, b), source)
    contents.weights.copy_(flat)
    if remainder is not None:
        contents.weights[:trainable] = join_master(flat[:trainable], remainder)
    return contents


def _state_spans(
    state: UnitState, precision: Precision
) -> Iterator[tuple[int, int, AdamState, tuple[Extent, torch.Tensor] | None]]:
    """Spans of the optimizer state as (start, stop, tensors, (their extent, its bytes) where they are stored)."""
    if state.unit.placement.optimizer is not Tier.NVME:
        whole = state.device_state or state.host_state
        assert whole is not None
        yield 0, state.unit.shape.trainable_elements, whole, None
        return
    assert state.state_extents is not None
    for (a, b), extent in zip(state.spans, state.state_extents, strict=True):
        raw = page_aligned(extent.size_bytes)
        assert extent.size_bytes >= (b - a) * state_bytes(precision)
        yield a, b, carve_state(raw, b - a, precision), (extent, raw)


def _copy_state(target: AdamState, source: AdamState) -> None:
    for t, s in zip(target, source, strict=True):
        if t is not None and s is not None:
            t.copy_(s)


def from_model(state: UnitState) -> Contents:
    """The numbers that the model's parameters hold now, with moments that are zero and take no memory."""
    shape = state.unit.shape
    nothing = torch.zeros(()).expand(shape.trainable_elements)
    contents = Contents(torch.zeros(shape.elements), nothing, nothing)
    for field in state.unit.fields:
        field.view(contents.weights).copy_(field.parameter.detach())
    return contents


def named(state: UnitState, contents: Contents) -> Iterable[tuple[str, dict[str, torch.Tensor]]]:
    """(parameter name, {what: tensor of the parameter's shape}) for every parameter of the unit."""
    for field in state.unit.fields:
        tensors = {"weight": field.view(contents.weights)}
        if field.trainable:
            tensors["exp_avg"] = field.view(contents.exp_avg)
            tensors["exp_avg_sq"] = field.view(contents.exp_avg_sq)
        yield field.name, tensors
