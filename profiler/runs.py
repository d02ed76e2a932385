"""Finding runs of blocks that repeat, so that a trace needs to run only a few of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

LONGEST_PERIOD = 8
KEPT_PERIODS = 3
"""At the front of a run; at least one more is kept at its end. The second and third show that the run is periodic."""


@dataclass(frozen=True)
class Run:
    """Blocks that follow each other in one container and whose kinds repeat with a period."""

    blocks: tuple[str, ...]
    """Paths, in the container's order."""
    period: int

    @property
    def skipped(self) -> range:
        """Positions of the blocks that need not run; their number is a multiple of the period."""
        start = KEPT_PERIODS * self.period
        rounds = max(0, (len(self.blocks) - start) // self.period - 1)
        return range(start, start + rounds * self.period)


@lru_cache(maxsize=1 << 16)
def parents(path: str) -> tuple[str, ...]:
    """The path and every module above it, the model ("") last."""
    found = []
    while path:
        found.append(path)
        path = path.rpartition(".")[0]
    return (*found, "")


def runs_of(model: nn.Module, blocks: Sequence[str]) -> tuple[Run, ...]:
    """The longest periodic run in every container of ``blocks`` in which some blocks need not run."""
    containers: dict[str, list[str]] = {}
    for path in blocks:
        containers.setdefault(path.rpartition(".")[0], []).append(path)
    users = _users(model)
    found = []
    for container, paths in containers.items():
        names = [name for name, _ in model.get_submodule(container).named_children()]
        positions = [names.index(path.rpartition(".")[2]) for path in paths]
        start, stop, period = _longest(_kinds([model.get_submodule(path) for path in paths], positions, users))
        run = Run(tuple(paths[start:stop]), period)
        if run.skipped and positions[stop - 1] - positions[start] == stop - 1 - start:
            found.append(run)
    return tuple(found)


def _users(model: nn.Module) -> dict[int, int]:
    """By parameter, in how many places of the model it stands."""
    users: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    return users


def _longest(kinds: Sequence[Any]) -> tuple[int, int, int]:
    """(start, stop, period) of the stretch in which the most kinds repeat, the shorter period of equal ones."""
    best, found = 0, (0, 0, 1)
    for period in range(1, min(LONGEST_PERIOD, len(kinds) // 2) + 1):
        start = 0
        for stop in range(period, len(kinds) + 1):
            if stop == len(kinds) or kinds[stop] != kinds[stop - period]:
                saved = len(Run(("",) * (stop - start), period).skipped)
                if saved > best:
                    best, found = saved, (start, stop, period)
                start = stop - period + 1
    return found


def _kinds(blocks: Sequence[nn.Module], positions: Sequence[int], users: dict[int, int]) -> list[Any]:
    """Equal for blocks that do the same: in classes, shapes and plain attributes, all the way down.

    An attribute that is every block's own number does not count; a block that shares parameters is like no other.
    """
    traits = [_traits(block) for block in blocks]
    numbers = {
        name
        for name in traits[0]
        if all(name in t and type(t[name]) is int and t[name] == i for t, i in zip(traits, positions, strict=True))
    }
    return [
        tuple((name, value) for name, value in t.items() if name not in numbers)
        if all(users[id(p)] == 1 for p in block.parameters())
        else object()
        for block, t in zip(blocks, traits, strict=True)
    ]


def _traits(block: nn.Module) -> dict[tuple[str, str], Any]:
    """What could make a block behave differently, by module and attribute."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in block.named_modules():
        found[path, "type"] = type(module)
        for name, parameter in module._parameters.items():
            found[path, name] = None if parameter is None else _form(parameter)
        for name, buffer in module._buffers.items():
            found[path, name] = None if buffer is None else _form(buffer)
        for name, value in vars(module).items():
            if not name.startswith("_"):
                found[path, name] = _plain(value)
    return found


def _form(tensor: torch.Tensor) -> Any:
    return (tensor.shape, tensor.dtype, tensor.requires_grad)


def _plain(value: Any) -> Any:
    """An attribute as far as it matters: how large a probability is does not."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return "a fraction" if 0 < value < 1 else value
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    return type(value)
