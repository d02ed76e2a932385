"""The bytes of every candidate, by tier, as tables: what ``offload.residency.footprint`` says, for thousands at a time.

Candidates move units off the GPU in one fixed order, the *chain*. A candidate is then five counts: how many units of
the chain, from its start, have their optimizer state, gradients and parameters off the GPU, and how many of those have
state and parameters on NVMe. Every figure is a difference of prefix sums; counts may be numbers or NumPy arrays.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from memplan.sharding import Sharding
from offload.plan import Buckets, Placement, Precision, StateFormat, Tier
from offload.residency import BLOCK_BYTES, UPDATE_RING, UnitShape, aligned, state_bytes, streamed_slot_bytes

Ints = Any
"""An int, or an integer array: the tables take both."""


@dataclass(frozen=True)
class Counts:
    """A candidate: units of the chain, from its start, that keep something off the GPU, or on NVMe.

    ``nvme_state <= state``, ``nvme_parameters <= parameters``, and ``gradients, parameters <= state``.
    """

    state: Ints
    gradients: Ints
    parameters: Ints
    nvme_state: Ints = 0
    nvme_parameters: Ints = 0


RESIDENT = Counts(0, 0, 0)
"""Everything on the GPU."""


def chain_order(shapes: Sequence[UnitShape]) -> list[int]:
    """Positions of ``shapes`` in the order in which they leave the GPU: the root last, lone large units before it.

    Units of one size share slots on the device, so moving many of them frees more than moving a lone one. The last ones
    of forward leave first: what stays is updated at once, so the next forward pass begins with it while the others are
    updated and fetched; and their gradients are the first to be sent, with all of backward beside them.
    """
    alike = Counter(s.elements for s in shapes if s.name)
    return sorted(
        range(len(shapes)),
        key=lambda i: (not shapes[i].name, -alike[shapes[i].elements] * bool(shapes[i].name), -shapes[i].elements, -i),
    )


def placements_of(shapes: Sequence[UnitShape], order: Sequence[int], counts: Counts) -> tuple[Placement, ...]:
    """The placements that these counts stand for, in the order of ``shapes``."""
    rank = {unit: position for position, unit in enumerate(order)}

    def tier(position: int, off: int, nvme: int) -> Tier:
        return Tier.NVME if position < nvme else Tier.HOST if position < off else Tier.GPU

    return tuple(
        Placement(
            shape.name,
            tier(rank[i], counts.parameters, counts.nvme_parameters),
            tier(rank[i], counts.gradients, 0),
            tier(rank[i], counts.state, counts.nvme_state),
        )
        for i, shape in enumerate(shapes)
    )


class ChainTables:
    """Bytes of one rank for every candidate of a chain, equal to ``footprint`` to the byte."""

    def __init__(
        self,
        shapes: Sequence[UnitShape],
        buckets: Buckets,
        form: StateFormat,
        sharding: Sharding,
        *,
        shared_update: bool = False,
    ) -> None:
        """``shapes`` in the order of the chain; ``shared_update``: the GPU has a share in that of the host's state."""
        self.units = len(shapes)
        slot = streamed_slot_bytes(buckets.update_elements, form)
        self.update_slots_bytes = buckets.update_slots * slot if shared_update else 0
        """Of the GPU, where state is on the host."""
        self.form = form
        shards = sharding.shards
        shapes = [s.padded(shards) for s in shapes]
        w = form.precision.weight_bytes
        whole, trained = [s.elements for s in shapes], [s.trainable_elements for s in shapes]
        away = [shards.weights(n, Tier.HOST) for n in whole]
        gradient, state = [shards.gradients(n) for n in trained], [shards.state(n) for n in trained]
        self.parameter_elements = _prefix([shards.weights(n, Tier.GPU) for n in whole])
        self.away_elements = _prefix(away)
        self.gradient_elements = _prefix(gradient)
        self.state_elements = _prefix(state)
        self.state_bytes = _prefix([state_bytes(n, form) for n in state])
        self.slot_elements = _slots(shapes, whole, buckets.prefetch_units + 1, root_apart=True)
        if not shards.on_device(Tier.GPU):
            self.slot_elements[:] = self.slot_elements[-1]
        self.gradient_slot_elements = _slots(shapes, trained, 2, root_apart=False)
        if not shards.whole_gradients():
            self.gradient_slot_elements[:] = self.gradient_slot_elements[-1]
        self.host_parameters = _prefix([aligned(n * w, BLOCK_BYTES) for n in away])
        self.host_mirrors = _prefix([aligned(n * w, BLOCK_BYTES) for n in state])
        self.host_gradients = _prefix([aligned(n * w, BLOCK_BYTES) for n in gradient])
        self.host_state = _prefix([aligned(state_bytes(n, form), BLOCK_BYTES) for n in state])
        self.nvme_state = _prefix([state_extent_bytes(n, form, buckets) for n in state])
        self.nvme_parameters = _prefix([weight_extent_bytes(n, form.precision, buckets) for n in away])
        # What a chunk of a unit brings through the staging ring, by what of it is on NVMe; late gradients add theirs.
        spans = [min(n, buckets.update_elements) for n in state]
        weight = [aligned(min(n, buckets.update_elements) * w, BLOCK_BYTES) for n in away]
        state_chunk = [aligned(state_bytes(n, form), BLOCK_BYTES) for n in spans]
        both = [a + b if n else 0 for a, b, n in zip(state_chunk, weight, spans, strict=True)]
        late = [aligned(n * w, BLOCK_BYTES) for n in spans]
        self._staged = [
            (_range_maximum(chunk), _range_maximum([a + b for a, b in zip(chunk, late, strict=True)]))
            for chunk in (both, state_chunk, [0] * len(shapes))
        ]
        self._weights_staged = np.maximum.accumulate([0, *weight])

    def gpu_bytes(self, c: Counts) -> Ints:
        """Of one GPU, activations left out."""
        w = self.form.precision.weight_bytes
        parameters = (
            self.parameter_elements[-1] - self.parameter_elements[c.parameters] + self.slot_elements[c.parameters]
        )
        gradients = (
            self.gradient_elements[-1] - self.gradient_elements[c.gradients] + self.gradient_slot_elements[c.gradients]
        )
        slots = (np.asarray(c.state) > np.asarray(c.nvme_state)) * self.update_slots_bytes
        return (parameters + gradients) * w + self.state_bytes[-1] - self.state_bytes[c.state] + slots

    def host_bytes(self, c: Counts) -> Ints:
        """Of one rank, staging included."""
        return (
            self.host_parameters[c.parameters]
            - self.host_parameters[c.nvme_parameters]
            + self.host_mirrors[c.state]
            - self.host_mirrors[c.parameters]
            + self.host_gradients[c.gradients]
            + self.host_state[c.state]
            - self.host_state[c.nvme_state]
            + self.staging_bytes(c)
        )

    def nvme_bytes(self, c: Counts) -> Ints:
        """Of one rank's file."""
        return self.nvme_state[c.nvme_state] + self.nvme_parameters[c.nvme_parameters]

    def offloaded_bytes(self, c: Counts) -> Ints:
        """Model state that does not live on the GPU; what lives on NVMe counts twice, being further away."""
        w = self.form.precision.weight_bytes
        return (
            (self.away_elements[c.parameters] + self.gradient_elements[c.gradients]) * w
            + self.state_bytes[c.state]
            + self.nvme_bytes(c)
        )

    def staging_bytes(self, c: Counts) -> Ints:
        """The rings through which chunks of state and weights pass, as ``offload.residency.staging_bytes``."""
        update: Ints = 0
        # In the chain, the units that bring the same things with a chunk lie side by side.
        edges = (0, c.nvme_parameters, c.nvme_state, c.state)
        for begin, end, (gathered, late) in zip(edges[:-1], edges[1:], self._staged, strict=True):
            update = np.maximum(update, gathered[begin, np.minimum(end, c.gradients)])
            update = np.maximum(update, late[np.maximum(begin, c.gradients), end])
        return UPDATE_RING * (update + self._weights_staged[c.nvme_parameters])


def _prefix(values: Sequence[int]) -> np.ndarray:
    """Sums of the first 0, 1, ... values."""
    return np.concatenate(([0], np.cumsum(np.asarray(values, dtype=np.int64)))).astype(np.int64)


def weight_extent_bytes(elements: int, precision: Precision, buckets: Buckets) -> int:
    """Of one unit's weights on NVMe."""
    return _extent_bytes(elements, lambda n: n * precision.weight_bytes, buckets)


def state_extent_bytes(elements: int, form: StateFormat, buckets: Buckets) -> int:
    """Of one unit's optimizer state on NVMe."""
    return _extent_bytes(elements, lambda n: state_bytes(n, form), buckets)


def _extent_bytes(elements: int, bytes_of: Callable[[int], int], buckets: Buckets) -> int:
    """Each chunk is an extent of its own."""
    whole, part = divmod(elements, buckets.update_elements)
    chunk = aligned(bytes_of(buckets.update_elements), BLOCK_BYTES)
    return whole * chunk + aligned(bytes_of(part), BLOCK_BYTES)


def _slots(shapes: Sequence[UnitShape], sizes: Sequence[int], ring: int, root_apart: bool) -> np.ndarray:
    """Elements of the device slots when the first 0, 1, ... units come and go: ``ring`` slots a size at most."""
    counts: Counter[int] = Counter()
    total = [0]
    for shape, size in zip(shapes, sizes, strict=True):
        if root_apart and not shape.name:
            total.append(total[-1] + size)
            continue
        counts[size] += 1
        total.append(total[-1] + (size if counts[size] <= ring else 0))
    return np.asarray(total, dtype=np.int64)


def _range_maximum(values: Sequence[int]) -> np.ndarray:
    """``table[i, j]``: the largest of ``values[i:j]``, 0 where that is empty."""
    count = len(values)
    table = np.zeros((count + 1, count + 1), dtype=np.int64)
    # Row i starts at its own unit: what lies before is 0.
    table[:, 1:] = np.triu(np.broadcast_to(np.asarray(values, dtype=np.int64), (count + 1, count)))
    return np.maximum.accumulate(table, axis=1)
