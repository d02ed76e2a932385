"""SecondRun: a block that runs again in backward begins with the buffers that it began with, and leaves no trace there.

[Note: buffers of a block that runs again]
Objects are kept as they are, so a buffer that forward reassigns costs nothing. Of one that it changes in place a copy
is needed from before the first run. Which these are is learned in a block's first run, from copies of all its buffers
that live no longer than that: tables and masks, which are large and never change, are not kept from forward to
backward. The second run works on a copy of that copy, as backward may need what it was; while it runs, the later values
of all the block's buffers are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

Names = dict[str, torch.Tensor | None]
"""A module's own buffers."""
Changing = dict[bool, set[tuple[int, str]]]
"""Buffers that a block changes in place, by the identity of their module's names; in training and outside of it."""


class SecondRun:
    """Of one call of a block."""

    def __init__(self, block: nn.Module, changing: Changing) -> None:
        self._block, self._changing = block, changing
        self._began: list[tuple[Names, Names]] = []
        self._copies: dict[int, torch.Tensor] = {}
        """What the buffers were that the first run changed in place, by their identity."""

    @contextmanager
    def first(self) -> Iterator[None]:
        """The block runs, and will again."""
        known = self._changing.get(self._block.training)
        self._began = _names(self._block)
        copied = [
            ((id(names), name), buffer, buffer.detach().clone(), _version(buffer))
            for names, began in self._began
            for name, buffer in began.items()
            if buffer is not None and (known is None or (id(names), name) in known)
        ]
        yield
        if known is None:  # compared by value, too: what is done to ``buffer.data`` counts as no change
            copied = [c for c in copied if _version(c[1]) != c[3] or not torch.equal(c[1], c[2])]
            self._changing[self._block.training] = {place for place, *_ in copied}
        self._copies = {id(buffer): copy for _, buffer, copy, _ in copied}

    @contextmanager
    def second(self) -> Iterator[None]:
        """It runs again; what its buffers are by then is there afterwards."""
        later = _names(self._block)
        kept = [(buffer, buffer.detach().clone()) for buffer in self._block.buffers()]
        fresh = {of: copy.clone() for of, copy in self._copies.items()}
        _put([(names, {n: fresh.get(id(b), b) for n, b in began.items()}) for names, began in self._began])
        try:
            yield
        finally:
            _put(later)
            for buffer, value in kept:  # some may be changed past the names, or in the second run only
                buffer.data.copy_(value)


def _names(block: nn.Module) -> list[tuple[Names, Names]]:
    return [(module._buffers, dict(module._buffers)) for module in block.modules()]


def _put(named: list[tuple[Names, Names]]) -> None:
    for names, there in named:
        names.clear()
        names.update(there)


def _version(buffer: torch.Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
