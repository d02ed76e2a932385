"""Device slots: the fixed ring of buffers that streamed weights come and go through.

[Note: slot lifetime]
A slot is *empty*, or *holds* a unit. While the unit is in use its slot may not be taken. When it is not, the unit
stays where it is until somebody needs the slot: the last layer of forward is still there when backward begins. A
slot is taken by unbinding its unit's parameters and writing behind everything the compute stream was given so far.
"""

from dataclasses import dataclass, field

import torch

from offload.state import UnitState
from offload.streams import Done


@dataclass(eq=False)
class Slot:
    """One device buffer, and the unit whose weights are in it or on their way to it."""

    buffer: torch.Tensor
    holds: UnitState | None = None
    arrived: Done | None = None


@dataclass(eq=False)
class SlotRings:
    """Slots by their number of elements."""

    dtype: torch.dtype
    device: torch.device
    rings: dict[int, list[Slot]] = field(default_factory=dict)
    overflow_count: int = 0
    """Slots that had to be made beyond the plan, because more units were in use at once than it foresaw."""

    @classmethod
    def make(cls, counts: dict[int, int], dtype: torch.dtype, device: torch.device) -> "SlotRings":
        """From {elements: how many}, all allocated now."""
        rings = cls(dtype, device)
        for elements, count in counts.items():
            rings.rings[elements] = [rings._new(elements) for _ in range(count)]
        return rings

    def _new(self, elements: int) -> Slot:
        return Slot(torch.zeros(elements, dtype=self.dtype, device=self.device))

    def ring(self, state: UnitState) -> list[Slot]:
        """The slots that can hold this unit."""
        return self.rings[state.unit.shape.elements]

    def grow(self, state: UnitState) -> Slot:
        """A slot beyond the plan: correctness first, the surplus is reported."""
        self.overflow_count += 1
        slot = self._new(state.unit.shape.elements)
        self.ring(state).append(slot)
        return slot

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(slot.buffer.nbytes for ring in self.rings.values() for slot in ring)
