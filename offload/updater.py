"""The update, unit by unit in forward order, while the next forward pass already runs.

[Note: overlap of the update]
``begin`` returns at once. Each unit whose state is not on the device gets a promise, and whoever fetches its weights
comes after that promise; so the next forward pass starts with the first unit that is ready. State on NVMe streams
through a ring of staging slots: one chunk being read, one updated, one written back.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch

from offload.arithmetic import device_update, host_update
from offload.masters import over_masters, unless
from offload.plan import StateFormat
from offload.residency import BLOCK_BYTES, UPDATE_RING, aligned
from offload.split import Took
from offload.state import OptimizerState, carve_state
from offload.store import Extent, Store, Ticket
from offload.streamed_update import StreamedUpdate
from offload.streams import Done, Lane
from offload.unit_update import ClipFactor, UnitUpdate
from offload.visits import Explain, Kept


@dataclass(eq=False)
class _StagingSlot:
    """Host memory through which one chunk travels."""

    buffer: torch.Tensor
    written: list[Ticket] = field(default_factory=list)

    def part(self, taken: int, size_bytes: int) -> tuple[torch.Tensor, int]:
        """The next piece of the slot, and how much is taken behind it."""
        size = aligned(size_bytes, BLOCK_BYTES)
        return self.buffer[taken : taken + size], taken + size


@dataclass(eq=False)
class _Chunk:
    """One span of one unit on its way through the update: tensors on the host, and what must happen first."""

    update: UnitUpdate
    index: int
    start: int
    stop: int
    slot: _StagingSlot
    weights: torch.Tensor
    gradients: torch.Tensor
    state: OptimizerState
    reads: list[Ticket]
    gradients_there: Done
    weight_bytes: torch.Tensor | None
    state_bytes: torch.Tensor | None


class Updater:
    """Carries out optimizer steps: on its own lane, and where there is a ``streamed`` update, partly on the device."""

    def __init__(
        self,
        form: StateFormat,
        lane: Lane,
        down: Lane,
        up: Lane,
        store: Store | None,
        ring: Sequence[torch.Tensor],
        streamed: StreamedUpdate | None,
        device: torch.device,
    ) -> None:
        self._form = form
        self._lane, self._down, self._up = lane, down, up
        self._store = store
        self._ring = [_StagingSlot(buffer) for buffer in ring]
        self._streamed = streamed
        self._device = device
        here, there = host_update(device, form), device_update(device, form)
        self._update_on_host, self._update_on_device = over_masters(here), over_masters(there)
        self._last: Done | None = None
        self._reading: set[str] = set()
        self._took: Took | None = None
        self._explain: Explain = lambda error, _: error
        self._at: str | None = None
        """The unit that the host works on."""

    def explain_by(self, explain: Explain) -> None:
        """Whoever waits for what went wrong in a step gets what this makes of it."""
        self._explain = explain
        if self._streamed is not None:
            self._streamed.explain = explain

    def in_flight(self) -> list[str]:
        """Units whose state is being read from the NVMe tier."""
        return sorted(self._reading)

    def coming(self) -> None:
        """The first backward pass before a step begins: what can be done for its update already is done beside it."""
        if self._streamed is not None:
            took, self._took = self._took, None  # a step in which the host has no part must not be told of it again
            self._streamed.fetch_ahead(took, [self._last] if self._last is not None else [])

    def kept(self, name: str) -> list[Kept]:
        """Which parts of a unit's last sum of gradients stay on the device: ``StreamedUpdate.kept``."""
        return self._streamed.kept(name) if self._streamed is not None else []

    def changed(self, name: str) -> None:
        """Somebody else changed the unit's numbers in the tiers."""
        if self._streamed is not None:
            self._streamed.changed(name)

    def begin(self, updates: Sequence[UnitUpdate], clip: ClipFactor) -> None:
        """Start the step. Units with state on the device are updated on the current stream, the others beside it."""
        self.check()
        begun = Done.now(self._device)
        away, streamed, first = [u for u in updates if u.state.device_state is None], list[UnitUpdate](), list[Done]()
        if self._streamed is not None:
            away, streamed, first = self._streamed.shared(away)
        host = self._lane.submit(lambda: self._run(away, clip, begun, first)) if away else None
        self._last = host or self._last
        if self._streamed is not None and streamed:
            self._streamed.begin(streamed, clip, begun, host)
        for update in updates:
            if update.state.device_state is not None:
                with self._explained(update.state.unit.name):
                    self._update_resident(update, clip)

    def check(self) -> None:
        """Raise what went wrong in the last step, if that is known."""
        with self._explained():
            if self._last is not None:
                self._last.check()
            if self._streamed is not None:
                self._streamed.check()
            for ticket in (t for slot in self._ring for t in slot.written if t.done()):
                ticket.result()

    def finish(self) -> None:
        """Wait until the last step is done and durable in its tiers; raises what went wrong in it."""
        with self._explained():
            if self._last is not None:
                self._last.synchronize()
            if self._streamed is not None:
                self._streamed.finish()
            self._finish_writes()

    def begin_anew(self) -> None:
        """Work was cut short, and all lanes have settled: what went wrong is explained now, and forgotten."""
        with suppress(Exception):  # whoever explains it knows it
            self.check()
        self._last = self._took = None
        self._reading.clear()
        for slot in self._ring:
            slot.written = []
        if self._streamed is not None:
            self._streamed.begin_anew()

    @contextmanager
    def _explained(self, unit: str | None = None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if (explained := self._explain(error, unit)) is error:
                raise
            raise explained from explained.__cause__

    def settled(self) -> list[Done]:
        """When the last step has reached its tiers; what begins later is not waited for."""
        done = [Done.now(self._device), self._lane.submit(self._finish_writes)]
        if self._last is not None:
            done.append(self._last)
        return done + (self._streamed.settled() if self._streamed is not None else [])

    def _update_resident(self, update: UnitUpdate, clip: ClipFactor) -> None:
        state = update.state
        assert state.device_weights is not None
        assert state.device_gradients is not None
        assert state.device_state is not None
        update.wait_copied()
        make = self._update_on_device if clip.skip is None else unless(clip.skip, self._update_on_device)
        for s in update.segments:
            part, moments = slice(s.start, s.stop), state.device_state.span(s.start, s.stop)
            weights, gradients = state.device_weights[part], state.device_gradients[part]
            make(weights, gradients, moments, s.how, clip.on_device)
        update.promise.finish(None)

    def _run(self, updates: Sequence[UnitUpdate], clip: ClipFactor, begun: Done, first: Sequence[Done]) -> None:
        self._at = None
        try:
            for earlier in first:
                earlier.synchronize()
            self._finish_writes()  # of the step before: its extents are read again now
            factor = clip.on_host()
            if clip.skipped():
                for update in updates:
                    update.promise.finish(None)
                self._took = None
                return
            started = time.perf_counter()
            window: deque[_Chunk] = deque()
            staged = 0
            for update in updates:
                for index, (start, stop) in enumerate(_spans(update)):
                    if any(s.start < stop and s.stop > start for s in update.segments):
                        window.append(self._stage(update, index, start, stop, self._ring[staged % UPDATE_RING]))
                        staged += 1
                    if len(window) == UPDATE_RING - 1:
                        self._apply(window.popleft(), factor, begun)
            while window:
                self._apply(window.popleft(), factor, begun)
            self._took = Took(sum(u.elements for u in updates), time.perf_counter() - started)
        except BaseException as error:  # noqa: BLE001 - raised below
            explained = self._explain(error, self._at)
            for update in updates:
                if not update.promise.settled:
                    update.promise.fail(explained)
            raise explained from explained.__cause__

    def _finish_writes(self) -> None:
        for slot in self._ring:
            self._wait_written(slot)

    def _wait_written(self, slot: _StagingSlot) -> None:
        for ticket in slot.written:
            ticket.result()
        slot.written = []

    def _stage(self, update: UnitUpdate, index: int, start: int, stop: int, slot: _StagingSlot) -> _Chunk:
        """Start bringing a chunk to the host; what is on the host already is used where it lies."""
        self._wait_written(slot)
        state, taken = update.state, 0
        self._at = state.unit.name
        reads: list[Ticket] = []
        gradients_there = update.landed
        if state.host_gradients is not None:
            gradients = state.host_gradients[start:stop]
        else:
            assert state.device_gradients is not None
            source = state.device_gradients[start:stop]
            raw, taken = slot.part(taken, source.nbytes)
            gradients = raw[: source.nbytes].view(source.dtype)
            gradients_there = self._down.copy(gradients, source, after=[update.landed])
        state_raw = weight_raw = None
        if state.host_state is not None:
            moments = state.host_state.span(start, stop)
        else:
            state_raw, taken = self._read(state.state_extents, index, slot, taken, reads)
            self._reading.add(state.unit.name)
            moments = carve_state(state_raw, stop - start, self._form)
        if state.host_weights is not None:
            weights = state.host_weights[start:stop]
        else:
            weight_raw, taken = self._read(state.weight_extents, index, slot, taken, reads)
            weights = weight_raw.view(gradients.dtype)[: stop - start]
        return _Chunk(
            update, index, start, stop, slot, weights, gradients, moments, reads, gradients_there, weight_raw, state_raw
        )

    def _read(
        self, extents: list[Extent] | None, index: int, slot: _StagingSlot, taken: int, reads: list[Ticket]
    ) -> tuple[torch.Tensor, int]:
        """Start reading one extent into the next piece of the slot; returns the piece and what is taken behind it."""
        assert self._store is not None
        assert extents is not None
        raw, taken = slot.part(taken, extents[index].size_bytes)
        reads.append(self._store.read(extents[index], raw))
        return raw, taken

    def _apply(self, chunk: _Chunk, factor: float, begun: Done) -> None:
        """Update a chunk that has arrived and start its way back."""
        self._at = chunk.update.state.unit.name
        for read in chunk.reads:
            read.result()
        self._reading.discard(chunk.update.state.unit.name)
        chunk.gradients_there.synchronize()
        chunk.update.wait_copied()
        for s in chunk.update.segments:
            a, b = max(s.start, chunk.start) - chunk.start, min(s.stop, chunk.stop) - chunk.start
            if a < b:
                self._update_on_host(chunk.weights[a:b], chunk.gradients[a:b], chunk.state.span(a, b), s.how, factor)
        state = chunk.update.state
        if self._store is not None:
            if chunk.state_bytes is not None and state.state_extents is not None:
                self._write(chunk, state.state_extents, chunk.state_bytes)
            if chunk.weight_bytes is not None and state.weight_extents is not None:
                self._write(chunk, state.weight_extents, chunk.weight_bytes)
        if chunk.stop >= max(s.stop for s in chunk.update.segments):
            self._keep_promise(chunk.update, begun)

    def _write(self, chunk: _Chunk, extents: list[Extent], raw: torch.Tensor) -> None:
        """Start writing it; what goes wrong then is explained before anybody waits for it."""
        assert self._store is not None
        unit, ticket = chunk.update.state.unit.name, self._store.write(extents[chunk.index], raw)

        def explain(ticket: Ticket) -> None:
            if (error := ticket.exception()) is not None:
                self._explain(error, unit)

        ticket.add_done_callback(explain)
        chunk.slot.written.append(ticket)

    def _keep_promise(self, update: UnitUpdate, begun: Done) -> None:
        """The unit's last chunk is updated: its new weights can be had where they live."""
        state = update.state
        if state.device_weights is not None:
            assert state.host_weights is not None
            part = slice(update.segments[0].start, update.segments[-1].stop)
            # Behind everything that was computing with the old weights when the step began.
            copied = self._up.copy(state.device_weights[part], state.host_weights[part], after=[begun])
            update.promise.follow(copied)
        elif state.weight_extents is not None:
            update.promise.follow(Done.after_all(t for slot in self._ring for t in slot.written))
        else:
            update.promise.finish(None)


def _spans(update: UnitUpdate) -> list[tuple[int, int]]:
    """The pieces in which the host updates a unit: all at once what is in its memory, else what is staged at a time."""
    state = update.state
    if state.host_state is not None and state.host_weights is not None and state.host_gradients is not None:
        return [(update.segments[0].start, update.segments[-1].stop)]
    return state.spans
