"""The time of a training step on a device: a roofline for each operation, and a queue between CPU and device.

[Note: The queue] The CPU issues operations one after another, each at a cost of its own; the device begins each when it
has been issued and the one before is done. A large model keeps the device busy and hides the CPU; a small one leaves
the device waiting for work, and its step lasts as long as the CPU takes to issue it. Both come out of the same
simulation. A step begins with nothing in the queue and ends when the device is done: loops read their loss.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiler.calibration import ASSUMED, Calibration
from profiler.device import Device
from profiler.events import BACKWARD, CLIP, FORWARD, STEP, Call, Event, Gradient, Op
from profiler.fusion import fused
from profiler.issues import issue_name
from profiler.kinds import PRODUCTS, SYNCHRONISING, VIEW, kind_of, plain_name, rate_of
from profiler.optimizers import Trained

COMPUTE, MEMORY, LAUNCH = "compute", "memory", "launch"
"""What an operation's time is bound by; "launch" is time in which the device waits for the CPU."""
OPTIMIZER_PIECES = 16
"""A multi-tensor update begins before all of it is issued: so many pieces stand for its kernels."""

_ARITHMETIC = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class StepTime:
    """The seconds of one step, all of them divided in four ways."""

    total_seconds: float
    by_phase: Mapping[str, float]
    by_module: Mapping[str, float]
    """By the path of the innermost module."""
    by_operation: Mapping[str, float]
    by_bound: Mapping[str, float]
    """What the time went into: compute, memory or launch."""


class Work(NamedTuple):
    """One thing that the CPU does: it may issue a kernel."""

    issue_seconds: float
    kernel_seconds: float
    bound: str
    phase: str
    module: str
    name: str
    synchronises: bool = False


def step_time(
    events: Iterable[Event],
    trained: Sequence[Trained],
    optimizer: str,
    clip: bool,
    device: Device,
    calibration: Calibration = ASSUMED,
    module_types: Mapping[str, str] | None = None,
) -> StepTime:
    """The time of one step: the events' forward and backward, then clipping and the optimizer.

    ``module_types`` (path -> class name) tells which modules CUDA runs in fused kernels where the trace shows parts.
    """
    cleared = calibration.issue("step") + calibration.issue("zero_grad") * len(trained)
    works = [Work(cleared, 0.0, "", FORWARD, "", "")]
    works += issued_works(events, device, calibration, module_types or {})
    works += _update(trained, optimizer, clip, device, calibration)
    return _played(works)


def issued_works(
    events: Iterable[Event], device: Device, calibration: Calibration, module_types: Mapping[str, str]
) -> Iterator[Work]:
    """What the CPU does for the events of one forward and backward, in order."""
    return _works(fused(events, module_types), device, calibration)


def op_seconds(op: Op, device: Device, calibration: Calibration = ASSUMED) -> float:
    """Seconds of an operation's kernels; 0 for a view."""
    name, sizes = rate_of(op)
    if name == VIEW:
        return 0.0
    return max(device.kernel_seconds, calibration.rate(name, op.dtype).seconds(ideal_seconds(op, device), sizes))


def ideal_seconds(op: Op, device: Device) -> float:
    """At the roofline."""
    return max(_compute_seconds(op, device), _memory_seconds(op, device))


def _compute_seconds(op: Op, device: Device) -> float:
    arithmetic, kind = _ARITHMETIC.get(op.dtype, "fp32"), kind_of(op).removesuffix("_backward")
    if kind not in PRODUCTS:
        arithmetic = "fp32"
    elif arithmetic == "fp32" and kind in ("convolution", "recurrent"):
        arithmetic = "tf32"  # PyTorch's default for cuDNN, though not for matrix products
    return (op.flops or 0) / device.peak(arithmetic)


def _memory_seconds(op: Op, device: Device) -> float:
    return op.bytes / device.memory_bytes_per_second


def _works(events: Iterable[Event], device: Device, calibration: Calibration) -> Iterator[Work]:
    repeating = False
    call, gradient, checkpoint = (calibration.issue(name) for name in ("call", "gradient", "checkpoint"))
    seen: dict[tuple[object, ...], tuple[float, float, str, bool]] = {}  # layers repeat each other
    for event in events:
        if isinstance(event, Op):
            if event.recompute and not repeating:
                yield Work(checkpoint, 0.0, "", BACKWARD, event.module, "")
            repeating = event.recompute
            key = (event.name, event.flops, event.bytes, event.dtype, event.shape, event.phase, event.recompute)
            if (known := seen.get(key)) is None:
                known = seen[key] = _work_of(event, device, calibration)
            issue, kernel, bound, waits = known
            yield Work(issue, kernel, bound, event.phase, event.module, event.name, waits)
        elif isinstance(event, Call):
            yield Work(call, 0.0, "", FORWARD, event.module, "")
        elif isinstance(event, Gradient):
            yield Work(gradient, 0.0, "", BACKWARD, "", "")


def _work_of(op: Op, device: Device, calibration: Calibration) -> tuple[float, float, str, bool]:
    """Seconds of its issue and of its kernels, what these are bound by, and whether the CPU waits for them."""
    bound = COMPUTE if _compute_seconds(op, device) > _memory_seconds(op, device) else MEMORY
    issue = calibration.issue(name) if (name := issue_name(op)) else 0.0
    return issue, op_seconds(op, device, calibration), bound, plain_name(op.name) in SYNCHRONISING


def _update(
    trained: Sequence[Trained], optimizer: str, clip: bool, device: Device, calibration: Calibration
) -> Iterator[Work]:
    size = sum(p.bytes for p in trained)
    parts = [("clip", CLIP)] if clip else []
    for name, phase in [*parts, (f"optimizer/{optimizer}", STEP)]:
        issue = calibration.issue(name) * len(trained)
        kernel = calibration.rate(name).seconds(size / device.memory_bytes_per_second, (size,)) if size else 0.0
        piece = Work(issue / OPTIMIZER_PIECES, kernel / OPTIMIZER_PIECES, MEMORY, phase, "", name)
        yield from [piece] * OPTIMIZER_PIECES


def _played(works: Sequence[Work]) -> StepTime:
    shares: dict[str, dict[str, float]] = {n: defaultdict(float) for n in ("phase", "module", "operation", "bound")}

    def spent(work: Work, waiting: float, kernel: float) -> None:
        shares["phase"][work.phase] += waiting + kernel
        shares["module"][work.module] += waiting + kernel
        shares["operation"][work.name] += waiting + kernel
        shares["bound"][work.bound] += kernel
        shares["bound"][LAUNCH] += waiting

    cpu = device = 0.0
    for work in works:
        cpu += work.issue_seconds
        if work.kernel_seconds:
            waiting = max(0.0, cpu - device)
            device += waiting + work.kernel_seconds
            spent(work, waiting, work.kernel_seconds)
        if work.synchronises:
            cpu = max(cpu, device)
    if works and cpu > device:  # what the CPU does after the last kernel
        spent(works[-1], cpu - device, 0.0)
    return StepTime(max(cpu, device), *(dict(share) for share in shares.values()))
