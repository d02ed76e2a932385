"""Finding tensors in nested containers."""

from typing import Any

import torch
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a tree, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
