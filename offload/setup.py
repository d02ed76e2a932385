"""What an engine checks and prepares around the model, before its first step and after its last."""

import atexit
import os
import threading
import weakref
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from offload.errors import OffloadError
from offload.plan import Plan, Precision, Target

FEEDING_CORES = 2
"""Cores that the update on the host leaves to the threads that feed a GPU."""


class SupportsClose(Protocol):
    """Something with threads to end."""

    def close(self) -> None:
        """End them."""


def close_at_exit(engine: SupportsClose) -> None:
    """A script need not call ``close``: its threads end before the interpreter does."""
    reference = weakref.ref(engine)

    def close() -> None:
        if (open_engine := reference()) is not None:
            with suppress(Exception):  # nobody is left to be told
                open_engine.close()

    # Before the executors' own, after which nothing can be written any more; atexit would be too late.
    getattr(threading, "_register_atexit", atexit.register)(close)


def update_threads(device: torch.device) -> int:
    """CPU threads of the update on the host."""
    return 1 if device.type == "cpu" else max(1, len(os.sched_getaffinity(0)) - FEEDING_CORES)


def check_can_run(plan: Plan) -> None:
    """Raise OffloadError for a plan that this version, or this machine, can not carry out."""
    if plan.target is not Target.MEMPLAN:
        raise OffloadError(f"this plan is for {plan.target}: give that engine the files beside it, or plan anew")
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise OffloadError("this plan is for a CUDA GPU and there is none here; make a plan on this machine")


def grow_segments(device: torch.device) -> None:
    """Let the caching allocator grow its segments: then it reserves hardly more than is allocated, as plans expect.

    What PYTORCH_ALLOC_CONF says of it stands.
    """
    said = os.environ.get("PYTORCH_ALLOC_CONF", "") + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if device.type == "cuda" and "expandable_segments" not in said:
        # Older PyTorch has only the second name.
        settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (settings or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def explained(error: BaseException) -> OffloadError | None:
    """A sentence where the model gets in the way of streaming; None for the model's own errors."""
    text = str(error)
    if isinstance(error, RuntimeError) and "_Boundary" in text:
        return OffloadError(
            "a module that is a unit of the plan changes its input in place, which hides the end of its backward; "
            f"use the out-of-place form there (inplace=False). PyTorch said: {text.splitlines()[0]}"
        )
    return None


def moved(batch: Any, device: torch.device, precision: Precision) -> Any:
    """The batch with its tensors on the device; in bf16 the floating-point ones in bf16."""

    def move(leaf: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if precision is Precision.BF16 and leaf.is_floating_point() else None
        return leaf.to(device=device, dtype=dtype, non_blocking=True)

    return tree_map_only(torch.Tensor, move, batch)


def move_buffers(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Buffers, and parameters that no unit owns, to the device.

    In bf16 the floating-point buffers of a module with floating-point parameters follow them, as batch norm's must;
    those of other modules (rotary tables, masks) keep their precision.
    """
    for module in model.modules():
        follows = precision is Precision.BF16 and any(p.is_floating_point() for p in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False):
            dtype = torch.bfloat16 if follows and buffer.is_floating_point() else None
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device=device, dtype=dtype), persistent=persistent)
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point() or not parameter.numel():
                parameter.data = parameter.data.to(device)
