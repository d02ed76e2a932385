"""The update of state on the host, by the engine's own lane and updater, alone and beside what a step does meanwhile.

What a step does meanwhile: the main thread, its own team shrunk as the engine shrinks it, issues kernels that keep the
GPU busy, and both directions of the link are copying.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from memplan.calibrate.compute import block_step, team_of
from memplan.calibrate.parts import MIB, Part, gigabytes, nanoseconds
from memplan.calibrate.streamed import StreamedUpdate
from offload.arithmetic import HOWS
from offload.plan import Buckets, OptimizerKind, Placement, Precision, StateFormat, Tier
from offload.residency import chunks, state_bytes
from offload.setup import FEEDING_CORES, update_threads
from offload.state import UnitState, carve_state, weight_dtype
from offload.streams import Done, Lane
from offload.unit import partition
from offload.unit_update import ClipFactor, Segment, UnitUpdate
from offload.updater import Updater

PIECE_BYTES = 32 * MIB
"""Weights and gradients travel in pieces of about this size."""
ON_THEIR_WAY = 2
"""Updates, and pieces of one direction, that are asked for ahead, so that their lane never waits."""
FED = 4096, 1024
"""Tokens and width of the block whose kernels keep the GPU busy."""
FED_AHEAD = 8
"""Passes through it that may wait in the GPU's queue."""
HOW = HOWS[OptimizerKind.ADAMW]


class Regions(NamedTuple):
    """Pieces of the arena, uint8."""

    state: torch.Tensor
    """Weights, gradients and state of what the CPU updates."""
    links: torch.Tensor
    """What is copied: to the device in its first half, to the host in its second."""

    @property
    def up(self) -> torch.Tensor:
        """What is copied to the device."""
        return self.links[: len(self.links) // 2]

    @property
    def down(self) -> torch.Tensor:
        """Where the device's bytes go, as large."""
        return self.links[len(self.links) // 2 :]


def host_bytes(elements: int, precision: Precision) -> int:
    """Of weights, gradients and state."""
    return 2 * elements * precision.weight_bytes + state_bytes(elements, StateFormat(precision))


class Beside(NamedTuple):
    """What happened while updates went on."""

    update_seconds: float
    count_per_second: float


class HostUpdate:
    """One unit with everything on the host, and the lanes of an engine."""

    def __init__(self, elements: int, precision: Precision, raw: torch.Tensor, device: torch.device) -> None:
        self.elements = elements
        self._device = device
        self.up, self.down = Lane("up", device), Lane("down", device)
        self._lane = Lane("update", device, update_threads(device))
        self._updater = Updater(
            StateFormat(precision), self._lane, self.down, self.up, None, [raw[:0]] * 3, None, device
        )
        self._state = _unit_on_host(elements, precision, raw)

    def begin(self) -> Done:
        """Start one update; what is returned is settled when it is over."""
        update = UnitUpdate(self._state, (Segment(0, self.elements, HOW),), Done.now(self._device))
        clip = ClipFactor(torch.ones((), device=self._device), 0.5)
        self._updater.begin([update], clip)
        return update.promise

    def close(self) -> None:
        """End the threads."""
        for lane in (self._lane, self.down, self.up):
            lane.close()


def _unit_on_host(elements: int, precision: Precision, raw: torch.Tensor) -> UnitState:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.empty(elements, device="meta")))
    (unit,) = partition(module, [Placement("", Tier.HOST, Tier.HOST, Tier.HOST)])
    spans, dtype = chunks(elements, Buckets().update_elements), weight_dtype(precision)
    one = elements * dtype.itemsize
    weights, gradients = raw[:one].view(dtype), raw[one : 2 * one].view(dtype)
    raw.zero_()
    gradients.fill_(1e-2)
    state = carve_state(raw[2 * one : host_bytes(elements, precision)], elements, StateFormat(precision))
    return UnitState(unit, spans, spans, host_weights=weights, host_gradients=gradients, host_state=state)


@dataclass(eq=False)
class Stream:
    """Copies through one lane, piece after piece of a buffer and again."""

    lane: Lane
    target: torch.Tensor
    source: torch.Tensor
    _arrived_bytes: int = 0
    _next: int = 0
    _waiting: deque[Done] = field(default_factory=deque)

    def pump(self) -> None:
        """Send the next piece; wait for one where enough are on their way."""
        size = min(PIECE_BYTES, len(self.source))
        start = self._next % (len(self.source) // size) * size
        self._next += 1
        part = slice(start, start + size)
        self._waiting.append(self.lane.copy(self.target[part], self.source[part]))
        if len(self._waiting) > ON_THEIR_WAY:
            self._waiting.popleft().synchronize()
            self._arrived_bytes += size

    def moved_bytes(self) -> int:
        """Of the pieces that have arrived."""
        return self._arrived_bytes


Pump = Callable[[], object]


def timed(begin: Callable[[], Done], pumps: Sequence[Pump], count: Callable[[], int], seconds: float) -> Beside:
    """Updates one after the other for ``seconds``, after a first one; the pumps are called in turn meanwhile."""
    waiting = deque(begin() for _ in range(ON_THEIR_WAY))
    marks: list[tuple[float, int]] = []
    while waiting:
        while pumps and not waiting[0].settled:
            for pump in pumps:
                pump()
        waiting.popleft().synchronize()
        marks.append((time.perf_counter(), count()))
        if marks[-1][0] - marks[0][0] < seconds:
            waiting.append(begin())
    took = marks[-1][0] - marks[0][0]
    return Beside(took / (len(marks) - 1), (marks[-1][1] - marks[0][1]) / took)


def pumped(pumps: Sequence[Pump], count: Callable[[], int], seconds: float) -> float:
    """What ``count`` grows by in a second while nothing is updated."""
    begun, warm = time.perf_counter(), 0
    start = begun
    while (now := time.perf_counter()) - begun < seconds:
        for pump in pumps:
            pump()
        if now - begun < seconds / 8:
            start, warm = time.perf_counter(), count()
    return (count() - warm) / (time.perf_counter() - start)


def host_update(regions: Regions, device: torch.device, elements: int, seconds: float) -> Part:
    """The update on the host: alone, beside a feeding thread, and beside streams both ways too; what the link keeps.

    On a GPU ``cpu_update_beside_links`` is that of bf16. Where the CPU computes, the lane has one thread and leaves the
    other cores to the model, so that an element takes its share of all cores.
    """
    rows: list[tuple[str, ...]] = [("update of an element", "alone", "while a GPU is fed", "and both directions copy")]
    alone: dict[Precision, float] = {}
    rates: dict[str, object] = {"cpu_update_beside_links": 1.0, "links_beside_update": 1.0}
    for precision in (Precision.FP32, Precision.BF16):
        with _engine(elements, precision, regions.state, device) as update:
            one = timed(update.begin, [], int, seconds).update_seconds / elements
            alone[precision] = one if device.type != "cpu" else one / torch.get_num_threads()
            if device.type == "cpu":
                rows.append((precision.value, nanoseconds(alone[precision]), "-", "-"))
                continue
            feed = block_step(*FED, device.type, torch.bfloat16)
            up, down = _streams(update, regions, device)
            fed = timed(update.begin, [feed, _breath(device)], int, seconds).update_seconds / elements
            pumps = [up.pump, down.pump, feed, _breath(device)]
            beside = timed(update.begin, pumps, up.moved_bytes, seconds)
            link = pumped(pumps, up.moved_bytes, seconds)
            slower = beside.update_seconds / elements
            rates["cpu_update_beside_links"] = max(1.0, slower / one)
            rates["links_beside_update"] = min(1.0, beside.count_per_second / link)
            what = f"{nanoseconds(slower)}, to the device {gigabytes(beside.count_per_second)} of {gigabytes(link)}"
            rows.append((precision.value, nanoseconds(one), nanoseconds(fed), what))
    alone[Precision.AMP] = alone[Precision.FP32]
    return Part({**rates, "cpu_update_seconds": alone}, {"update on the host": tuple(rows)})


def both_updates(regions: Regions, device: torch.device, elements: int, seconds: float) -> Part:
    """State on the host that the GPU updates, streaming it both ways: alone, and while the CPU updates other state."""
    rows: list[tuple[str, ...]] = [("update of an element", "by the GPU alone", "beside the CPU", "the CPU beside it")]
    alone: dict[Precision, float] = {}
    rates: dict[str, object] = {}
    for precision in (Precision.FP32, Precision.BF16):
        with _engine(elements, precision, regions.state, device) as update:
            streamed = StreamedUpdate(regions.links, precision, device)
            cpu = timed(update.begin, [], int, seconds).update_seconds
            alone[precision] = 1 / pumped([streamed.pump], streamed.updated_elements, seconds)
            beside = timed(update.begin, [streamed.pump], streamed.updated_elements, seconds)
            streamed.finish()
        gpu_beside = 1 / max(beside.count_per_second, 1.0)
        rates["cpu_update_beside_streamed"] = max(1.0, beside.update_seconds / cpu)
        rates["streamed_update_beside_cpu"] = max(1.0, gpu_beside / alone[precision])
        cells = (alone[precision], gpu_beside, beside.update_seconds / elements)
        rows.append((precision.value, *map(nanoseconds, cells)))
    alone[Precision.AMP] = alone[Precision.FP32]
    return Part({**rates, "streamed_update_seconds": alone}, {"update streamed through the GPU": tuple(rows)})


@contextmanager
def _engine(elements: int, precision: Precision, raw: torch.Tensor, device: torch.device) -> Iterator[HostUpdate]:
    """An update under the conditions of an engine: beside a GPU, this thread's team is small."""
    threads = torch.get_num_threads()
    with team_of(threads if device.type == "cpu" else min(FEEDING_CORES, threads)):
        update = HostUpdate(elements, precision, raw, device)
        try:
            yield update
        finally:
            update.close()


def _streams(update: HostUpdate, regions: Regions, device: torch.device) -> tuple[Stream, Stream]:
    there = [torch.zeros(len(region), dtype=torch.uint8, device=device) for region in (regions.up, regions.down)]
    return Stream(update.up, there[0], regions.up), Stream(update.down, regions.down, there[1])


def _breath(device: torch.device) -> Pump:
    """Waits until the GPU has done what it was given some calls ago, as a training loop can not run ahead for ever."""
    events: deque[Done] = deque()

    def pump() -> None:
        events.append(Done.now(device))
        if len(events) > FED_AHEAD:
            events.popleft().synchronize()

    return pump
