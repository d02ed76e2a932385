"""The static schedule of weights: from the order of use, before the step, which unit is fetched when.

Pure. Positions are uses of units in one forward and backward pass, in order; behind each position stand the
fetches to start while it computes. A fetch that needs another unit's place names it: the one whose next use is
furthest away (Belady's rule), and never one that is needed sooner than the fetched unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fetch:
    """Start fetching ``unit``, in the place of ``evict`` where the ring has no empty slot."""

    unit: str
    evict: str | None


def expected_order(forward: Sequence[str], *, training: bool) -> tuple[str, ...]:
    """The uses of one pass: forward, then backward in reverse. The turn is one use: the unit is still there."""
    backward = tuple(reversed(forward))[1:] if training else ()
    return tuple(forward) + backward


def next_use(order: Sequence[str], unit: str, after: int) -> int:
    """Position of the unit's next use behind ``after``, or the number of positions when there is none."""
    return next((i for i in range(after + 1, len(order)) if order[i] == unit), len(order))


def schedule(
    order: Sequence[str], ring_of: Mapping[str, int], capacity: Mapping[int, int], depth: int
) -> tuple[tuple[Fetch, ...], ...]:
    """The fetches behind each position of ``order``.

    ``ring_of`` maps streamed units to their ring, ``capacity`` rings to their number of slots; units in no ring
    never move. ``depth`` is how many coming uses are fetched ahead. A position's own unit is assumed to be fetched on
    demand if it is not there.
    """
    held: dict[int, list[str]] = {ring: [] for ring in capacity}
    plan: list[tuple[Fetch, ...]] = []
    for position, unit in enumerate(order):
        if unit in ring_of:
            _take_place(held[ring_of[unit]], capacity[ring_of[unit]], unit, order, position, keep=frozenset())
        fetches = []
        ahead: list[str] = []
        for coming in order[position + 1 :]:
            if len(ahead) == depth:
                break
            if coming not in ring_of or coming in ahead:
                continue
            ahead.append(coming)
            ring = held[ring_of[coming]]
            if coming in ring:
                continue
            keep = frozenset((unit, *ahead))
            evicted = _take_place(ring, capacity[ring_of[coming]], coming, order, position, keep)
            if coming in ring:
                fetches.append(Fetch(coming, evicted))
        plan.append(tuple(fetches))
    return tuple(plan)


def _take_place(
    held: list[str], capacity: int, unit: str, order: Sequence[str], position: int, keep: frozenset[str]
) -> str | None:
    """Put ``unit`` into its ring if there is a place for it; returns whom it displaced."""
    if unit in held:
        return None
    if len(held) < capacity:
        held.append(unit)
        return None
    candidates = [h for h in held if h not in keep]
    if not candidates:
        return None
    furthest = max(candidates, key=lambda h: next_use(order, h, position))
    if next_use(order, furthest, position) <= next_use(order, unit, position) and unit != order[position]:
        return None
    held.remove(furthest)
    held.append(unit)
    return furthest
