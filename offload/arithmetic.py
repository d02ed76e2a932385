"""Which of the ways to update a span an engine uses: one for the host's memory, one for the device's.

On a CUDA machine both are one pass over memory where they can be made, equal to each other to the last bit. A way that
fails here, or disagrees with torch's own operations, is not used. Where the CPU is the compute device, torch's own
operations make the update, so that a step is that of ``torch.optim``. Moments in bf16 or 8 bits the compiled update of
the host does itself, where it is to the last bit what ``moments`` makes of it; for the others they are widened.
"""

import importlib.util
from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch

from offload.masters import over_masters
from offload.moments import over_moments
from offload.native import native_update
from offload.optimizer import UpdateSpan, update_in_torch
from offload.plan import MomentFormat, OptimizerKind, Precision, StateFormat
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
    if native is None or not agrees(native, torch.device("cpu"), wide):
        return update_in_torch if form == wide else over_moments(update_in_torch)
    widened = over_moments(native)
    return native if form == wide or equals(native, widened, torch.device("cpu"), form) else widened


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
    rounding = {Precision.BF16: 2.0**-8, Precision.FP16: 2.0**-10}.get(form.precision, 1e-6)
    with suppress(Exception):  # whatever a compiler has against this machine, the update goes on without it
        (found, state), (expected, other) = (_tried(way, device, form) for way in (update, update_in_torch))
        pairs = zip((found, *state.moments), (expected, *other.moments), strict=True)
        return all(torch.allclose(a.float(), b.float(), rtol=rounding, atol=1e-6) for a, b in pairs)
    return False


def equals(update: UpdateSpan, other: UpdateSpan, device: torch.device, form: StateFormat) -> bool:
    """Whether two updates are the same to the last bit; not where one raises."""
    with suppress(Exception):
        (one, state), (two, beside) = (_tried(way, device, form) for way in (update, other))
        return all(torch.equal(a, b) for a, b in zip((one, *state.tensors()), (two, *beside.tensors()), strict=True))
    return False


def _tried(update: UpdateSpan, device: torch.device, form: StateFormat) -> tuple[torch.Tensor, OptimizerState]:
    """Weights and state after an update."""
    weight, gradient, state = _numbers(device, form)
    over_masters(update)(weight, gradient, state, HOWS[form.optimizer], torch.full((), 0.7, device=device))
    return weight, state


def _numbers(device: torch.device, form: StateFormat) -> tuple[torch.Tensor, torch.Tensor, OptimizerState]:
    """Weights, gradients and a state that has seen some steps; the same every time, whatever the caller drew."""
    draw = torch.Generator(device).manual_seed(0)
    dtype, n = weight_dtype(form.precision), TRIED_ELEMENTS
    state = carve_state(torch.zeros(state_bytes(n, form), dtype=torch.uint8, device=device), n, form)
    for moment in (*state.moments, *state.scales):
        if moment.is_floating_point():
            moment.uniform_(generator=draw)
        else:
            moment.view(torch.uint8).random_(generator=draw)
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15, generator=draw)
    weight, gradient = (torch.randn(n, generator=draw, device=device).to(dtype) for _ in range(2))
    if state.master is not None:
        state.master.copy_(weight)
    return weight, gradient, state
