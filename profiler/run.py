"""From a model to its ModelProfile."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from profiler.blame import explained
from profiler.contract import Loss, ModelSource, checked_batch, default_loss, loss_of, plain_model
from profiler.errors import ProfilerError
from profiler.events import BACKWARD, FORWARD, MODEL_STATE, STEP, Alloc, Category, Op
from profiler.layers import layer_profiles, repeated_blocks
from profiler.optimizers import check_optimizer
from profiler.profile import ActivationPoint, ModelProfile, ParameterProfile, PhasePeaks
from profiler.replay import replay
from profiler.trace import Forward, Trace, trace_step

Batches = dict[int, Callable[[], Any]]
"""What makes a batch of a size."""
Traces = dict[tuple[int, bool], Trace]
"""By batch size, and whether the blocks are recomputed."""


@dataclass(frozen=True)
class _Subject:
    """What is profiled, and under which conditions."""

    model: nn.Module
    forward: Forward
    precision: str
    blocks: tuple[str, ...]
    where: str

    def trace(self, batch: Any, recompute: bool) -> Trace:
        """Trace one step."""
        with explained(f"one training step of {self.where} can not be traced"):
            return trace_step(self.model, batch, self.forward, self.precision, self.blocks, recompute)


def profile_source(
    source: ModelSource, batch_size: int, precision: str = "fp32", optimizer: str = "adamw"
) -> ModelProfile:
    """Profile a model file with ``example_batch(batch_size)``; parameters are not materialised where that works.

    Raises SourceError when the file's model, batch and loss do not fit together, ProfilerError for other input.
    """
    check_optimizer(optimizer)
    if batch_size < 1:
        raise ProfilerError(f"batch_size is {batch_size}; it must be at least 1")
    model = source.build_abstract()
    subject = _Subject(model, source.forward, precision, repeated_blocks(model), source.path.name)
    batches: Batches = {size: partial(source.example_batch, size) for size in (batch_size, 1)}
    profile = _profile(subject, batches, batch_size, optimizer, source.name)
    return replace(profile, assumptions=(*source.assumptions, *profile.assumptions))


def profile_model(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    precision: str = "fp32",
    optimizer: str = "adamw",
    name: str | None = None,
    batch_size: int | None = None,
) -> ModelProfile:
    """Profile a module in memory on a batch: a dict of keyword arguments, a tuple of arguments or a tensor.

    ``loss(outputs, batch)`` gives the scalar to train on; without it the output, or its ``loss``, is taken.
    ``batch_size`` defaults to the first dimension of the batch's first tensor. Model and batch are left as they were.
    """
    check_optimizer(optimizer)
    model, batch = plain_model(model), checked_batch(batch, "the batch")
    if batch_size is None:
        batch_size = next((len(t) for t in _tensors(batch) if t.dim()), 1)
    forward = partial(loss_of, loss=loss or (lambda outputs, _: default_loss(outputs)))
    subject = _Subject(model, forward, precision, repeated_blocks(model), "the model")
    batches: Batches = {batch_size: lambda: batch}
    if batch_size > 1 and all(t.dim() and len(t) == batch_size for t in _tensors(batch)):
        batches[1] = lambda: tree_map_only(torch.Tensor, lambda t: t[:1], batch)
    return _profile(subject, batches, batch_size, optimizer, name or type(model).__name__)


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _profile(subject: _Subject, batches: Batches, batch_size: int, optimizer: str, name: str) -> ModelProfile:
    trace = subject.trace(batches[batch_size](), recompute=False)
    subject = replace(subject, blocks=tuple(path for path in trace.calls if path in subject.blocks))
    traces, remarks = _further_traces(subject, batches, {(batch_size, False): trace})
    peaks = replay(trace, optimizer)
    parameters = _parameters(subject.model, trace)
    layers = layer_profiles(subject.model, trace, parameters)
    uncounted = Counter(e.name for e in trace.events if isinstance(e, Op) and e.flops is None)
    return ModelProfile(
        model=name,
        precision=subject.precision,
        optimizer=optimizer,
        batch_size=batch_size,
        layers=layers,
        parameters=parameters,
        buffer_bytes=trace.buffer_bytes,
        peaks=PhasePeaks(
            forward_bytes=peaks.allocated_bytes.get(FORWARD, 0),
            backward_bytes=peaks.allocated_bytes.get(BACKWARD, 0),
            step_bytes=peaks.allocated_bytes.get(STEP, 0),
            overall_bytes=peaks.overall_bytes,
            reserved_bytes=peaks.reserved_bytes,
        ),
        activations=tuple(_point(size, recompute, t, optimizer) for (size, recompute), t in traces.items()),
        blocks=subject.blocks,
        uncounted_ops=dict(uncounted.most_common()),
        workspace_bytes=sum(e.bytes for e in trace.events if isinstance(e, Alloc) and e.category is Category.WORKSPACE),
        assumptions=tuple(dict.fromkeys([s for t in traces.values() for s in t.assumptions] + remarks)),
    )


def _further_traces(subject: _Subject, batches: Batches, known: Traces) -> tuple[Traces, list[str]]:
    """The known traces and those of the other points; one that does not work is left out, with a sentence on why."""
    traces, remarks = dict(known), []
    for size, make in batches.items():
        for recompute in (False, True) if subject.blocks else (False,):
            if (size, recompute) in traces:
                continue
            try:
                traces[size, recompute] = subject.trace(make(), recompute)
            except ProfilerError as error:
                how = " with recomputed blocks" if recompute else ""
                remarks.append(f"batch size {size}{how} is left out: {str(error).splitlines()[0]}")
    return traces, remarks


def _parameters(model: nn.Module, trace: Trace) -> tuple[ParameterProfile, ...]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(
        ParameterProfile(
            name=name,
            shape=tuple(parameter.shape),
            dtype=traced.dtype,
            trainable=parameter.requires_grad,
            aliases=tuple(names[id(parameter)][1:]),
            used_outside=name in trace.used_outside,
        )
        for (name, parameter), traced in zip(model.named_parameters(), trace.parameters, strict=True)
    )


def _point(batch_size: int, recompute: bool, trace: Trace, optimizer: str) -> ActivationPoint:
    peaks = replay(trace, optimizer, leave_out=MODEL_STATE)
    flops = sum(e.flops or 0 for e in trace.events if isinstance(e, Op))
    return ActivationPoint(batch_size, recompute, peaks.overall_bytes, peaks.reserved_bytes, flops)
