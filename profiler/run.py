"""From a model to its ModelProfile."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from profiler.allocator import CachingAllocator, ExpandableAllocator
from profiler.blame import explained
from profiler.contract import Loss, ModelSource, checked_batch, default_loss, loss_of, plain_model
from profiler.errors import ProfilerError
from profiler.events import MODEL_STATE, PHASES, Alloc, Call, Category, Op
from profiler.layers import layer_profiles, operation_profiles, repeated_blocks
from profiler.optimizers import check_optimizer
from profiler.profile import ActivationPoint, ModelProfile, ParameterProfile, PhasePeaks
from profiler.replay import Peaks, replay, training_loop
from profiler.runs import Run, runs_of
from profiler.timed import Target, find_target, timed
from profiler.timeline import timeline_of
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
    runs: tuple[Run, ...]
    where: str

    def trace(self, batch: Any, recompute: bool) -> Trace:
        """Trace one step."""
        with explained(f"one training step of {self.where} can not be traced"):
            return trace_step(self.model, batch, self.forward, self.precision, self.blocks, recompute, self.runs)


def profile_source(
    source: ModelSource,
    batch_size: int,
    precision: str = "fp32",
    optimizer: str = "adamw",
    clip: bool = False,
    device: str | None = None,
    calibration: Path | None = None,
) -> ModelProfile:
    """Profile a model file with ``example_batch(batch_size)``; parameters are not materialised where that works.

    ``device`` is the name of one whose times to predict (``profiler.device``), ``calibration`` a file of its rates.
    Raises SourceError when the file's model, batch and loss do not fit together, ProfilerError for other input.
    """
    check_optimizer(optimizer)
    target = find_target(device, calibration)
    if batch_size < 1:
        raise ProfilerError(f"batch_size is {batch_size}; it must be at least 1")
    model = source.build_abstract()
    blocks = repeated_blocks(model)
    subject = _Subject(model, source.forward, precision, blocks, runs_of(model, blocks), source.path.name)
    batches: Batches = {size: partial(source.example_batch, size) for size in (batch_size, 1)}
    profile = _profile(subject, batches, batch_size, optimizer, clip, source.name, target)
    return replace(profile, assumptions=(*source.assumptions, *profile.assumptions))


def profile_model(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    precision: str = "fp32",
    optimizer: str = "adamw",
    clip: bool = False,
    device: str | None = None,
    calibration: Path | str | None = None,
    name: str | None = None,
    batch_size: int | None = None,
) -> ModelProfile:
    """Profile a module in memory on a batch: a dict of keyword arguments, a tuple of arguments or a tensor.

    ``loss(outputs, batch)`` gives the scalar to train on; without it the output, or its ``loss``, is taken.
    ``batch_size`` defaults to the first dimension of the batch's first tensor. Model and batch are left as they were.
    ``device`` is the name of one whose times to predict (``profiler.device``), ``calibration`` a file of its rates.
    """
    check_optimizer(optimizer)
    target = find_target(device, calibration)
    model, batch = plain_model(model), checked_batch(batch, "the batch")
    if batch_size is None:
        batch_size = next((len(t) for t in _tensors(batch) if t.dim()), 1)
    forward = partial(loss_of, loss=loss or (lambda outputs, _: default_loss(outputs)))
    blocks = repeated_blocks(model)
    subject = _Subject(model, forward, precision, blocks, runs_of(model, blocks), "the model")
    batches: Batches = {batch_size: lambda: batch}
    if batch_size > 1 and all(t.dim() and len(t) == batch_size for t in _tensors(batch)):
        batches[1] = lambda: tree_map_only(torch.Tensor, lambda t: t[:1], batch)
    return _profile(subject, batches, batch_size, optimizer, clip, name or type(model).__name__, target)


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]


def _profile(
    subject: _Subject,
    batches: Batches,
    batch_size: int,
    optimizer: str,
    clip: bool,
    name: str,
    target: Target | None,
) -> ModelProfile:
    trace = subject.trace(batches[batch_size](), recompute=False)
    called = dict.fromkeys(e.module for e in trace.events if isinstance(e, Call))
    subject = replace(subject, blocks=tuple(path for path in called if path in subject.blocks))
    traces, remarks = _further_traces(subject, batches, {(batch_size, False): trace})
    loop = training_loop(trace, optimizer, clip)
    native, expandable = (replay(loop, allocator) for allocator in (CachingAllocator(), ExpandableAllocator()))
    first, steady = (_phase_peaks(*both) for both in zip(native, expandable, strict=True))
    timeline, contents = timeline_of(loop, trace.events)
    parameters = _parameters(subject.model, trace)
    found = ModelProfile(
        model=name,
        precision=subject.precision,
        optimizer=optimizer,
        batch_size=batch_size,
        layers=layer_profiles(subject.model, trace, parameters),
        parameters=parameters,
        buffer_bytes=trace.buffer_bytes,
        peaks=steady,
        first_peaks=first,
        activations=tuple(_point(size, recompute, t, optimizer) for (size, recompute), t in traces.items()),
        blocks=subject.blocks,
        operations=operation_profiles(trace),
        timeline=timeline,
        peak_contents=contents,
        workspace_bytes=sum(e.bytes for e in trace.events if isinstance(e, Alloc) and e.category is Category.WORKSPACE),
        assumptions=tuple(dict.fromkeys([s for t in traces.values() for s in t.assumptions] + remarks)),
    )
    return timed(found, subject.model, trace, target) if target else found


def _phase_peaks(peaks: Peaks, expandable: Peaks) -> PhasePeaks:
    found: dict[str, Any] = {f"{phase}_bytes": peaks.allocated_bytes.get(phase) for phase in PHASES}
    return PhasePeaks(**found, reserved_bytes=peaks.reserved_bytes, reserved_expandable_bytes=expandable.reserved_bytes)


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
    _, peaks = replay(training_loop(trace, optimizer), CachingAllocator(), leave_out=MODEL_STATE)
    flops = sum(e.flops or 0 for e in trace.events if isinstance(e, Op))
    return ActivationPoint(batch_size, recompute, peaks.overall_bytes, peaks.reserved_bytes, flops)
