"""Lanes: one worker thread a direction of travel, each with a stream of its own where the device has streams.

[Note: ordering]
A lane does its jobs one after another. What crosses lanes is ordered by ``Done``: a job names the Dones that it
comes after, and the compute side waits for a Done before it touches what the job wrote. On a device with streams
the waiting is done by the device (an event), on the CPU by the thread. Nothing else orders anything, so a missing
wait shows as wrong bytes in the tests that delay lanes on purpose.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import Any

import torch


class Done:
    """The moment at which some work is finished, for whoever has to come after it."""

    def __init__(self) -> None:
        self._enqueued: Future[torch.Event | None] = Future()
        self._parts: tuple[Future[Any], ...] = ()
        self._others: tuple[Done, ...] = ()

    @classmethod
    def now(cls, device: torch.device) -> "Done":
        """Everything that the current stream has been given so far."""
        done = cls()
        done.finish(torch.accelerator.current_stream(device).record_event() if device.type != "cpu" else None)
        return done

    @classmethod
    def after_all(cls, futures: Iterable[Future[Any]]) -> "Done":
        """When all of these host-side futures have a result."""
        done = cls()
        done._parts = tuple(futures)
        done.finish(None)
        return done

    def finish(self, event: torch.Event | None) -> None:
        """The work is done on the host, or is enqueued and done when ``event`` is."""
        self._enqueued.set_result(event)

    def follow(self, other: "Done") -> None:
        """Be done when ``other`` is."""
        self._parts = other._parts

        def pass_on(enqueued: Future[torch.Event | None]) -> None:
            if self._enqueued.done():
                return  # it was failed meanwhile
            if (error := enqueued.exception()) is not None:
                self._enqueued.set_exception(error)
            else:
                self._enqueued.set_result(enqueued.result())

        other._enqueued.add_done_callback(pass_on)

    def follow_all(self, others: Iterable["Done"]) -> None:
        """Be done when all of these are; for one that nobody finishes or fails."""
        self._others = tuple(others)
        self.finish(None)

    def fail(self, error: BaseException) -> None:
        """The work can not be done; whoever waits gets ``error``."""
        self._enqueued.set_exception(error)

    @property
    def told(self) -> bool:
        """Whether finish, fail or follow_all was called on it, or on what it follows."""
        return self._enqueued.done()

    @property
    def settled(self) -> bool:
        """Whether finish or fail was called."""
        return self._enqueued.done() and all(other.settled for other in self._others)

    def check(self) -> None:
        """Raise what went wrong so far; waits for nothing."""
        for other in self._others:
            other.check()
        for known in (self._enqueued, *self._parts):
            if known.done():
                known.result()

    def _host_part(self) -> torch.Event | None:
        event = self._enqueued.result()
        for part in self._parts:
            part.result()
        return event

    def settle(self) -> None:
        """Let this thread go on when the work is done or has failed."""
        with suppress(Exception):
            self.synchronize()

    def wait(self) -> None:
        """Let the current stream (on the CPU: this thread) go on only when the work is done."""
        event = self._host_part()
        for other in self._others:
            other.wait()
        if event is not None:
            torch.accelerator.current_stream().wait_event(event)

    def synchronize(self) -> None:
        """Let this thread go on only when the work is done."""
        event = self._host_part()
        for other in self._others:
            other.synchronize()
        if event is not None:
            event.synchronize()

    def reached(self) -> bool:
        """Whether the work is done; what has failed counts as done. Waits for nothing."""
        if not self._enqueued.done() or not all(part.done() for part in self._parts):
            return False
        event = None if self._enqueued.exception() is not None else self._enqueued.result()
        return (event is None or event.query()) and all(other.reached() for other in self._others)


URGENT = -1
"""The priority of streams whose kernels go before those that wait beside them. Collectives would find no room among the
blocks of a matrix product, and other ranks wait for them."""


class Lane:
    """One direction of travel: a thread that does its jobs in order, on its own stream.

    ``cpu_threads`` are the threads its operations on host memory use. Where the CPU is the compute device it must be 1:
    a second team of OpenMP threads on the same cores makes the first one sleep between operations (measured on two
    cores: forward and backward 1.35 times slower). ``priority`` is that of its stream: 0 or ``URGENT``.
    """

    def __init__(self, name: str, device: torch.device, cpu_threads: int = 1, priority: int = 0) -> None:
        self.name = name
        self.bytes_moved = 0
        self._device = device
        self._stream = torch.Stream(device, priority=priority) if device.type != "cpu" else None
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Sequence[Done], Done] | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(cpu_threads,), name=f"memplan-{name}", daemon=True)
        caller_threads = torch.get_num_threads()
        self._thread.start()
        self._started.wait()
        # Setting the number in one thread also sets what threads made later begin with.
        torch.set_num_threads(caller_threads)

    def submit(self, job: Callable[[], None], after: Sequence[Done] = ()) -> Done:
        """Do ``job`` after all earlier ones of this lane and after these Dones."""
        done = Done()
        self._jobs.put((job, after, done))
        return done

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Done] = ()) -> Done:
        """Copy ``source`` into ``target``; the source must stay as it is until the Done."""

        return self.submit(lambda: self.move(target, source), after)

    def move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy ``source`` into ``target`` now; in a job of this lane."""
        target.copy_(source, non_blocking=True)
        self.bytes_moved += source.nbytes

    def settle(self) -> None:
        """Wait until all that was submitted is done or has failed."""
        self.submit(lambda: None).settle()

    def close(self) -> None:
        """Do what was submitted, then end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self, cpu_threads: int) -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the default, so it comes first
        torch.set_num_threads(cpu_threads)
        self._started.set()
        if self._device.type != "cpu":
            torch.accelerator.set_device_index(self._device.index or 0)
        while (item := self._jobs.get()) is not None:
            job, after, done = item
            try:
                with torch.no_grad(), self._stream or nullcontext():
                    for earlier in after:
                        earlier.wait()
                    job()
                    event = self._stream.record_event() if self._stream is not None else None
            except BaseException as error:  # noqa: BLE001 - the error belongs to whoever waits for the job
                done.fail(error)
            else:
                done.finish(event)
            # The job holds its tensors; they may go now, not when the next job comes.
            del item, job, after, done
        if self._stream is not None:
            self._stream.synchronize()  # whoever closes the lane frees what it was copying


class Lanes:
    """Makes the lanes of a device; what closes each joins the ``closers``."""

    def __init__(self, device: torch.device, closers: list[Callable[[], None]]) -> None:
        self._device, self._closers = device, closers
        self.made: list[Lane] = []

    def __call__(self, name: str, cpu_threads: int, priority: int = 0) -> Lane:
        """One more."""
        lane = Lane(name, self._device, cpu_threads, priority)
        self._closers.append(lane.close)
        self.made.append(lane)
        return lane
