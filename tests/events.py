"""A clock, and what threads and streams need to wait for each other on it: a small discrete-event simulation.

A process is a generator. It yields seconds to let them pass, or a ``Signal`` to wait for it.
"""

import heapq
import itertools
from collections.abc import Generator, Sequence
from typing import Any

Process = Generator[Any, None, None]


class Signal:
    """Something that happens once."""

    def __init__(self, happened: bool = False) -> None:
        self.happened = happened
        self.waiting: list[Process] = []


class Clock:
    """Runs processes in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._coming: list[tuple[float, int, Process]] = []
        self._number = itertools.count()

    def start(self, process: Process, seconds: float = 0.0) -> None:
        """Go on with it after so many seconds."""
        heapq.heappush(self._coming, (self.now + seconds, next(self._number), process))

    def tell(self, signal: Signal) -> None:
        """It has happened: whoever waits for it goes on."""
        signal.happened = True
        for process in signal.waiting:
            self.start(process)
        signal.waiting.clear()

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._coming:
            self.now, _, process = heapq.heappop(self._coming)
            for wanted in process:
                if not isinstance(wanted, Signal):
                    self.start(process, wanted)
                    break
                if not wanted.happened:
                    wanted.waiting.append(process)
                    break


class Stream:
    """Does what it is given one after another, each behind signals of others; ``spans`` are (label, start, end)."""

    def __init__(self, clock: Clock, link: "Stream | None" = None) -> None:
        self.clock = clock
        self.link = link
        """What does the work for several streams, in the order in which they come to it."""
        self.last = Signal(happened=True)
        """Of everything that it was given so far."""
        self.spans: list[tuple[str, float, float]] = []

    def give(
        self, seconds: float, label: str = "", after: Sequence[Signal] = (), ends_after: Signal | None = None
    ) -> Signal:
        """Work of so many seconds that does not end before ``ends_after``; returns its end."""
        before, self.last = self.last, Signal()
        self.clock.start(self._do(before, seconds, label, after, ends_after, self.last))
        return self.last

    def _do(
        self,
        before: Signal,
        seconds: float,
        label: str,
        after: Sequence[Signal],
        ends_after: Signal | None,
        done: Signal,
    ) -> Process:
        yield before
        yield from after
        start = self.clock.now
        if self.link is not None and seconds > 0:
            yield self.link.give(seconds, label)
        else:
            yield seconds
        if ends_after is not None:
            yield ends_after
        if self.clock.now > start:
            self.spans.append((label, start, self.clock.now))
        self.clock.tell(done)


class Done:
    """As ``offload.streams.Done``: enqueued at one time, finished with an event of a stream, or with others."""

    def __init__(self, event: Signal | None = None, *, enqueued: bool = False) -> None:
        self.enqueued = Signal(enqueued)
        self.event = event
        self.parts: Sequence[Signal] = ()

    @property
    def host(self) -> list[Signal]:
        """What a thread waits for before its stream can be told to wait for the event."""
        return [self.enqueued, *self.parts]


class Worker:
    """A thread that does jobs in order, on a stream of its own."""

    def __init__(self, clock: Clock, link: Stream | None = None) -> None:
        self.clock, self.stream = clock, Stream(clock, link)
        self._last = Signal(happened=True)

    def submit(self, job: Process, after: Sequence[Done] = ()) -> Done:
        """``job`` runs on the thread and gives its stream work; the Done is enqueued when it has ended."""
        before, self._last = self._last, Signal()
        done = Done()
        self.clock.start(self._work(before, job, after, done, self._last))
        return done

    def copy(self, seconds: float, label: str, after: Sequence[Done] = ()) -> Done:
        """A copy of so many seconds."""
        return self.submit(self._copy(seconds, label), after)

    def _copy(self, seconds: float, label: str) -> Process:
        self.stream.give(seconds, label)
        yield from ()

    def _work(self, before: Signal, job: Process, after: Sequence[Done], done: Done, ended: Signal) -> Process:
        yield before
        for earlier in after:
            yield from earlier.host
            if earlier.event is not None:
                self.stream.give(0.0, after=[earlier.event])
        yield from job
        done.event = self.stream.last
        self.clock.tell(done.enqueued)
        self.clock.tell(ended)
