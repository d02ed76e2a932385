"""Visits: pieces of the host's state on the device for their update, the slots they pass through, and their pace.

[Note: patient lanes]
A copy engine of a GPU stays with a stream as long as that has copies to do, and others wait: beside a lane that keeps
two pieces under way, a loss of 4 bytes took up to 356 ms to the host and a gradient of 36 MB 255 ms, for the lane had
so much to do; beside one that lets a piece arrive before it gives the next 2 ms, and the lane itself fell from 56 to
54 GB/s (``benchmarks/copy_turns.py``). So lanes that carry state, which nobody waits for, sleep until a piece is over.
They do not look again and again: that takes the interpreter lock from the thread that issues the next forward pass.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from offload.allotment import Piece
from offload.split import Took
from offload.state import OptimizerState
from offload.streams import Done
from offload.unit_update import UnitUpdate

Explain = Callable[[BaseException, str | None], BaseException]
"""Makes of what went wrong in an update, and of the unit if that is known, what whoever waits gets."""


@dataclass(eq=False)
class Slot:
    """Device memory for one piece."""

    weights: torch.Tensor
    gradients: torch.Tensor
    state: OptimizerState
    updated: Done
    """When the piece in it needs its gradients no more."""
    left: Done
    """When the piece in it is on the host again."""
    arrived: Done | None = None
    """When the state that came ahead is in it."""


class Kept(NamedTuple):
    """A part of a unit's gradients that stays on the device."""

    part: slice
    there: torch.Tensor
    free: Done
    """When it may be written to."""


@dataclass(eq=False)
class Visit:
    """One piece in one step."""

    update: UnitUpdate
    piece: Piece
    slot: Slot
    before: Done
    """When the piece that was in the slot has left."""
    arrived: Done | None
    """Of state that came ahead."""
    has_gradients: bool
    """Whether the slot has them."""
    last: bool
    """Whether it is the last piece of its unit."""
    updated: Done = field(default_factory=Done)
    home: Done = field(init=False)
    """When its new weights can be had where they live."""
    left: Done = field(default_factory=Done)

    def __post_init__(self) -> None:
        """Weights that live on the device are there when they are updated."""
        self.home = self.updated

    @property
    def weights(self) -> torch.Tensor:
        """Where they are updated: in the slot, or where they live on the device."""
        whole, piece = self.update.state.device_weights, self.piece
        return self.slot.weights[: piece.elements] if whole is None else whole[piece.start : piece.stop]

    def fail(self, error: BaseException) -> None:
        """Let whoever waits for any of it know."""
        for done in (self.updated, self.left, self.update.promise):
            if not done.told:
                with suppress(InvalidStateError):  # another thread has told it meanwhile
                    done.fail(error)

    def skip(self) -> None:
        """Leave everything as it is."""
        self.updated.finish(None)
        self.left.follow_all([self.before])
        if self.last:
            self.update.promise.finish(None)


def be_patient(device: torch.device) -> None:
    """Go on when the current stream has done all that it was given: [Note: patient lanes]."""
    if device.type == "cuda":
        over = torch.cuda.Event(blocking=True)
        over.record()
        over.synchronize()


class Clock:
    """Seconds on a CUDA device from the moment the clip factor is known until the last promise is kept."""

    def __init__(self, visits: Sequence[Visit]) -> None:
        self._elements = sum(v.piece.elements for v in visits)
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._stopped = False

    def start(self) -> None:
        """The updates may begin."""
        self._first.record()

    def stop(self) -> None:
        """The last promise is kept."""
        self._last.record()
        self._stopped = True

    def read(self) -> Took | None:
        """What they took, if they are over."""
        if not self._stopped or not self._last.query():
            return None
        return Took(self._elements, self._first.elapsed_time(self._last) / 1000)
