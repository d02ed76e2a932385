"""The sizes of the operations whose rate depends on more than how much they compute and move."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from profiler.rows import channels_last, row_shape

_LEFT = {"mm": 0, "bmm": 0, "_scaled_mm": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1}
_LEFT_FACTOR = {"aten::" + name: position for name, position in _LEFT.items()}
"""Where the left factor stands among the arguments; the right one follows."""
_PACKED = {
    "_flash_attention_forward": (0, 3, 7, 8, None),
    "_flash_attention_backward": (1, 6, 10, 11, None),
    "_efficient_attention_forward": (0, 4, 8, 9, 3),
    "_efficient_attention_backward": (1, 6, 11, 14, 4),
}
_PACKED_ATTENTION = {"aten::" + name: places for name, places in _PACKED.items()}
"""Where queries, sequences' offsets, dropout, causality and mask stand among the arguments; keys follow the queries."""

WIDEST_LOAD_BYTES = 16


def work_shape(name: str, args: Sequence[Any], out: Any) -> tuple[int, ...]:
    """The sizes of a call.

    Of a matrix product (batch, m, n, k, alignment in bytes), of a convolution (positions, channels in, channels out,
    elements of the kernel, groups, whether channels come last), of attention ``attention_shape``; of a normalisation,
    softmax, reduction or the gradient of a table what ``profiler.rows`` says; of any other operation () or, where
    its tensors do not lie alike, (``UNLIKE`` or ``TRANSPOSED``,).

    Rows that begin at multiples of 16 bytes can be loaded whole; the alignment is that of the worst of the three
    matrices. Positions are those of the batch's outputs, or of its inputs where the convolution is transposed.
    """
    if name in _LEFT_FACTOR:
        a, b = args[_LEFT_FACTOR[name] :][:2]
        batch = a.shape[0] if a.dim() == 3 else 1
        alignment = min(_alignment(t) for t in (a, b, out) if t.dim() >= 2)
        return (batch, a.shape[-2], b.shape[-1], a.shape[-1], alignment)
    if name == "aten::_grouped_mm":
        a, b = args[:2]
        groups = max(t.shape[0] if t.dim() == 3 else 1 for t in (a, b))
        rows, inner = a.shape[-2], a.shape[-1]
        if a.dim() == 2 and b.dim() == 3:
            rows //= groups
        elif a.dim() == b.dim() == 2:
            groups = out.shape[0]
            inner //= groups
        return (groups, max(rows, 1), b.shape[-1], max(inner, 1), min(_alignment(a), _alignment(b)))
    if name in ("aten::mv", "aten::addmv", "aten::dot", "aten::vdot", "aten::addr"):
        return _with_vector(name, args)
    if name in _PACKED_ATTENTION:
        return _packed_attention(args, *_PACKED_ATTENTION[name])
    if name == "aten::convolution":
        return _convolution(args[0], args[1], out, bool(args[6]), args[8])
    if name == "aten::convolution_backward":
        return _convolution(args[1], args[2], args[0], bool(args[7]), args[9])
    return row_shape(name, args, out)


def attention_shape(
    query: Sequence[int], key: Sequence[int], causal: bool, masked: bool, dropout: bool = False
) -> tuple[int, ...]:
    """(batch times heads, queries, keys, dim, causal, masked, with dropout), from shapes [..., length, dim]."""
    return (prod(query[:-2]), query[-2], key[-2], query[-1], int(causal), int(masked), int(dropout))


def _with_vector(name: str, args: Sequence[Any]) -> tuple[int, ...]:
    left, right = args[-2:] if name in ("aten::addmv", "aten::addr") else args[:2]
    if name == "aten::addr":
        return (1, len(left), len(right), 1, _alignment(args[0]) if args[0].dim() == 2 else WIDEST_LOAD_BYTES)
    if left.dim() == 1:
        return (1, 1, 1, len(left), WIDEST_LOAD_BYTES)
    return (1, left.shape[0], 1, left.shape[1], _alignment(left))


def _packed_attention(
    args: Sequence[Any], first: int, offsets: int, dropout: int, causal: int, mask: int | None
) -> tuple[int, ...]:
    """Of [batch, length, heads, dim], or of sequences behind each other, taken to be of equal length."""
    query, key = (args[place].shape for place in (first, first + 1))
    count = args[offsets].shape[0] - 1 if args[offsets] is not None else prod(query[:-3])
    lengths = (max(prod(shape[:-2]) // count, 1) for shape in (query, key))
    masked = mask is not None and args[mask] is not None
    return (count * query[-2], *lengths, query[-1], int(bool(args[causal])), int(masked), int(args[dropout] > 0))


def _convolution(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, transposed: bool, groups: int
) -> tuple[int, ...]:
    positions = x.shape if transposed else out.shape
    last = int(channels_last(x))
    return (positions[0] * prod(positions[2:]), x.shape[1], out.shape[1], prod(weight.shape[2:]), groups, last)


def _alignment(matrix: torch.Tensor) -> int:
    leading = max(matrix.stride()[-2:]) * matrix.element_size()
    return min(leading & -leading, WIDEST_LOAD_BYTES) if leading else WIDEST_LOAD_BYTES
