"""Which of the ways to update a span an engine uses: one for the host's memory, one for the device's.

On a CUDA machine both are one pass over memory where they can be made, equal to each other to the last bit. A way that
fails here, or disagrees with torch's own operations, is not used. Where the CPU is the compute device, torch's own
operations make the update, so that a step is that of ``torch.optim``. All of them know fp32 moments only: others are
widened for them (``moments``).
"""

import importlib.util
from dataclasses import replace
from functools import cache

import torch

from offload.masters import over_masters
from offload.moments import over_moments
from offload.native import native_update
from offload.optimizer import UpdateSpan, update_in_torch
from offload.plan import MomentFormat, OptimizerKind, StateFormat
from offload.residency import state_bytes
from offload.rules import AdagradStep, AdamStep, AdamWStep, LionStep, MomentumStep, SgdStep, UpdateStep
from offload.state import OptimizerState, carve_state, weight_dtype

TRIED_ELEMENTS = 10_007
"""Of the update by which a way is tried: several blocks, and a part of one."""
HOWS: dict[OptimizerKind, UpdateStep] = {
    OptimizerKind.ADAMW: AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.1, step=3),
    OptimizerKind.ADAM: AdamStep(1e-2, 0.9, 0.95, 1e-8, 0.1, step=3),
    OptimizerKind.LION: LionStep(1e-2, 0.9, 0.99, 0.1),
    OptimizerKind.SGD: SgdStep(1e-2, 0.1),
    OptimizerKind.SGD_MOMENTUM: MomentumStep(1e-2, 0.9, 0.1, nesterov=True, weight_decay=0.1, step=3),
    OptimizerKind.ADAGRAD: AdagradStep(1e-2, 0.1, 1e-10, 0.0, 0.1, step=3),
}
"""A step of each rule, to try it by, and to time it by."""


def host_update(device: torch.device, form: StateFormat) -> UpdateSpan:
    """For spans in host memory, beside this compute device; of masters where the weights are fp16 (``masters``)."""
    native = native_update() if device.type == "cuda" else None
    wide = replace(form, moments=MomentFormat.FP32)
    update = native if native is not None and agrees(native, torch.device("cpu"), wide) else update_in_torch
    return update if form == wide else over_moments(update)


@cache
def device_update(device: torch.device, form: StateFormat) -> UpdateSpan:
    """For spans in the device's memory; of masters where the weights are fp16 (``masters``)."""
    wide = replace(form, moments=MomentFormat.FP32)
    if form != wide:
        return over_moments(device_update(device, wide))
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from offload.device_update import update_on_device

        if agrees(update_on_device, device, form):
            return update_on_device
    return update_in_torch


def agrees(update: UpdateSpan, device: torch.device, form: StateFormat) -> bool:
    """Whether an update is that of torch's own operations, but for rounding; not where it raises."""
    try:
        return _agrees(update, device, form)
    except Exception:  # noqa: BLE001 - whatever a compiler has against this machine, the update goes on without it
        return False


def _agrees(update: UpdateSpan, device: torch.device, form: StateFormat) -> bool:
    found, expected = (_numbers(device, form) for _ in range(2))
    clip = torch.full((), 0.7, device=device)
    for way, (weight, gradient, state) in ((update, found), (update_in_torch, expected)):
        over_masters(way)(weight, gradient, state, HOWS[form.optimizer], clip)
    pairs = zip((found[0], *found[2].moments), (expected[0], *expected[2].moments), strict=True)
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(found[0].dtype, 1e-6)
    return all(torch.allclose(a.float(), b.float(), rtol=rounding, atol=1e-6) for a, b in pairs)


def _numbers(device: torch.device, form: StateFormat) -> tuple[torch.Tensor, torch.Tensor, OptimizerState]:
    """Weights, gradients and a state that has seen some steps; the same every time, whatever the caller drew."""
    draw = torch.Generator(device).manual_seed(0)
    dtype, n = weight_dtype(form.precision), TRIED_ELEMENTS
    state = carve_state(torch.zeros(state_bytes(n, form), dtype=torch.uint8, device=device), n, form)
    for moment in state.moments:
        moment.uniform_(generator=draw)
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15, generator=draw)
    weight, gradient = (torch.randn(n, generator=draw, device=device).to(dtype) for _ in range(2))
    if state.master is not None:
        state.master.copy_(weight)
    return weight, gradient, state
