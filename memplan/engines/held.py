"""What an engine holds beside activations, by tier and phase: the answer every engine's model of memory gives."""

from collections.abc import Mapping
from dataclasses import dataclass

ATTACH, FORWARD, BACKWARD, STEP = "attach", "forward", "backward", "step"
PHASES = (ATTACH, FORWARD, BACKWARD, STEP)
"""Of a run: the engine takes the model over (once), then forward, backward and update of every step."""


@dataclass(frozen=True)
class Held:
    """Bytes of model state, copies and buffers; activations and the CUDA context are not in it."""

    gpu: Mapping[str, int]
    """The most on one GPU, by phase."""
    host: Mapping[str, int]
    """The most in one node's memory, all its ranks together, by phase."""
    pinned_bytes: int
    """Of ``host``, page-locked: rounding by the allocator included."""
    nvme_bytes: int
    """Of files on one node's disk."""

    @property
    def gpu_peak_bytes(self) -> int:
        """Over all phases."""
        return max(self.gpu.values())

    @property
    def host_peak_bytes(self) -> int:
        """Over all phases."""
        return max(self.host.values())
