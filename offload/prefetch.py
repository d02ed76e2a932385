"""Prefetcher: plays the static schedule while the model runs, and makes a new one when the model's order changes."""

from collections.abc import Sequence

from offload.plan import Tier
from offload.schedule import Fetch, expected_order, schedule
from offload.unit import Unit
from offload.weights import WeightMover


class Prefetcher:
    """Follows the uses of units through forward and backward, and starts the fetches that the schedule has for each.

    ``capacity`` is the slots of each ring, by the elements of a slot. A pass whose order differs from what was expected
    is still right, for units are fetched when they are used; its order is expected from then on.
    """

    def __init__(self, mover: WeightMover, units: Sequence[Unit], capacity: dict[int, int], depth: int) -> None:
        self._mover, self._capacity, self._depth = mover, capacity, depth
        self._ring_of = {
            u.name: u.shape.elements
            for u in units
            if u.name and u.shape.elements and u.placement.parameters is not Tier.GPU
        }
        self._seen: list[str] = []
        self._position = -1
        self._expect(expected_order([u.name for u in units if u.name], training=True))

    def begin_pass(self) -> None:
        """A forward pass begins."""
        self._seen.clear()
        self._position = -1

    def used(self, name: str) -> bool:
        """A unit is in use: start the fetches behind its position. Returns whether the use is a new one."""
        if self._seen and self._seen[-1] == name:
            return False
        self._seen.append(name)
        position = next((i for i in range(self._position + 1, len(self._order)) if self._order[i] == name), None)
        if position is not None:
            self._position = position
            for fetch in self._schedule[position]:
                self._mover.prefetch(fetch)
        return True

    def end_pass(self) -> None:
        """Backward is over."""
        if tuple(self._seen) != self._order:
            self._expect(tuple(self._seen))
        self.prefetch_first()

    def prefetch_first(self) -> None:
        """Start the fetches that the next forward pass begins with."""
        streamed = [name for name in dict.fromkeys(self._order) if name in self._ring_of]
        for name in streamed[: self._depth]:
            self._mover.prefetch(Fetch(name, None))

    def _expect(self, order: tuple[str, ...]) -> None:
        """Make the schedule for passes that use units in this order."""
        self._order = order
        self._schedule = schedule(order, self._ring_of, self._capacity, self._depth)
