"""The numbers of all units, copied piece by piece from where they live while training goes on.

[Note: what a checkpoint costs]
A piece is a chunk of one unit, with its optimizer state. It is copied into host memory, and written from there. The
memory for this is bounded: where it is used up, copying goes on when a piece has been written. The next update of a
unit waits until all its pieces are copied, never until they are written; whatever else a step does goes on. So with
state of S bytes, memory of M for copies, a disk of D bytes a second and T seconds until the update begins, a step waits
for about (S - M) / D - T seconds, if that is more than none. M is half of the memory that is free beside the plan's
tiers, at most half of S, and at least two pieces.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import psutil
import torch

from offload.arena import mapped
from offload.optimizer import join_master
from offload.plan import MOMENT_BLOCK_ELEMENTS, MomentFormat, StateFormat
from offload.residency import BLOCK_BYTES, aligned, chunks, state_bytes
from offload.state import OptimizerState, UnitState, carve_state, moment_dtype, weight_dtype
from offload.store import Store
from offload.tensor_file import Entry, TensorFile
from offload.unit import Field

WEIGHT = "weight"
"""The kind of what a file holds of every parameter: of a trainable one the fp32 master, and beside it are its moments,
named as in ``OptimizerKind.moments``."""
CODES, SCALES = ".codes", ".scales"
"""What a moment's name has behind it where it is in 8 bits, and its two tensors."""
JOINED_ELEMENTS = 1 << 18
"""Masters that are joined at a time."""


def span_key(kind: str, start: int, name: str) -> str:
    """The key of a span of a parameter's elements, flat, that begins at ``start``."""
    return f"{kind}/{start}/{name}"


@dataclass(frozen=True, eq=False)
class Part:
    """The elements of one parameter in a piece: from ``start`` of the parameter, at ``inside`` the piece."""

    field: Field
    start: int
    inside: slice

    @property
    def elements(self) -> int:
        """How many."""
        return self.inside.stop - self.inside.start


@dataclass(frozen=True, eq=False)
class Piece:
    """A chunk of what a rank saves of a unit: the elements that it updates, then its share of the frozen ones.

    ``start`` and ``stop`` count in these. The first ``trained`` of the piece have optimizer state. Where weights are on
    NVMe, pieces are the chunks that they are read in.
    """

    state: UnitState
    index: int
    start: int
    stop: int
    form: StateFormat

    @property
    def trained(self) -> int:
        """Elements with optimizer state."""
        updated = self.state.updated
        return max(0, min(self.stop, updated.stop - updated.start) - self.start)

    @property
    def weight_bytes(self) -> int:
        """Of the weights in whole blocks, as the NVMe tier reads them."""
        return aligned((self.stop - self.start) * self.form.precision.weight_bytes, BLOCK_BYTES)

    @property
    def size_bytes(self) -> int:
        """Host memory that a copy of it takes."""
        return self.weight_bytes + aligned(state_bytes(self.trained, self.form), BLOCK_BYTES)

    def places(self) -> Iterator[tuple[int, int]]:
        """(first element of the unit, elements) of the updated ones in it, and of the frozen ones."""
        yield self.state.updated.start + self.start, self.trained
        updated, frozen = self.state.updated, frozen_share(self.state)
        first = self.start + self.trained - (updated.stop - updated.start)
        yield frozen.start + first, self.stop - self.start - self.trained

    def parts(self) -> Iterator[Part]:
        """The parameters in it, in their order; what is between them is padding."""
        inside = 0
        for first, elements in self.places():
            for field in self.state.unit.fields if elements else ():
                a, b = max(field.start, first), min(field.stop, first + elements)
                if a < b:
                    yield Part(field, a - field.start, slice(inside + a - first, inside + b - first))
            inside += elements

    def entries(self) -> Iterator[Entry]:
        """What a file holds of it."""
        for part in self.parts():
            dtype = torch.float32 if part.field.trainable else weight_dtype(self.form.precision)
            kinds = [(WEIGHT, dtype, part.elements), *(self._moments(part) if part.field.trainable else ())]
            for kind, dtype, elements in kinds:
                yield Entry(span_key(kind, part.start, part.field.name), dtype, (elements,))

    def _moments(self, part: Part) -> Iterator[tuple[str, torch.dtype, int]]:
        """(kind, type, numbers) of each moment, as it is stored."""
        for name in self.form.optimizer.moments:
            dtype = moment_dtype(name, self.form)
            if self.form.moments is MomentFormat.EIGHT_BIT:
                yield name + CODES, dtype, part.elements
                yield name + SCALES, torch.float32, -(-part.elements // MOMENT_BLOCK_ELEMENTS)
            else:
                yield name, dtype, part.elements


def frozen_share(state: UnitState) -> slice:
    """The unit's frozen elements that this rank saves: those that it keeps, or as many where all keep all."""
    shape, parts = state.unit.shape, state.shards.state_parts
    size = shape.frozen_elements // parts
    position = state.ranks.position if state.ranks is not None and parts > 1 else 0
    start = shape.trainable_elements + position * size
    return slice(start, start + size)


def pieces_of(state: UnitState, form: StateFormat, update_elements: int) -> list[Piece]:
    """All pieces that this rank saves of a unit; none where another rank has the same."""
    if state.ranks is not None and state.ranks.rank >= state.shards.state_parts:
        return []
    updated, frozen = state.updated, frozen_share(state)
    elements = updated.stop - updated.start + frozen.stop - frozen.start
    return [Piece(state, i, a, b, form) for i, (a, b) in enumerate(chunks(elements, update_elements))]


class CopiedPiece:
    """A piece's numbers in a buffer of the host."""

    def __init__(self, piece: Piece, buffer: torch.Tensor, store: Store | None) -> None:
        """Copy them from where they live; no update of the unit may be under way."""
        self.piece, self.buffer = piece, buffer
        state, dtype = piece.state, weight_dtype(piece.form.precision)
        raw_weights, raw_state = buffer[: piece.weight_bytes], buffer[piece.weight_bytes : piece.size_bytes]
        elements = piece.stop - piece.start
        self._weights = raw_weights[: elements * dtype.itemsize].view(dtype)
        self._state = carve_state(raw_state, piece.trained, piece.form)
        reads = []
        if state.weight_extents is not None:
            assert store is not None
            reads.append(store.read(state.weight_extents[piece.index], raw_weights))
        else:
            _copy_weights(self._weights, piece)
        if piece.trained and state.state_extents is not None:
            assert store is not None
            reads.append(store.read(state.state_extents[piece.index], raw_state))
        elif piece.trained:
            source = state.device_state or state.host_state
            assert source is not None
            _copy_state(self._state, source.span(piece.start, piece.start + piece.trained))
        for read in reads:
            read.result()

    def write(self, file: TensorFile) -> None:
        """Write its entries, in their order."""
        for part in self.piece.parts():
            weights = self._weights[part.inside]
            if not part.field.trainable:
                file.write(weights)
                continue
            state = self._state.span(part.inside.start, part.inside.stop)
            if state.remainder is None:
                file.write(weights if state.master is None else state.master)
            else:
                for a, b in chunks(part.elements, JOINED_ELEMENTS):
                    file.write(join_master(weights[a:b], state.remainder[a:b]))
            for i, moment in enumerate(state.moments):
                file.write(moment)
                if state.scales:
                    file.write(state.scales[i])


def _copy_weights(target: torch.Tensor, piece: Piece) -> None:
    """From the host as far as they are there too, which costs no crossing of the link."""
    state, updates = piece.state, piece.state.part()
    if piece.trained:
        source = updates.host_weights if updates.host_weights is not None else updates.device_weights
        assert source is not None
        target[: piece.trained].copy_(source[piece.start : piece.start + piece.trained])
    _, (first, frozen) = piece.places()
    if frozen:
        kept = state.device_weights if state.device_weights is not None else state.host_weights
        assert kept is not None
        for part in state.kept_weights[1:]:  # divided: behind what is updated here
            first += state.updated.stop - state.updated.start - part.start
        target[piece.trained :].copy_(kept[first : first + frozen])


def _copy_state(target: OptimizerState, source: OptimizerState) -> None:
    for t, s in zip(target.tensors(), source.tensors(), strict=True):
        t.copy_(s)


class Abandoned(Exception):  # noqa: N818 - nothing went wrong here
    """A checkpoint that was being made is not wanted any more, or can not be written."""


class Staging:
    """Host memory for copied pieces, at most ``capacity_bytes`` at a time; it is had when it is needed."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._free: list[torch.Tensor] = []
        self._changed = threading.Condition()
        self._abandoned = False

    def take(self, size_bytes: int) -> torch.Tensor:
        """A page-aligned buffer; waits until there is one. Raises Abandoned."""
        with self._changed:
            while True:
                if self._abandoned:
                    raise Abandoned
                for place, buffer in enumerate(self._free):
                    if len(buffer) == size_bytes:
                        return self._free.pop(place)
                while self._free and self._held_bytes + size_bytes > self.capacity_bytes:
                    self._held_bytes -= len(self._free.pop())
                if not self._held_bytes or self._held_bytes + size_bytes <= self.capacity_bytes:
                    self._held_bytes += size_bytes
                    return mapped(size_bytes)[:size_bytes]
                self._changed.wait()

    def give_back(self, buffer: torch.Tensor) -> None:
        """The piece in it has been written. Raises Abandoned."""
        with self._changed:
            if self._abandoned:
                raise Abandoned
            self._free.append(buffer)
            self._changed.notify_all()

    def abandon(self) -> None:
        """No more buffers for anybody, and none kept."""
        with self._changed:
            self._abandoned = True
            self._free.clear()
            self._changed.notify_all()


def staging_bytes(pieces: Sequence[Piece], spare_bytes: int) -> int:
    """Memory for copies, where ``spare_bytes`` are free beside the tiers. [Note: what a checkpoint costs]"""
    room = min(spare_bytes, psutil.virtual_memory().available) // 2
    total, largest = sum(p.size_bytes for p in pieces), max((p.size_bytes for p in pieces), default=0)
    return max(2 * largest, min(total // 2, room))
