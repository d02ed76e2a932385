"""The copies that a step of DeepSpeed 0.19 makes, and which of them run beside what.

[Note: overlap in DeepSpeed]
Weights that are off the GPU come up module by module in forward, and again in backward, on a stream of their own,
ahead of use by one bucket a module; of several ranks each brings its own part up and the gather follows. Gradients go
down during backward, on the stream that reduces them. The update begins after the last gradient and nothing runs
beside it: neither the next forward, nor a copy of the weights that it has finished (unless the GPU updates its own
share, one sub-group after the other). In stages 1 and 2 all updated weights then go up in one piece; in stage 3 those
that live on the GPU go up a sub-group at a time, from ordinary memory, at the pace of pageable copies. With state on
NVMe every sub-group is read, updated and written; with eight buffers the next one's reading overlaps the update, with
twelve the last one's writing too. Its fp32 gradients are written during backward.
"""

from memplan.engines.deepspeed_memory import FP32, MOMENTS
from memplan.engines.deepspeed_setup import DeepSpeedSetup
from memplan.engines.traffic import Traffic
from offload.plan import Precision, Tier


def deepspeed_traffic(
    setup: DeepSpeedSetup, trainable_elements: int, total_elements: int, micro_batches: int, kept_elements: int = 0
) -> Traffic:
    """The copies of one step; ``micro_batches`` is the number of gradient accumulation steps.

    ``kept_elements`` are one rank's parameters that stay in host memory where the others are on NVMe (``Sizes.kept``).

    Parameters that persist on the GPU are counted like the others: they are small.
    """
    s, w = setup, setup.precision.weight_bytes
    part = -(-trainable_elements // s.gpus) if s.zero_stage else trainable_elements
    held = -(-total_elements // s.gpus) if s.zero_stage == 3 else total_elements
    offloaded = s.optimizer is not Tier.GPU
    on_gpu = int(s.gpu_update_share * part) if offloaded else part
    fetched = w * held * micro_batches if s.parameters is not Tier.GPU else 0
    down, up = _gradients(s, part, micro_batches) if offloaded else (0, 0)
    read, written = _disk(s, part, part - kept_elements, held - kept_elements, micro_batches)
    return Traffic(
        h2d_forward_bytes=fetched,
        h2d_backward_bytes=fetched + up,
        d2h_backward_bytes=down,
        h2d_step_bytes=w * (part - on_gpu) if offloaded and s.parameters is Tier.GPU else 0,
        d2h_step_bytes=w * on_gpu if s.parameters is not Tier.GPU else 0,
        nvme_read_bytes=read,
        nvme_write_bytes=written,
        cpu_update_elements=part - on_gpu if offloaded else 0,
        gpu_update_elements=on_gpu,
        gather_bytes=_gathered(s, trainable_elements, total_elements, micro_batches),
        reduce_bytes=_reduced(s, trainable_elements, micro_batches),
    )


def _gradients(s: DeepSpeedSetup, part: int, micro_batches: int) -> tuple[int, int]:
    """Down and up, bytes. All end in fp32 on the host.

    Stage 3 stores the sum of every micro-batch in the flat buffer, and brings it back: to be added to, and, also of
    the first, because norm and fp32 copy are made on the GPU. Stage 2 stores and brings back only where there are
    several; stage 1 lets them wait on the GPU.
    """
    w = s.precision.weight_bytes
    if s.zero_stage == 3:
        down = up = s.gradient_bytes * part * micro_batches
    elif s.zero_stage == 2 and micro_batches > 1:
        down, up = w * part * micro_batches, w * part * (micro_batches - 1)
    else:
        down = up = 0
    return down + FP32 * part, up


def _disk(s: DeepSpeedSetup, part: int, swapped: int, held: int, micro_batches: int) -> tuple[int, int]:
    """Read and written, bytes: master, moments and fp32 gradients once each way, 32 bytes an element in all.

    Of the weights ``held`` are read, and the updated ones written, ``swapped``.
    """
    read = written = 0
    if s.optimizer is Tier.NVME:
        read = written = (FP32 + MOMENTS + FP32) * part
    if s.parameters is Tier.NVME:
        w = s.precision.weight_bytes
        read += 2 * w * held * micro_batches
        written += w * swapped
    return read, written


def _gathered(s: DeepSpeedSetup, trainable: int, total: int, micro_batches: int) -> int:
    """Stage 3 gathers in forward and in backward, under autocast in bf16; stages 1 and 2 once, after the update."""
    w = s.precision.weight_bytes
    if s.zero_stage == 3:
        return _from_others(2 * (2 if s.precision is Precision.AMP else w) * total * micro_batches, s.gpus)
    return _from_others(w * trainable, s.gpus) if s.zero_stage else 0


def _reduced(s: DeepSpeedSetup, trainable: int, micro_batches: int) -> int:
    """Stage 3 scatters; the others reduce to all ranks, which is twice that, though each keeps its slice only."""
    element = 2 if s.precision is Precision.AMP else s.reduced_bytes
    if s.zero_stage == 3:
        return _from_others(element * trainable * micro_batches, s.gpus)
    times = micro_batches if s.zero_stage == 2 else 1
    return _from_others(2 * element * trainable * times, s.gpus)


def _from_others(size_bytes: int, gpus: int) -> int:
    return size_bytes * (gpus - 1) // gpus
