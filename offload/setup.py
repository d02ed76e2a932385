"""What an engine checks and prepares around the model, before its first step and after its last.

[Note: Python's collector]
Some hundred thousand of the objects that it follows are imported modules', and a training step makes and drops
thousands. So every few steps it looked through all of them, found nothing, and meanwhile no thread issued anything:
steps of 1.04 s took up to 1.38 s. Plain training is so far ahead of its GPU that it does not notice.
What there is when training begins is therefore passed over until the engine is closed; what comes later is not.
"""

import atexit
import gc
import os
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from offload import buffers
from offload.errors import OffloadError
from offload.plan import Plan, Precision, Target
from offload.ranks import Ranks
from offload.state import weight_dtype

FEEDING_CORES = 2
"""Cores that the update on the host leaves to the threads that feed a GPU."""

_PASSING_OVER: list[object] = []
"""One for each engine in this process that has the collector pass over what lasts."""


class SupportsClose(Protocol):
    """Something with threads to end."""

    def close(self) -> None:
        """End them."""


def close_all(closers: list[Callable[[], None]]) -> None:
    """Call all, the last first, and forget them; what the first that failed raised is raised then."""
    failed: BaseException | None = None
    while closers:
        try:
            closers.pop()()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed = failed or error
    if failed is not None:
        raise failed


def close_at_exit(engine: SupportsClose) -> None:
    """A script need not call ``close``: its threads end before the interpreter does."""
    reference = weakref.ref(engine)

    def close() -> None:
        if (open_engine := reference()) is not None:
            with suppress(Exception):  # nobody is left to be told
                open_engine.close()

    # Before the executors' own, after which nothing can be written any more; atexit would be too late.
    getattr(threading, "_register_atexit", atexit.register)(close)


def update_threads(device: torch.device, ranks: Ranks | None = None) -> int:
    """CPU threads of the update on the host: of cores that several ranks may use, each takes its share."""
    sharing = ranks.sharing_cores() if ranks is not None else 1
    return 1 if device.type == "cpu" else max(1, len(os.sched_getaffinity(0)) // sharing - FEEDING_CORES)


def feed_a_gpu(device: torch.device, closers: list[Callable[[], None]], *, updates_on_host: bool) -> None:
    """Prepare this process for threads that feed a GPU; what undoes it joins the ``closers``."""
    if device.type == "cpu":
        return
    closers.append(pass_over_what_lasts())
    if updates_on_host:
        closers.append(leave_cores_to_the_update())


def leave_cores_to_the_update() -> Callable[[], None]:
    """Shrink this thread's own team, for teams that together outnumber the cores sleep between operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(FEEDING_CORES, threads))
    torch.ones(1 << 18).add_(1)  # a team changes its size with its next work
    return lambda: torch.set_num_threads(threads)


def pass_over_what_lasts() -> Callable[[], None]:
    """Let Python's collector leave alone what is there now: [Note: Python's collector].

    Gives what undoes it, when whoever asked for it last is through.
    """
    gc.collect()  # what is garbage by now would stay
    gc.freeze()
    mine = object()
    _PASSING_OVER.append(mine)

    def undo() -> None:
        _PASSING_OVER.remove(mine)
        if not _PASSING_OVER:
            gc.unfreeze()

    return undo


def check_can_run(plan: Plan) -> None:
    """Raise OffloadError for a plan that this version, or this machine, can not carry out."""
    if plan.target is not Target.MEMPLAN:
        raise OffloadError(f"this plan is for {plan.target}: give that engine the files beside it, or plan anew")
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise OffloadError("this plan is for a CUDA GPU and there is none here; make a plan on this machine")


def check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise OffloadError for a scheduler that an engine with this optimizer can not step."""
    if getattr(scheduler, "optimizer", None) is not optimizer:
        raise OffloadError("the scheduler is for another optimizer than the engine's; make it with the same one")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise OffloadError("ReduceLROnPlateau needs a metric: keep it out of the engine and step it yourself")


def grow_segments(device: torch.device) -> None:
    """Let the caching allocator grow its segments: then it reserves hardly more than is allocated, as plans expect.

    What PYTORCH_ALLOC_CONF says of it stands; where that is no, a warning says what it means.
    """
    if device.type != "cuda":
        return
    said = os.environ.get("PYTORCH_ALLOC_CONF", "") + "," + os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    if "expandable_segments" not in said:
        # Older PyTorch has only the second name.
        settings = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
        (settings or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    elif "expandable_segments:True" not in said.replace(" ", ""):
        warnings.warn(
            "the environment (PYTORCH_ALLOC_CONF, PYTORCH_CUDA_ALLOC_CONF) keeps the GPU's memory in segments that do "
            "not grow, and plans do not count what is left over in those: training may run out of memory where the "
            "plan fits. Set expandable_segments:True",
            RuntimeWarning,
            stacklevel=4,
        )


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
    """The batch with its tensors on the device; in bf16 and fp16 the floating-point ones in that type."""
    half = weight_dtype(precision) if precision.weight_bytes == 2 else None

    def move(leaf: torch.Tensor) -> torch.Tensor:
        return leaf.to(device=device, dtype=half if leaf.is_floating_point() else None, non_blocking=True)

    return tree_map_only(torch.Tensor, move, batch)


def move_buffers(model: nn.Module, device: torch.device, precision: Precision, ranks: Ranks | None) -> None:
    """Buffers, and parameters that no unit owns, to the device: those of the first rank.

    In bf16 and fp16 the floating-point buffers of a module with floating-point parameters follow them, as batch norm's
    must; those of other modules (rotary tables, masks) keep their precision.
    """
    if ranks is not None:
        buffers.from_first(model, ranks)  # before a buffer of several modules becomes one of each
    half = weight_dtype(precision) if precision.weight_bytes == 2 else None
    for module in model.modules():
        follows = any(p.is_floating_point() for p in module.parameters(recurse=False))
        for name, buffer in module.named_buffers(recurse=False):
            dtype = half if follows and buffer.is_floating_point() else None
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device=device, dtype=dtype), persistent=persistent)
        for parameter in module.parameters(recurse=False):
            if not parameter.is_floating_point() or not parameter.numel():
                parameter.data = parameter.data.to(device)
