"""What a module's call has made: tensors in its output, and in the containers and objects that it was given.

Nothing is copied or replaced there, for a module may change what it was given, and a caller may look at it later.
"""

from collections import UserDict
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_NO_CONTAINERS = (type(None), bool, int, float, str, torch.dtype, torch.device, nn.Module, type)
_PLAIN = (torch.Tensor, *_NO_CONTAINERS)


def next_node() -> int:
    """The number that autograd gives the next node that this thread makes."""
    return int(torch.autograd._get_sequence_nr())


def made_since(node: int, output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors with a gradient to come that were made since the node of this number, and leaves that are returned.

    What only passed through the call is another's: its gradient comes when more than this call's backward is over.
    """
    found = [t for t in _tensors(output) if t.requires_grad and (t.is_leaf or _number(t) >= node)]
    given = [v for v in (*args, *kwargs.values()) if _may_be_written(v)]
    if given:
        known = {id(t) for t in found}
        written = (t for t in _tensors(given) if t.requires_grad and not t.is_leaf and _number(t) >= node)
        found += {id(t): t for t in written if id(t) not in known}.values()
    return found


def _may_be_written(value: Any) -> bool:
    if type(value) is tuple:
        return any(_may_be_written(item) for item in value)
    return not isinstance(value, _PLAIN)


def _number(tensor: torch.Tensor) -> int:
    assert tensor.grad_fn is not None
    return int(tensor.grad_fn._sequence_nr())


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [tree] if isinstance(tree, torch.Tensor) else list(_inside(tree, set()))


def _inside(tree: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif not isinstance(leaf, _NO_CONTAINERS) and id(leaf) not in seen:
            seen.add(id(leaf))
            yield from _inside_object(leaf, seen)


def _inside_object(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Of containers that torch does not know, and of data, all; of any other object only what is its own attribute."""
    if isinstance(value, dict | UserDict):
        yield from _inside(list(value.values()), seen)
    elif isinstance(value, list | tuple):
        yield from _inside(list(value), seen)
    elif is_dataclass(value):
        yield from _inside([getattr(value, f.name, None) for f in fields(value)], seen)
    else:
        yield from (v for v in getattr(value, "__dict__", {}).values() if isinstance(v, torch.Tensor))
