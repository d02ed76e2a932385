"""What a plan's residency costs, to the byte: pure arithmetic, shared by the runtime that allocates and the planner.

Bytes an element of optimizer state and weights:

==========  ======  =====================  ============  ========
precision   weight  remainder or master    each moment   gradient
==========  ======  =====================  ============  ========
fp32, amp   4       0                      4             4
bf16        2       2                      4             2
fp16        2       4                      4             2
==========  ======  =====================  ============  ========

Moments may also be kept in bf16, 2 bytes each, or in 8 bits: a byte each, and 4 bytes for every 64 of them.

AdamW and Adam keep two moments of an element; Lion, SGD with momentum and Adagrad one; plain SGD none. In bf16 weight
and remainder together are the exact fp32 master, so state of AdamW on the host is 12 bytes a parameter. In fp16 the
master is there as a whole: fp16 has fewer exponents than fp32, so a weight that overflows or vanishes in it would leave
more to a remainder than 16 bits hold.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offload.plan import MOMENT_BLOCK_ELEMENTS, Buckets, MomentFormat, Placement, Precision, StateFormat, Tier
from offload.shards import ALIGN_ELEMENTS, ALONE, Shards

BLOCK_BYTES = 4096
"""Extents in the NVMe tier and allocations in the arena are multiples of this: what direct I/O asks for."""
UPDATE_RING = 3
"""Staging slots of a streamed update: one being read, one updated, one written back."""


def aligned(count: int, multiple: int) -> int:
    """``count`` rounded up to a multiple."""
    return -(-count // multiple) * multiple


@dataclass(frozen=True)
class UnitShape:
    """The flat buffers of one unit: its trainable parameters first, then the frozen ones, each aligned.

    Over several ranks both are padded: ``padded``.
    """

    name: str
    trainable_elements: int
    frozen_elements: int

    @classmethod
    def of(cls, name: str, trainable: Iterable[int], frozen: Iterable[int] = ()) -> "UnitShape":
        """From the element counts of its parameters."""
        trained, other = (sum(aligned(n, ALIGN_ELEMENTS) for n in counts) for counts in (trainable, frozen))
        return cls(name, trained, other)

    def padded(self, shards: Shards) -> "UnitShape":
        """The same, so that the ranks' parts are equal."""
        align = shards.align_elements
        return UnitShape(self.name, aligned(self.trainable_elements, align), aligned(self.frozen_elements, align))

    @property
    def elements(self) -> int:
        """Elements of the flat weight buffer."""
        return self.trainable_elements + self.frozen_elements


def moment_bytes(elements: int, moments: MomentFormat) -> int:
    """Bytes of one moment of ``elements``, with the scales that belong to it."""
    if moments is MomentFormat.EIGHT_BIT:
        return elements + 4 * -(-elements // MOMENT_BLOCK_ELEMENTS)
    return elements * (2 if moments is MomentFormat.BF16 else 4)


def state_bytes(elements: int, form: StateFormat) -> int:
    """Bytes of the optimizer state of ``elements`` beside their weights: moments, and what their masters need more."""
    rest = {Precision.BF16: 2, Precision.FP16: 4}.get(form.precision, 0)
    return elements * rest + len(form.optimizer.moments) * moment_bytes(elements, form.moments)


def update_traffic_bytes(elements: int, form: StateFormat) -> int:
    """Bytes that an update reads and writes: gradients in, weights and state in and out."""
    return 3 * elements * form.precision.weight_bytes + 2 * state_bytes(elements, form)


def chunks(elements: int, update_elements: int) -> list[tuple[int, int]]:
    """The (start, stop) spans in which a unit's state is updated and streamed."""
    return [(start, min(start + update_elements, elements)) for start in range(0, elements, update_elements)]


@dataclass(frozen=True)
class Footprint:
    """Bytes held from the first step to the last, by tier; activations are not in it."""

    gpu_bytes: int
    host_bytes: int
    nvme_bytes: int


def slot_counts(
    shapes: Sequence[UnitShape], placements: Sequence[Placement], buckets: Buckets, shards: Shards = ALONE
) -> dict[int, int]:
    """Device slots for weights that come and go: {elements of the slot: how many}.

    Units of one size share a ring: the one that computes, and those fetched ahead. The root unit is in use all
    through a step and has a slot of its own.
    """
    pairs = zip(shapes, placements, strict=True)
    streamed = [s for s, p in pairs if not shards.on_device(p.parameters) and s.elements]
    sizes = Counter(s.elements for s in streamed if s.name)
    counts = {size: min(units, buckets.prefetch_units + 1) for size, units in sizes.items()}
    for s in streamed:
        if not s.name:
            counts[s.elements] = counts.get(s.elements, 0) + 1
    return counts


def gradient_slot_counts(
    shapes: Sequence[UnitShape], placements: Sequence[Placement], shards: Shards = ALONE
) -> dict[int, int]:
    """Device slots in which a unit's gradients gather on their way home: two a size, or one for a lone unit.

    Home is the host, or the rank's part on the device.
    """
    sizes = Counter(
        s.trainable_elements
        for s, p in zip(shapes, placements, strict=True)
        if s.trainable_elements and not (p.gradients is Tier.GPU and shards.whole_gradients())
    )
    return {size: min(units, 2) for size, units in sizes.items()}


def mirrored(placement: Placement) -> bool:
    """Whether the host keeps a copy of weights that live on the GPU, because their update runs on the host."""
    return placement.parameters is Tier.GPU and placement.optimizer is not Tier.GPU


def staging_bytes(
    shapes: Sequence[UnitShape],
    placements: Sequence[Placement],
    buckets: Buckets,
    form: StateFormat,
    shards: Shards = ALONE,
) -> tuple[int, int]:
    """Bytes of one slot of the update's staging ring and of one slot of the weight reader's, 0 where none is needed.

    A slot holds what one chunk of one unit brings with it: state read from NVMe, weights read from NVMe, gradients
    that wait on the GPU.
    """
    update = weights = 0
    w = form.precision.weight_bytes
    for s, p in zip(shapes, placements, strict=True):
        kept = shards.weights(s.elements, p.parameters)
        if s.trainable_elements and p.optimizer is not Tier.GPU:
            span = min(shards.state(s.trainable_elements), buckets.update_elements)
            held = aligned(span * w, BLOCK_BYTES) if p.gradients is Tier.GPU else 0
            if p.optimizer is Tier.NVME:
                held += aligned(state_bytes(span, form), BLOCK_BYTES)
            if p.parameters is Tier.NVME:
                # Weights are read and written in whole chunks, frozen elements at the end of the last one included.
                held += aligned(min(kept, buckets.update_elements) * w, BLOCK_BYTES)
            update = max(update, held)
        if s.elements and p.parameters is Tier.NVME:
            weights = max(weights, aligned(min(kept, buckets.update_elements) * w, BLOCK_BYTES))
    return update, weights


def streamed_slot_bytes(elements: int, form: StateFormat) -> int:
    """Bytes of one slot on the device through which state of the host is updated there: weight, gradient and state."""
    return 2 * elements * form.precision.weight_bytes + state_bytes(elements, form)


def streamed_bytes(placements: Sequence[Placement], buckets: Buckets, form: StateFormat, share: float) -> int:
    """Device bytes of the slots of the streamed update, where the device has a share in the update of the host's state.

    State on NVMe is updated on the host, and so are units whose weights are there.
    """
    if not share or not any(p.optimizer is Tier.HOST for p in placements):
        return 0
    return buckets.update_slots * streamed_slot_bytes(buckets.update_elements, form)


def host_bytes_of_unit(shape: UnitShape, p: Placement, form: StateFormat, shards: Shards = ALONE) -> int:
    """Of a rank's host tier: what stays of a unit there; staging is not of one unit."""
    w = form.precision.weight_bytes
    state = shards.state(shape.trainable_elements)
    parts = (
        (p.parameters is Tier.HOST, shards.weights(shape.elements, p.parameters) * w),
        (mirrored(p), state * w),
        (p.gradients is Tier.HOST, shards.gradients(shape.trainable_elements) * w),
        (p.optimizer is Tier.HOST, state_bytes(state, form)),
    )
    return sum(aligned(size, BLOCK_BYTES) for there, size in parts if there)


def checkpoint_host_bytes(blocks: int, input_bytes: int) -> int:
    """Host bytes of the inputs of so many recomputed blocks, each of ``input_bytes`` and a piece of its own."""
    return blocks * aligned(input_bytes, BLOCK_BYTES)


def footprint(
    shapes: Sequence[UnitShape],
    placements: Sequence[Placement],
    buckets: Buckets,
    form: StateFormat,
    gpu_update_share: float = 0.0,
    shards: Shards = ALONE,
) -> Footprint:
    """What one rank of the runtime allocates for these units, to the byte.

    ``shapes``, padded for ``shards``, and ``placements`` go in pairs. Gradients that autograd holds for the moment
    before they are gathered are not in it: they are part of a pass, as activations are.
    """
    w = form.precision.weight_bytes
    gpu = host = nvme = 0
    for s, p in zip(shapes, placements, strict=True):
        weights = shards.weights(s.elements, p.parameters)
        gradients, state = shards.gradients(s.trainable_elements), shards.state(s.trainable_elements)
        gpu += weights * w if p.parameters is Tier.GPU else 0
        gpu += gradients * w if p.gradients is Tier.GPU else 0
        gpu += state_bytes(state, form) if p.optimizer is Tier.GPU else 0
        host += host_bytes_of_unit(s, p, form, shards)
        if p.optimizer is Tier.NVME:
            spans = chunks(state, buckets.update_elements)
            nvme += sum(aligned(state_bytes(b - a, form), BLOCK_BYTES) for a, b in spans)
        if p.parameters is Tier.NVME:
            nvme += sum(aligned((b - a) * w, BLOCK_BYTES) for a, b in chunks(weights, buckets.update_elements))
    gpu += sum(size * n * w for size, n in slot_counts(shapes, placements, buckets, shards).items())
    gpu += sum(size * n * w for size, n in gradient_slot_counts(shapes, placements, shards).items())
    gpu += streamed_bytes(placements, buckets, form, gpu_update_share)
    update, staged = staging_bytes(shapes, placements, buckets, form, shards)
    return Footprint(gpu, host + UPDATE_RING * (update + staged), nvme)
