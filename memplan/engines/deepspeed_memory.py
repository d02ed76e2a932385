"""What DeepSpeed 0.19 holds beside activations: every copy, buffer and rounding, read from its code and measured.

Named after what they are in ``runtime/zero`` of DeepSpeed: *masters* are the fp32 weights that are updated; the *flat
gradient buffer* collects a step's gradients in the type of the weights; the *fp32 gradients* are what the CPU's Adam
reads; the *reduce bucket* ("IPG") brings gradients together for a collective. All are counted where they exist, also
while something else could do. Not counted: activations, the CUDA context, a process's own libraries.
"""

from collections.abc import Sequence

from memplan.engines.deepspeed_setup import ADAM_TENSORS, DeepSpeedSetup
from memplan.engines.deepspeed_sizes import Sizes, sizes_of, swappable
from memplan.engines.held import ATTACH, BACKWARD, FORWARD, STEP, Held
from memplan.engines.pinned import PinnedCache
from offload.plan import Precision, Tier
from profiler.profile import ParameterProfile

FP32 = 4
MOMENTS = 8
NORM = 8
"""Gradient norms are taken of an fp64 copy."""
NORM_PIECE_ELEMENTS = 250_000_000
"""In stage 3 with offloading, of at most this many elements at a time."""
ALL_REDUCE_ELEMENTS = 500_000_000
"""Gradients that stage 0 flattens for one all-reduce."""


def deepspeed_held(
    parameters: Sequence[ParameterProfile], setup: DeepSpeedSetup, gradient_accumulation_steps: int
) -> Held:
    """Bytes by tier and phase, an upper bound: what different moments of one phase hold is added up.

    ``parameters`` in the order of ``model.parameters()``; of ``gradient_accumulation_steps`` it matters only whether
    there are several. ``attach`` is ``deepspeed.initialize`` with the model as the script built it, on the host
    in the type of the parameters' profiles, or under ``deepspeed.zero.Init``; ``step`` also covers the end of
    backward, when the activations are gone and the last gradients, those of the embedding, are worked on.
    """
    sizes = sizes_of(parameters, setup)
    accumulates = gradient_accumulation_steps > 1
    gpu = _gpu(sizes, setup, accumulates)
    host, pinned = _host(sizes, setup, accumulates)
    if not setup.zero_init:
        # A module moves to its GPU parameter by parameter; until then each rank has a model of its own.
        host[ATTACH] = max(host[ATTACH], sum(p.bytes for p in parameters))
    ranks = setup.ranks_per_node
    return Held(gpu, {phase: n * ranks for phase, n in host.items()}, pinned * ranks, _files(sizes, setup) * ranks)


def _gpu(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> dict[str, int]:
    if s.zero_stage == 3:
        return _gpu_stage_3(z, s)
    return _gpu_stages_1_and_2(z, s, accumulates) if s.zero_stage else _gpu_stage_0(z, s, accumulates)


def _gpu_stage_0(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> dict[str, int]:
    """Everything on every GPU; in bf16 with a flat fp32 master, whose gradients are made of a list of copies."""
    w, t = s.precision.weight_bytes, z.trainable
    master = FP32 if s.precision is Precision.BF16 else 0
    steady = w * z.total + (master + MOMENTS) * t
    gradients = w * t
    flattened = 2 * FP32 * t if master else 0
    reduced = w * min(t, ALL_REDUCE_ELEMENTS + z.largest) if s.gpus > 1 else 0
    return {
        # Adam's moments are made by an update with gradients of zero.
        ATTACH: max(steady + master * t, (2 * w + w) * z.total),
        FORWARD: steady + gradients * accumulates,
        BACKWARD: steady + gradients + w * z.largest_early,
        STEP: steady + gradients + max(flattened, reduced),
    }


def _gpu_stages_1_and_2(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> dict[str, int]:
    w, part = s.precision.weight_bytes, z.slice
    weights = w * z.total
    offloaded = s.optimizer is not Tier.GPU
    # Offloaded, gradients pass through a buffer for the largest on their way back from the host.
    steady = weights + (w * z.largest if offloaded else (FP32 + MOMENTS) * part)
    # Under autocast some layers reduce in bf16 and others in fp32: a set of buckets for each.
    kinds = 2 if s.precision is Precision.AMP else 1
    buckets = w * s.reduce_elements * kinds * (2 if s.overlap_comm else 1)
    # The slices of a full bucket are flattened once more for the collective.
    flattened = w * min(z.trainable, max(s.reduce_elements, z.largest_early))
    # Stage 1 leaves all gradients at their parameters until the last micro-batch, where there are several.
    at_parameters = w * z.trainable if s.zero_stage == 1 and (accumulates or not s.overlap_comm) else 0
    # A parameter on the border of two slices counts in both.
    own = 0 if offloaded else w * min(z.trainable, part + 2 * z.largest * (s.gpus > 1))
    kept = own if accumulates and s.zero_stage == 2 else 0
    held = steady + at_parameters + own + kept + buckets + flattened
    norm = NORM if offloaded else 0
    # Gradients become one fp32 tensor for the update; in bf16 by way of a flat copy.
    update = FP32 * part + (w * part if s.precision is Precision.BF16 else 0)
    return {
        # The flat copy is made beside the model, then the fp32 masters of it, on the GPU even where they go down.
        ATTACH: max(weights + w * z.trainable, weights + (w + FP32) * part),
        FORWARD: steady + (at_parameters + kept) * accumulates,
        BACKWARD: held + w * z.shared + (w + norm) * z.largest_early,
        STEP: max(
            held - buckets * (not offloaded) + (w + norm) * z.largest,
            steady if offloaded else steady + own + max(update, NORM * z.largest),
        ),
    }


def _gpu_stage_3(z: Sizes, s: DeepSpeedSetup) -> dict[str, int]:
    w, bf16 = s.precision.weight_bytes, s.precision is Precision.BF16
    resident = s.parameters is Tier.GPU
    offloaded = s.optimizer is not Tier.GPU
    alone = resident and s.gpus == 1
    weights = w * (z.partition + z.frozen_partition) if resident else 0
    persistent = 0 if alone else w * z.persistent
    on_gpu = sum(z.gpu_groups)
    # fp32 weights that stay on the GPU are their own masters.
    master = FP32 if bf16 or offloaded else 0
    state = (master + MOMENTS) * on_gpu
    # The flat buffer of gradients; where the update is split, the GPU's fp32 gradients are kept as well.
    gradients = FP32 * on_gpu if offloaded else w * z.partition
    # Under autocast one bucket in bf16 and one in fp32.
    bucket = s.reduce_elements * (2 if bf16 else 6 if s.precision is Precision.AMP else 4) * s.contiguous_gradients
    steady = weights + persistent + state + gradients + bucket
    gathered = 0 if alone else w * _gathered(z, s)
    secondary = w * -(-z.total // s.hpz) if s.hpz > 1 and resident else 0
    piece = -(-z.largest_early // s.gpus)
    # A reduce-scatter interleaves the ranks' parts in a copy of the bucket.
    scattered = w * min(z.trainable, max(s.reduce_elements, z.largest_early))
    # On its way down a gradient is put together on the GPU, and copied in fp64 for its norm, or in fp32.
    passing = _passing(w, piece) if offloaded else 0
    if s.optimizer is Tier.NVME:
        # A bucket's fp32 gradients are all made before the first is written.
        passing += FP32 * -(-max(s.reduce_elements, z.largest_early) // s.gpus)
    last = w * z.largest + (_passing(w, -(-z.largest // s.gpus)) if offloaded else NORM * -(-z.largest // s.gpus))
    largest_group = max(z.groups, default=0)
    # torch's AdamW, which updates the GPU's sub-groups of a split update, makes one more copy of a sub-group; without
    # offloading a sub-group's gradients are flattened, and in bf16 converted.
    split = FP32 * max(z.gpu_groups, default=0)
    update = split if offloaded else (FP32 + w * bf16) * largest_group
    full = w * (z.largest if s.zero_init else z.total)
    return {
        # Masters are converted and cloned a sub-group at a time.
        ATTACH: max(full + weights, steady + 2 * FP32 * largest_group, steady + w * z.largest),
        FORWARD: steady + gathered + secondary,
        BACKWARD: steady + gathered + secondary + w * (z.shared + z.largest_early) + scattered + passing,
        STEP: steady + secondary + max(update, scattered + last),
    }


def _passing(w: int, elements: int) -> int:
    return w * elements + NORM * min(elements, NORM_PIECE_ELEMENTS)


def _gathered(z: Sizes, s: DeepSpeedSetup) -> int:
    """Elements of whole parameters on a GPU in stage 3.

    Every module that begins, also one without parameters, fetches a further bucket ahead until ``live_elements`` are
    there; the parameter that crosses the line is fetched whole. Of several ranks the gathered bucket remains until the
    last of its parameters has been copied out of it.
    """
    coming = z.total - z.persistent
    live = min(coming, max(s.live_elements, z.largest) + z.largest)
    return live + (min(coming, s.gather_elements + 2 * z.largest) if s.gpus > 1 else 0)


def _host(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> tuple[dict[str, int], int]:
    """Bytes of one rank by phase, and how many of them are page-locked."""
    if s.optimizer is Tier.GPU and s.parameters is Tier.GPU:
        # Stage 3 puts the partitions in order by way of the host.
        return {
            ATTACH: s.precision.weight_bytes * z.partition * (s.zero_stage == 3),
            FORWARD: 0,
            BACKWARD: 0,
            STEP: 0,
        }, 0
    rows = _host_stage_3(z, s) if s.zero_stage == 3 else _host_stages_1_and_2(z, s, accumulates)
    pinned, steady, attach, step = rows
    held = pinned + steady
    return {ATTACH: pinned + attach, FORWARD: held, BACKWARD: held, STEP: held + step}, pinned * s.pin_memory


class _Exact(PinnedCache):
    """Memory that is not page-locked: as much as was asked for, and given back."""

    def allocate(self, size_bytes: int) -> None:
        self.bytes += size_bytes

    def free(self, size_bytes: int) -> None:
        self.bytes -= size_bytes


def _host_stages_1_and_2(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> tuple[int, int, int, int]:
    w = s.precision.weight_bytes
    cache = PinnedCache() if s.pin_memory else _Exact()
    cache.allocate(FP32 * z.slice)  # masters
    cache.allocate(w * z.slice)  # the updated weights, in their own type, before they go up
    cache.allocate(w * z.largest)
    cache.allocate(FP32 * z.slice)  # fp32 gradients
    if accumulates:
        # The sum so far of every parameter of the slice, each pinned by itself and whole; a slice at either end may
        # begin and end within one.
        least, taken = z.slice, 0
        for n in sorted(z.whole, reverse=True):
            if taken >= least:
                break
            cache.allocate(w * n)
            taken += n
    # Each is built as ordinary memory and then copied into page-locked memory.
    building = FP32 * z.slice * s.pin_memory
    return cache.bytes, MOMENTS * z.slice, building, 0


def _host_stage_3(z: Sizes, s: DeepSpeedSetup) -> tuple[int, int, int, int]:
    """Page-locked, ordinary memory from step to step, and what attaching and updating need beside the page-locked."""
    w, nvme = s.precision.weight_bytes, s.optimizer is Tier.NVME
    cache = PinnedCache() if s.pin_memory else _Exact()
    locked = _weights_on_host(z, s, cache)
    largest, on_host = max(z.groups, default=0), sum(z.host_groups)
    if s.hpz > 1 and s.parameters is not Tier.GPU:
        for n in z.whole:
            cache.allocate(w * -(-n // s.hpz))
    swapped = [n for n in z.groups if nvme and swappable(n, FP32)]
    steady = (FP32 + MOMENTS) * (on_host - sum(swapped))
    if s.optimizer is not Tier.GPU:
        for n in z.groups:
            if n not in swapped:
                cache.allocate(FP32 * n)  # fp32 gradients, of each sub-group
        for n in z.gpu_groups:
            cache.free(FP32 * n)  # moved up, but the block stays
        cache.allocate(w * z.partition)  # the flat buffer of gradients
    if swapped:
        # Swap buffers are locked by DeepSpeed itself, without rounding.
        locked += s.optimizer_buffer_count * FP32 * largest
    masters = FP32 * (on_host - sum(swapped))
    attach = masters + FP32 * largest + max(FP32 * largest, w * z.partition)
    # Weights that live on the GPU are converted on the host before they go up.
    converted = w * max(z.host_groups, default=0) if s.parameters is Tier.GPU else 0
    # With swapping, the moments are made outside of the buffers in the first step.
    step = MOMENTS * largest if swapped else 0
    return cache.bytes + locked, steady, attach, step + converted


def _weights_on_host(z: Sizes, s: DeepSpeedSetup, cache: PinnedCache) -> int:
    """Allocate the partitions; returns what is locked beside the cache."""
    w = s.precision.weight_bytes
    if s.parameters is Tier.GPU:
        return 0
    nvme = s.parameters is Tier.NVME
    rows = [(w * part, n) for n, part in zip(z.whole, z.partitions, strict=True) if n > s.persistence_elements]
    rows = [(size, n) for size, n in rows if not (nvme and swappable(size // w, w))]
    for size, _ in rows:
        cache.allocate(size)  # each by itself at first ...
    cache.allocate(w * z.frozen_partition)
    if nvme:
        buffers = s.param_buffer_count * s.param_buffer_elements
        return w * (buffers + max(z.groups, default=0))  # ... and a sub-group of new weights on its way down
    cache.allocate(w * z.partition)  # ... then in one buffer,
    for size, _ in rows:
        cache.free(size)  # after which the blocks stay.
    return 0


def _files(z: Sizes, s: DeepSpeedSetup) -> int:
    """Of one rank: masters, moments and fp32 gradients, and weights."""
    w = s.precision.weight_bytes
    state = sum(n for n in z.groups if swappable(n, FP32)) if s.optimizer is Tier.NVME else 0
    weights = sum(n for n in z.partitions if swappable(n, w)) if s.parameters is Tier.NVME else 0
    return ADAM_TENSORS * FP32 * state + w * weights
