"""The seconds of a profile, on a device that need not be here."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from profiler.calibration import ASSUMED, Calibration
from profiler.device import Device, find_device
from profiler.events import BACKWARD, CLIP, STEP
from profiler.layers import with_children
from profiler.profile import ModelProfile, ModuleSeconds
from profiler.roofline import issued_works, step_time
from profiler.trace import Trace

MEASURED = ("H100", "H200")
"""What the memory of kernels (workspaces, attention, convolutions) is modelled on."""


@dataclass(frozen=True)
class Target:
    """A device, and how much of its rates kernels reach."""

    device: Device
    calibration: Calibration

    @property
    def assumptions(self) -> list[str]:
        """What times and bytes stand on, where it was not measured on the device."""
        found = []
        name = self.device.name
        if not any(known in name for known in MEASURED):
            found.append(f"kernels of {name} hold beside tensors what they do on a Hopper GPU, where that was measured")
        if self.calibration is ASSUMED:
            found.append(f"kernels reach usual shares of the rates of {name}; a calibration measures them")
        elif find_device(self.calibration.device) != self.device:
            found.append(f"kernels of {name} reach the same shares of its rates as on {self.calibration.device}")
        return found


def find_target(device: str | None, calibration: Calibration | Path | str | None) -> Target | None:
    """The device by name, by default that of the calibration or its file; ``None`` without either.

    Raises ProfilerError when there is no such device, or the file is not a calibration.
    """
    given = Calibration.load(Path(calibration)) if isinstance(calibration, str | Path) else calibration
    rates = ASSUMED if given is None else given
    name = device or rates.device
    return Target(find_device(name), rates) if name else None


def module_seconds(
    model: nn.Module, trace: Trace, target: Target, blocks: Collection[str]
) -> tuple[ModuleSeconds, ...]:
    """The seconds of one forward and backward, by block, and by module outside of the blocks."""
    types = {path: type(module).__name__ for path, module in model.named_modules()}
    block_of = {path: next((b for b in _enclosing(path) if b in blocks), path) for path in types}
    sums: dict[str, list[float]] = {}
    for work in issued_works(trace.events, target.device, target.calibration, types):
        row = sums.setdefault(block_of[work.module], [0.0] * 4)
        first = 2 if work.phase == BACKWARD else 0
        row[first] += work.kernel_seconds
        row[first + 1] += work.issue_seconds
    return tuple(ModuleSeconds(path, *row) for path, row in sums.items())


def _enclosing(path: str) -> Iterator[str]:
    """The path and those of the modules around it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def timed(profile: ModelProfile, model: nn.Module, trace: Trace, target: Target) -> ModelProfile:
    """The profile with the seconds of its step, layers and operations."""
    device, clip = target.device, profile.peaks.clip_bytes is not None
    trained = [p for p in trace.parameters if p.has_gradient]
    types = {path: type(module).__name__ for path, module in model.named_modules()}
    found = step_time(trace.events, trained, profile.optimizer, clip, device, target.calibration, types)
    seconds = with_children(found.by_module)
    # Clipping and the optimizer count for the model itself; a layer's seconds are those of forward and backward.
    update = sum(found.by_phase.get(phase, 0.0) for phase in (CLIP, STEP))
    return replace(
        profile,
        device=device.name,
        context_bytes=device.context_bytes,
        step_seconds=found.total_seconds,
        layers=tuple(replace(x, seconds=seconds[x.path] - (0.0 if x.path else update)) for x in profile.layers),
        operations=tuple(replace(o, seconds=found.by_operation.get(o.name, 0.0)) for o in profile.operations),
        assumptions=(*profile.assumptions, *target.assumptions),
    )
