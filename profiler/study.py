"""One model under one way of training it, and what its traces add up to.

[Note: one sample is not half of two] A tensor of one sample with its dimensions turned still lies together in memory,
and is not copied where one of two samples is. So the bytes of one sample may lie below the line through all other
batches. Where its trace makes other storages than that of the largest batch, two samples are traced, too.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from profiler.allocator import CachingAllocator, ExpandableAllocator
from profiler.blame import explained
from profiler.checkpoints import checkpoints_on_host, freed_bytes, input_bytes, staying_bytes
from profiler.errors import ProfileError, ProfilerError
from profiler.events import BACKWARD, FORWARD, LOSS, MODEL_STATE, OF_CUDA, PHASES, Alloc, Call, Category, Event, Op
from profiler.gradients_taken import gradients_taken
from profiler.layers import layer_profiles, operation_profiles, repeated_blocks
from profiler.profile import ActivationPoint, ModelProfile, ParameterProfile, PhasePeaks
from profiler.replay import (
    Loop,
    Peaks,
    allocated_peak,
    held_bytes,
    peaks_by_phase,
    replay,
    scratch_moments,
    training_loop,
)
from profiler.resize import resized, sequence_length
from profiler.runs import Run, runs_of
from profiler.timed import Target, module_seconds, timed
from profiler.timeline import timeline_of
from profiler.trace import Forward, Trace, trace_step
from profiler.trees import tensors_in
from profiler.uncollected import uncollected

Batches = dict[int, Callable[[], Any]]
"""What makes a batch of a size: that of the profile, one sample, and two."""
FEWEST_SAMPLES = (1, 2)
"""[Note: one sample is not half of two]"""
Chunked = Callable[[nn.Module, int], nn.Module | None]
"""The model with its loss in so many chunks, to be called in its place; None where the model does not allow it."""
LOSS_CHUNKS = 8
"""In how many chunks the loss is profiled."""
WORTHWHILE_SHARE = 0.05
"""Of the largest batch's peak, what chunks must take away to be worth further traces."""


class Case(NamedTuple):
    """One way to run the step."""

    batch_size: int
    recompute: bool
    """Of all blocks."""
    loss_chunks: int = 1

    @property
    def described(self) -> str:
        """In words."""
        recompute = " with recomputed blocks" if self.recompute else ""
        return f"batch size {self.batch_size}{recompute}" + (" and the loss in chunks" if self.loss_chunks > 1 else "")


Traced = dict[Case, Trace]

ENGINES_STATE = MODEL_STATE - {Category.GRADIENT}
"""What an engine keeps elsewhere; a gradient is there until it is taken away."""


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
    chunked: Chunked | None = None

    @classmethod
    def of(cls, model: nn.Module, **how: Any) -> "Study":
        """The study of a model, whose blocks are found; ``how`` are the other fields."""
        blocks = repeated_blocks(model)
        return cls(model=model, blocks=blocks, runs=runs_of(model, blocks), **how)

    def trace(self, batch: Any, case: Case, called: nn.Module | None = None) -> Trace:
        """Trace one step; ``called`` is called in the model's place."""
        forward = self.forward if called is None else lambda _, batch: self.forward(called, batch)
        with explained(f"one training step of {self.where} can not be traced"):
            return trace_step(self.model, batch, forward, self.precision, self.blocks, case.recompute, self.runs)

    def profile(self, batches: Batches, batch_size: int) -> ModelProfile:
        """The profile of a batch of ``batch_size``, with activation points of every batch."""
        with uncollected():
            return self._profile(batches, batch_size)

    def _profile(self, batches: Batches, batch_size: int) -> ModelProfile:
        batch = batches[batch_size]()
        plain = Case(batch_size, recompute=False)
        trace = self.trace(batch, plain)
        called = dict.fromkeys(e.module for e in trace.events if isinstance(e, Call))
        study = replace(self, blocks=tuple(path for path in called if path in self.blocks))
        traced, remarks = study._further_traces(batches, {plain: trace})
        points = [study._point(case, t) for case, t in traced.items()]
        on_host = [study._on_host(point, t) for point, t in zip(points, traced.values(), strict=True)]
        points += [point for point in on_host if point is not None]
        remarks = [s for t in traced.values() for s in t.assumptions] + remarks
        return study._summed_up(trace, batch, tuple(points), tuple(dict.fromkeys(remarks)))

    def _scaled(self, known: Any, known_size: int, batch: int | None, seq: int | None) -> ModelProfile:
        """The profile of a batch like ``known``, with another number of samples or another sequence length."""
        size, length = known_size if batch is None else batch, sequence_length(known)
        if seq is not None and length is None:
            raise ProfileError(f"the batch of {self.where} has no sequences: it has no integers in two dimensions")
        if size < 1 or (seq is not None and seq < 1):
            raise ProfileError("batch and seq must be at least 1")
        like = resized(known, (known_size, size), (length, seq) if length is not None and seq is not None else None)
        with uncollected():
            case = Case(size, recompute=False)
            trace = self.trace(like, case)
            return self._summed_up(trace, like, (self._point(case, trace),), trace.assumptions)

    def _summed_up(
        self, trace: Trace, batch: Any, points: tuple[ActivationPoint, ...], remarks: tuple[str, ...]
    ) -> ModelProfile:
        size, loop = points[0].batch_size, self._loop(trace)
        native, expandable = (replay(loop, allocator) for allocator in (CachingAllocator(), ExpandableAllocator()))
        first, steady = (_phase_peaks(*both) for both in zip(native, expandable, strict=True))
        timeline, contents = timeline_of(loop, trace.events)
        parameters = _parameters(self.model, trace)
        found = ModelProfile(
            model=self.name,
            precision=self.precision,
            optimizer=self.optimizer,
            batch_size=size,
            sample_elements=-(-sum(t.numel() for t in tensors_in(batch)) // size),
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

    def _loop(self, trace: Trace) -> Loop:
        """The loop of such steps."""
        return training_loop(trace, self.optimizer, self.clip)

    def _point(self, case: Case, trace: Trace) -> ActivationPoint:
        inputs = input_bytes(trace.events, self.blocks) if case.recompute else ()
        return ActivationPoint(
            batch_size=case.batch_size,
            recompute=case.recompute,
            executed_flops=sum(e.flops or 0 for e in trace.events if isinstance(e, Op)),
            loss_chunks=case.loss_chunks,
            input_bytes=inputs,
            device_input_bytes=inputs,
            freed_bytes=() if case.recompute else freed_bytes(trace.events, self.blocks),
            given_bytes=trace.given_bytes,
            modules=module_seconds(self.model, trace, self.target, self.blocks) if self.target else (),
            **self._bytes(trace, trace.events),
        )

    def _on_host(self, point: ActivationPoint, trace: Trace) -> ActivationPoint | None:
        """The same step with the recomputed blocks' inputs on the host; None where nothing would wait there."""
        events = checkpoints_on_host(trace.events) if point.recompute else None
        if events is None:
            return None
        staying = staying_bytes(trace.events, self.blocks)
        # Its operations are the same; what is held when is not.
        held = self._bytes(trace, events)
        return replace(point, checkpoints_on_host=True, device_input_bytes=staying, **held)

    def _bytes(self, trace: Trace, events: Iterable[Event]) -> dict[str, Any]:
        """What a point holds and when, by its fields, if the step has these events."""
        taken = gradients_taken(events, {p.name: p.bytes for p in trace.parameters})
        loop = training_loop(replace(trace, events=tuple(taken)), self.optimizer)
        peaks = peaks_by_phase(loop, leave_out=ENGINES_STATE)
        return {
            "allocated_bytes": max(peaks.values(), default=0),
            "on_cpu_bytes": allocated_peak(loop, leave_out=ENGINES_STATE | OF_CUDA),
            "phase_bytes": {phase: peaks[phase] for phase in (FORWARD, LOSS, BACKWARD) if phase in peaks},
            "held_bytes": held_bytes(loop, leave_out=ENGINES_STATE | OF_CUDA),
            "scratch_moments": scratch_moments(loop, leave_out=ENGINES_STATE),
        }

    def _further_traces(self, batches: Batches, known: Traced) -> tuple[Traced, list[str]]:
        """The known traces and those of the other points; one that fails is left out, with a sentence on why."""
        traced, remarks = dict(known), list[str]()

        def add(cases: Iterable[Case], called: nn.Module | None = None) -> None:
            for case in cases:
                try:
                    traced[case] = self.trace(batches[case.batch_size](), case, called)
                except ProfilerError as error:
                    remarks.append(f"{case.described} is left out: {str(error).splitlines()[0]}")

        whole = [Case(max(batches), recompute) for recompute in (False, True)[: 1 + bool(self.blocks)]]
        ones, twos = ([case._replace(batch_size=n) for case in whole if n in batches] for n in FEWEST_SAMPLES)
        add(case for case in dict.fromkeys((*whole, *ones)) if case not in traced)
        if not all(_alike(traced, *pair) for pair in zip(ones, whole, strict=False)):
            add(case for case in twos if case not in traced)
        in_chunks = self.chunked(self.model, LOSS_CHUNKS) if self.chunked else None
        if in_chunks is not None:
            # Where the loss is the peak, it is so most of all with a large batch and recomputed blocks.
            first = max(traced)._replace(loss_chunks=LOSS_CHUNKS)
            add([first], in_chunks)
            worthwhile = self._worthwhile(traced, first) if first in traced else []
            add((case for case in worthwhile if case != first), in_chunks)
            if not worthwhile:
                traced.pop(first, None)
        return traced, remarks

    def _worthwhile(self, traced: Traced, chunked: Case) -> list[Case]:
        """What else to trace in chunks: where the bytes that one such case saves are a sizeable part of the peak."""
        size, _, chunks = chunked
        loops = {case: self._loop(trace) for case, trace in traced.items() if case.batch_size == size}
        peaks = {case: allocated_peak(loop, leave_out=MODEL_STATE) for case, loop in loops.items()}
        saved = peaks[chunked._replace(loss_chunks=1)] - peaks[chunked]
        worthwhile = {case.recompute for case, peak in peaks.items() if saved >= WORTHWHILE_SHARE * peak}
        return [c._replace(loss_chunks=chunks) for c in traced if c.loss_chunks == 1 and c.recompute in worthwhile]


def smaller_sizes(batch_size: int) -> tuple[int, ...]:
    """Of the batches below one of this size that are looked at, too."""
    return tuple(size for size in FEWEST_SAMPLES if size < batch_size)


def _alike(traced: Traced, one: Case, other: Case) -> bool:
    """Whether two traces make the same storages in the same order, of whatever sizes; kernels' own aside."""

    def made(case: Case) -> list[tuple[Category, str, str]]:
        events = traced[case].events if case in traced else ()
        found = (e for e in events if isinstance(e, Alloc) and e.category not in OF_CUDA)
        return [(e.category, e.module, e.phase) for e in found]

    return one == other or made(one) == made(other)


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
