"""How far one rank is with the collectives of one kind, on the host and on its device.

[Note: collectives that the device has not done]
A device does the collectives of one kind in order, so of those that it was given the oldest that it has not done is the
one that it is in, and the rank waits there since it was given it or, where that is later, has done the one before. What
is asked is an event, once a second and only by the watching thread. An event also waits for what was before the
collective: a unit whose computing takes long counts as one that the rank is in, as it can not be told apart.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from offload.standing import Entered

UNITS = ("gather", "reduce", "sum over replicas")
"""Collectives of one unit."""


class Mark(Protocol):
    """An event of a device's stream."""

    def query(self) -> bool:
        """Whether the device has come to it; waits for nothing."""
        ...


@dataclass(frozen=True)
class _Queued:
    """A collective that the device was given."""

    number: int
    place: tuple[str, str, int]
    since: float
    mark: Mark


@dataclass(eq=False)
class Kind:
    """Collectives of one kind on this rank; one thread enters them, and another asks."""

    count: int = 0
    place: tuple[str, str, int] = ("", "", 0)
    """Of the last one: what is done, for which unit, in which step."""
    since: float | None = None
    """When it went into the one that it is in, on the host."""
    changed: float = 0.0
    """When it went into one or out of one."""
    waited_seconds: float = 0.0
    """On the host."""
    _queued: deque[_Queued] = field(default_factory=deque)
    _done: float = 0.0
    """When the device was last seen to have done one."""

    def enter(self, place: tuple[str, str, int], now: float) -> float:
        """It goes into the next one; gives when."""
        self.place = place
        self.count += 1
        self.since = self.changed = now
        return now

    def queue(self, mark: Mark, now: float) -> None:
        """The device was given the one that it is in."""
        self._queued.append(_Queued(self.count, self.place, now, mark))

    def leave(self, began: float, now: float) -> None:
        """It is out of the one that it went into then, on the host."""
        self.since, self.changed = None, now
        self.waited_seconds += now - began

    def entered(self, now: float) -> Entered:
        """For the other ranks."""
        while self._queued and _reached(self._queued[0].mark):
            self._queued.popleft()
            self._done = now
        if self._queued:
            first = self._queued[0]
            return Entered(first.number, _what(first.place), now - max(first.since, self._done))
        return Entered(self.count, _what(self.place), None if self.since is None else now - self.since)


def _what(place: tuple[str, str, int]) -> str:
    verb, unit, step = place
    where = f"{verb} of {unit or 'the root unit'}" if verb in UNITS else verb
    return f"{where} of step {step}" if step else where


def _reached(mark: Mark) -> bool:
    try:
        return mark.query()
    except Exception:  # noqa: BLE001 - the device has failed, which those who use it will be told
        return True
