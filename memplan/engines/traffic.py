"""Traffic: the bytes one rank moves in one optimizer step, by link: what an engine's model of time starts from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Of one rank in one optimizer step, all its micro-batches together."""

    h2d_forward_bytes: int
    """Host to device while forward computes."""
    h2d_backward_bytes: int
    d2h_backward_bytes: int
    """Device to host while backward computes."""
    h2d_step_bytes: int
    """Host to device in the update, when nothing computes."""
    d2h_step_bytes: int
    nvme_read_bytes: int
    nvme_write_bytes: int
    cpu_update_elements: int
    """Parameters that the CPU updates."""
    gpu_update_elements: int
    """Parameters that the GPU updates."""
    gather_bytes: int
    """That this rank receives from other ranks in all-gathers."""
    reduce_bytes: int
    """That this rank sends to other ranks in reduce-scatters and all-reduces."""
