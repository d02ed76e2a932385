"""The update on the device of state that lives on the host: it comes and goes through a ring of slots.

[Note: streamed update]
A piece arrives in a slot, is updated there and leaves, each on a stream of its own, so both directions of the link and
the device work at once. A slot is taken again when what was in it has left. Nothing waits on the host.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from offload.arithmetic import device_update
from offload.masters import over_masters
from offload.plan import StateFormat
from offload.residency import UPDATE_RING, chunks, streamed_slot_bytes
from offload.rules import UpdateStep
from offload.split import Took, UpdateSplit
from offload.state import OptimizerState, UnitState, carve_state, weight_dtype
from offload.streams import Done, Lane
from offload.unit_update import ClipFactor, UnitUpdate, shared


@dataclass(eq=False)
class _Slot:
    """Device memory for one piece."""

    weights: torch.Tensor
    gradients: torch.Tensor
    state: OptimizerState
    left: Done


class _Clock:
    """Seconds that a step's pieces take on a CUDA device, from the first arrival to the last leave."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._started = self._stopped = False

    def start(self) -> None:
        """The first piece may arrive; later calls change nothing."""
        if not self._started:
            self._first.record()
            self._started = True

    def stop(self, leaving: torch.Stream) -> None:
        """The last piece was sent on its way."""
        with leaving:
            self._last.record()
        self._stopped = self._started

    def read(self) -> Took | None:
        """What they took, if they are over."""
        if not self._stopped or not self._last.query():
            return None
        return Took(self._elements, self._first.elapsed_time(self._last) / 1000)


class StreamedUpdate:
    """Updates on the device, piece by piece, in the order in which they are given."""

    def __init__(self, form: StateFormat, elements: int, device_share: float, device: torch.device, lane: Lane) -> None:
        """``elements``: of one piece. ``lane``'s stream is the one on which pieces arrive."""
        self._split = UpdateSplit(device_share)
        self._device, self._elements, self._lane = device, elements, lane
        self._update = over_masters(device_update(device, form))
        self._computing, self._leaving = (torch.Stream(device) if device.type != "cpu" else None for _ in range(2))
        size, dtype = streamed_slot_bytes(elements, form), weight_dtype(form.precision)
        raw = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(UPDATE_RING)]
        one = elements * dtype.itemsize
        self._ring = [
            _Slot(
                r[:one].view(dtype),
                r[one : 2 * one].view(dtype),
                carve_state(r[2 * one :], elements, form),
                Done.now(device),
            )
            for r in raw
        ]
        self._next = 0
        self.sent_bytes = self.fetched_bytes = 0
        self._last: Done | None = None
        self._clock: _Clock | None = None

    @property
    def device_share(self) -> float:
        """Of the elements within its reach, those that the device updates."""
        return self._split.device_share

    def shared(self, updates: Sequence[UnitUpdate]) -> tuple[list[UnitUpdate], list[UnitUpdate]]:
        """The updates as the host's parts and the device's."""
        return shared(updates, self.device_share, self._elements)

    def learn(self, host: Took) -> None:
        """What the host took for its part of the last step."""
        if self._clock is not None and (took := self._clock.read()) is not None:
            self._split.learn(host, took)

    def begin(self, updates: Sequence[UnitUpdate], clip: ClipFactor, begun: Done) -> None:
        """Start the updates; each promise is kept when the device has been told everything of it."""
        self._last = self._lane.submit(lambda: self._run(updates, clip, begun))

    def finish(self) -> None:
        """Wait until everything is back on the host; raises what went wrong."""
        for done in self.settled():
            done.synchronize()

    def settled(self) -> list[Done]:
        """When everything that has begun is back on the host."""
        last = [self._last] if self._last is not None else []
        return [*last, self._lane.submit(self._wait_left)]

    def _wait_left(self) -> None:
        for slot in self._ring:
            slot.left.synchronize()

    def _run(self, updates: Sequence[UnitUpdate], clip: ClipFactor, begun: Done) -> None:
        try:
            if clip.skipped():
                for update in updates:
                    update.promise.finish(None)
                return
            elements = sum(update.elements for update in updates)
            clock = self._clock = _Clock(elements) if self._computing is not None else None
            with _on(self._computing):
                if self._computing is not None:
                    clip.on_device.record_stream(self._computing)
                begun.wait()  # the clip factor, and what was computing with weights that never leave the device
            for update in updates:
                left = begun
                update.landed.wait()
                update.wait_copied()
                if clock is not None:
                    clock.start()
                for segment in update.segments:
                    for start, stop in chunks(segment.stop - segment.start, self._elements):
                        part = slice(segment.start + start, segment.start + stop)
                        left = self._piece(update.state, part, segment.how, clip.on_device)
                update.promise.follow(left)
            if clock is not None and self._leaving is not None:
                clock.stop(self._leaving)
        except BaseException as error:
            for update in updates:
                if not update.promise.settled:
                    update.promise.fail(error)
            raise

    def _piece(self, state: UnitState, part: slice, how: UpdateStep, clip: torch.Tensor) -> Done:
        """One piece there and back; returns when it has left. On the lane."""
        slot, size = self._ring[self._next], part.stop - part.start
        self._next = (self._next + 1) % UPDATE_RING
        assert state.host_state is not None
        assert state.host_weights is not None
        home, there = state.host_state.span(part.start, part.stop), slot.state.span(0, size)
        mirror = state.host_weights[part]
        slot.left.wait()
        weights, gradients = slot.weights[:size], slot.gradients[:size]
        if state.device_weights is not None:
            weights = state.device_weights[part]
        else:
            self._fetch(weights, mirror)
        if state.device_gradients is not None:
            gradients = state.device_gradients[part]
        else:
            assert state.host_gradients is not None
            self._fetch(gradients, state.host_gradients[part])
        for target, source in zip(there.tensors(), home.tensors(), strict=True):
            self._fetch(target, source)
        arrived = Done.now(self._device)
        with _on(self._computing):
            arrived.wait()
            self._update(weights, gradients, there, how, clip)
            updated = Done.now(self._device)
        with _on(self._leaving):
            updated.wait()
            for target, source in zip((mirror, *home.tensors()), (weights, *there.tensors()), strict=True):
                target.copy_(source, non_blocking=True)
                self.sent_bytes += source.nbytes
            slot.left = Done.now(self._device)
        return slot.left

    def _fetch(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        self.fetched_bytes += source.nbytes


def _on(stream: torch.Stream | None) -> AbstractContextManager[Any]:
    return stream if stream is not None else nullcontext()
