"""Putting back the blocks that a trace has passed over, as data: pure, and refused where it would not be exact.

[Note: Unfolding] In a run of equal blocks every period does the same: it makes storages, ends some of its own, of the
period before (its input) and of the one after (the gradient that comes back). A folded trace has three periods of the
run, then blocks that were passed over, then at least one more. In the terms below the period of an event is its
"round"; a storage is named by its round relative to the event's, by its side (forward or backward) and by its position
among the storages made there. If in these terms the second and the third round are the same sequence, the fourth is it
again, and so on: the third is repeated for every round that was passed over, and what follows refers to the last copy.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from profiler.events import SETUP, Alloc, Back, Call, Event, Free, Gradient, Op, Save
from profiler.runs import Run

FORWARD_SIDE, BACKWARD_SIDE = "forward", "backward"
TEMPLATE = 2
"""The round that is repeated; the one before it must be its like."""

ID_AT: dict[Any, int] = {Alloc: 0, Free: 0, Save: 0}
"""Position of the storage's id among an event's fields."""
NAME_AT: dict[Any, int] = {Alloc: 3, Op: 4, Save: 1, Call: 0, Back: 0, Gradient: 0}
"""Position of the dotted name."""
Name = tuple[int, str, int]
"""(round, side, position) of a storage; forward positions count from the end of their round, and are negative."""


class CannotUnfoldError(Exception):
    """The rounds are not alike: the trace has to be made without folding."""


def unfold(events: Sequence[Event], runs: Iterable[Run]) -> list[Event]:
    """The events with every block of the runs in them. Raises CannotUnfoldError."""
    for run in runs:
        events = _Unfolding(events, run).result()
    return list(events)


@dataclass(frozen=True)
class _Spans:
    """Where the rounds of a run lie in the events: [start, stop) for forward rounds 0-3 and backward rounds 3-1."""

    forward: tuple[range, ...]
    backward: dict[int, range]
    skipped_forward: range
    skipped_backward: range


def _spans(events: Sequence[Event], run: Run) -> _Spans:
    calls, backs = _once(events, Call, run), _once(events, Back, run)
    p, skipped = run.period, run.skipped
    f = [calls[run.blocks[i]] for i in (0, p, 2 * p, 3 * p, skipped.stop)]
    g = [backs[run.blocks[i - 1]] for i in (skipped.stop + p, skipped.stop, 3 * p, 2 * p, p)]
    if [*f, *g] != sorted(f + g):
        raise CannotUnfoldError("the blocks do not run in their order")
    return _Spans(
        forward=tuple(range(a, b) for a, b in pairwise(f[:4])),
        backward={3: range(g[0], g[1]), 2: range(g[2], g[3]), 1: range(g[3], g[4])},
        skipped_forward=range(f[3], f[4]),
        skipped_backward=range(g[1], g[2]),
    )


def _once(events: Sequence[Event], kind: type[Call] | type[Back], run: Run) -> dict[str, int]:
    blocks = set(run.blocks)
    found = [(e.module, i) for i, e in enumerate(events) if isinstance(e, kind) and e.module in blocks]
    if len(found) != len(blocks) or len(dict(found)) != len(blocks):
        raise CannotUnfoldError("a block of the run ran more than once, or not at all")
    return dict(found)


class _Unfolding:
    """One run of one trace."""

    def __init__(self, events: Sequence[Event], run: Run) -> None:
        self.events, self.run, self.spans = events, run, _spans(events, run)
        self.rounds = len(run.skipped) // run.period
        self.position = {path: i for i, path in enumerate(run.blocks)}
        self.made: dict[tuple[int, str], list[int]] = {
            **{(c, FORWARD_SIDE): self._ids(span) for c, span in enumerate(self.spans.forward)},
            **{(c, BACKWARD_SIDE): self._ids(span) for c, span in self.spans.backward.items()},
        }
        self.names: dict[int, Name] = {
            number: (c, side, i - (len(ids) if side == FORWARD_SIDE else 0))
            for (c, side), ids in self.made.items()
            for i, number in enumerate(ids)
        }
        self.standing = self._standing()
        self.next_id = 1 + max(e.id for e in events if isinstance(e, Alloc))

    def result(self) -> list[Event]:
        """The events with the copies in their places."""
        self._check()
        spans = self.spans
        out = list(self.events[: spans.skipped_forward.start])
        forward, backward = (
            _Template(self.events[span.start : span.stop])
            for span in (spans.forward[TEMPLATE], spans.backward[TEMPLATE])
        )
        for copy in range(self.rounds):
            out += self._copied(forward, copy + 1)
        used = self._used_names()
        for i in range(spans.skipped_forward.stop, spans.skipped_backward.start):
            out += self._after(self.events[i], used)
        for copy in reversed(range(self.rounds)):
            out += self._copied(backward, copy + 1)
        for i in range(spans.skipped_backward.stop, len(self.events)):
            out += self._below(self.events[i], used)
        return out

    def _ids(self, span: range) -> list[int]:
        return [e.id for e in self.events[span.start : span.stop] if isinstance(e, Alloc)]

    def _standing(self) -> dict[int, tuple[str, int]]:
        """(path, position) of what stood in a block before the step: buffers and parameters."""
        found: dict[int, tuple[str, int]] = {}
        counts: dict[str, int] = {}
        for e in self.events:
            if not isinstance(e, Alloc) or e.phase != SETUP:
                continue
            path = e.module
            while path and path not in self.position:
                path = path.rpartition(".")[0]
            if path:
                counts[path] = counts.get(path, 0) + 1
                found[e.id] = (path, counts[path])
        self.places = {place: number for number, place in found.items()}
        return found

    def _check(self) -> None:
        """Raise unless rounds 1 and 2 are the same, and what ran between the blocks passed over has left nothing."""
        spans = self.spans
        for span in (spans.skipped_forward, spans.skipped_backward):
            between = self.events[span.start : span.stop]
            made, ended = ({e.id for e in between if isinstance(e, kind)} for kind in (Alloc, Free))
            if made != ended or any(isinstance(e, Gradient) for e in between):
                raise CannotUnfoldError("something ran between the blocks that were passed over, and left something")
        for side in (spans.forward, spans.backward):
            one, two = (self._canonical(c, side[c]) for c in (TEMPLATE - 1, TEMPLATE))
            if one != two:
                raise CannotUnfoldError("the blocks are not alike")
        three, two = (self._sizes(spans.backward[c]) for c in (3, TEMPLATE))
        if three[: len(two)] != two:
            raise CannotUnfoldError("the last block is not like the others")

    def _sizes(self, span: range) -> list[tuple[object, ...]]:
        return [(e.bytes, e.category) for e in self.events[span.start : span.stop] if isinstance(e, Alloc)]

    def _canonical(self, c: int, span: range) -> list[Any]:
        p = self.run.period
        part = _Template(self.events[span.start : span.stop])
        names = _renamed(part.names, {path: str(i) for i, path in enumerate(self.run.blocks[c * p : (c + 1) * p])})
        forms = part.copy({number: self._relative(number, c) for number in part.ids}, names)
        found: list[Any] = []
        # What ends at one moment does so in any order: a container's, or that of a set.
        for ends, group in groupby(forms, key=lambda e: isinstance(e, Free)):
            kinds = [(type(e), e) for e in group]
            found += sorted(kinds, key=repr) if ends else kinds
        return found

    def _relative(self, number: int, c: int) -> Any:
        if number in self.names:
            made, side, position = self.names[number]
            return (made - c, side, position)
        if number in self.standing:
            path, position = self.standing[number]
            return (self.position[path] - c * self.run.period, position)
        return number

    def _id(self, c: int, side: str, position: int) -> int:
        """Id of a storage of unfolded round ``c``."""
        if c <= TEMPLATE:
            return self.made[c, side][position]
        if c > TEMPLATE + self.rounds:
            return self.made[3, side][position]
        forward = len(self.made[TEMPLATE, FORWARD_SIDE])
        each = forward + len(self.made[TEMPLATE, BACKWARD_SIDE])
        return self.next_id + (c - TEMPLATE - 1) * each + forward + position

    def _copied(self, template: "_Template", shift: int) -> list[Event]:
        """The template's events, ``shift`` rounds later."""
        p, blocks = self.run.period, self.run.blocks
        start = TEMPLATE * p
        pairs = zip(blocks[start : start + p], blocks[start + shift * p : start + (shift + 1) * p], strict=True)
        return template.copy(
            {number: self._shifted(number, shift) for number in template.ids}, _renamed(template.names, dict(pairs))
        )

    def _shifted(self, number: int, shift: int) -> int:
        if number in self.names:
            c, side, position = self.names[number]
            return self._id(c + shift, side, position)
        if number in self.standing:
            path, position = self.standing[number]
            return self.places[self.run.blocks[self.position[path] + shift * self.run.period], position]
        return number

    def _used_names(self) -> set[Any]:
        """What the template's events name, relative to it."""
        spans = (self.spans.forward[TEMPLATE], self.spans.backward[TEMPLATE])
        used = (e for span in spans for e in self.events[span.start : span.stop] if isinstance(e, Free | Save))
        return {self._relative(e.id, TEMPLATE) for e in used}

    def _after(self, event: Event, used: set[Any]) -> list[Event]:
        """An event after the copies: what the last round names of the one before it is the last copy's."""
        if not isinstance(event, Free | Save) or event.id not in self.names:
            return [event]
        c, side, position = self.names[event.id]
        if side == FORWARD_SIDE and (c - 3, side, position) in used:
            return [event._replace(id=self._id(c + self.rounds, side, position))]
        return self._everywhere(event)

    def _below(self, event: Event, used: set[Any]) -> list[Event]:
        """An event of backward below the copies: what the template names of the round after it is the first copy's."""
        if not isinstance(event, Free | Save) or event.id not in self.names:
            return [event]
        c, side, position = self.names[event.id]
        if c == 3:
            return [event._replace(id=self._id(3, side, position))] if (1, side, position) in used else [event]
        if c == TEMPLATE and not {(0, side, position), (1, side, position)} & used:
            return self._everywhere(event)
        return [event]

    def _everywhere(self, event: Free | Save) -> list[Event]:
        """What happens to the template's storage outside of the rounds happens to every copy's."""
        c, side, position = self.names[event.id]
        if c != TEMPLATE or not isinstance(event, Free):
            return [event]
        return [Free(self._id(c + shift, side, position), event.phase) for shift in range(self.rounds + 1)]


class _Template:
    """Some events, ready to be copied many times with other ids and names."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._fields: list[tuple[Any, list[Any], int | None, int | None]] = [
            (type(e), list(e), ID_AT.get(type(e)), NAME_AT.get(type(e))) for e in events
        ]
        self.ids: set[int] = {fields[at] for _, fields, at, _ in self._fields if at is not None}
        self.names: set[str] = {fields[at] for _, fields, _, at in self._fields if at is not None}

    def copy(self, ids: Mapping[int, Any], names: Mapping[str, str]) -> list[Event]:
        """The events with every id and name replaced."""
        out: list[Any] = []
        for kind, fields, id_at, name_at in self._fields:
            fields = fields.copy()
            if id_at is not None:
                fields[id_at] = ids[fields[id_at]]
            if name_at is not None:
                fields[name_at] = names[fields[name_at]]
            out.append(tuple.__new__(kind, fields))
        return out


def _renamed(names: Iterable[str], prefixes: dict[str, str]) -> dict[str, str]:
    """Dotted names, under another prefix if they have one of ``prefixes``."""
    found: dict[str, str] = {}
    for name in names:
        head = name
        while head and head not in prefixes:
            head = head.rpartition(".")[0]
        found[name] = prefixes[head] + name[len(head) :] if head else name
    return found
