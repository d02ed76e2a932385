"""The bytes that one micro-batch holds beside the model's state, for every way in which it can pass through the model.

A profile knows a few points: batch sizes, all blocks recomputed or none, the loss whole or in chunks. Between two batch
sizes the line through them counts: at every moment of a step the bytes grow linearly with the samples, so the peak,
being the largest of many lines, lies below the line through two of its points.

Where the first blocks are recomputed, a moment outside of them has what it has without recompute, less what forward
keeps for all of them. A moment inside of them has what it has where all are recomputed, or less: the blocks behind them
are through. So the peak is the larger of these two, and neither is too low.
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
    share = recompute_share(profile, way)
    known = [p for p in profile.activations if p.loss_chunks == way.loss_chunks]
    kept = [p for p in known if not p.recompute]
    again = [p for p in known if p.recompute and p.checkpoints_on_host == (way.checkpoints is Tier.HOST)]
    ends = [(kept, 1 - share), (again, share)]
    parts = [(_at_batch(points, way.micro_batch_size, device), weight) for points, weight in ends if weight]
    if any(part is None for part, _ in parts):
        return None
    found = [part for part, _ in parts if part is not None]
    first, last = found[0], found[-1]
    saved = _saved_bytes(profile, way, first, last) if len(found) > 1 else 0.0
    peak = max(last.peak_bytes, first.peak_bytes - saved)
    names = dict.fromkeys(name for part in found for name in part.phase_bytes)
    phases = {name: max(last.phase_bytes.get(name, 0), first.phase_bytes.get(name, 0) - saved) for name in names}
    given = first.given_bytes if device == "cuda" else 0
    on_host = way.recomputed_blocks if way.checkpoints is Tier.HOST else 0
    return Activations(
        round(peak),
        int(peak * ACTIVATION_MARGIN) + given + FIXED_MARGIN_BYTES[device],
        {name: round(size) for name, size in phases.items()},
        tuple(map(round, last.input_bytes[:on_host])),
    )


def _saved_bytes(profile: ModelProfile, way: Way, plain: "_End", again: "_End") -> float:
    """What forward keeps less for backward with the first blocks recomputed, of what it keeps less with all of them.

    A block saves what it would have kept, but for its input where that stays on the device. Of inputs that wait on the
    host the newest one stays, until a block behind it runs again.
    """
    count, on_host = way.recomputed_blocks, way.checkpoints is Tier.HOST
    inputs = again.input_bytes or (0.0,) * len(profile.blocks)
    kept = (size * way.micro_batch_size / profile.batch_size for size in _kept_bytes(profile))
    each = [max(0.0, size - (0.0 if on_host else given)) for size, given in zip(kept, inputs, strict=True)]
    newest = (inputs[count - 1], inputs[-1]) if on_host else (0.0, 0.0)
    whole = plain.held_bytes - again.held_bytes + newest[1]
    part = whole * _share(each, count)
    # What several blocks keep is gone only with the last of them.
    return (min(sum(each[:count]), part) if any(each) else part) - newest[0]


def recompute_share(profile: ModelProfile, way: Way) -> float:
    """What the recomputed blocks would keep for backward, of what all blocks would."""
    if way.recomputed_blocks in (0, len(profile.blocks)):
        return float(way.recomputed_blocks > 0)
    return _share(_kept_bytes(profile), way.recomputed_blocks)


def _kept_bytes(profile: ModelProfile) -> list[int]:
    """What each block keeps for backward in a batch of the profile."""
    kept = {layer.path: layer.activation_bytes for layer in profile.layers}
    return [kept.get(block, 0) for block in profile.blocks]


def _share(sizes: Sequence[float], count: int) -> float:
    """Of all, the first so many; without figures they are taken as alike."""
    return sum(sizes[:count]) / sum(sizes) if sum(sizes) else count / len(sizes)


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
    input_bytes: tuple[float, ...]
    """By recomputed block."""
    held_bytes: int
    """When backward begins."""
    given_bytes: int


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
    inputs = tuple(between(*both) for both in zip(below.input_bytes, above.input_bytes, strict=True))
    held, given = between(below.held_bytes, above.held_bytes), between(below.given_bytes, above.given_bytes)
    return _End(between(low, high), phases, inputs, held, given)
