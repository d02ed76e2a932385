"""Finding tensors in nested containers."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format})
"""Leaves that are no tensors: most of what operations are given beside tensors."""


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a tree, in order."""
    found: list[torch.Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[torch.Tensor]) -> None:
    """As ``tree_leaves`` would: it is asked for containers that are not Python's own, and its asking takes time."""
    kind = type(tree)
    if kind is tuple or kind is list:
        for item in tree:
            _gather(item, found)
    elif kind is dict:
        for item in tree.values():
            _gather(item, found)
    elif isinstance(tree, torch.Tensor):
        found.append(tree)
    elif kind not in _PLAIN:
        found += [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
