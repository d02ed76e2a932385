"""Weights on their way: fetched into device slots before a unit computes, bound to its parameters, let go after.

[Note: parameters that are away]
A parameter that is away keeps its shape, type and device: it is one NaN, expanded. Writing to it raises, and reading
it can never pass for a number. The same holds for weights that stay on the device while an update of them is under way
elsewhere: from the step to the unit's next use nobody can wait for what is there. During the first pass every operation
is watched for such a read (``AwayGuard``), so that a model which uses a parameter outside of its module is refused with
that parameter's name.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from offload.away_guard import AwayGuard
from offload.dtensors import show
from offload.errors import TierError
from offload.residency import UPDATE_RING
from offload.schedule import Fetch
from offload.slots import Slot, SlotRings
from offload.state import UnitState
from offload.store import Store, Ticket
from offload.streams import Done, Lane
from offload.unit import Field


class WeightReference(NamedTuple):
    """What autograd keeps in the place of a weight, or of a view of one, that may be away when backward needs it."""

    unit: str
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    conjugate: bool
    negative: bool


def send_away(state: UnitState, nan: torch.Tensor) -> None:
    """Leave a unit's parameters with nothing but their shape; ``nan`` is a scalar of their type and device."""
    for field in state.unit.fields:
        show(field.parameter, nan.expand(field.shape))


class WeightMover:
    """Fetches and releases the weights of units; the only one who changes what a parameter's data is."""

    def __init__(
        self,
        states: Sequence[UnitState],
        rings: SlotRings,
        lane: Lane,
        gathers: Lane | None,
        store: Store | None,
        reader_ring: Sequence[torch.Tensor],
        nan: torch.Tensor,
    ) -> None:
        """``gathers`` is the lane that brings the ranks' parts together, where units are divided."""
        self._gathers = gathers
        self._states = {s.unit.name: s for s in states}
        self._staying = {s.unit.name for s in states if s.on_device}
        self._rings = rings
        self._lane = lane
        self._store = store
        self._reader_ring = [(buffer, Done()) for buffer in reader_ring]
        for _, idle in self._reader_ring:
            idle.finish(None)
        self._slot_of: dict[str, Slot] = {}
        self._slot_at: dict[int, Slot] = {}
        """Slots by the address of their buffer."""
        self._bound: set[str] = set()
        """Units whose parameters are what lies in a slot, or on the device for good."""
        self._in_use: set[str] = set()
        self._updated: dict[str, Done] = {}
        # [Note: parameters that are away]
        self._nan = nan
        self._nothing = {s.unit.name: [nan.expand(f.shape) for f in s.unit.fields] for s in states}
        """What a unit's parameters are while it is away."""
        self._views: dict[tuple[str, int], list[torch.Tensor]] = {}
        """A unit's parameters in the buffer at an address: making them anew for every use takes time."""
        self._resident = {
            s.device_weights.data_ptr(): s for s in states if s.device_weights is not None and s.on_device
        }
        self._used: set[str] = set()
        """Units used since the last ``begin_pass``."""
        self._lent: set[str] = set()
        """Units whose parameters are copies of their own."""
        for state in states:
            self._show(state)

    @property
    def overflow_count(self) -> int:
        """Slots made beyond the plan so far."""
        return self._rings.overflow_count

    def begin_pass(self) -> None:
        """A forward pass begins."""
        self._used.clear()

    @property
    def streams(self) -> bool:
        """Whether the weights of any unit come and go."""
        return len(self._staying) < len(self._states)

    def stays(self, name: str) -> bool:
        """Whether the unit's weights never leave the device."""
        return name in self._staying

    def use(self, name: str) -> None:
        """The unit is about to compute: its weights are there when this returns, and stay until ``unuse``."""
        if name in self._in_use:
            return
        self._used.add(name)
        if name in self._lent:
            return
        if name in self._staying:
            if (updated := self._updated.pop(name, None)) is not None:
                updated.wait()
                self._show(self._states[name])
            return
        state = self._states[name]
        if name not in self._slot_of:
            self._start(state, self._free_slot(state) or self._rings.grow(state))
        slot = self._slot_of[name]
        if slot.arrived is not None:
            slot.arrived.wait()
            slot.arrived = None
        if name not in self._bound:
            self._bind(state, slot.buffer)
        self._in_use.add(name)

    def unuse(self, name: str) -> None:
        """The unit has computed: its slot may be taken by another."""
        self._in_use.discard(name)

    def unuse_all(self) -> None:
        """Nothing computes: the step's passes are over."""
        self._in_use.clear()
        self._nan.fill_(torch.nan)  # filling a parameter that is away, by its data say, fills this one

    def prefetch(self, fetch: Fetch) -> None:
        """Start a fetch of the schedule, if what it wants to displace is not in use."""
        state = self._states[fetch.unit]
        if fetch.unit in self._slot_of or fetch.unit in self._lent:
            return
        if fetch.evict in self._slot_of and fetch.evict not in self._in_use:
            slot: Slot | None = self._slot_of[fetch.evict]
        else:
            slot = self._empty_slot(state)
        if slot is not None:
            self._start(state, slot)

    def guard(self) -> AwayGuard:
        """A context in which operations on parameters that are away raise."""
        fields = [f for s in self._states.values() for f in s.unit.fields]
        return AwayGuard(
            self._nan,
            lambda shape: [f.name for f in fields if f.shape == shape],
            stale=self._is_stale,
            held=lambda address: address in self._slot_at or self._is_mirrored(address),
        )

    def _is_mirrored(self, address: int) -> bool:
        state = self._resident.get(address)
        return state is not None and state.host_weights is not None

    def _is_stale(self, address: int) -> bool:
        state = self._resident.get(address)
        if state is None or state.unit.name in self._used:
            return False
        gathered = state.ranks is not None and state.shards.zero_stage > 0 and state.unit.shape.trainable_elements > 0
        return gathered or self._is_mirrored(address)

    def in_flight(self) -> list[str]:
        """Units whose weights are on their way."""
        return [n for n, s in self._slot_of.items() if s.arrived is not None and not s.arrived.settled]

    def will_change(self, name: str, updated: Done) -> None:
        """The unit's weights are being updated: what is on the device is stale, what is fetched comes after."""
        self._updated[name] = updated
        if name in self._staying:
            self._unbind(self._states[name])
        else:
            self.forget(name)

    def forget(self, name: str) -> None:
        """What is on the device of this unit is stale: fetch it again before its next use."""
        if (slot := self._slot_of.get(name)) is not None:
            self._vacate(slot)

    def lend(self, name: str, flat: torch.Tensor) -> None:
        """Bind the unit's parameters to a copy of its weights, and leave them alone until ``take_back``."""
        self.forget(name)
        self._lent.add(name)
        for field in self._states[name].unit.fields:
            show(field.parameter, field.view(flat))

    def take_back(self, name: str) -> None:
        """Bind the unit's parameters to what the tiers hold."""
        self._lent.discard(name)
        self._show(self._states[name])

    def begin_anew(self) -> None:
        """A pass was cut short, and all lanes have settled: no slot holds anything, units are what tiers hold.

        What an interrupted fetch left of a unit may be anything, and so may be who waits for which update.
        """
        self._slot_of.clear()
        for ring in self._rings.rings.values():
            for slot in ring:
                slot.holds = slot.arrived = None
        self._in_use.clear()
        self._updated.clear()
        self._nan.fill_(torch.nan)
        for name, state in self._states.items():
            if name not in self._lent:
                self._show(state)

    def restore(self, name: str) -> None:
        """Make the unit what its tiers hold, whatever was done to its parameters; no update may be under way."""
        self._nan.fill_(torch.nan)
        state = self._states[name]
        if state.on_device and state.device_weights is not None and state.host_weights is not None:
            state.device_weights[state.updated].copy_(state.host_weights)
        self._show(state)

    def _show(self, state: UnitState) -> None:
        self.forget(state.unit.name)
        if state.on_device and state.device_weights is not None:
            self._bind(state, state.device_weights)
        else:
            self._unbind(state)

    def address(self, name: str) -> Callable[[Field], int]:
        """Where the data of the unit's parameters lies now."""
        if name not in self._bound:
            away = self._nan.data_ptr()
            return lambda _: away
        state = self._states[name]
        flat = state.device_weights if state.on_device else self._slot_of[name].buffer
        assert flat is not None
        start, size = flat.data_ptr(), flat.itemsize
        return lambda field: start + field.start * size

    def settle(self) -> None:
        """Wait for all updates that weights may still be under; those that stay on the device can be read then."""
        for name, updated in list(self._updated.items()):
            updated.synchronize()
            if name in self._staying and name not in self._lent:
                self._show(self._states[name])

    def is_resident(self, address: int) -> bool:
        """Whether weights that never leave the device lie there."""
        return address in self._resident

    def reference(self, tensor: torch.Tensor, address: int) -> WeightReference | None:
        """How to find this tensor again, if its memory at ``address`` is a slot that may be taken before backward."""
        slot = self._slot_at.get(address)
        if slot is None or slot.holds is None:
            return None
        name = slot.holds.unit.name
        place = (int(tensor.storage_offset()), tensor.shape, tensor.stride())
        return WeightReference(name, *place, tensor.dtype, tensor.is_conj(), tensor.is_neg())

    def resolve(self, reference: WeightReference) -> torch.Tensor:
        """The tensor of a reference; its unit must be in use."""
        buffer = self._slot_of[reference.unit].buffer.view(reference.dtype)
        tensor = buffer.as_strided(reference.size, reference.stride, reference.offset)
        tensor = tensor.conj() if reference.conjugate else tensor
        return torch._neg_view(tensor) if reference.negative else tensor

    def _empty_slot(self, state: UnitState) -> Slot | None:
        return next((s for s in self._rings.ring(state) if s.holds is None), None)

    def _free_slot(self, state: UnitState) -> Slot | None:
        """An empty slot, or else one whose unit is not in use."""
        idle = (s for s in self._rings.ring(state) if s.holds is None or s.holds.unit.name not in self._in_use)
        return self._empty_slot(state) or next(idle, None)

    def _vacate(self, slot: Slot) -> None:
        assert slot.holds is not None
        name = slot.holds.unit.name
        if slot.arrived is not None:
            # Whatever comes next is ordered behind it on the same lane. Only its failure must not be lost, but for that
            # of a read: whoever needs the weights reads them again.
            with suppress(TierError):
                slot.arrived.wait()
        self._unbind(slot.holds)
        self._in_use.discard(name)
        del self._slot_of[name]
        slot.holds = slot.arrived = None

    def _start(self, state: UnitState, slot: Slot) -> None:
        if slot.holds is not None:
            self._vacate(slot)
        name = state.unit.name
        slot.holds = state
        self._slot_of[name] = self._slot_at[slot.buffer.data_ptr()] = slot
        # [Note: slot lifetime]: behind everything that may still read the slot, and behind the unit's own update.
        after = [Done.now(slot.buffer.device)]
        if (updated := self._updated.pop(name, None)) is not None:
            after.append(updated)
        kept = state.device_weights if state.device_weights is not None else state.host_weights
        if kept is not None:
            slot.arrived = self._lane.submit(lambda: self._copy(state, slot.buffer, kept), after)
        else:
            slot.arrived = self._lane.submit(lambda: self._read(state, slot.buffer), after)
        if not state.shards.whole_weights(state.unit.placement.parameters):
            slot.arrived = self._gather(state, slot.buffer, slot.arrived)

    def gather_updated(self, name: str, updated: Done) -> Done:
        """After an update of its part on every rank: bring together a unit whose weights are whole on the device."""
        state = self._states[name]
        assert state.device_weights is not None
        return self._gather(state, state.device_weights, updated)

    def _gather(self, state: UnitState, flat: torch.Tensor, after: Done) -> Done:
        ranks, trainable, gathers = state.ranks, state.unit.shape.trainable_elements, self._gathers
        assert ranks is not None
        assert gathers is not None
        trained, frozen = flat[:trainable], flat[trainable:]
        whole = [trained] if state.on_device else [trained, frozen]  # frozen ones stay as they are

        def gather() -> None:
            for part in whole:
                ranks.gather(part, state.unit.name)

        ranks.submitted("gather", state.unit.name)
        return gathers.submit(gather, after=[after])

    def _copy(self, state: UnitState, target: torch.Tensor, kept: torch.Tensor) -> None:
        """Weights from where this rank keeps them. On the lane."""
        start = 0
        for place in state.places(target, 0, len(kept)):
            place.copy_(kept[start : start + len(place)], non_blocking=True)
            start += len(place)
        if state.device_weights is None:
            self._lane.bytes_moved += kept.nbytes

    def _read(self, state: UnitState, target: torch.Tensor) -> None:
        """Weights from the NVMe tier through the reader's ring: reads run ahead of the copies. On the lane."""
        assert self._store is not None
        assert state.weight_extents is not None
        waiting: deque[tuple[int, list[torch.Tensor]]] = deque()
        tickets: dict[int, Ticket] = {}
        try:
            for i, (span, extent) in enumerate(zip(state.weight_spans, state.weight_extents, strict=True)):
                place = i % UPDATE_RING
                if len(waiting) == UPDATE_RING:
                    self._land(*waiting.popleft(), tickets)
                buffer, idle = self._reader_ring[place]
                idle.synchronize()
                tickets[place] = self._store.read(extent, buffer[: extent.size_bytes])
                waiting.append((place, state.places(target, *span)))
            while waiting:
                self._land(*waiting.popleft(), tickets)
        except BaseException:
            for ticket in tickets.values():
                ticket.exception()  # what is still being read must not land where the next one reads to
            raise

    def _land(self, place: int, parts: list[torch.Tensor], tickets: dict[int, Ticket]) -> None:
        tickets[place].result()
        buffer, _ = self._reader_ring[place]
        start = 0
        for part in parts:
            part.copy_(buffer[start : start + part.nbytes].view(part.dtype), non_blocking=True)
            start += part.nbytes
        self._lane.bytes_moved += start
        self._reader_ring[place] = (buffer, Done.now(parts[0].device))

    def _bind(self, state: UnitState, flat: torch.Tensor) -> None:
        key = state.unit.name, flat.data_ptr()
        if key not in self._views:
            self._views[key] = [field.view(flat) for field in state.unit.fields]
        _show_as(state, self._views[key])
        self._bound.add(state.unit.name)

    def _unbind(self, state: UnitState) -> None:
        self._bound.discard(state.unit.name)
        _show_as(state, self._nothing[state.unit.name])


def _show_as(state: UnitState, tensors: Iterable[torch.Tensor]) -> None:
    for field, tensor in zip(state.unit.fields, tensors, strict=True):
        show(field.parameter, tensor)
