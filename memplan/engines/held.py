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

    def or_more(self, other: "Held") -> "Held":
        """The larger of two, phase by phase: room for whichever comes."""
        return Held(
            gpu={phase: max(size, other.gpu[phase]) for phase, size in self.gpu.items()},
            host={phase: max(size, other.host[phase]) for phase, size in self.host.items()},
            pinned_bytes=max(self.pinned_bytes, other.pinned_bytes),
            nvme_bytes=max(self.nvme_bytes, other.nvme_bytes),
        )
