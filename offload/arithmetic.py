"""Which of the ways to update a span an engine uses: one for the host's memory, one for the device's.

On a CUDA machine both are one pass over memory, equal to the last bit. Where the CPU is the compute device, torch's own
operations make the update, so that a step is that of ``torch.optim.AdamW``.
"""

import importlib.util

import torch

from offload.native import faster, native_update
from offload.optimizer import UpdateSpan, update_in_torch


def host_update(device: torch.device) -> UpdateSpan:
    """For spans in host memory, beside this compute device."""
    native = native_update() if device.type == "cuda" else None
    return faster(native) if native is not None else update_in_torch


def device_update(device: torch.device) -> UpdateSpan:
    """For spans in the device's memory."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from offload.device_update import update_on_device

        return update_on_device
    return update_in_torch
