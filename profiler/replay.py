"""Replays a traced step through the allocator: what a loop of such steps holds at its peaks.

The loop is the one people write, in the steady state::

    for batch in batches:
        loss = loss_of(model(batch))   # forward
        loss.backward()                # backward
        optimizer.step()               # step
        optimizer.zero_grad()          # step

What is left of one step (the loss, what modules keep) lives until the next forward has replaced it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count

from profiler.allocator import CachingAllocator
from profiler.events import BACKWARD, FORWARD, SETUP, STEP, Alloc, Category, Event, Free
from profiler.optimizers import optimizer_events
from profiler.trace import Trace

LASTING = frozenset({Category.WORKSPACE, Category.OPTIMIZER})
"""Made in the first step and kept."""


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of the second step, by phase, and the bytes reserved by its end."""

    allocated_bytes: dict[str, int]
    reserved_bytes: int

    @property
    def overall_bytes(self) -> int:
        """The largest of the phases."""
        return max(self.allocated_bytes.values(), default=0)


def replay(trace: Trace, optimizer: str, leave_out: Collection[Category] = ()) -> Peaks:
    """The peaks of the steady state with this optimizer, as if the categories in ``leave_out`` did not exist."""
    allocator = CachingAllocator()
    _play(allocator, [e for e in trace.events if e.phase == SETUP], leave_out)
    peaks: dict[str, int] = {}
    for step in _steps(trace, optimizer):
        peaks = _play(allocator, step, leave_out)
    return Peaks(peaks, allocator.reserved_bytes)


def _play(allocator: CachingAllocator, events: Iterable[Event], leave_out: Collection[Category]) -> dict[str, int]:
    peaks: Counter[str] = Counter()
    for event in events:
        # A phase begins with what the one before left behind.
        peaks[event.phase] = max(peaks[event.phase], allocator.allocated_bytes)
        if isinstance(event, Alloc) and event.category not in leave_out:
            allocator.allocate(event.id, event.bytes)
        elif isinstance(event, Free):
            allocator.free(event.id)
        peaks[event.phase] = max(peaks[event.phase], allocator.allocated_bytes)
    return dict(peaks)


def _steps(trace: Trace, optimizer: str) -> Iterator[list[Event]]:
    """The events of the first and of the second step."""
    body = [e for e in trace.events if isinstance(e, Alloc | Free) and e.phase in (FORWARD, BACKWARD)]
    made = [e for e in body if isinstance(e, Alloc)]
    ended = {e.id for e in body if isinstance(e, Free)}
    left = [e for e in made if e.id not in ended and e.category not in LASTING]
    span = 1 + max((e.id for e in trace.events if isinstance(e, Alloc)), default=0)
    own = {e.id for e in made if e.category not in LASTING}
    trained = [(p.name.rpartition(".")[0], p.bytes) for p in trace.parameters if p.has_gradient]
    fresh = count(2 * span)
    for number in range(2):
        shift = number * span
        step: list[Event] = [
            replace(e, id=e.id + shift) if e.id in own else e
            for e in body
            if number == 0 or not (isinstance(e, Alloc) and e.category in LASTING)
        ]
        if number:
            at = next((i for i, e in enumerate(step) if e.phase == BACKWARD), len(step))
            step[at:at] = [Free(e.id, FORWARD) for e in left if e.category is not Category.GRADIENT]
        step += optimizer_events(optimizer, trained, number == 0, lambda: next(fresh))
        step += [Free(e.id + shift, STEP) for e in left if e.category is Category.GRADIENT]
        yield step
