"""One model under one way of training it, and what its traces add up to."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from profiler.allocator import CachingAllocator, ExpandableAllocator
from profiler.blame import explained
from profiler.errors import ProfileError, ProfilerError
from profiler.events import BACKWARD, FORWARD, LOSS, MODEL_STATE, OF_CUDA, PHASES, Call, Op
from profiler.layers import layer_profiles, operation_profiles, repeated_blocks
from profiler.profile import ActivationPoint, ModelProfile, ParameterProfile, PhasePeaks
from profiler.replay import Loop, Peaks, allocated_peak, replay, training_loop
from profiler.resize import resized, sequence_length
from profiler.runs import Run, runs_of
from profiler.timed import Target, module_seconds, timed
from profiler.timeline import timeline_of
from profiler.trace import Forward, Trace, trace_step

Batches = dict[int, Callable[[], Any]]
"""What makes a batch of a size."""
Traces = dict[tuple[int, bool], Trace]
"""By batch size, and whether the blocks are recomputed."""


@dataclass(frozen=True)
class Study:
    """What is profiled, and how it is trained."""

    model: nn.Module
    forward: Forward
    precision: str
    optimizer: str
    clip: bool
    target: Target | None
    name: str
    where: str
    """What messages call it."""
    blocks: tuple[str, ...]
    runs: tuple[Run, ...]
    assumptions: Callable[[], tuple[str, ...]] = tuple
    """What the model's source assumes, known only once the model has run."""

    @classmethod
    def of(cls, model: nn.Module, **how: Any) -> "Study":
        """The study of a model, whose blocks are found; ``how`` are the other fields."""
        blocks = repeated_blocks(model)
        return cls(model=model, blocks=blocks, runs=runs_of(model, blocks), **how)

    def trace(self, batch: Any, recompute: bool) -> Trace:
        """Trace one step."""
        with explained(f"one training step of {self.where} can not be traced"):
            return trace_step(self.model, batch, self.forward, self.precision, self.blocks, recompute, self.runs)

    def profile(self, batches: Batches, batch_size: int) -> ModelProfile:
        """The profile of a batch of ``batch_size``, with activation points of every batch."""
        with _uncollected():
            return self._profile(batches, batch_size)

    def _profile(self, batches: Batches, batch_size: int) -> ModelProfile:
        batch = batches[batch_size]()
        trace = self.trace(batch, recompute=False)
        called = dict.fromkeys(e.module for e in trace.events if isinstance(e, Call))
        study = replace(self, blocks=tuple(path for path in called if path in self.blocks))
        traces, remarks = study._further_traces(batches, {(batch_size, False): trace})
        loops = {key: training_loop(t, self.optimizer, self.clip) for key, t in traces.items()}
        points = tuple(study._point(*key, t, loops[key]) for key, t in traces.items())
        remarks = [s for t in traces.values() for s in t.assumptions] + remarks
        return study._summed_up(trace, loops[batch_size, False], batch, points, tuple(dict.fromkeys(remarks)))

    def _scaled(self, known: Any, known_size: int, batch: int | None, seq: int | None) -> ModelProfile:
        """The profile of a batch like ``known``, with another number of samples or another sequence length."""
        size, length = known_size if batch is None else batch, sequence_length(known)
        if seq is not None and length is None:
            raise ProfileError(f"the batch of {self.where} has no sequences: it has no integers in two dimensions")
        if size < 1 or (seq is not None and seq < 1):
            raise ProfileError("batch and seq must be at least 1")
        like = resized(known, (known_size, size), (length, seq) if length is not None and seq is not None else None)
        with _uncollected():
            trace = self.trace(like, recompute=False)
            loop = training_loop(trace, self.optimizer, self.clip)
            return self._summed_up(trace, loop, like, (self._point(size, False, trace, loop),), trace.assumptions)

    def _summed_up(
        self, trace: Trace, loop: Loop, batch: Any, points: tuple[ActivationPoint, ...], remarks: tuple[str, ...]
    ) -> ModelProfile:
        size = points[0].batch_size
        native, expandable = (replay(loop, allocator) for allocator in (CachingAllocator(), ExpandableAllocator()))
        first, steady = (_phase_peaks(*both) for both in zip(native, expandable, strict=True))
        timeline, contents = timeline_of(loop, trace.events)
        parameters = _parameters(self.model, trace)
        found = ModelProfile(
            model=self.name,
            precision=self.precision,
            optimizer=self.optimizer,
            batch_size=size,
            layers=layer_profiles(self.model, trace, parameters),
            parameters=parameters,
            buffer_bytes=trace.buffer_bytes,
            peaks=steady,
            first_peaks=first,
            activations=points,
            blocks=self.blocks,
            operations=operation_profiles(trace),
            timeline=timeline,
            peak_contents=contents,
            assumptions=(*self.assumptions(), *remarks),
            again=partial(self._scaled, batch, size),
        )
        return timed(found, self.model, trace, self.target) if self.target else found

    def _point(self, batch_size: int, recompute: bool, trace: Trace, loop: Loop) -> ActivationPoint:
        _, peaks = replay(loop, CachingAllocator(), leave_out=MODEL_STATE)
        return ActivationPoint(
            batch_size=batch_size,
            recompute=recompute,
            allocated_bytes=peaks.overall_bytes,
            reserved_bytes=peaks.reserved_bytes,
            executed_flops=sum(e.flops or 0 for e in trace.events if isinstance(e, Op)),
            on_cpu_bytes=allocated_peak(loop, leave_out=MODEL_STATE | OF_CUDA),
            phase_bytes={p: peaks.allocated_bytes[p] for p in (FORWARD, LOSS, BACKWARD) if p in peaks.allocated_bytes},
            modules=module_seconds(self.model, trace, self.target, self.blocks) if self.target else (),
        )

    def _further_traces(self, batches: Batches, known: Traces) -> tuple[Traces, list[str]]:
        """The known traces and those of the other points; one that fails is left out, with a sentence on why."""
        traces, remarks = dict(known), []
        for size, make in batches.items():
            for recompute in (False, True) if self.blocks else (False,):
                if (size, recompute) in traces:
                    continue
                try:
                    traces[size, recompute] = self.trace(make(), recompute)
                except ProfilerError as error:
                    how = " with recomputed blocks" if recompute else ""
                    remarks.append(f"batch size {size}{how} is left out: {str(error).splitlines()[0]}")
        return traces, remarks


@contextmanager
def _uncollected() -> Iterator[None]:
    """No collection of cycles: storages end with their last reference, always at the same moment; and it takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _phase_peaks(peaks: Peaks, expandable: Peaks) -> PhasePeaks:
    found: dict[str, Any] = {f"{phase}_bytes": peaks.allocated_bytes.get(phase) for phase in PHASES}
    return PhasePeaks(**found, reserved_bytes=peaks.reserved_bytes, reserved_expandable_bytes=expandable.reserved_bytes)


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
