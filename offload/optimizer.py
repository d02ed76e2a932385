"""The update of a span, by a rule on its fp32 masters, and the split of a master into weight and remainder. Pure.

The same functions run on the CPU and on a GPU, and always work. What is faster (``native``, ``device_update``) is held
to them.
"""

import math
from collections.abc import Callable

import torch

from offload.rules import UpdateStep
from offload.state import OptimizerState

CPU_ELEMENTS = 1 << 16
"""Elements a CPU update works on at a time and thread, so that its temporaries stay in the cache: on the cores tried,
16 Ki were 1.3 and 1 Mi 1.2 times slower."""
DEVICE_ELEMENTS = 1 << 22
"""The same on a GPU, so that its temporaries stay small beside the model."""


UpdateSpan = Callable[[torch.Tensor, torch.Tensor, OptimizerState, UpdateStep, float | torch.Tensor], None]
"""Updates a span of a unit in place, as ``update_in_torch``: weight, gradient, state, how, clip."""


def join_master(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a bf16 weight and its int16 remainder, exactly."""
    bits = weight.view(torch.int16).to(torch.int32).bitwise_left_shift_(16).add_(remainder)
    return bits.view(torch.float32)


def split_master_(master: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write the nearest bf16 weight and the signed 16-bit remainder that makes the pair lossless.

    Differs from round-to-nearest-even only on exact ties, which go away from zero. A NaN stays a NaN, if not the same.
    """
    bits = master.view(torch.int32)
    high = bits.add(0x8000).bitwise_right_shift_(16)
    weight.view(torch.int16).copy_(high)
    # Rounding up may have carried a NaN over to zero. On the host a sum tells soon whether there is one;
    # on a device, asking would mean waiting for the answer.
    if master.device.type != "cpu" or not math.isfinite(master.sum()):
        weight.masked_fill_(master.isnan(), torch.nan)
    remainder.copy_(bits)  # bits - (high << 16) is what the low 16 bits are as a signed number


def update_in_torch(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: OptimizerState,
    how: UpdateStep,
    clip: float | torch.Tensor,
) -> None:
    """Update a span of a unit in place.

    ``weight`` and ``gradient`` are bf16 where ``state`` has a remainder, fp32 otherwise; ``clip`` scales the gradient,
    a scalar of the same device where it is a tensor.
    """
    at_once = CPU_ELEMENTS * torch.get_num_threads() if weight.device.type == "cpu" else DEVICE_ELEMENTS
    for start in range(0, len(weight), at_once):
        part = slice(start, start + at_once)
        scaled = gradient[part].float().mul(clip)
        span = state.span(start, start + at_once)
        if span.remainder is None:
            how.update_(weight[part], scaled, span.moments)
        else:
            master = join_master(weight[part], span.remainder)
            how.update_(master, scaled, span.moments)
            split_master_(master, weight[part], span.remainder)
