"""What is allocated when, in a steady step, and what the peak is made of."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from profiler.allocator import ALIGNMENT_BYTES, round_up
from profiler.events import Alloc, Event, Op
from profiler.profile import Holding, MemoryPoint
from profiler.replay import Loop

MOMENTS = 400
"""Points of a timeline, about."""
NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")
"""Parts of a dotted path that are numbers, such as those of blocks."""


def timeline_of(loop: Loop, events: Sequence[Event]) -> tuple[tuple[MemoryPoint, ...], tuple[Holding, ...]]:
    """The moments of a steady step, thinned out, and the storages that are alive at its peak, the largest first.

    Of neighbouring moments the one with the most bytes stays. Storages are grouped by module (of numbered ones, all
    together), by category, and by the operation among ``events`` that made them.
    """
    alive = {e.id: e for e in loop.setup if isinstance(e, Alloc)}
    for e in loop.first:
        if isinstance(e, Alloc):
            alive[e.id] = e
        else:
            alive.pop(e.id, None)
    changes = _changes(loop, dict(alive))
    chosen, peak = _chosen(changes)
    held: Counter[str] = Counter()
    for e in alive.values():
        held[e.category] += _size(e)
    points, contents = [], []
    for i, (e, sign) in enumerate(changes):
        held[e.category] += sign * _size(e)
        if sign > 0:
            alive[e.id] = e
        else:
            alive.pop(e.id, None)
        if i in chosen:
            points.append(MemoryPoint(chosen[i], e.module, {str(c): n for c, n in held.items() if n}))
        if i == peak:
            contents = _grouped(alive.values(), _makers(events))
    return tuple(points), tuple(contents)


Changes = list[tuple[Alloc, int]]
"""Storages that come (1) and go (-1)."""


def _changes(loop: Loop, alive: dict[int, Alloc]) -> Changes:
    found: Changes = []
    for e in loop.steady:
        if isinstance(e, Alloc):
            alive[e.id] = e
            found.append((e, 1))
        elif (gone := alive.pop(e.id, None)) is not None:
            found.append((gone._replace(phase=e.phase), -1))
    return found


def _chosen(changes: Changes) -> tuple[dict[int, str], int]:
    """The positions of the moments to show, with their phases, and that of the peak."""
    totals, total = [], 0
    for e, sign in changes:
        total += sign * _size(e)
        totals.append(total)
    every = max(1, len(totals) // MOMENTS)
    buckets = (range(i, min(i + every, len(totals))) for i in range(0, len(totals), every))
    tops = [max(bucket, key=totals.__getitem__) for bucket in buckets]
    peak = max(tops, key=totals.__getitem__, default=0)
    return {i: changes[i][0].phase for i in tops}, peak


def _makers(events: Iterable[Event]) -> dict[int, str]:
    """By storage, the operation that made it: the first to be logged after it."""
    found: dict[int, str] = {}
    waiting: list[int] = []
    for e in events:
        if isinstance(e, Alloc):
            waiting.append(e.id)
        elif isinstance(e, Op):
            found.update(dict.fromkeys(waiting, e.name))
            waiting.clear()
    return found


def _grouped(alive: Iterable[Alloc], makers: dict[int, str]) -> list[Holding]:
    sizes: Counter[tuple[str, str, str]] = Counter()
    counts: Counter[tuple[str, str, str]] = Counter()
    for e in alive:
        key = (NUMBERS.sub("*", e.module), str(e.category), makers.get(e.id, ""))
        sizes[key] += _size(e)
        counts[key] += 1
    return [Holding(*key, counts[key], size) for key, size in sizes.most_common() if size]


def _size(event: Alloc) -> int:
    return round_up(event.bytes, ALIGNMENT_BYTES)
