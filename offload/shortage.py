"""Device memory that ran out in a step: where, what was expected, what was there, and which plan avoids it."""

import traceback

import torch

from offload.errors import DeviceMemoryError
from offload.plan import Plan, Tier

GIB = 1 << 30


def shortage(error: torch.OutOfMemoryError, plan: Plan, where: str, held_bytes: int) -> DeviceMemoryError:
    """The error for a person; ``where`` says what was computing, ``held_bytes`` what the device held then.

    What the failed pass held in its frames is let go, so that another try finds the memory free even while somebody
    handles the error.
    """
    held = f"{_gib(held_bytes)} were allocated"
    if plan.device == "cuda":
        held += f" and {_gib(torch.cuda.memory_reserved())} reserved"
    expected = plan.prediction
    said = str(error).partition(". ")[0].strip().rstrip(".") or "no more is free"
    traceback.clear_frames(error.__traceback__)
    return DeviceMemoryError(
        f"the device ran out of memory in {where}: {held} of the budget of {_gib(plan.budget.gpu_bytes)}, and the plan "
        f"expected a peak of {_gib(expected.gpu_peak_bytes)}, {_gib(expected.gpu_upper_bytes)} at most ({said}). "
        f"{' or '.join(_ways_out(plan))}. The gradients since the last step are forgotten; the model is as that step "
        "left it, and this engine can go on."
    )


def _ways_out(plan: Plan) -> list[str]:
    """Changes that need less device memory, the smallest first."""
    ways = []
    if plan.micro_batch_size > 1:
        ways.append(f"Give the engine smaller micro-batches than {plan.micro_batch_size}")
    ways.append(f"plan again with --gpu-memory below {_gib(plan.budget.gpu_bytes)}")
    more = [] if plan.recompute else ["recomputes activations"]
    if any(Tier.GPU in (p.parameters, p.gradients, p.optimizer) for p in plan.placements):
        more.append("offloads more of the model")
    if more:
        ways[-1] += f", which {' and '.join(more)}"
    ways[0] = ways[0][0].upper() + ways[0][1:]
    return ways


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
