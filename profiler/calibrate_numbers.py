"""What a calibration times, and on which numbers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from profiler.events import FORWARD, Op

DTYPES = (torch.bfloat16, torch.float32)
MOST_BYTES = 4e9
"""Larger points of a grid are left out: they would take too long, and rates no longer change there."""


class Timed(NamedTuple):
    """One thing to time: what to run, and the operations that one run carries out."""

    name: str
    """Of the rate."""
    run: Callable[[], object]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Grid:
    """Sizes, and what is timed at each of them."""

    name: str
    axes: tuple[tuple[float, ...], ...]
    prepare: Callable[..., Iterator[Timed]]
    """Called with one size an axis; yields what to time there, nothing where a point is too large."""


class Numbers(NamedTuple):
    """Of which dtype the tensors of a grid are, and on which device."""

    dtype: torch.dtype
    place: str

    @property
    def name(self) -> str:
        """Of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return torch.empty((), dtype=self.dtype).element_size()

    def random(self, *shape: int, grad: bool = False) -> torch.Tensor:
        """A tensor of random numbers."""
        return torch.randn(shape, device=self.place).to(self.dtype).requires_grad_(grad)

    def op(self, name: str, flops: float, moved: float, shape: tuple[int, ...] = ()) -> Op:
        """An operation on such numbers as the tracer logs it."""
        return Op(name, int(flops), int(moved), self.name, "", FORWARD, False, shape)


def backward_of(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """Runs backward from ``out`` again and again."""
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
