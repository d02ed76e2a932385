"""How the benchmarks make a configuration's model: without values, or with values that cost no time."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.zoo import Configuration

aten = torch.ops.aten
LARGE = 1 << 20
"""From this many elements on, values are copied from a pattern instead of drawn."""


class QuickValues(TorchDispatchMode):
    """Large tensors that a model initialises get evenly spread values of a period; to draw them all takes minutes."""

    def __init__(self) -> None:
        super().__init__()
        self._pattern = torch.rand(LARGE - 57) * 2 - 1  # a length that no matrix's rows divide

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.numel() >= LARGE and first.is_contiguous():
            if func is aten.normal_.default:
                mean, deviation = (*args[1:], *(0.0, 1.0)[len(args) - 1 :])
                return self._spread(first, mean, deviation * 3**0.5)
            if func is aten.uniform_.default:
                low, high = (*args[1:], *(0.0, 1.0)[len(args) - 1 :])
                return self._spread(first, (low + high) / 2, (high - low) / 2)
            if func is aten.erfinv_.default:
                return first  # the slow part of drawing from a truncated normal distribution
        return func(*args, **(kwargs or {}))

    def _spread(self, tensor: torch.Tensor, centre: float, reach: float) -> torch.Tensor:
        flat, values = tensor.view(-1), self._pattern * reach + centre
        whole = len(flat) // len(values) * len(values)
        flat[:whole].view(-1, len(values)).copy_(values.expand(whole // len(values), -1))
        flat[whole:].copy_(values[: len(flat) - whole])
        return tensor


def build_real(configuration: Configuration) -> nn.Module:
    """The model on the CPU, the same values every time."""
    torch.manual_seed(0)
    with QuickValues():
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
