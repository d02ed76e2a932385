"""The update on a GPU: of state in its memory, and of state on the host that comes and goes over both directions."""

from functools import partial

import torch

from memplan.calibrate.parts import Part, best_seconds, gigabytes, nanoseconds
from offload.arithmetic import HOWS, device_update
from offload.plan import Buckets, OptimizerKind, Precision, StateFormat
from offload.residency import state_bytes, update_traffic_bytes
from offload.state import OptimizerState, carve_state, weight_dtype

RING = 3
"""Chunks on the GPU: one arriving, one updated, one on its way back."""
HOW = HOWS[OptimizerKind.ADAMW]

Numbers = tuple[torch.Tensor, OptimizerState]


def resident_update(device: torch.device, elements: int) -> Part:
    """The runtime's update of weights, gradients and state in the GPU's memory."""
    rows = [("update of an element in the GPU's memory", "", "of what must be read and written")]
    found: dict[Precision, float] = {}
    for precision in (Precision.FP32, Precision.BF16):
        weights, state = _numbers(torch.zeros(_bytes(elements, precision), dtype=torch.uint8, device=device), precision)
        gradients = torch.full_like(weights, 1e-2)
        update_span = device_update(device, StateFormat(precision))
        update = partial(update_span, weights, gradients, state, HOW, torch.ones((), device=device))
        found[precision] = best_seconds(update, device.type) / elements
        moved = update_traffic_bytes(1, StateFormat(precision))
        rows.append((precision.value, nanoseconds(found[precision]), gigabytes(moved / found[precision])))
    found[Precision.AMP] = found[Precision.FP32]
    return Part({"gpu_update_seconds": found}, {"update on the GPU": tuple(rows)})


class StreamedUpdate:
    """State and weights on the host, updated on a CUDA device chunk by chunk, in a ring of slots and three streams."""

    def __init__(self, raw: torch.Tensor, precision: Precision, device: torch.device) -> None:
        self._chunk = min(Buckets().update_elements, len(raw) // _bytes(1, precision))
        self._chunks = len(raw) // _bytes(self._chunk, precision)
        raw.zero_()
        self._host = _numbers(raw[: _bytes(self._chunks * self._chunk, precision)], precision)
        size = _bytes(self._chunk, precision)
        self._slots = [_numbers(torch.zeros(size, dtype=torch.uint8, device=device), precision) for _ in range(RING)]
        self._gradients = torch.full((self._chunk,), 1e-2, dtype=weight_dtype(precision), device=device)
        self._clip = torch.ones((), device=device)
        self._update = device_update(device, StateFormat(precision))
        self._arrive, self._compute, self._leave = (torch.cuda.Stream(device) for _ in range(3))
        self._left: list[torch.cuda.Event | None] = [None] * RING
        self._begun = 0
        self._updated = 0
        torch.cuda.synchronize()

    def pump(self) -> None:
        """Begin the next chunk; wait for the one before it in its slot."""
        slot, index = self._begun % RING, self._begun % self._chunks
        if (left := self._left[slot]) is not None:
            left.synchronize()
            self._updated += self._chunk
        self._begun += 1
        there, home = self._slots[slot], self._part(index)
        with torch.cuda.stream(self._arrive):
            _copy(there, home)
            arrived = self._arrive.record_event()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(arrived)
            self._update(there[0], self._gradients, there[1], HOW, self._clip)
            updated = self._compute.record_event()
        with torch.cuda.stream(self._leave):
            self._leave.wait_event(updated)
            _copy(home, there)
            self._left[slot] = self._leave.record_event()

    def updated_elements(self) -> int:
        """Of the chunks that are back on the host."""
        return self._updated

    def finish(self) -> None:
        """Wait for everything that was begun."""
        torch.cuda.synchronize()

    def _part(self, index: int) -> Numbers:
        start, stop = index * self._chunk, (index + 1) * self._chunk
        return self._host[0][start:stop], self._host[1].span(start, stop)


def _bytes(elements: int, precision: Precision) -> int:
    return elements * precision.weight_bytes + state_bytes(elements, StateFormat(precision))


def _numbers(raw: torch.Tensor, precision: Precision) -> Numbers:
    """Weights and state in a uint8 buffer."""
    elements = len(raw) // _bytes(1, precision)
    weights = elements * precision.weight_bytes
    return raw[:weights].view(weight_dtype(precision)), carve_state(raw[weights:], elements, StateFormat(precision))


def _copy(target: Numbers, source: Numbers) -> None:
    for there, here in zip((target[0], *target[1].tensors()), (source[0], *source[1].tensors()), strict=True):
        there.copy_(here, non_blocking=True)
