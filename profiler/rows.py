"""The sizes of operations that only move numbers, as far as their speed depends on more than how many.

Normalisations, softmax and reductions work by rows: many short ones and few long ones are done differently. Elementwise
work and copies are fastest where all tensors lie in memory alike.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

UNLIKE, TRANSPOSED = 1, 2
"""Tensors that lie differently or are broadcast, and those of them whose neighbours in memory are not the same."""

_REDUCTION_NAMES = (
    "sum mean amax amin max min prod any all norm linalg_vector_norm std var var_mean std_mean logsumexp argmax argmin"
)
_REDUCTIONS = frozenset(_REDUCTION_NAMES.split())
_JOINED = frozenset({"aten::cat", "aten::stack"})
_BATCH_NORMS = frozenset({"native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update"})


def row_shape(name: str, args: Sequence[Any], out: Any) -> tuple[int, ...]:
    """The sizes of a call.

    Of batch normalisation (positions, channels, whether channels come last), of another normalisation (rows, width),
    of softmax (rows, width, whether its numbers are not neighbours), of a reduction (results, numbers for each, whether
    these are not neighbours), of the gradient of a table of embeddings (tokens, rows of the table), of any other
    operation how its tensors lie: () for alike, or (``UNLIKE`` or ``TRANSPOSED``,).
    """
    base = name.removeprefix("aten::")
    if base.removesuffix("_backward") in _BATCH_NORMS:
        x = args[1] if base.endswith("_backward") else args[0]
        return (x.numel() // x.shape[1], x.shape[1], int(channels_last(x)))
    if base.startswith(("native_layer_norm", "_fused_rms_norm")):
        x, width = (args[1], prod(args[2])) if base.endswith("_backward") else (args[0], prod(args[1]))
        return (x.numel() // max(width, 1), width)
    if base.startswith("native_group_norm"):
        x, first = (args[1], 5) if base.endswith("_backward") else (args[0], 3)
        rows = args[first] * args[first + 3]
        return (rows, x.numel() // max(rows, 1))
    if base in ("_softmax", "_log_softmax", "_safe_softmax"):
        return _softmax(args[0], args[1])
    if base in ("_softmax_backward_data", "_log_softmax_backward_data"):
        return _softmax(args[0], args[2])
    if base in _REDUCTIONS:
        return _reduction(args, 2 if "norm" in base else 1, out)
    if base == "embedding_dense_backward":
        return (args[1].numel(), args[2])
    if base == "_embedding_bag_backward":
        return (args[1].numel(), args[6])
    return () if name in _JOINED else _layout(args, out)


def channels_last(x: torch.Tensor) -> bool:
    """Whether a batch of images lies in memory with its channels innermost, and only so."""
    return x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def _softmax(x: torch.Tensor, dim: int) -> tuple[int, ...]:
    if not x.dim():
        return (1, 1, 0)
    width = x.shape[dim]
    return (x.numel() // max(width, 1), width, int(dim % x.dim() != x.dim() - 1))


def _reduction(args: Sequence[Any], place: int, out: Any) -> tuple[int, ...]:
    x = args[0]
    results = out[0] if isinstance(out, tuple | list) else out
    kept = max(results.numel(), 1)
    over = args[place] if len(args) > place else None
    dims = [over] if isinstance(over, int) else over if isinstance(over, Sequence) and over else range(x.dim())
    dims = [d % x.dim() for d in dims if isinstance(d, int)] if x.dim() else []
    apart = bool(dims) and kept > 1 and min(x.stride(d) for d in dims) > min(x.stride())
    return (kept, max(x.numel() // kept, 1), int(apart))


def _layout(args: Sequence[Any], out: Any) -> tuple[int, ...]:
    if not isinstance(out, torch.Tensor) or out.numel() <= 1:
        return ()
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.numel() > 1]
    if all(t.shape == out.shape and t.stride() == out.stride() for t in inputs) and _dense(out):
        return ()
    same = [t for t in inputs if t.shape == out.shape]
    if any(_innermost(t) != _innermost(out) for t in same):
        return (TRANSPOSED,)
    return (UNLIKE,)


def _dense(x: torch.Tensor) -> bool:
    return x.numel() == 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _innermost(x: torch.Tensor) -> int | None:
    """The dimension along which neighbours in memory lie; ``None`` where there is none."""
    return next((d for d in reversed(range(x.dim())) if x.shape[d] > 1 and x.stride(d) == 1), None)
