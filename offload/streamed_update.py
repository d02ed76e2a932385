"""The update on the device of state that lives on the host: it comes, is updated, and leaves, piece by piece.

[Note: streamed update]
A piece comes to a slot, is updated there and leaves, each on a stream of its own, so both directions of the link and
the device work at once. Three slots are for pieces that come when there is room. The others hold the pieces that a
step begins with: their state comes while the backward pass before still runs, when the links have little else to do,
and the gradients of these pieces never leave the device (``kept``). So their update takes what the device's memory
needs for it, and not what the link does; and forward uses these units first. Weights leave before state does, for
somebody waits for them.

[Note: elements that change hands]
State is on its way home when its unit's promise is kept. Where the share stays as it is, nobody reads it there before
the device's next piece of the same elements. One that has a slot of its own comes to it behind itself; one that comes
when there is room may come to another slot, so first its unit must be home. When the share moves, elements pass from
one slot to another, or to the host: then all that is on its way must be home before either of them touches any.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from offload.allotment import Allotment, Piece, Reach, allot
from offload.arithmetic import device_update
from offload.masters import over_masters
from offload.plan import Buckets, Plan, StateFormat
from offload.residency import UPDATE_RING, streamed_bytes, streamed_slot_bytes
from offload.split import Took, UpdateSplit
from offload.state import UnitState, carve_state, weight_dtype
from offload.streams import Done, Lane
from offload.unit_update import ClipFactor, UnitUpdate, shared
from offload.visits import Clock, Explain, Kept, Slot, Visit, be_patient


class StreamedUpdate:
    """Updates on the device, unit by unit in the order of the ``states``."""

    @classmethod
    def of(
        cls,
        plan: Plan,
        states: Sequence[UnitState],
        device: torch.device,
        lane: Callable[[str, int], Lane],
        *,
        in_backward: bool,
    ) -> "StreamedUpdate | None":
        """The one of a plan; ``None`` where the device has no share. ``lane`` makes one by name and CPU threads."""
        form, share = plan.state_format, plan.gpu_update_share
        if not streamed_bytes([s.unit.placement for s in states], plan.buckets, form, share):
            return None
        home, leaving, coming = (lane(name, 1) for name in ("home", "leaving", "streamed"))  # closed in reverse
        parts = [state.part() for state in states]
        return cls(form, plan.buckets, share, parts, device, coming, home, leaving, in_backward=in_backward)

    def __init__(
        self,
        form: StateFormat,
        buckets: Buckets,
        device_share: float,
        states: Iterable[UnitState],
        device: torch.device,
        lane: Lane,
        home: Lane,
        leaving: Lane,
        *,
        in_backward: bool = False,
    ) -> None:
        """State comes on ``lane``'s stream, weights leave on that of ``home`` and state on that of ``leaving``.

        ``states`` are what this rank updates. ``in_backward``: all but the root unit are updated in backward.
        """
        reached = [s for s in states if s.host_state is not None and s.host_weights is not None]
        self._states = {s.unit.name: s for s in reached}
        self._reach = [Reach(s.unit.name, s.updated.stop - s.updated.start) for s in reached]
        self._late = [""] if in_backward else None
        self._split = UpdateSplit(device_share, learns=not in_backward)
        self._device, self._lane, self._home, self._leaving = device, lane, home, leaving
        self._elements, dtype = buckets.update_elements, weight_dtype(form.precision)
        self._update = over_masters(device_update(device, form))
        self._computing = torch.Stream(device) if device.type != "cpu" else None
        size, one = streamed_slot_bytes(self._elements, form), self._elements * dtype.itemsize
        raws = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(buckets.update_slots))
        self._slots = [
            Slot(
                r[:one].view(dtype),
                r[one : 2 * one].view(dtype),
                carve_state(r[2 * one :], self._elements, form),
                Done.now(device),
                Done.now(device),
            )
            for r in raws
        ]
        self._turn = 0
        """Of the slots for pieces that come when there is room."""
        self._allotment: Allotment | None = None
        self._last: Done | None = None
        self._let_pass: Done | None = None
        """Until the last weights have gone home their lane takes nothing else."""
        self._going_home: list[Done] = []
        """[Note: elements that change hands]"""
        self._left: dict[str, list[Done]] = {}
        """By unit, when its pieces without a slot of their own are home."""
        self._clock: Clock | None = None
        self.explain: Explain = lambda error, _: error

    @property
    def device_share(self) -> float:
        """Of the elements within its reach, those that the device updates."""
        return self._split.device_share

    @property
    def fetched_bytes(self) -> int:
        """To the device so far."""
        return self._lane.bytes_moved

    @property
    def sent_bytes(self) -> int:
        """From the device so far."""
        return self._home.bytes_moved + self._leaving.bytes_moved

    # Before the step

    def fetch_ahead(self, host: Took | None, after: Sequence[Done]) -> None:
        """The first backward pass before an update begins: let state come ahead that the updates ``after`` have left.

        ``host`` is what the host took for its part of the last step. Until the step, or until its gradients are
        forgotten, this is not called again: pieces stay what they are while gradients wait for them.
        """
        clock, self._clock = self._clock, None  # a step in which the device has no part must not be told of it again
        took = clock.read() if clock is not None else None
        if host is not None and took is not None and self._split.learn(host, took):
            self.deal_again()
        coming = []
        for name, piece in self._parts().ahead():
            slot = self._slots[piece.slot or 0]
            slot.arrived = Done()
            coming.append((self._states[name], piece, slot, slot.left, slot.arrived))
        if coming:
            first = [*after, *self._going_home]
            self._lane.submit(lambda: self._fetch_all(coming, first))

    def kept(self, name: str) -> list[Kept]:
        """Where the last sum of a unit's gradients stays on the device, for an update that ``fetch_ahead`` announced.

        Whoever asks puts them there, and says so in the update.
        """
        state = self._states.get(name)
        if state is None or state.device_gradients is not None:
            return []
        found = []
        for piece in self._parts().pieces.get(name, ()):
            if piece.slot is not None:
                slot = self._slots[piece.slot]
                found.append(Kept(_in_unit(state, piece), slot.gradients[: piece.elements], slot.updated))
        return found

    def deal_again(self) -> None:
        """The share has moved: [Note: elements that change hands]."""
        self._allotment = None
        self._going_home = [slot.left for slot in self._slots]

    def changed(self, name: str) -> None:
        """Somebody else wrote to the unit's numbers on the host: what came ahead is not true any more."""
        for piece in self._parts().pieces.get(name, ()):
            if piece.slot is not None:
                self._slots[piece.slot].arrived = None

    def _parts(self) -> Allotment:
        if self._allotment is None:
            self._allotment = allot(self._reach, self.device_share, self._elements, len(self._slots), self._late)
        return self._allotment

    def _fetch_all(self, coming: Sequence[tuple[UnitState, Piece, Slot, Done, Done]], after: Sequence[Done]) -> None:
        try:
            for earlier in after:
                earlier.wait()
            for state, piece, slot, left, arrived in coming:
                left.wait()
                self._fetch_state(state, piece, slot)
                arrived.follow(Done.now(self._device))
                be_patient(self._device)
        except BaseException as error:
            for *_, arrived in coming:
                if not arrived.told:
                    arrived.fail(error)
            raise

    # The step

    def shared(self, updates: Sequence[UnitUpdate]) -> tuple[list[UnitUpdate], list[UnitUpdate], list[Done]]:
        """The updates as the host's parts and the device's, and what must be over before the host begins."""
        return *shared(updates, self._parts().edges), self._going_home

    def begin(self, updates: Sequence[UnitUpdate], clip: ClipFactor, begun: Done, host: Done | None) -> None:
        """Start the device's parts; each promise is kept when the device has been told everything of it.

        ``host`` is the host's update beside it. What came ahead leaves when that is over: until then the host's memory
        has enough to do, and nobody waits for that state.
        """
        visits = []
        going_home, self._going_home = [*self._going_home], []
        for update in updates:
            name = update.state.unit.name
            going_home += self._left.pop(name, [])
            first, stop = update.segments[0].start, update.segments[-1].stop
            pieces = [p for p in self._parts().pieces[name] if p.start < stop and p.stop > first]
            for piece in pieces:
                slot = self._slot_of(piece)
                arrived, slot.arrived = slot.arrived, None
                has_gradients = update.kept and piece.slot is not None
                visit = Visit(update, piece, slot, slot.left, arrived, has_gradients, piece is pieces[-1])
                slot.updated, slot.left = visit.updated, visit.left
                visits.append(visit)
                if piece.slot is None:
                    self._left.setdefault(name, []).append(visit.left)
        self._last = self._lane.submit(lambda: self._run(visits, clip, begun, host, going_home))

    def _slot_of(self, piece: Piece) -> Slot:
        if piece.slot is not None:
            return self._slots[piece.slot]
        self._turn = (self._turn + 1) % UPDATE_RING
        return self._slots[-1 - self._turn]

    def check(self) -> None:
        """Raise what went wrong in the last step, if that is known."""
        for done in self.settled():
            done.check()

    def finish(self) -> None:
        """Wait until everything is back on the host; raises what went wrong."""
        for done in self.settled():
            done.synchronize()

    def begin_anew(self) -> None:
        """Work was cut short, and all lanes have settled: nothing is in the slots, or on its way."""
        for slot in self._slots:
            slot.updated = slot.left = Done.now(self._device)
            slot.arrived = None
        self._left.clear()
        self._going_home = []
        self._last = self._let_pass = self._clock = None

    def settled(self) -> list[Done]:
        """When everything that has begun is back on the host."""
        last = [done for done in (self._last, self._let_pass) if done is not None]
        return [*last, *(slot.left for slot in self._slots)]

    def _run(
        self, visits: Sequence[Visit], clip: ClipFactor, begun: Done, host: Done | None, first: Sequence[Done]
    ) -> None:
        unit: str | None = None
        try:
            for earlier in first:
                earlier.wait()
            if clip.skipped():
                for visit in visits:
                    visit.skip()
                return
            clock = self._clock = Clock(visits) if self._computing is not None and self._split.learns else None
            with _on(self._computing):
                if self._computing is not None:
                    clip.on_device.record_stream(self._computing)
                begun.wait()  # the clip factor, and what was computing with weights that never leave the device
                if clock is not None:
                    clock.start()
            for visit in visits:
                unit = visit.update.state.unit.name
                self._update_piece(visit, clip.on_device)
                self._keep_promise(visit)
                if visit.piece.slot is None:
                    self._let_go(visit, after=[visit.updated])
                be_patient(self._device)
            if clock is not None and visits:
                self._home.submit(clock.stop, after=[v.update.promise for v in visits if v.last])
            for visit in visits:
                if visit.piece.slot is not None:
                    self._let_go(visit, after=[visit.updated, *filter(None, [host])])
        except BaseException as error:  # noqa: BLE001 - raised below
            explained = self.explain(error, unit)
            for visit in reversed(visits):  # who hears of one finds that of the last one in each slot
                visit.fail(explained)
            raise explained from explained.__cause__

    def _update_piece(self, visit: Visit, clip: torch.Tensor) -> None:
        """Update one piece when it is there: have what did not come ahead come now."""
        state, piece, slot = visit.update.state, visit.piece, visit.slot
        part = slice(piece.start, piece.stop)
        gradients = slot.gradients[: piece.elements] if state.device_gradients is None else state.device_gradients[part]
        arrived, brings = visit.arrived, state.device_gradients is None and not visit.has_gradients
        if arrived is None or brings:
            visit.before.wait()
            if arrived is None:
                self._fetch_state(state, piece, slot)
            else:
                arrived.wait()
            if brings:
                assert state.host_gradients is not None
                visit.update.landed.wait()
                self._lane.move(gradients, state.host_gradients[part])
            arrived = Done.now(self._device)
        with _on(self._computing):
            arrived.wait()
            visit.update.landed.wait()
            for s in visit.update.within(piece.start, piece.stop).segments:
                a, b = s.start - piece.start, s.stop - piece.start
                self._update(visit.weights[a:b], gradients[a:b], slot.state.span(a, b), s.how, clip)
            visit.updated.follow(Done.now(self._device))

    def _keep_promise(self, visit: Visit) -> None:
        """Let new weights go to where they live; they can be had then, and those that live on the device at once."""
        visit.update.wait_copied()
        state, piece = visit.update.state, visit.piece
        if state.device_weights is None:
            assert state.host_weights is not None
            mirror = state.host_weights[piece.start : piece.stop]
            visit.home = self._home.copy(mirror, visit.weights, after=[visit.updated])
            self._let_pass = self._home.submit(lambda: be_patient(self._device))
        if visit.last:
            visit.update.promise.follow(visit.home)

    def _let_go(self, visit: Visit, after: Sequence[Done]) -> None:
        """Let state go, and the mirror of weights that live on the device."""
        state, piece = visit.update.state, visit.piece
        assert state.host_state is not None
        assert state.host_weights is not None
        there = state.host_state.span(piece.start, piece.stop).tensors()
        pairs = list(zip(there, visit.slot.state.span(0, piece.elements).tensors(), strict=True))
        if state.device_weights is not None:
            pairs.append((state.host_weights[piece.start : piece.stop], visit.weights))

        def leave() -> None:
            for target, source in pairs:
                self._leaving.move(target, source)
            be_patient(self._device)

        visit.left.follow_all([visit.home, self._leaving.submit(leave, after)])

    # Copies

    def _fetch_state(self, state: UnitState, piece: Piece, slot: Slot) -> None:
        assert state.host_state is not None
        assert state.host_weights is not None
        if state.device_weights is None:
            self._lane.move(slot.weights[: piece.elements], state.host_weights[piece.start : piece.stop])
        home, there = state.host_state.span(piece.start, piece.stop), slot.state.span(0, piece.elements)
        for target, source in zip(there.tensors(), home.tensors(), strict=True):
            self._lane.move(target, source)


def _in_unit(state: UnitState, piece: Piece) -> slice:
    """The piece in the buffer that gathers the whole unit's gradients."""
    return slice(state.updated.start + piece.start, state.updated.start + piece.stop)


def _on(stream: torch.Stream | None) -> AbstractContextManager[Any]:
    return stream if stream is not None else nullcontext()
