"""How the benchmarks make a configuration's model: without values, or with values that cost no time."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.zoo import Configuration

aten = torch.ops.aten
LARGE = 1 << 20
"""From this many elements on, values are copied from a pattern instead of drawn."""
_DRAWN = {aten.normal_.default, aten.uniform_.default}
_SCALED = {aten.erfinv_.default, aten.mul_.Tensor, aten.add_.Tensor, aten.clamp_.default}


class _QuickValues(TorchDispatchMode):
    """Large tensors that a model initialises get small random values of a period; the draws take minutes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self._pattern = torch.randn(LARGE - 57) * 0.02  # an odd length, so that no matrix has equal rows

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        large = isinstance(first, torch.Tensor) and first.numel() >= LARGE and first.is_contiguous()
        if large and func in _SCALED:
            return first
        if large and func in _DRAWN:
            flat, period = first.view(-1), len(self._pattern)
            whole = len(flat) // period * period
            flat[:whole].view(-1, period).copy_(self._pattern.expand(whole // period, -1))
            flat[whole:].copy_(self._pattern[: len(flat) - whole])
            return first
        return func(*args, **(kwargs or {}))


def build_real(configuration: Configuration) -> nn.Module:
    """The model on the CPU, the same values every time."""
    torch.manual_seed(0)
    with _QuickValues():
        return configuration.build().train()


def build_abstract(configuration: Configuration) -> nn.Module:
    """The model without memory for its parameters; the real one where its building needs values."""
    try:
        with torch.device("meta"):
            return configuration.build().train()
    except (RuntimeError, NotImplementedError, ValueError):
        return build_real(configuration)


def batch_of(configuration: Configuration) -> Any:
    """The batch on the CPU, the same every time."""
    torch.manual_seed(1)
    return configuration.batch()
