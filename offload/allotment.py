"""Which elements of the host's state the device updates, and which of them come to it before their update begins.

Pure. State that came ahead is updated the moment the clip factor is known, so the device takes the first units of
forward as a whole as far as slots for that reach, and forward begins with them while the host is at work on later ones.
What is left of the device's share is cut from the ends of all other units, for there both engines must keep up with
forward; where that would be less than a piece of each, from the end of every second or third, or as many as it takes.
Then, where nothing comes ahead, it begins with the first that holds a piece: that is there when the clip factor is
known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from offload.residency import UPDATE_RING, aligned, chunks
from offload.shards import ALIGN_ELEMENTS


@dataclass(frozen=True)
class Reach:
    """A unit whose state both engines can update."""

    name: str
    elements: int


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a unit that pass through the device at a time."""

    start: int
    stop: int
    slot: int | None = None
    """Where it waits for its update; ``None`` for one that comes when there is room."""

    @property
    def elements(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class Allotment:
    """The device's part of each unit: from ``edges`` on, in ``pieces``; a unit it has no part in is in neither."""

    edges: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, tuple[Piece, ...]] = field(default_factory=dict)

    def ahead(self) -> Iterable[tuple[str, Piece]]:
        """The pieces that come ahead, with their units, in the order of the updates."""
        return ((name, piece) for name, pieces in self.pieces.items() for piece in pieces if piece.slot is not None)


def allot(
    units: Sequence[Reach], share: float, piece_elements: int, slots: int, late: Iterable[str] | None = None
) -> Allotment:
    """The device's part of ``units``, which are given in the order of their updates.

    ``share`` is the device's of all elements; ``slots`` there are, of ``piece_elements`` each. Only units that are
    ``late`` come ahead, which are all where nobody says: others are updated before backward is over.
    """
    wanted = round(share * sum(u.elements for u in units))
    free = slots - UPDATE_RING
    may_wait = {u.name for u in units} if late is None else set(late)
    edges: dict[str, int] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}

    def give(unit: Reach, edge: int, first_slot: int | None) -> None:
        spans = enumerate(chunks(unit.elements - edge, piece_elements))
        edges[unit.name] = edge
        pieces[unit.name] = tuple(
            Piece(edge + a, edge + b, None if first_slot is None else first_slot + i) for i, (a, b) in spans
        )

    taken = 0
    for unit in units:
        room = min(wanted, (free - taken) * piece_elements)
        if unit.name not in may_wait or room < min(unit.elements, piece_elements) or not unit.elements:
            continue
        give(unit, aligned(max(0, unit.elements - room), ALIGN_ELEMENTS), taken)
        wanted -= unit.elements - edges[unit.name]
        taken += len(pieces[unit.name])
    others = [u for u in units if u.name not in edges]
    left = float(max(0, wanted))
    part_of_rest, due = left / max(sum(u.elements for u in others), 1), 0.0
    begins = None
    if late is None and not taken:
        whole = min(piece_elements, max((u.elements for u in others), default=0))
        begins = next((u for u in others if u.elements >= whole > part_of_rest * u.elements), None)
    for unit in others:
        due += part_of_rest * unit.elements
        if unit is begins:
            due += (1 - part_of_rest) * unit.elements
        part = min(due, unit.elements, left)
        edge = aligned(round(unit.elements - part), ALIGN_ELEMENTS)
        if unit.elements - edge >= min(piece_elements, max(unit.elements, 1)):
            give(unit, edge, None)
            due, left = due - part, left - part
    return Allotment(edges, pieces)
