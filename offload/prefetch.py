"""Prefetcher: plays the static schedule while the model runs, and makes a new one when the model's order changes."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.schedule import Fetch, expected_order, schedule
from offload.shards import ALONE, Shards
from offload.unit import Unit
from offload.weights import WeightMover


@dataclass(frozen=True, eq=False)
class _Pass:
    """The uses of units in one pass, and the fetches behind each."""

    order: tuple[str, ...]
    fetches: tuple[tuple[Fetch, ...], ...]


class Prefetcher:
    """Follows the uses of units through forward and backward, and starts the fetches that the schedule has for each.

    ``capacity`` is the slots of each ring, by the elements of a slot. A pass whose order differs from what was expected
    is still right, for units are fetched when they are used; its order is expected from then on.
    """

    def __init__(
        self, mover: WeightMover, units: Sequence[Unit], capacity: dict[int, int], depth: int, shards: Shards = ALONE
    ) -> None:
        self._mover, self._capacity, self._depth = mover, capacity, depth
        self._ring_of = {
            u.name: u.shape.elements
            for u in units
            if u.name and u.shape.elements and not shards.on_device(u.placement.parameters)
        }
        self._root_streams = any(
            not u.name and u.shape.elements and not shards.on_device(u.placement.parameters) for u in units
        )
        names = [u.name for u in units if u.name]
        self._training = self._expected(expected_order(names, training=True))
        self._inference = self._expected(tuple(names), again=True)
        self._pass = self._training
        self._seen: list[str] = []
        self._position = -1
        self._interrupted = self._seen, self._position
        """What was seen of training before a pass without it."""

    def begin_pass(self, *, training: bool = True) -> None:
        """A forward pass begins, which a backward pass follows where it is one of ``training``."""
        if not training:
            self._interrupted = self._seen, self._position
        self._pass = self._training if training else self._inference
        self._seen, self._position = [], -1

    def used(self, name: str) -> bool:
        """A unit is in use: start the fetches behind its position. Returns whether the use is a new one."""
        if self._seen and self._seen[-1] == name:
            return False
        self._seen.append(name)
        order = self._pass.order
        position = next((i for i in range(self._position + 1, len(order)) if order[i] == name), None)
        if position is not None:
            self._position = position
            for fetch in self._pass.fetches[position]:
                self._mover.prefetch(fetch)
        return True

    def end_pass(self, *, step_follows: bool = False) -> None:
        """Backward is over, or forward where no backward follows.

        Before a step nothing is fetched: weights that it changes would have to come again.
        """
        seen = tuple(self._seen)
        if self._pass is self._training:
            if seen != self._training.order:
                self._training = self._expected(seen)
            if not step_follows:
                self.prefetch_first()
            return
        if seen != self._inference.order:
            self._inference = self._expected(seen, again=True)
        # The backward of a pass that it came into may follow.
        self._pass = self._training
        self._seen, self._position = self._interrupted

    def begin_anew(self) -> None:
        """A pass was cut short: of one without training nothing is learned, and one of training begins by itself."""
        if self._pass is not self._training:
            self._pass = self._training
            self._seen, self._position = self._interrupted

    def prefetch_first(self) -> None:
        """Start the fetches that the next forward pass begins with: the root unit's first, which all of it needs."""
        if self._root_streams:
            self._mover.prefetch(Fetch("", None))
        streamed = [name for name in dict.fromkeys(self._training.order) if name in self._ring_of]
        for name in streamed[: self._depth]:
            self._mover.prefetch(Fetch(name, None))

    def _expected(self, order: tuple[str, ...], *, again: bool = False) -> _Pass:
        """A pass that uses units in this order; ``again``: the same one follows, as while a text is generated."""
        if not again:
            return _Pass(order, schedule(order, self._ring_of, self._capacity, self._depth))
        # The one in the middle finds the slots as the one before it leaves them.
        fetches = schedule(order * 3, self._ring_of, self._capacity, self._depth)
        return _Pass(order, fetches[len(order) : 2 * len(order)])
