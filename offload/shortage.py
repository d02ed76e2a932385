"""Device memory that ran out in a step: where, what was expected, what was there, and which plan avoids it.

[Note: memory of a failed pass]
An error leads through its traceback to the frames of the pass, and so to every activation. Whoever handles it may want
to try again with less, so the traceback stays as text only. The frame that raises is in the new error's traceback: it
keeps neither the loss that it was called with, nor the error, a circle that only the garbage collector would find.
"""

import re
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from offload.errors import DeviceMemoryError
from offload.plan import Plan, Tier

UPDATE = "update"
HALF_DONE = "The update is half done: go on from a checkpoint"
"""What every error says of which nothing but other numbers helps: [Note: half done] in ``offload/recovery.py``."""
BYTE_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))

Method = TypeVar("Method", bound=Callable[..., Any])


def explaining_shortage(phase: str) -> Callable[[Method], Method]:
    """Make of torch's OutOfMemoryError, in a method of the engine that is this phase, one that a person can act on."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def explaining(engine: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(engine, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                unit = engine.computing if phase != UPDATE else None
                where = f"the {phase}" if unit is None else f"the {phase} of unit {unit}"
                if not (half_done := engine.recovery.half_done):
                    engine.zero_grad()
                    half_done = engine.recovery.half_done  # of updates that began in backward
                held_bytes = engine.meter.now_bytes()["gpu"]
                # [Note: memory of a failed pass]
                error.add_note("".join(["It was raised here:\n", *traceback.format_tb(error.__traceback__)]))
                del args, kwargs
                raise shortage(error, engine.plan, where, held_bytes, half_done=half_done) from error.with_traceback(
                    None
                )

        return explaining  # type: ignore[return-value]

    return decorate


def shortage(
    error: torch.OutOfMemoryError, plan: Plan, where: str, held_bytes: int, *, half_done: bool = False
) -> DeviceMemoryError:
    """The error for a person; ``where`` says what was computing, ``held_bytes`` what the device held then."""
    held = f"{_text(held_bytes)} were allocated"
    if plan.device == "cuda":
        held += f" and {_text(torch.cuda.memory_reserved())} reserved"
    if (tried := re.search(r"allocate ([\d.]+ \w+)", str(error))) is not None:
        held += f" when it asked for {tried[1]} more,"
    expected = plan.prediction
    after = (
        "The gradients since the last step are forgotten and the model is as that step left it: this engine can go on."
        if not half_done
        else f"{HALF_DONE}."
    )
    return DeviceMemoryError(
        f"the device ran out of memory in {where}: {held} of a budget of {_text(plan.budget.gpu_bytes)}; the plan "
        f"expected a peak of {_text(expected.gpu_peak_bytes)}, at most {_text(expected.gpu_upper_bytes)}. "
        f"{_ways_out(plan)}. {after}"
    )


def _ways_out(plan: Plan) -> str:
    """Changes that need less device memory, the smallest first."""
    more = [] if plan.recompute else ["recomputes activations"]
    if any(Tier.GPU in (p.parameters, p.gradients, p.optimizer) for p in plan.placements):
        more.append("offloads more of the model")
    again = f"lan again with --gpu-memory below {_text(plan.budget.gpu_bytes)}"
    if more:
        again += f", which {' and '.join(more)}"
    if plan.micro_batch_size == 1:
        return f"P{again}"
    return f"Give the engine micro-batches smaller than {plan.micro_batch_size}, or p{again}"


def _text(size_bytes: int) -> str:
    unit, scale = next((u for u in BYTE_UNITS if size_bytes >= u[1]), BYTE_UNITS[-1])
    return f"{size_bytes / scale:.4g} {unit}"
