"""Updates of whole fp32 masters beside fp16 weights, and updates that the device may find it must not make. Pure.

Any update of fp32 weights does for masters: they take the weights' place. Nothing waits for the device to tell whether
a step is skipped: it makes the update on copies, a piece at a time, and keeps what was there or what it made.
"""

import torch

from offload.optimizer import CPU_ELEMENTS, DEVICE_ELEMENTS, UpdateSpan
from offload.rules import UpdateStep
from offload.state import OptimizerState


def over_masters(update: UpdateSpan) -> UpdateSpan:
    """``update``, which knows no masters; where the state has them they are updated, and the weights are rounded."""

    def updated(
        weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, how: UpdateStep, clip: float | torch.Tensor
    ) -> None:
        if state.master is None:
            update(weight, gradient, state, how, clip)
            return
        for part, moments in _pieces(weight, state):
            assert moments.master is not None
            update(moments.master, gradient[part].float(), moments._replace(master=None), how, clip)
            weight[part].copy_(moments.master)

    return updated


def unless(skip: torch.Tensor, update: UpdateSpan) -> UpdateSpan:
    """``update`` where ``skip``, a boolean scalar on the device, is false; where it is true nothing changes."""

    def updated(
        weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, how: UpdateStep, clip: float | torch.Tensor
    ) -> None:
        for part, moments in _pieces(weight, state):
            made, there = weight[part].clone(), moments.each(torch.clone)
            update(made, gradient[part], there, how, clip)
            for before, after in zip((weight[part], *moments.tensors()), (made, *there.tensors()), strict=True):
                torch.where(skip, before, after, out=before)

    return updated


def _pieces(weight: torch.Tensor, state: OptimizerState) -> list[tuple[slice, OptimizerState]]:
    """Spans so small that copies of one stay in the cache of a CPU, or small beside the model on a device."""
    at_once = CPU_ELEMENTS * torch.get_num_threads() if weight.device.type == "cpu" else DEVICE_ELEMENTS
    starts = range(0, len(weight), at_once)
    return [(slice(start, start + at_once), state.span(start, start + at_once)) for start in starts]
