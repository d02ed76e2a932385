"""Batches like a given one, with more or fewer samples or tokens."""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from profiler.trees import tensors_in

Change = tuple[int, int]
"""(old, new) length of a dimension."""


def sequence_length(batch: Any) -> int | None:
    """The second dimension of the first tensor of integers that has two: tokens. ``None`` where there is none."""
    found = (t.shape[1] for t in tensors_in(batch) if t.dim() >= 2 and not t.is_floating_point() and not t.is_complex())
    return next(found, None)


def resized(batch: Any, samples: Change, tokens: Change | None) -> Any:
    """The batch with the first dimensions of that many samples, and the later ones of that many tokens, changed.

    The numbers in it are repeated.
    """

    def change(tensor: torch.Tensor) -> torch.Tensor:
        for dim in range(tensor.dim()):
            old, new = samples if dim == 0 else tokens or (-1, -1)
            if tensor.shape[dim] == old != new:
                tensor = tensor.index_select(dim, torch.arange(new, device=tensor.device) % old)
        return tensor

    return tree_map_only(torch.Tensor, change, batch)
