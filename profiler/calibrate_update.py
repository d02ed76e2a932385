"""What a calibration times of a step's end: the optimizers, and the clipping of gradients."""

from collections.abc import Callable

import torch

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


def update(name: str, tensors: int, elements: int, place: str = "cuda") -> Callable[[], object]:
    """One update of so many square-ish tensors of so many elements each, or the clipping of their gradients."""
    side = max(int(elements**0.5), 1)
    parameters = [torch.nn.Parameter(torch.randn(side, side, device=place)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    if name == "clip":
        return lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return OPTIMIZERS[name.removeprefix("optimizer/")](parameters).step
