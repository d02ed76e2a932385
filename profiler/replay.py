"""Replays a traced step through the allocator: what a loop of such steps holds at its peaks.

The loop is the one people write::

    for batch in batches:
        optimizer.zero_grad()          # step: it ends the gradients of the step before
        loss = loss_of(model(batch))   # forward, loss
        loss.backward()                # backward
        clip_grad_norm_(parameters)    # clip, if asked for
        optimizer.step()               # step

What is left of one step (the loss, what modules keep) lives until the next forward has replaced it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import count

from profiler.allocator import ALIGNMENT_BYTES, CachingAllocator, round_up
from profiler.events import BACKWARD, FORWARD, LOSS, SETUP, STEP, Alloc, Category, Free
from profiler.optimizers import clip_events, optimizer_events
from profiler.trace import Trace

LASTING = frozenset({Category.WORKSPACE, Category.OPTIMIZER})
"""Made in the first step and kept."""

Storages = list[Alloc | Free]
"""The part of a step's events that the allocator sees."""


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of one step by phase, and the bytes reserved by its end."""

    allocated_bytes: dict[str, int]
    reserved_bytes: int

    @property
    def overall_bytes(self) -> int:
        """The largest of the phases."""
        return max(self.allocated_bytes.values(), default=0)


@dataclass(frozen=True)
class Loop:
    """The storages of a training loop: what there is before it, and its first two steps, the others as the second."""

    setup: Storages
    first: Storages
    steady: Storages

    @cached_property
    def before_steady(self) -> dict[int, Alloc]:
        """What the setup and the first step leave, by id."""
        alive: dict[int, Alloc] = {}
        for event in (*self.setup, *self.first):
            if isinstance(event, Alloc):
                alive[event.id] = event
            else:
                alive.pop(event.id, None)
        return alive


def replay(loop: Loop, allocator: CachingAllocator) -> tuple[Peaks, Peaks]:
    """The peaks of the first step and of the steady state, as this allocator has them."""
    _play(allocator, loop.setup)
    first = Peaks(_play(allocator, loop.first), allocator.reserved_bytes)
    steady = Peaks(_play(allocator, loop.steady), allocator.reserved_bytes)
    return first, steady


def peaks_by_phase(loop: Loop, leave_out: Collection[Category]) -> dict[str, int]:
    """The most bytes that tensors hold in each phase of the steady state, without the categories in ``leave_out``.

    It is what an allocator that grows its segments has allocated: it cuts blocks to size.
    """
    peaks: dict[str, int] = {}
    before, after = _held(loop, leave_out)
    for event, held in zip(loop.steady, after, strict=True):
        if held > peaks.setdefault(event.phase, before):
            peaks[event.phase] = held
        before = held
    return peaks


def allocated_peak(loop: Loop, leave_out: Collection[Category]) -> int:
    """The most bytes that tensors hold in the steady state, without the categories in ``leave_out``."""
    return max(peaks_by_phase(loop, leave_out).values(), default=0)


def held_bytes(loop: Loop, leave_out: Collection[Category]) -> int:
    """What tensors hold in the steady state when backward begins, without the categories in ``leave_out``."""
    before, after = _held(loop, leave_out)
    last = (held for e, held in zip(reversed(loop.steady), reversed(after), strict=True) if e.phase in (FORWARD, LOSS))
    return next(last, before)


def scratch_moments(loop: Loop, leave_out: Collection[Category]) -> tuple[tuple[int, int], ...]:
    """(scratch, beside) bytes when kernels hold something for a moment, in a steady step.

    Scratch is the most that it is in any smaller batch, too. Of all moments those that have more of one than any with
    as much of the other, most scratch first.
    """
    alive = {e.id: _scratch(e) for e in loop.before_steady.values() if e.category is Category.SCRATCH}
    held_scratch, most_scratch = (sum(sizes) for sizes in zip((0, 0), *alive.values(), strict=True))
    moments = set()
    for event, held in zip(loop.steady, _held(loop, leave_out)[1], strict=True):
        if isinstance(event, Free):
            size, most = alive.pop(event.id, (0, 0))
            held_scratch, most_scratch = held_scratch - size, most_scratch - most
            continue
        if event.category is Category.SCRATCH:
            alive[event.id] = size, most = _scratch(event)
            held_scratch, most_scratch = held_scratch + size, most_scratch + most
        if most_scratch:
            moments.add((most_scratch, held - held_scratch))
    found: list[tuple[int, int]] = []
    for moment in sorted(moments, reverse=True):
        if not found or moment[1] > found[-1][1]:
            found.append(moment)
    return tuple(found)


def _scratch(event: Alloc) -> tuple[int, int]:
    size = round_up(event.bytes, ALIGNMENT_BYTES)
    return size, max(size, round_up(event.most_bytes, ALIGNMENT_BYTES))


def _held(loop: Loop, leave_out: Collection[Category]) -> tuple[int, list[int]]:
    """Bytes of tensors before the steady step and after each of its events, as if ``leave_out`` did not exist."""
    alive = loop.before_steady.values()
    sizes = {e.id: round_up(e.bytes, ALIGNMENT_BYTES) for e in alive if e.category not in leave_out}
    before = held = sum(sizes.values())
    after: list[int] = []
    for event in loop.steady:
        if isinstance(event, Free):
            held -= sizes.pop(event.id, 0)
        elif event.category not in leave_out:
            sizes[event.id] = size = round_up(event.bytes, ALIGNMENT_BYTES)
            held += size
        after.append(held)
    return before, after


def _play(allocator: CachingAllocator, events: Storages) -> dict[str, int]:
    peaks: dict[str, int] = {}
    phase = ""
    for event in events:
        if event.phase != phase:  # a phase begins with what the one before left behind
            phase = event.phase
            peaks[phase] = max(peaks.get(phase, 0), allocator.allocated_bytes)
        if isinstance(event, Free):
            allocator.free(event.id)
        else:
            allocator.allocate(event.id, event.bytes)
            if allocator.allocated_bytes > peaks[phase]:
                peaks[phase] = allocator.allocated_bytes
    return peaks


def training_loop(trace: Trace, optimizer: str, clip: bool = False) -> Loop:
    """The first two steps of the loop with this optimizer, which clips gradients by their norm if asked."""
    storages = [e for e in trace.events if isinstance(e, (Alloc, Free))]
    body = [e for e in storages if e.phase in (FORWARD, LOSS, BACKWARD)]
    made = [e for e in body if isinstance(e, Alloc)]
    ended = {e.id for e in body if isinstance(e, Free)}
    left = [e for e in made if e.id not in ended and e.category not in LASTING]
    span = 1 + max((e.id for e in storages if isinstance(e, Alloc)), default=0)
    again = {e.id for e in left}
    trained = [p for p in trace.parameters if p.has_gradient]
    fresh = count(2 * span)
    steps: list[Storages] = []
    for number in range(2):
        shift = number * span
        # What is left of the first step is still there when the second makes its like.
        step = [
            e._replace(id=e.id + shift) if shift and e.id in again else e
            for e in body
            if number == 0 or not (isinstance(e, Alloc) and e.category in LASTING)
        ]
        if number:
            at = next((i for i, e in enumerate(step) if e.phase == BACKWARD), len(step))
            last = step[at - 1].phase if at else FORWARD
            step[at:at] = [Free(e.id, last) for e in left if e.category is not Category.GRADIENT]
        if clip:
            step += clip_events(trained, lambda: next(fresh))
        step += optimizer_events(optimizer, trained, number == 0, lambda: next(fresh))
        step += [Free(e.id + shift, STEP) for e in left if e.category is Category.GRADIENT]
        steps.append(step)
    setup = [e for e in storages if e.phase == SETUP]
    return Loop(setup, *steps)
