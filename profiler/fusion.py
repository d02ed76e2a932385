"""Layers that CUDA runs in one kernel, where a trace on the CPU shows their parts."""

from collections.abc import Iterable, Iterator, Mapping

from profiler.events import BACKWARD, Event, Gradient, Op
from profiler.kinds import kind_of

FUSED = {"RMSNorm": "aten::_fused_rms_norm"}
"""By the class of ``torch.nn`` that does it."""


def fused(events: Iterable[Event], module_types: Mapping[str, str]) -> Iterator[Event]:
    """The events that a device's time depends on, each run of such a layer's operations replaced by one."""
    parts: list[Op] = []
    for event in events:
        if isinstance(event, Op):
            if parts and (event.module, event.phase, event.recompute) != _run(parts[0]):
                yield _whole(parts, module_types)
                parts = []
            if module_types.get(event.module) in FUSED:
                parts.append(event)
                continue
        elif parts and not isinstance(event, Gradient):
            continue  # storages that come and go, inside of the layer
        yield event
    if parts:
        yield _whole(parts, module_types)


def _run(op: Op) -> tuple[str, str, bool]:
    return op.module, op.phase, op.recompute


def _whole(parts: list[Op], module_types: Mapping[str, str]) -> Op:
    first = parts[0]
    name = FUSED[module_types[first.module]]
    backward = first.phase == BACKWARD and not first.recompute
    largest = max(parts, key=lambda op: op.bytes)
    shape = _norm_shape(parts)
    return first._replace(
        name=name + "_backward" if backward else name,
        flops=sum(op.flops or 0 for op in parts),
        bytes=largest.bytes,
        dtype=largest.dtype,
        shape=shape,
    )


def _norm_shape(parts: list[Op]) -> tuple[int, ...]:
    """(rows, width), as the mean over each row or the sum over all rows says."""
    for op in parts:
        if kind_of(op) == "reduction" and op.shape:
            kept, reduced, apart = op.shape
            return (reduced, kept) if apart else (kept, reduced)
    return ()
