"""What clipping and the optimizer's step allocate on a device, for the optimizers of ``torch.optim`` and their kin.

A step is a sequence of (name, bytes): the name begins to hold that much, and what it held before ends afterwards, as
with a Python variable; 0 bytes end it. That is what makes a for-loop optimizer hold several tensors and not one: its
variables keep the last parameter's tensors until the next one's have replaced them.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from profiler.errors import ProfilerError
from profiler.events import CLIP, STEP, Alloc, Category, Free

SCALAR_BYTES = 4
CHUNK_ELEMENTS = 1 << 16
"""What one block of a multi-tensor kernel works on; the norm's kernel writes one partial sum for each."""
BLOCK_ELEMENTS = 256
"""Of the 8-bit optimizers: so many elements share one fp32 scale."""
QUANTISED_ELEMENTS = 4096
"""The 8-bit optimizers keep the state of smaller tensors in fp32."""


class Trained(Protocol):
    """A parameter that has a gradient; state and gradient have its dtype."""

    @property
    def name(self) -> str:
        """Dotted name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""

    @property
    def bytes(self) -> int:
        """Of the parameter."""


Holdings = Iterator[tuple[Hashable, int]]


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps, and what a step holds for a moment."""

    state: Callable[[Trained], tuple[int, ...]]
    """Bytes of the tensors that are kept for one parameter, in the order in which they are made."""
    step: Callable[[Sequence[Trained]], Holdings]


def check_optimizer(name: str) -> None:
    """Raise ProfilerError when there is no such optimizer."""
    if name not in OPTIMIZERS:
        raise ProfilerError(f"optimizer is {name!r}; it must be one of {', '.join(OPTIMIZERS)}")


def optimizer_events(
    name: str, parameters: Sequence[Trained], first: bool, new_id: Callable[[], int]
) -> Iterator[Alloc | Free]:
    """The storages of one step. State is made in the first step and stays; ``new_id`` gives unused storage ids."""
    optimizer = OPTIMIZERS[name]
    if first:
        for p in parameters:
            for size in optimizer.state(p):
                yield Alloc(new_id(), size, Category.OPTIMIZER, _owner(p), STEP)
    yield from _storages(optimizer.step(parameters), STEP, new_id)


def clip_events(parameters: Sequence[Trained], new_id: Callable[[], int]) -> Iterator[Alloc | Free]:
    """The storages of ``torch.nn.utils.clip_grad_norm_``, which takes the multi-tensor kernels."""
    yield from _storages(_clip(parameters), CLIP, new_id)


def _storages(holdings: Holdings, phase: str, new_id: Callable[[], int]) -> Iterator[Alloc | Free]:
    held: dict[Hashable, int] = {}
    for name, size in holdings:
        before = held.pop(name, None)
        if size:
            held[name] = new_id()
            yield Alloc(held[name], size, Category.UPDATE, "", phase)
        if before is not None:
            yield Free(before, phase)
    for number in held.values():
        yield Free(number, phase)


def _owner(parameter: Trained) -> str:
    return parameter.name.rpartition(".")[0]


def _clip(parameters: Sequence[Trained]) -> Holdings:
    """One norm a tensor, and partial sums for as many chunks as the largest tensor has, for every tensor."""
    chunks = max((-(-prod(p.shape) // CHUNK_ELEMENTS) for p in parameters), default=0)
    yield "partial sums", len(parameters) * chunks * SCALAR_BYTES
    for number in range(len(parameters)):
        yield ("norm", number), SCALAR_BYTES
    yield "partial sums", 0
    yield "stacked", len(parameters) * SCALAR_BYTES
    yield "total", SCALAR_BYTES
    yield "factor", SCALAR_BYTES


def _nothing(_: Sequence[Trained]) -> Holdings:
    yield from ()


def _square_roots(parameters: Sequence[Trained]) -> Holdings:
    """The foreach implementation takes the roots of all second moments at once and keeps them to its end."""
    for number, p in enumerate(parameters):
        yield ("root", number), p.bytes


def _denominators(parameters: Sequence[Trained]) -> Holdings:
    for p in parameters:
        yield "root", p.bytes
        yield "denominator", p.bytes
        yield "root", 0


def _factored_updates(parameters: Sequence[Trained]) -> Holdings:
    for p in parameters:
        yield "norm", SCALAR_BYTES
        if len(p.shape) > 1:
            row, column = _factors(p)
            yield "row mean", row
            yield "column mean", column
        else:
            yield "squared gradient", p.bytes
        yield "estimate", p.bytes


def _signs(parameters: Sequence[Trained]) -> Holdings:
    for p in parameters:
        yield "momentum", p.bytes
        yield "sum", p.bytes
        yield "momentum", 0


def _none(_: Trained) -> tuple[int, ...]:
    return ()


def _one(parameter: Trained) -> tuple[int, ...]:
    return (parameter.bytes,)


def _moments(parameter: Trained) -> tuple[int, ...]:
    return (parameter.bytes, parameter.bytes)


def _counter_and_moments(parameter: Trained) -> tuple[int, ...]:
    """Fused AdamW keeps its step count on the device."""
    return (SCALAR_BYTES, parameter.bytes, parameter.bytes)


def _factors(parameter: Trained) -> tuple[int, ...]:
    """Adafactor keeps a row and a column of each matrix, and a vector whole."""
    if len(parameter.shape) < 2 or not parameter.bytes:
        return (parameter.bytes,)
    return (parameter.bytes // parameter.shape[-1], parameter.bytes // parameter.shape[-2])


def _block_wise(parameter: Trained) -> tuple[int, ...]:
    elements = prod(parameter.shape)
    if elements < QUANTISED_ELEMENTS:
        return (SCALAR_BYTES * elements, SCALAR_BYTES * elements)
    scales = -(-elements // BLOCK_ELEMENTS) * SCALAR_BYTES
    return (elements, elements, scales, scales)


OPTIMIZERS = {
    "adamw": Optimizer(_moments, _square_roots),
    "adamw-fused": Optimizer(_counter_and_moments, _nothing),
    "adamw-forloop": Optimizer(_moments, _denominators),
    "sgd": Optimizer(_none, _nothing),
    "sgd-momentum": Optimizer(_one, _nothing),
    "adafactor": Optimizer(_factors, _factored_updates),
    "lion": Optimizer(_one, _signs),
    "adamw-8bit": Optimizer(_block_wise, _nothing),
}
"""By name. The first six are ``torch.optim`` with default settings (foreach where that is the default); ``lion`` is the
usual for-loop over one momentum, ``adamw-8bit`` the block-wise one of bitsandbytes."""
