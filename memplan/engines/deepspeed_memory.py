"""What DeepSpeed 0.19 holds beside activations: every copy, buffer and rounding, read from its code and measured.

Named after what they are in ``runtime/zero`` of DeepSpeed: *masters* are the fp32 weights that are updated; the *flat
gradient buffer* collects a step's gradients in the type of the weights; the *fp32 gradients* are what the CPU's Adam
reads; the *reduce bucket* ("IPG") brings gradients together for a collective. All are counted where they exist, also
while something else could do. Not counted: activations, the CUDA context, a process's own libraries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from memplan.engines.deepspeed_setup import ADAM_TENSORS, SWAPPABLE_BYTES, DeepSpeedSetup
from memplan.engines.deepspeed_sizes import Sizes, sizes_of
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
OFFLOADING_PROCESS_BYTES = 1_100_000_000
"""Host memory of a process that has its optimizer there, over one that offloads nothing: 1.07 GB in three
configurations of two models on an H200, whatever their sizes (``benchmarks.emitted``)."""
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
    process = OFFLOADING_PROCESS_BYTES if setup.optimizer is not Tier.GPU and setup.pin_memory else 0
    return Held(
        gpu, {phase: (n + process) * ranks for phase, n in host.items()}, pinned * ranks, _files(sizes, setup) * ranks
    )


def _gpu(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> dict[str, int]:
    if s.zero_stage == 3:
        return _gpu_stage_3(z, s)
    if s.whole_gradients:
        return _gpu_whole_gradients(z, s)
    return _gpu_stages_1_and_2(z, s, accumulates) if s.zero_stage else _gpu_stage_0(z, s, accumulates)


def _gpu_stage_0(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> dict[str, int]:
    """Everything on every GPU; in bf16 with a flat fp32 master, whose gradients are made of a list of copies."""
    w, t = s.precision.weight_bytes, z.trainable
    master = FP32 if s.precision is Precision.BF16 else 0
    steady = w * z.total + (master + MOMENTS) * t
    gradients = w * t
    flattened = 2 * FP32 * t if master else 0
    converted = s.reduced_bytes if s.reduced_bytes != w else 0
    reduced = (w + converted) * min(t, ALL_REDUCE_ELEMENTS + z.largest) if s.gpus > 1 else 0
    return {
        # Adam's moments are made by an update with gradients of zero.
        ATTACH: max(steady + master * t, (2 * w + w) * z.total),
        FORWARD: steady + gradients * accumulates,
        BACKWARD: steady + gradients + w * z.largest_early,
        STEP: steady + gradients + max(flattened, reduced),
    }


def _gpu_whole_gradients(z: Sizes, s: DeepSpeedSetup) -> dict[str, int]:
    """BF16_Optimizer: the sums of all gradients in fp32 on every GPU, from start to end, and bf16 ones beside them."""
    w, part, t = s.precision.weight_bytes, z.slice, z.trainable
    weights, sums, gradients = w * z.total, FP32 * t, w * t
    steady = weights + (FP32 + MOMENTS) * part + sums
    # The sums are one tensor, which is converted whole for the collective.
    reduced = s.reduced_bytes * t if s.gpus > 1 and s.reduced_bytes != FP32 else 0
    return {
        # The flat copy is made beside the model, then a copy of the slice, its masters, and the sums.
        ATTACH: max(weights + w * t, weights + (w + FP32) * part + sums),
        # Gradients of a micro-batch are set to zero and not let go until the step is over.
        FORWARD: steady + gradients,
        BACKWARD: steady + gradients + w * (z.shared + z.largest_early),
        STEP: steady + gradients + max(reduced, FP32 * z.largest, NORM * z.largest),
    }


def _gpu_stages_1_and_2(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> dict[str, int]:
    w, g, r, part = s.precision.weight_bytes, s.gradient_bytes, s.reduced_bytes, z.slice
    weights = w * z.total
    offloaded = s.optimizer is not Tier.GPU
    # Offloaded, gradients pass through a buffer for the largest on their way back from the host.
    steady = weights + (w * z.largest if offloaded else (FP32 + MOMENTS) * part)
    # Under autocast some layers reduce in bf16 and others in fp32: a set of buckets for each.
    kinds = 2 if s.precision is Precision.AMP else 1
    buckets = r * s.reduce_elements * kinds * (2 if s.overlap_comm else 1)
    # The slices of a full bucket are flattened once more for the collective.
    flattened = r * min(z.trainable, max(s.reduce_elements, z.largest_early))
    # Stage 1 leaves all gradients at their parameters until the last micro-batch, where there are several, or where
    # they are summed in another type.
    waits = s.zero_stage == 1 and (accumulates or not s.overlap_comm or g != w)
    at_parameters = g * z.trainable if waits else 0
    # A parameter on the border of two slices counts in both.
    own = 0 if offloaded else g * min(z.trainable, part + 2 * z.largest * (s.gpus > 1))
    kept = own if accumulates and s.zero_stage == 2 else 0
    held = steady + at_parameters + own + kept + buckets + flattened
    norm = NORM if offloaded else 0
    # Gradients become one fp32 tensor for the update; in bf16 by way of a flat copy.
    update = FP32 * part + (g * part if g < FP32 else 0)
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
    w, g, bf16 = s.precision.weight_bytes, s.gradient_bytes, s.precision is Precision.BF16
    resident = s.parameters is Tier.GPU
    offloaded = s.optimizer is not Tier.GPU
    alone = resident and s.gpus == 1
    weights = w * (z.partition + sum(z.frozen)) if resident else 0
    persistent = 0 if alone else w * z.persistent
    on_gpu = sum(z.gpu_groups)
    # fp32 weights that stay on the GPU are their own masters.
    master = FP32 if bf16 or offloaded else 0
    state = (master + MOMENTS) * on_gpu
    # The flat buffer of gradients; where the update is split, the GPU's fp32 gradients are kept as well.
    gradients = FP32 * on_gpu if offloaded else g * z.partition
    # Under autocast one bucket in bf16 and one in fp32.
    bucket = s.reduce_elements * (6 if s.precision is Precision.AMP else s.reduced_bytes) * s.contiguous_gradients
    steady = weights + persistent + state + gradients + bucket
    gathered = 0 if alone else w * _gathered(z, s)
    secondary = w * -(-z.total // s.hpz) if s.hpz > 1 and resident else 0
    piece = -(-z.largest_early // s.gpus)
    # A reduce-scatter interleaves the ranks' parts in a copy of the bucket.
    scattered = s.reduced_bytes * min(z.trainable, max(s.reduce_elements, z.largest_early))
    # On its way down a gradient is put together on the GPU, and copied in fp64 for its norm, or in fp32.
    passing = _passing(g, piece) if offloaded else 0
    if s.optimizer is Tier.NVME:
        # A bucket's fp32 gradients are all made before the first is written.
        passing += FP32 * -(-max(s.reduce_elements, z.largest_early) // s.gpus)
    last = w * z.largest + (_passing(g, -(-z.largest // s.gpus)) if offloaded else NORM * -(-z.largest // s.gpus))
    largest_group = max(z.groups, default=0)
    # torch's AdamW, which updates the GPU's sub-groups of a split update, makes one more copy of a sub-group; without
    # offloading a sub-group's gradients are flattened, and in bf16 converted.
    split = FP32 * max(z.gpu_groups, default=0)
    update = split if offloaded else (FP32 + g * (g < FP32)) * largest_group
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


class _Ordinary(PinnedCache):
    """Memory that is not page-locked: as much as was asked for, and given back."""

    def allocate(self, size_bytes: int) -> None:
        self.bytes += size_bytes

    def free(self, size_bytes: int) -> None:
        self.bytes -= size_bytes


@dataclass
class _Host:
    """Bytes of one rank: from the first step to the last, and beside that while it attaches and while it updates."""

    pins: bool
    locked: PinnedCache = field(default_factory=PinnedCache)
    """What DeepSpeed page-locks whatever ``pin_memory`` says."""
    steady: int = 0
    attach: int = 0
    """Instead of ``steady``, which is made by the first update."""
    step: int = 0

    def __post_init__(self) -> None:
        self.cache = self.locked if self.pins else _Ordinary()

    @property
    def phases(self) -> dict[str, int]:
        """All of it by phase."""
        kept = self.locked.bytes + (0 if self.pins else self.cache.bytes)
        held = kept + self.steady
        return {ATTACH: kept + self.attach, FORWARD: held, BACKWARD: held, STEP: held + self.step}


def _host(z: Sizes, s: DeepSpeedSetup, accumulates: bool) -> tuple[dict[str, int], int]:
    """Bytes of one rank by phase, and how many of them are page-locked."""
    host = _Host(s.pin_memory)
    if s.zero_stage == 3:
        _weights_on_host(z, s, host)
        _state_on_host_stage_3(z, s, host)
    elif s.optimizer is not Tier.GPU:
        _state_on_host_stages_1_and_2(z, s, host, accumulates)
    return host.phases, host.locked.bytes


def _state_on_host_stages_1_and_2(z: Sizes, s: DeepSpeedSetup, host: _Host, accumulates: bool) -> None:
    w = s.precision.weight_bytes
    host.cache.allocate(FP32 * z.slice)  # masters
    host.cache.allocate(w * z.slice)  # the updated weights, in their own type, before they go up
    host.cache.allocate(w * z.largest)  # the largest gradient on its way
    host.cache.allocate(FP32 * z.slice)  # fp32 gradients
    if accumulates:
        # The sum so far of every parameter of the slice, each by itself and whole: the large ones, to be sure.
        taken = 0
        for n in sorted(z.whole, reverse=True):
            if taken < z.slice:
                host.cache.allocate(w * n)
            taken += n
    host.steady = MOMENTS * z.slice
    # Each is built as ordinary memory and then copied into page-locked memory.
    host.attach = FP32 * z.slice * s.pin_memory


def _weights_on_host(z: Sizes, s: DeepSpeedSetup, host: _Host) -> None:
    """Stage 3. Every partition is made by itself, then moved into one buffer; the cache keeps the blocks."""
    w = s.precision.weight_bytes
    if s.parameters is Tier.GPU:
        # Partitions on the GPU are put in order by way of the host.
        host.attach = w * z.partition
        return
    if s.hpz > 1:
        for n in z.whole:
            host.cache.allocate(w * -(-n // s.hpz))
    swapped = s.parameters is Tier.NVME
    own = [w * part for n, part in zip(z.whole, z.partitions, strict=True) if n > s.persistence_elements]
    single = [size for size in (*own, *(w * n for n in z.frozen)) if not (swapped and size >= SWAPPABLE_BYTES)]
    # Under zero.Init a tied parameter is built under both of its names, and the cache keeps the block of the second.
    twice = [w * -(-n // s.gpus) for n in z.tied if s.zero_init and s.pin_memory and not swapped]
    for size in (*single, *twice):
        host.cache.allocate(size)
    if swapped:
        # Buffers for what is read, and for a sub-group of new weights on its way down, locked without rounding.
        reused = max(z.groups, default=0) if z.kept < z.partition else 0
        host.locked.bytes += w * (s.param_buffer_count * s.param_buffer_elements + reused)
        # The room for parameters that may stay here is taken whether they fill it or not.
        host.locked.allocate(w * min(z.partition, s.max_in_cpu_elements))
    else:
        host.locked.allocate(w * z.partition)
        for size in own:
            host.cache.free(size)


def _state_on_host_stage_3(z: Sizes, s: DeepSpeedSetup, host: _Host) -> None:
    if s.optimizer is Tier.GPU:
        return
    w, largest = s.precision.weight_bytes, max(z.groups, default=0)
    least = SWAPPABLE_BYTES if s.optimizer is Tier.NVME else FP32 * (largest + 1)
    swapped = [n for n in z.groups if FP32 * n >= least]
    kept = sum(z.host_groups) - sum(swapped)
    for n in z.groups:
        if FP32 * n < least:
            host.cache.allocate(FP32 * n)  # fp32 gradients of each sub-group
    for n in z.gpu_groups:
        host.cache.free(FP32 * n)  # moved up
    host.cache.allocate(s.gradient_bytes * z.partition)  # the flat buffer of gradients
    host.steady = (FP32 + MOMENTS) * kept
    # Masters are converted and cloned one by one; gradients are built as ordinary memory.
    host.attach = max(host.attach, FP32 * (kept + largest) + max(FP32 * largest, w * z.partition))
    # Weights that live on the GPU are converted on the host before they go up.
    host.step = w * max(z.host_groups, default=0) if s.parameters is Tier.GPU else 0
    if swapped:
        host.locked.bytes += s.optimizer_buffer_count * FP32 * largest
        host.step += MOMENTS * largest  # in the first step the moments are made outside of the buffers


def _files(z: Sizes, s: DeepSpeedSetup) -> int:
    """Of one rank: masters, moments and fp32 gradients, and weights."""
    w = s.precision.weight_bytes
    state = sum(n for n in z.groups if n * FP32 >= SWAPPABLE_BYTES) if s.optimizer is Tier.NVME else 0
    weights = 0
    if s.parameters is Tier.NVME:
        weights = sum(n for n in (*z.partitions, *z.frozen) if n * w >= SWAPPABLE_BYTES)
        # Under zero.Init a tied parameter is built, and written, under both of its names.
        weights += -(-z.shared // s.gpus) * s.zero_init
    return ADAM_TENSORS * FP32 * state + w * weights
