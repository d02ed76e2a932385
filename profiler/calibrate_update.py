"""What a calibration times of a step's end: the optimizers, and the clipping of gradients."""

from collections.abc import Callable

import torch

from profiler.calibrate_timing import cpu_seconds

TENSORS = 16
"""The parameters of a grid's point are so many tensors,"""
TINY_TENSORS, TINY_ELEMENTS = 256, 64
"""and those that cost the CPU more than the device, so many of so few elements."""

Parameters = list[torch.nn.Parameter]

OPTIMIZERS: dict[str, Callable[[Parameters], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw-forloop": lambda p: torch.optim.AdamW(p, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, foreach=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "adafactor": torch.optim.Adafactor,
}
UPDATES = ("clip", *(f"optimizer/{name}" for name in OPTIMIZERS))


CACHE_BYTES = 64 << 20
"""What a processor's caches hold of a program is gone after so many others, as it is after a forward and backward."""


def update_seconds(name: str) -> float:
    """What the CPU takes for one tensor of an update, whose gradients are new and the caches cold, as in a step."""
    parameters = _parameters(TINY_TENSORS, TINY_ELEMENTS, "cuda")
    run = _run(name, parameters)
    return cpu_seconds(run, before=lambda: _get_gradients(parameters)) / TINY_TENSORS


def clearing_seconds() -> float:
    """What the CPU takes to drop the gradient of one tensor."""
    parameters = _parameters(TINY_TENSORS, TINY_ELEMENTS, "cuda")
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step() -> None:
        _get_gradients(parameters)
        optimizer.step()

    return cpu_seconds(optimizer.zero_grad, before=step) / TINY_TENSORS


def _get_gradients(parameters: Parameters) -> None:
    for parameter in parameters:
        parameter.grad = None
    torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
    torch.zeros(CACHE_BYTES // 4).add_(1)


def update(name: str, tensors: int, elements: int, place: str = "cuda") -> Callable[[], object]:
    """One update of so many square-ish tensors of so many elements each, or the clipping of their gradients."""
    parameters = _parameters(tensors, elements, place)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return _run(name, parameters)


def _parameters(tensors: int, elements: int, place: str) -> Parameters:
    side = max(int(elements**0.5), 1)
    return [torch.nn.Parameter(torch.randn(side, side, device=place)) for _ in range(tensors)]


def _run(name: str, parameters: Parameters) -> Callable[[], object]:
    if name == "clip":
        return lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return OPTIMIZERS[name.removeprefix("optimizer/")](parameters).step
