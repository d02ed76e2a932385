"""What one GPU's engine does in a few steps, as threads and streams on a simulated clock: the planner's twin.

Written from ``offload``: the threads are the engine's (the one that issues, a lane each way, the update), they block
where those block, and what decides there decides here (``Prefetcher``, ``schedule``, the slot rings). The planner's
event model must come to the same seconds for the same work.

What is defined by the planner's model and not by the engine comes from ``StepWork``: seconds of kernels and of issuing
them, rates, and by which factor lanes slow each other down.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from memplan.memory import Counts, chain_order, placements_of
from memplan.passes import BACKWARD, BACKWARD_ISSUE, FORWARD, FORWARD_ISSUE
from memplan.work import StepWork
from offload.plan import Placement, Tier
from offload.prefetch import Prefetcher
from offload.residency import (
    BLOCK_BYTES,
    UPDATE_RING,
    UnitShape,
    aligned,
    chunks,
    gradient_slot_counts,
    mirrored,
    slot_counts,
    state_bytes,
)
from offload.schedule import Fetch
from tests.events import Clock, Done, Process, Signal, Stream, Worker

STEPS = 6


@dataclass(frozen=True)
class Simulated:
    """The end of a simulation."""

    seconds: float
    """Between the last two times that the loop read a loss."""
    ends: tuple[float, ...]
    spans: dict[str, list[tuple[str, float, float]]]
    """By lane."""


def simulate(work: StepWork, counts: Counts, first_gradient: float = 0.0, steps: int = STEPS) -> Simulated:
    """So many steps of one candidate on one GPU.

    ``first_gradient`` is the share of a unit's backward that has passed when its first gradient comes.
    """
    return _Engine(work, counts, first_gradient).train(steps)


@dataclass(eq=False)
class _Slot:
    holds: str | None = None
    arrived: Done | None = None


@dataclass(eq=False)
class _Unit:
    index: int
    shape: UnitShape
    place: Placement
    landed: Done | None = None
    promise: Done = field(default_factory=Done)

    @property
    def label(self) -> str:
        return self.shape.name or "(root)"


@dataclass(eq=False)
class _Staged:
    """A chunk on its way through the update."""

    unit: _Unit
    elements: int
    stop: int
    ring: int
    reads: list[Signal]
    gradients: Done


class _Engine:
    def __init__(self, work: StepWork, counts: Counts, first_gradient: float) -> None:
        self.work, self.first_gradient = work, first_gradient
        self._weight_bytes, self._state_bytes = work.precision.weight_bytes, state_bytes(1, work.form)
        shapes = work.shapes
        places = placements_of(shapes, chain_order(shapes), counts)
        self.units = [_Unit(i, s, p) for i, (s, p) in enumerate(zip(shapes, places, strict=True))]
        self.by_name = {u.shape.name: u for u in self.units}
        self.clock = clock = Clock()
        self.compute, self.disk, self.cores = Stream(clock), Stream(clock), Stream(clock)
        self.down, self.update = Worker(clock), Worker(clock)
        self.link_up = Stream(clock)
        self.up, self.returns = Worker(clock, self.link_up), Worker(clock, self.link_up)
        self.input_lane = Worker(clock)
        self.newest: Done | None = None
        self.inputs: dict[int, Done] = {}
        """By unit, when the input of its block can be had in backward."""
        capacity = slot_counts(shapes, places, work.buckets)
        self.rings = {size: [_Slot() for _ in range(count)] for size, count in capacity.items()}
        self.slot_of: dict[str, _Slot] = {}
        self.in_use: set[str] = set()
        self.updated: dict[str, Done] = {}
        self.owed: list[Done] = []
        """What the issuing thread must still wait for."""
        self.backward = self.beside_update = False
        listed = [SimpleNamespace(name=u.shape.name, shape=u.shape, placement=u.place) for u in self.units]
        self.prefetcher = Prefetcher(self, listed, capacity, work.buckets.prefetch_units)
        self.idle = {
            size: deque([Done(enqueued=True)] * count) for size, count in gradient_slot_counts(shapes, places).items()
        }
        self.staging: list[list[Signal]] = [[] for _ in range(UPDATE_RING)]
        """By slot of the update's ring: the writes that it waits for."""
        self.reader: list[Signal] = [Signal(happened=True)] * UPDATE_RING
        self.ends: list[float] = []
        # The model's definitions of contention.
        rates = work.rates
        streaming, returning, updating = (n > 0 for n in (counts.parameters, counts.gradients, counts.state))
        self.up_backward = 1 / rates.duplex_share if returning else 1.0
        self.up_update = 1 / rates.links_beside_update if updating else 1.0
        self.down_backward = 1 / rates.duplex_share if streaming else 1.0
        self.update_factor = rates.cpu_update_beside_links if streaming else 1.0
        hooked = float(streaming or any(work.input_bytes))
        self.by_unit = work.by_unit + hooked * work.hooks_by_unit
        self.rest = work.passes.rest + hooked * work.hooks_of_rest

    def train(self, steps: int) -> Simulated:
        self.clock.start(self._loop(steps))
        self.clock.run()
        assert len(self.ends) == steps, "the threads wait for each other"
        lanes = {
            "compute": self.compute,
            "host_to_device": self.link_up,
            "device_to_host": self.down.stream,
            "inputs": self.input_lane.stream,
            "nvme": self.disk,
            "cpu_update": self.cores,
        }
        return Simulated(self.ends[-1] - self.ends[-2], tuple(self.ends), {n: s.spans for n, s in lanes.items()})

    # The training loop, on the thread that issues

    def _loop(self, steps: int) -> Process:
        for _ in range(steps):
            for micro_batch in range(self.work.micro_batches):
                yield from self._forward(beside_update=micro_batch == 0)
                last = micro_batch == self.work.micro_batches - 1
                yield from self._backward(first=micro_batch == 0, last=last)
            yield from self._step()
            yield self.compute.last  # the loop reads its loss
            self.ends.append(self.clock.now)

    def _forward(self, beside_update: bool) -> Process:
        self.backward, self.beside_update = False, beside_update
        self.prefetcher.begin_pass()
        if "" in self.by_name:
            yield from self._use("")
        for u in self._named():
            yield from self._begin_use(u.shape.name)
            yield from self._send_input(u)
            yield from self._issue(self.by_unit[u.index], FORWARD, FORWARD_ISSUE, f"{u.label} forward")
            self.in_use.discard(u.shape.name)
        yield from self._issue(self.rest, FORWARD, FORWARD_ISSUE, "rest forward")

    def _backward(self, first: bool, last: bool) -> Process:
        self.backward = True
        if "" in self.by_name:
            yield from self._use("")
        yield from self._issue(self.rest, BACKWARD, BACKWARD_ISSUE, "rest backward")
        root = self.by_name.get("")
        for i, u in enumerate(reversed(self._named())):
            yield from self._begin_use(u.shape.name)
            yield from self._have_input(u)
            row, share = self.by_unit[u.index], self.first_gradient
            yield from self._issue(row * share, BACKWARD, BACKWARD_ISSUE, f"{u.label} backward")
            yield from self._target(u, first)
            if i == 0 and root is not None:  # a norm behind the blocks, or the head that shares its weight
                yield from self._target(root, first)
            yield from self._issue(row * (1 - share), BACKWARD, BACKWARD_ISSUE, f"{u.label} backward")
            self._land(u)
            self.in_use.discard(u.shape.name)
        if root is not None:
            if not self._named():
                yield from self._target(root, first)
            self._land(root)
        self.in_use.clear()
        self.prefetcher.end_pass(step_follows=last)
        yield from self._pay()

    def _step(self) -> Process:
        norm_known = self.compute.last
        begun = Done(self.compute.last, enqueued=True)
        changed = [u for u in self.units if u.place.optimizer is not Tier.GPU and u.shape.trainable_elements]
        if changed:
            self.update.submit(self._update(changed, norm_known, begun))
        self.compute.give(self.work.gpu_update_seconds, "update on the GPU")
        for u in changed:
            self.updated[u.shape.name] = u.promise = Done()
            if (slot := self.slot_of.get(u.shape.name)) is not None:
                self._vacate(slot)
        yield from self._pay()
        yield self.work.step_issue_seconds
        self.backward, self.beside_update = False, True
        self.prefetcher.prefetch_first()
        yield from self._pay()

    def _named(self) -> list[_Unit]:
        return [u for u in self.units if u.shape.name]

    def _issue(self, row: np.ndarray, kernels: int, issue: int, label: str) -> Process:
        issued = Signal()
        self.compute.give(float(row[kernels]), label, ends_after=issued)
        yield float(row[issue])
        self.clock.tell(issued)

    # Inputs of recomputed blocks

    def _send_input(self, unit: _Unit) -> Process:
        if not self.work.input_bytes[unit.index]:
            return
        if self.newest is not None:
            yield from self._wait(self.newest)
        factor = self.up_update if self.beside_update else 1.0
        seconds = self.work.input_bytes[unit.index] / self.work.down_rate * factor
        here = Done(self.compute.last, enqueued=True)
        self.newest = self.inputs[unit.index] = self.input_lane.copy(seconds, f"{unit.label} input", [here])

    def _have_input(self, unit: _Unit) -> Process:
        if unit.index not in self.inputs:
            return
        self.newest = None
        yield from self._wait(self.inputs.pop(unit.index))
        if self.inputs:
            before = max(self.inputs)
            seconds = self.work.input_bytes[before] / self.work.up_rate * self.up_backward
            here = Done(self.compute.last, enqueued=True)
            self.inputs[before] = self.input_lane.copy(seconds, f"{self.units[before].label} input", [here])

    # Weights

    def _begin_use(self, name: str) -> Process:
        yield from self._use(name)
        self.prefetcher.used(name)
        yield from self._pay()

    def _use(self, name: str) -> Process:
        unit = self.by_name[name]
        if unit.place.parameters is Tier.GPU:
            if (updated := self.updated.pop(name, None)) is not None:
                yield from self._wait(updated)
            return
        self.in_use.add(name)
        if name not in self.slot_of:
            idle = [s for s in self.rings[unit.shape.elements] if s.holds not in self.in_use]
            empty = [s for s in idle if s.holds is None]
            self._start(unit, (empty or idle)[0])
            yield from self._pay()
        slot = self.slot_of[name]
        if slot.arrived is not None:
            yield from self._wait(slot.arrived)
            slot.arrived = None

    def prefetch(self, fetch: Fetch) -> None:
        """The prefetcher wants a unit's weights."""
        if fetch.unit in self.slot_of:
            return
        unit = self.by_name[fetch.unit]
        slot = next((s for s in self.rings[unit.shape.elements] if s.holds is None), None)
        if fetch.evict in self.slot_of and fetch.evict not in self.in_use:
            slot = self.slot_of[fetch.evict]
        if slot is not None:
            self._start(unit, slot)

    def _wait(self, done: Done) -> Process:
        """The compute stream goes on behind it, this thread when it is enqueued."""
        yield from done.host
        if done.event is not None:
            self.compute.give(0.0, after=[done.event])

    def _pay(self) -> Process:
        while self.owed:
            yield from self._wait(self.owed.pop(0))

    def _vacate(self, slot: _Slot) -> None:
        if slot.arrived is not None:
            self.owed.append(slot.arrived)
        assert slot.holds is not None
        del self.slot_of[slot.holds]
        slot.holds = slot.arrived = None

    def _start(self, unit: _Unit, slot: _Slot) -> None:
        if slot.holds is not None:
            self._vacate(slot)
        slot.holds = unit.shape.name
        self.slot_of[unit.shape.name] = slot
        after = [Done(self.compute.last, enqueued=True)]
        if (updated := self.updated.pop(unit.shape.name, None)) is not None:
            after.append(updated)
        factor = self.up_backward if self.backward else self.up_update if self.beside_update else 1.0
        if unit.place.parameters is Tier.HOST:
            seconds = unit.shape.elements * self._weight_bytes / self.work.up_rate * factor
            slot.arrived = self.up.copy(seconds, unit.label, after)
        else:
            slot.arrived = self.up.submit(self._read_weights(unit, factor), after)

    def _read_weights(self, unit: _Unit, factor: float) -> Process:
        """Chunks through the reader's ring, on the thread of the lane."""
        waiting: deque[tuple[int, Signal, int]] = deque()
        spans = chunks(unit.shape.elements, self.work.buckets.update_elements)
        for i, (a, b) in enumerate(spans):
            if len(waiting) == UPDATE_RING:
                yield from self._land_weights(unit, factor, *waiting.popleft())
            place = i % UPDATE_RING
            yield self.reader[place]
            waiting.append((place, self._read(b - a, self._weight_bytes, f"{unit.label} read"), b - a))
        while waiting:
            yield from self._land_weights(unit, factor, *waiting.popleft())

    def _land_weights(self, unit: _Unit, factor: float, place: int, read: Signal, elements: int) -> Process:
        yield read
        seconds = elements * self._weight_bytes / self.work.up_rate * factor
        self.reader[place] = self.up.stream.give(seconds, unit.label)

    # Gradients

    def _target(self, unit: _Unit, first: bool) -> Process:
        """The unit's first gradient has come: have the buffer in which they gather."""
        if unit.place.gradients is Tier.GPU or not unit.shape.trainable_elements:
            return
        slot = self.idle[unit.shape.trainable_elements].popleft()
        if first:
            yield from self._wait(slot)
        else:
            assert unit.landed is not None
            seconds = self._gradient_bytes(unit) / self.work.up_rate * self.up_backward
            yield from self._wait(self.returns.copy(seconds, unit.label, [slot, unit.landed]))

    def _land(self, unit: _Unit) -> None:
        here = Done(self.compute.last, enqueued=True)
        unit.landed = here
        if unit.place.gradients is not Tier.GPU and unit.shape.trainable_elements:
            seconds = self._gradient_bytes(unit) / self.work.down_rate * self.down_backward
            unit.landed = self.down.copy(seconds, f"{unit.label} gradient", [here])
            self.idle[unit.shape.trainable_elements].append(unit.landed)

    # The update, on its thread

    def _update(self, units: Sequence[_Unit], norm_known: Signal, begun: Done) -> Process:
        for place in range(UPDATE_RING):
            yield from self._written(place)
        yield norm_known
        window: deque[_Staged] = deque()
        staged = 0
        for unit in units:
            for a, b in chunks(unit.shape.trainable_elements, self.work.buckets.update_elements):
                place = staged % UPDATE_RING
                yield from self._written(place)
                window.append(self._stage(unit, a, b, place))
                staged += 1
                if len(window) == UPDATE_RING - 1:
                    yield from self._apply(window.popleft(), begun)
        while window:
            yield from self._apply(window.popleft(), begun)

    def _written(self, place: int) -> Process:
        yield from self.staging[place]
        self.staging[place] = []

    def _stage(self, unit: _Unit, start: int, stop: int, place: int) -> _Staged:
        assert unit.landed is not None
        gradients = unit.landed
        if unit.place.gradients is Tier.GPU:
            seconds = (stop - start) * self._weight_bytes / self.work.down_rate
            gradients = self.down.copy(seconds, f"{unit.label} gradient", [unit.landed])
        reads = [
            self._read(stop - start, size, f"{unit.label} {what} read")
            for tier, size, what in self._kept(unit.place)
            if tier is Tier.NVME
        ]
        return _Staged(unit, stop - start, stop, place, reads, gradients)

    def _apply(self, chunk: _Staged, begun: Done) -> Process:
        unit, place = chunk.unit, chunk.unit.place
        yield from chunk.reads
        yield from chunk.gradients.host
        if chunk.gradients.event is not None:
            yield chunk.gradients.event
        alone = chunk.unit.place.optimizer is Tier.NVME
        each = self.work.nvme_update_seconds if alone else self.work.host_update_seconds
        seconds = chunk.elements * each * self.update_factor
        yield self.cores.give(seconds, f"{unit.label} update")
        writes = self.staging[chunk.ring]
        for tier, size, what in self._kept(place):
            if tier is Tier.NVME:
                writes.append(self._write(chunk.elements, size, f"{unit.label} {what} written"))
        if chunk.stop == unit.shape.trainable_elements:
            self._keep_promise(unit, begun)

    def _keep_promise(self, unit: _Unit, begun: Done) -> None:
        promise = unit.promise
        if mirrored(unit.place):
            seconds = self._gradient_bytes(unit) / self.work.up_rate * self.up_update
            copied = self.returns.copy(seconds, unit.label, [begun])
            self.clock.start(self._follow(promise, copied))
            return
        if unit.place.parameters is Tier.NVME:
            promise.parts = [ticket for tickets in self.staging for ticket in tickets]
        self.clock.tell(promise.enqueued)

    def _follow(self, promise: Done, other: Done) -> Process:
        yield other.enqueued
        promise.event = other.event
        self.clock.tell(promise.enqueued)

    # Bytes

    def _kept(self, place: Placement) -> list[tuple[Tier, int, str]]:
        return [(place.optimizer, self._state_bytes, "state"), (place.parameters, self._weight_bytes, "weights")]

    def _gradient_bytes(self, unit: _Unit) -> int:
        return unit.shape.trainable_elements * self._weight_bytes

    def _read(self, elements: int, element_bytes: int, label: str) -> Signal:
        return self.disk.give(aligned(elements * element_bytes, BLOCK_BYTES) / self.work.read_rate, label)

    def _write(self, elements: int, element_bytes: int, label: str) -> Signal:
        return self.disk.give(aligned(elements * element_bytes, BLOCK_BYTES) / self.work.write_rate, label)
