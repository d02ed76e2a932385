"""What a run really holds, by tier, to stand beside the prediction; and what it moves, by link."""

from collections.abc import Iterable
from typing import Protocol

import torch

from offload.block_inputs import BlockInputs
from offload.residency import Footprint
from offload.slots import SlotRings
from offload.store import Store
from offload.streams import Lane


class Moves(Protocol):
    """What moves bytes beside the lanes."""

    @property
    def fetched_bytes(self) -> int:
        """To the device so far."""

    @property
    def sent_bytes(self) -> int:
        """From the device so far."""


def traffic_bytes(
    up: Iterable[Lane], down: Iterable[Lane], beside: Iterable[Moves | None], store: Store | None
) -> dict[str, int]:
    """Bytes moved since the start, by link; ``up`` and ``down`` are the lanes to the device and from it."""
    others = [mover for mover in beside if mover is not None]
    return {
        "host_to_device": sum(x.fetched_bytes for x in others) + sum(lane.bytes_moved for lane in up),
        "device_to_host": sum(x.sent_bytes for x in others) + sum(lane.bytes_moved for lane in down),
        "nvme_read": store.bytes_read if store else 0,
        "nvme_write": store.bytes_written if store else 0,
    }


class MemoryMeter:
    """Bytes in each tier now and at the peak.

    On a GPU the allocator's own counters are read. On the CPU, where the GPU tier is a budget of ordinary memory, it
    is the model state plus what autograd saved for backward; temporaries of single operations are not seen there.
    """

    def __init__(self, device: torch.device, held: Footprint, rings: SlotRings, inputs: BlockInputs) -> None:
        self._device, self._held, self._rings, self._inputs = device, held, rings, inputs
        self._planned_slots_bytes = rings.nbytes
        self._saved: dict[int, int] = {}
        self._peak_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def begin_forward(self) -> None:
        """A forward pass begins: nothing is saved for its backward yet."""
        self._saved.clear()

    @property
    def counts_saved(self) -> bool:
        """Whether it has to be told what autograd saves."""
        return self._device.type == "cpu"

    def saved(self, tensor: torch.Tensor) -> None:
        """Autograd saved a tensor."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._saved[storage.data_ptr()] = storage.nbytes()

    def now_bytes(self) -> dict[str, int]:
        """Bytes held now."""
        if self._device.type == "cuda":
            return self._tiers(torch.cuda.memory_allocated(self._device))
        overflow = self._rings.nbytes - self._planned_slots_bytes
        held = self._held.gpu_bytes + overflow + sum(self._saved.values()) + self._inputs.device_bytes
        self._peak_bytes = max(self._peak_bytes, held)
        return self._tiers(held)

    def peak_bytes(self) -> dict[str, int]:
        """Most bytes held at any time; call after ``now_bytes`` of the same step."""
        if self._device.type == "cuda":
            return self._tiers(torch.cuda.max_memory_allocated(self._device))
        return self._tiers(self._peak_bytes)

    def _tiers(self, gpu_bytes: int) -> dict[str, int]:
        host_bytes = self._held.host_bytes + self._inputs.host_bytes
        return {"gpu": gpu_bytes, "host": host_bytes, "nvme": self._held.nvme_bytes}
