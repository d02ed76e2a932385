"""Streams and events of the CPU, which order nothing and only tell the races of it.

[Note: simulated streams]
A simulated stream does everything at once, in the thread that asks, and only notes events and waits. So training is
what it is on the CPU, to the last bit, while the engine goes the way that it goes on a GPU: threads wait for each other
only where a GPU's would, and everything else is left to events. Nothing depends on how long anything takes: what no
event orders is found although it happened in the right order.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, cycle
from typing import Any

import pytest
import torch

from offload import streamed_update
from offload.memory import MemoryMeter
from offload.split import Took
from offload.streams import Done
from offload.visits import Visit
from tests.stream_races import INSTRUMENTS, Races
from tests.watched_engine import name_streams

INSTRUMENTS.add(__file__)


class _Simulation:
    """Streams and events that only tell the races of what is asked of them."""

    def __init__(self, races: Races) -> None:
        self.races = races
        self._threads = threading.local()
        self._numbers = count(1)  # the default stream is 0

    @property
    def stack(self) -> list["_Stream"]:
        """The streams that this thread has entered."""
        if not hasattr(self._threads, "stack"):
            self._threads.stack = [_Stream(self, 0)]
        return self._threads.stack

    def current(self, _: Any = None) -> "_Stream":
        return self.stack[-1]

    def stream(self) -> "_Stream":
        return _Stream(self, next(self._numbers))

    def event(self) -> "_Event":
        return _Event(self, next(self._numbers))


class _Event:
    def __init__(self, simulation: _Simulation, number: int) -> None:
        self.simulation, self.number = simulation, number

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.simulation.races.event_synchronized(self.number)


class _Stream:
    def __init__(self, simulation: _Simulation, number: int) -> None:
        self.simulation, self.number = simulation, number

    def __enter__(self) -> None:
        self.simulation.stack.append(self)

    def __exit__(self, *_: Any) -> None:
        self.simulation.stack.pop()

    def record_event(self) -> _Event:
        event = self.simulation.event()
        self.simulation.races.recorded(event.number, self.number)
        return event

    def wait_event(self, event: _Event) -> None:
        self.simulation.races.waited(event.number, self.number)

    def synchronize(self) -> None:
        self.simulation.races.stream_synchronized(self.number)


def simulate_streams(patch: pytest.MonkeyPatch) -> Races:
    """Give engines on the CPU streams of their own: [Note: simulated streams]."""
    simulation = _Simulation(races := Races(lambda: simulation.current().number, simulated=True))
    name_streams(patch, races, lambda *_: simulation.stream())

    def now(cls: type[Done], device: torch.device) -> Done:
        done = cls()
        done.finish(simulation.current().record_event())
        return done

    patch.setattr(Done, "now", classmethod(now))
    patch.setattr(torch.accelerator, "current_stream", simulation.current)
    patch.setattr(torch.Tensor, "record_stream", lambda tensor, _: races.lent(tensor))
    patch.setattr(streamed_update, "Clock", partial(_Clock, cycle([1e-9, 1e9])))
    patch.setattr(MemoryMeter, "counts_saved", False)  # as on a GPU
    return races


class _Clock:
    """Of a device that is fast in one step and slow in the next, so that its share of the update moves."""

    def __init__(self, seconds: Iterator[float], visits: Sequence[Visit]) -> None:
        self._seconds, self._elements = seconds, sum(visit.piece.elements for visit in visits)

    def start(self) -> None:
        """The updates may begin."""

    def stop(self) -> None:
        """The last promise is kept."""

    def read(self) -> Took:
        """What they took."""
        return Took(self._elements, next(self._seconds))
