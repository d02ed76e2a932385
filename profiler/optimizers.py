"""What the optimizer's step allocates on a device, for the optimizers of ``torch.optim`` with default settings."""

from collections.abc import Callable, Iterator, Sequence

from profiler.errors import ProfilerError
from profiler.events import STEP, Alloc, Category, Event, Free

OPTIMIZERS = ("adamw", "adamw-fused", "sgd", "sgd-momentum")

STEP_COUNTER_BYTES = 4
"""Fused AdamW keeps each parameter's step count on the device, as one fp32 number."""


def check_optimizer(name: str) -> None:
    """Raise ProfilerError when there is no such optimizer."""
    if name not in OPTIMIZERS:
        raise ProfilerError(f"optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}")


def optimizer_events(
    name: str, parameters: Sequence[tuple[str, int]], first: bool, new_id: Callable[[], int]
) -> Iterator[Event]:
    """The allocations of one step over ``parameters``: (module, bytes) of each that has a gradient.

    State has the dtype of its parameter. It is made in the first step and stays; ``new_id`` gives unused storage ids.
    """

    def held(module: str, size: int) -> Alloc:
        return Alloc(new_id(), size, Category.OPTIMIZER, module, STEP)

    if first and name in ("adamw", "adamw-fused"):
        for module, size in parameters:
            if name == "adamw-fused":
                yield held(module, STEP_COUNTER_BYTES)
            yield held(module, size)
            yield held(module, size)
    if first and name == "sgd-momentum":
        for module, size in parameters:
            yield held(module, size)
    if name == "adamw":
        # The foreach implementation takes the square roots of all second moments at once and keeps them to its end.
        roots = [held(module, size) for module, size in parameters]
        yield from roots
        for root in roots:
            yield Free(root.id, STEP)
