"""The bytes that one micro-batch holds beside the model's state, for every way in which it can pass through the model.

A profile knows a few points: batch sizes, all blocks recomputed or none, the loss whole or in chunks. Between two batch
sizes the line through them counts: at every moment of a step the bytes grow linearly with the samples, so the peak,
being the largest of many lines, lies below the line through two of its points. Only what kernels hold for a moment
grows otherwise, as buffers in which gradients of biases are summed: the upper bound has room for the difference.

Where the first blocks are recomputed, a moment outside of them has what it has without recompute, less what nobody but
they keep for backward. A moment inside of them has what it has where all are recomputed, or less: the blocks behind
them are through. So the peak is the larger of these two, and neither is too low.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload.plan import Tier
from profiler.profile import ActivationPoint, ModelProfile

ACTIVATION_MARGIN = 1.01
"""Upper bound of the activations over their estimate."""
FIXED_MARGIN_BYTES = {"cuda": 128 << 20, "cpu": 1 << 20}
"""What no trace sees: pages that the allocator can not fill, and what is predicted too low in a convolution."""


@dataclass(frozen=True)
class Way:
    """How a micro-batch passes through the model."""

    micro_batch_size: int
    recomputed_blocks: int = 0
    """The first so many in forward order."""
    checkpoints: Tier = Tier.GPU
    """Where the inputs of recomputed blocks wait."""
    loss_chunks: int = 1


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch beside the model's own state."""

    peak_bytes: int
    """What tensors hold at the peak: the estimate."""
    upper_bytes: int
    """The most to expect of the device's memory, where the allocator may grow its segments, and the caller keeps a
    batch there that the engine casts."""
    phase_bytes: dict[str, int]
    """Of ``peak_bytes``, by phase of the pass."""
    input_bytes: tuple[int, ...]
    """Of each recomputed block, the inputs that wait in host memory."""

    @property
    def host_bytes(self) -> int:
        """Of the inputs that wait in host memory."""
        return sum(self.input_bytes)


def activations_of(profile: ModelProfile, way: Way, device: str) -> Activations | None:
    """The activations of one way; ``None`` where the profile knows nothing about it.

    A single point is an upper bound for smaller batches. Batches above the largest profiled one are not known.
    """
    known = [p for p in profile.activations if p.loss_chunks == way.loss_chunks]
    kept = [p for p in known if not p.recompute]
    again = [p for p in known if p.recompute and p.checkpoints_on_host == (way.checkpoints is Tier.HOST)]
    all_of_them = 0 < way.recomputed_blocks == len(profile.blocks)
    ends = ([] if all_of_them else [kept]) + ([again] if way.recomputed_blocks else [])
    found = [end for points in ends if (end := _at_batch(points, way.micro_batch_size, device)) is not None]
    if len(found) < len(ends):
        return None
    first, last = found[0], found[-1]
    on_host = way.recomputed_blocks if way.checkpoints is Tier.HOST else 0
    saved = _saved_bytes(way.recomputed_blocks, first, last, on_host=on_host > 0) if len(found) > 1 else 0
    peak = max(last.peak_bytes, first.peak_bytes - saved)
    names = dict.fromkeys(name for part in found for name in part.phase_bytes)
    phases = {name: max(last.phase_bytes.get(name, 0), first.phase_bytes.get(name, 0) - saved) for name in names}
    beside = first.given_bytes + max(end.bend_bytes for end in found) if device == "cuda" else 0
    return Activations(
        peak,
        int(peak * ACTIVATION_MARGIN) + beside + FIXED_MARGIN_BYTES[device],
        phases,
        last.input_bytes[:on_host],
    )


def _saved_bytes(count: int, plain: "_End", again: "_End", *, on_host: bool) -> int:
    """What backward begins with less because the first so many blocks are recomputed.

    It is what nobody but they keep, but for inputs that are kept anew. Of those that wait on the host the newest is
    still there. Whatever all blocks together do not free in truth is not counted on in any of them.
    """

    def saved(count: int) -> int:
        newest = again.input_bytes[count - 1] - again.device_input_bytes[count - 1] if on_host else 0
        return plain.freed_bytes[count - 1] - sum(again.device_input_bytes[:count]) - newest

    everything = len(plain.freed_bytes)
    return saved(count) - max(0, saved(everything) - (plain.held_bytes - again.held_bytes))


def recompute_share(profile: ModelProfile, way: Way) -> float:
    """What the recomputed blocks would keep for backward, of what all blocks would."""
    if way.recomputed_blocks in (0, len(profile.blocks)):
        return float(way.recomputed_blocks > 0)
    kept = {layer.path: layer.activation_bytes for layer in profile.layers}
    saved = [kept.get(block, 0) for block in profile.blocks]
    # Without figures, the blocks are taken as alike.
    return sum(saved[: way.recomputed_blocks]) / sum(saved) if sum(saved) else way.recomputed_blocks / len(saved)


def ways_of(profile: ModelProfile) -> list[tuple[int, Tier, int]]:
    """(recomputed blocks, where checkpoints wait, loss chunks) of all ways that the profile knows of.

    None, a quarter, a half, three quarters and all of the blocks.
    """
    blocks = len(profile.blocks)
    counts = sorted({0, *(round(blocks * share) for share in (0.25, 0.5, 0.75, 1.0))})
    wanted = [Way(1, n, tier, 1) for n in counts for tier in ((Tier.GPU, Tier.HOST) if n else (Tier.GPU,))]
    chunks = sorted({p.loss_chunks for p in profile.activations})
    ways = [replace(way, loss_chunks=pieces) for way in wanted for pieces in chunks]
    return [
        (w.recomputed_blocks, w.checkpoints, w.loss_chunks)
        for w in ways
        if activations_of(profile, w, "cuda") is not None
    ]


def largest_batch(profile: ModelProfile) -> int:
    """The largest micro-batch that the profile knows about."""
    return max(p.batch_size for p in profile.activations)


@dataclass(frozen=True)
class _End:
    """Bytes of one batch size with all blocks recomputed, or none."""

    peak_bytes: int
    phase_bytes: dict[str, int]
    input_bytes: tuple[int, ...]
    device_input_bytes: tuple[int, ...]
    freed_bytes: tuple[int, ...]
    held_bytes: int
    given_bytes: int
    bend_bytes: int
    """By how much the peak may lie above the line between two batch sizes."""


def _at_batch(points: Sequence[ActivationPoint], batch_size: int, device: str) -> _End | None:
    """On the line through the two profiled batch sizes around this one."""
    points = sorted(points, key=lambda p: p.batch_size)
    if not points or batch_size > points[-1].batch_size:
        return None
    above = next(p for p in points if p.batch_size >= batch_size)
    below = next((p for p in reversed(points) if p.batch_size <= batch_size), above)
    span = above.batch_size - below.batch_size

    def between(low: int, high: int) -> int:
        return low + -(-(high - low) * (batch_size - below.batch_size) // span) if span else high

    # The libraries' workspaces and the kernels' scratch memory are CUDA's.
    low, high = (p.on_cpu_bytes if device == "cpu" else p.allocated_bytes for p in (below, above))
    phases = {name: between(below.phase_bytes.get(name, 0), size) for name, size in above.phase_bytes.items()}
    if device == "cpu":
        phases = {name: min(size, between(low, high)) for name, size in phases.items()}
    inputs, staying, freed = (
        tuple(between(*both) for both in zip(getattr(below, name), getattr(above, name), strict=True))
        for name in ("input_bytes", "device_input_bytes", "freed_bytes")
    )
    held, given = between(below.held_bytes, above.held_bytes), between(below.given_bytes, above.given_bytes)
    # What kernels hold for a moment may be all that they ever take already, and there may be none in a small batch.
    bent = [between(low, beside) + scratch for scratch, beside in above.scratch_moments] if low < high else []
    bend = max([between(low, high), *bent]) - between(low, high)
    return _End(between(low, high), phases, inputs, staying, freed, held, given, bend)
