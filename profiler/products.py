"""FLOPs of products: matrices, convolutions, attention. Two to a multiply-add, the bias that one begins with included.

The formulas read an operation's arguments by the names of its schema. ``k`` multiplications and ``k - 1`` additions
make an element of a product, and its bias one more: 2 k, with a bias exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

Arguments = Mapping[str, Any]
Formula = Callable[[Arguments, Any], int]
"""FLOPs from an operation's arguments, by name and with their defaults, and its result."""

_FACTORS = {
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "_addmm_activation": ("mat1", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "addbmm": ("batch1", "batch2"),
    "_int_mm": ("self", "mat2"),
    "_scaled_mm": ("self", "mat2"),
}
_VECTORS = {"mv": "self", "addmv": "mat", "dot": "self", "vdot": "self"}
"""The factor of which each element meets one other number."""

CAUSAL_FROM_TOP, CAUSAL_FROM_BOTTOM = 1, 2
"""``custom_mask_type`` of the memory-efficient kernels: which row of the scores the mask's diagonal begins or ends."""


def _matmul(left: str, right: str) -> Formula:
    return lambda a, _: 2 * a[left].numel() * a[right].shape[-1]


def _vector(matrix: str) -> Formula:
    return lambda a, _: 2 * a[matrix].numel()


def _outer(_: Arguments, out: torch.Tensor) -> int:
    return 2 * out.numel()


def _grouped_mm(a: Arguments, _: Any) -> int:
    """Every row, or column, or inner index belongs to one group, whatever the sizes of the groups."""
    left, right = a["self"], a["mat2"]
    if left.dim() == 3 and right.dim() == 2:  # the groups share out the columns
        return 2 * prod(left.shape[1:]) * right.shape[-1]
    return 2 * left.numel() * right.shape[-1]


def _trilinear(a: Arguments, _: Any) -> int:
    """Sums of products of three, as a product of two and then the third: the first, which is the larger, is counted."""
    shapes = []
    for tensor, expanded in ((a[f"i{n}"], a[f"expand{n}"]) for n in (1, 2, 3)):
        shape = list(tensor.shape)
        for dim in expanded:
            shape.insert(dim, 1)
        shapes.append(shape)
    return 2 * prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _convolution(a: Arguments, out: torch.Tensor) -> int:
    """Each weight meets each output position once, padding included; each input position where it is transposed.

    The weight is [out, in / groups, ...], transposed [in, out / groups, ...]: groups are accounted for by its size.
    """
    positions = a["input"].shape if a["transposed"] else out.shape
    return 2 * positions[0] * prod(positions[2:]) * a["weight"].numel()


def _convolution_backward(a: Arguments, _: Any) -> int:
    """The input's gradient and the weight's each cost as much as forward, the bias's one an element: if asked for."""
    for_input, for_weight, for_bias = map(bool, a["output_mask"])
    gradient = a["grad_output"]
    forward = _convolution(a, gradient)
    return forward * (for_input + for_weight) + gradient.numel() * for_bias


class Attention(NamedTuple):
    """The sizes of one call."""

    heads: int
    """Of the whole batch, those of the queries."""
    pairs: int
    """Of a query and a key that meet, of one head."""
    dim: int
    value_dim: int

    @property
    def flops(self) -> int:
        """Scores, and their product with the values. The softmax inside of the kernel is left out, as is usual."""
        return 2 * self.heads * self.pairs * (self.dim + self.value_dim)

    @property
    def score_flops(self) -> int:
        """The product of queries and keys, which fused kernels compute again in backward."""
        return 2 * self.heads * self.pairs * self.dim

    @property
    def backward_flops(self) -> int:
        """Five products: the scores again, and the gradients of the weights, of values, queries and keys."""
        return 2 * self.heads * self.pairs * (3 * self.dim + 2 * self.value_dim)


def attended_pairs(queries: int, keys: int, shift: int = 0, left: int | None = None, right: int | None = None) -> int:
    """Pairs (query i, key j) with i + shift - left <= j <= i + shift + right; ``None`` is without a limit."""
    upper = queries * keys if right is None else _clamped_sum(queries, shift + right + 1, keys)
    return upper if left is None else max(0, upper - _clamped_sum(queries, shift - left, keys))


def _clamped_sum(count: int, start: int, most: int) -> int:
    """The sum of ``count`` numbers from ``start`` on, each clamped to [0, most]."""

    def below(end: int) -> int:
        if end <= most:
            return max(end, 0) * max(end - 1, 0) // 2
        return most * (most - 1) // 2 + (end - most) * most

    return below(start + count) - below(start)


def attention_of(query: Sequence[int], key: Sequence[int], value_dim: int, causal: bool) -> Attention:
    """From shapes [..., length, dim]. ``causal`` is PyTorch's: a query meets the keys up to its own position.

    A mask that is given as a tensor leaves all pairs: its kernels compute full scores.
    """
    *heads, length, dim = query
    pairs = attended_pairs(length, key[-2], right=0 if causal else None)
    return Attention(prod(heads), pairs, dim, value_dim)


def _sdpa(a: Arguments) -> Attention:
    return attention_of(a["query"].shape, a["key"].shape, a["value"].shape[-1], a.get("is_causal", False))


def _packed(a: Arguments) -> Attention:
    """Of [batch, length, heads, dim], or of sequences behind each other with the offsets where each begins.

    Offsets of a fake tensor hold no numbers: then the sequences are taken to be of equal length.
    """
    query, key = a["query"], a["key"]
    *_, heads, dim = query.shape
    lengths = zip(_lengths(query, a, "q"), _lengths(key, a, "k"), strict=True)
    kind = a.get("custom_mask_type", CAUSAL_FROM_BOTTOM if a.get("is_causal") else 0)
    window = a.get("window_size") or (a.get("window_size_left"), a.get("window_size_right"))
    if isinstance(window, int):  # so many keys up to a query's own position
        window = (window - 1, None)
    left, right = (None if size is None or size < 0 else size for size in window)
    if kind:
        right = 0
    pairs = sum(attended_pairs(q, k, k - q if kind != CAUSAL_FROM_TOP else 0, left, right) for q, k in lengths)
    return Attention(heads, pairs, dim, a["value"].shape[-1])


def _lengths(tensor: torch.Tensor, a: Arguments, which: str) -> list[int]:
    """Of the sequences in a tensor of [batch, length, heads, dim] or [1?, all lengths, heads, dim]."""
    names = (f"{prefix}_{side}" for side in (which, "q") for prefix in ("cum_seq", "cu_seqlens", "cu_seq"))
    offsets = next((a[name] for name in names if a.get(name) is not None), None)
    if offsets is None:
        return [tensor.shape[1]] * tensor.shape[0]
    count, total = offsets.shape[0] - 1, tensor.shape[-3]
    if isinstance(offsets, FakeTensor) or offsets.is_meta:
        return [total // count + (i < total % count) for i in range(count)]
    return [int(n) for n in offsets.diff().tolist()]


def _both(name: str, sizes: Callable[[Arguments], Attention], backward: str) -> dict[str, Formula]:
    return {name: lambda a, _: sizes(a).flops, backward: lambda a, _: sizes(a).backward_flops}


def _attentions() -> dict[str, Formula]:
    found: dict[str, Formula] = {}
    for kernel in ("flash", "efficient", "cudnn", "fused"):
        name = f"_scaled_dot_product_{kernel}_attention" + ("_overrideable" if kernel == "fused" else "")
        found |= _both(name, _sdpa, name + "_backward")
    found |= _both(
        "_scaled_dot_product_flash_attention_for_cpu", _sdpa, "_scaled_dot_product_flash_attention_for_cpu_backward"
    )
    found |= _both("_flash_attention_forward", _packed, "_flash_attention_backward")
    found |= _both("_efficient_attention_forward", _packed, "_efficient_attention_backward")
    return found | _both("torch_attn::_varlen_attn", _packed, "torch_attn::_varlen_attn_backward")


PRODUCTS: dict[str, Formula] = {
    **{name: _matmul(*factors) for name, factors in _FACTORS.items()},
    **{name: _vector(matrix) for name, matrix in _VECTORS.items()},
    "addr": _outer,
    "_grouped_mm": _grouped_mm,
    "_scaled_grouped_mm": _grouped_mm,
    "_trilinear": _trilinear,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **_attentions(),
}
"""By name, without namespace where it is PyTorch's own."""
