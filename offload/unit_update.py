"""What one optimizer step does to one unit, and how two engines share it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from offload.rules import UpdateStep
from offload.state import UnitState
from offload.streams import Done


class ClipFactor:
    """What gradients are multiplied with so that their global norm is at most ``max_norm``.

    min(1, max_norm / (norm + 1e-6)), the rule of ``torch.nn.utils.clip_grad_norm_``. Known on the device at once, and
    on the host when it has arrived there. Gradients of a loss that was multiplied with ``scale`` are divided by it, and
    where they are not finite the step is skipped.
    """

    def __init__(self, norm: torch.Tensor, max_norm: float | None, scale: torch.Tensor | None = None) -> None:
        self.skip: torch.Tensor | None = None
        """Whether the step is skipped, a boolean scalar on the device; ``None`` where that can not be."""
        if scale is not None:
            self.skip = norm.isfinite().logical_not()
            norm = norm / scale
        factor = torch.ones_like(norm) if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
        self.on_device = factor = factor if scale is None else factor / scale
        pinned = norm.device.type == "cuda"
        self._host = torch.zeros(2, pin_memory=pinned)
        self._host.copy_(torch.stack([factor, norm]), non_blocking=pinned)
        self._arrived = Done.now(norm.device)

    def on_host(self) -> float:
        """The factor; waits for it."""
        self._arrived.synchronize()
        return float(self._host[0])

    def norm(self) -> float:
        """The norm before clipping, of the loss itself; waits for it."""
        self._arrived.synchronize()
        return float(self._host[1])

    def skipped(self) -> bool:
        """Whether the step is skipped; waits for it where that can be."""
        return self.skip is not None and not math.isfinite(self.norm())


@dataclass(frozen=True)
class Segment:
    """Consecutive elements of a unit that are updated in the same way."""

    start: int
    stop: int
    how: UpdateStep


@dataclass(frozen=True, eq=False)
class UnitUpdate:
    """One unit's part in one optimizer step."""

    state: UnitState
    segments: tuple[Segment, ...]
    landed: Done
    """When its gradient is in the buffer of its tier."""
    copied: Done | None = None
    """When what a checkpoint wants of the numbers before is copied: only then they may change. None: at once."""
    kept: bool = False
    """Whether gradients stayed on the device where it will update with them: ``StreamedUpdate.kept``."""
    promise: Done = field(default_factory=Done)
    """When its new weights can be had where they live."""

    @property
    def elements(self) -> int:
        """Elements that are updated."""
        return sum(s.stop - s.start for s in self.segments)

    def within(self, start: int, stop: int) -> "UnitUpdate":
        """What this update does between two elements, with a promise of its own."""
        return UnitUpdate(self.state, within(self.segments, start, stop), self.landed, self.copied, self.kept)

    def wait_copied(self) -> None:
        """Let this thread go on when the unit's numbers may change."""
        if self.copied is not None:
            self.copied.synchronize()


def within(segments: Iterable[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """The parts of segments that lie between two elements."""
    cut = (replace(s, start=max(s.start, start), stop=min(s.stop, stop)) for s in segments)
    return tuple(s for s in cut if s.start < s.stop)


def from_first(segments: Iterable[Segment], part: slice) -> tuple[Segment, ...]:
    """What of these segments lies in a part of the unit, counted from its first element."""
    inside = within(segments, part.start, part.stop)
    return tuple(replace(s, start=s.start - part.start, stop=s.stop - part.start) for s in inside)


def shared(updates: Iterable[UnitUpdate], edges: Mapping[str, int]) -> tuple[list[UnitUpdate], list[UnitUpdate]]:
    """The updates as the host's parts and the device's, both in the same order; a unit's promise is kept by its parts.

    The device gets the elements of a unit from its edge on, and nothing of units that have none.
    """
    host: list[UnitUpdate] = []
    device: list[UnitUpdate] = []
    for update in updates:
        state = update.state
        if (edge := edges.get(state.unit.name)) is None:
            host.append(update)
            continue
        parts = update.within(0, edge), update.within(edge, state.updated.stop - state.updated.start)
        for part, engine in zip(parts, (host, device), strict=True):
            if part.segments:
                engine.append(part)
        update.promise.follow_all(part.promise for part in parts if part.segments)
    return host, device
