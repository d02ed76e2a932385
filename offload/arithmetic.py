"""Which of the ways to update a span an engine uses: one for the host's memory, one for the device's.

On a CUDA machine both are one pass over memory where they can be made, equal to each other to the last bit. A way that
fails here, or disagrees with torch's own operations, is not used. Where the CPU is the compute device, torch's own
operations make the update, so that a step is that of ``torch.optim.AdamW``.
"""

import importlib.util
from functools import cache

import torch

from offload.native import native_update
from offload.optimizer import AdamWStep, UpdateSpan, update_in_torch
from offload.plan import Precision
from offload.residency import state_bytes
from offload.state import AdamState, carve_state, weight_dtype

TRIED_ELEMENTS = 10_007
"""Of the update by which a way is tried: several blocks, and a part of one."""
HOW = AdamWStep(learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)


def host_update(device: torch.device) -> UpdateSpan:
    """For spans in host memory, beside this compute device."""
    native = native_update() if device.type == "cuda" else None
    return native if native is not None and agrees(native, torch.device("cpu")) else update_in_torch


@cache
def device_update(device: torch.device) -> UpdateSpan:
    """For spans in the device's memory."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from offload.device_update import update_on_device

        if agrees(update_on_device, device):
            return update_on_device
    return update_in_torch


def agrees(update: UpdateSpan, device: torch.device) -> bool:
    """Whether an update is that of torch's own operations, but for rounding; not where it raises."""
    try:
        return all(_agrees(update, device, precision) for precision in (Precision.FP32, Precision.BF16))
    except Exception:  # noqa: BLE001 - whatever a compiler has against this machine, the update goes on without it
        return False


def _agrees(update: UpdateSpan, device: torch.device, precision: Precision) -> bool:
    found, expected = (_numbers(device, precision) for _ in range(2))
    clip = torch.full((), 0.7, device=device)
    for way, (weight, gradient, state) in ((update, found), (update_in_torch, expected)):
        way(weight, gradient, state, HOW, clip)
    pairs = zip((found[0], *found[2][:2]), (expected[0], *expected[2][:2]), strict=True)
    rounding = 2.0**-8 if precision is Precision.BF16 else 1e-6
    return all(torch.allclose(a.float(), b.float(), rtol=rounding, atol=1e-6) for a, b in pairs)


def _numbers(device: torch.device, precision: Precision) -> tuple[torch.Tensor, torch.Tensor, AdamState]:
    """Weights, gradients and a state that has seen some steps; the same every time, whatever the caller drew."""
    draw = torch.Generator(device).manual_seed(0)
    dtype, n = weight_dtype(precision), TRIED_ELEMENTS
    state = carve_state(torch.zeros(n * state_bytes(precision), dtype=torch.uint8, device=device), n, precision)
    state.exp_avg.normal_(generator=draw)
    state.exp_avg_sq.uniform_(generator=draw)
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15, generator=draw)
    weight, gradient = (torch.randn(n, generator=draw, device=device).to(dtype) for _ in range(2))
    return weight, gradient, state
