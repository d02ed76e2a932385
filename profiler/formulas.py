"""FLOPs of operations by formula, two to a multiply-add."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Formula = Callable[..., int]
_FORMULAS: dict[str, Formula] = {}

MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"})

_MOVES = (
    "_local_scalar_dense _pin_memory _to_copy _unsafe_view arange bernoulli_ cat clone constant_pad_nd copy_ "
    "embedding empty_like empty_strided expand_copy fill fill_ flip full_like gather index index_select lift "
    "lift_fresh lift_fresh_copy masked_select new_empty new_empty_strided new_full new_ones new_zeros nonzero "
    "normal_ ones_like rand_like randn_like repeat roll scalar_tensor select_backward select_scatter "
    "slice_backward slice_scatter split_with_sizes_copy stack tril triu uniform_ unfold_backward zero_ zeros_like"
)
MOVES = frozenset("aten::" + name for name in _MOVES.split())
"""Operations that only make, fill or move numbers."""


_ASKS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
UNMOVED = frozenset("aten::" + name for name in _ASKS)
"""Operations that only ask for memory."""


def register(name: str) -> Callable[[Formula], Formula]:
    """Register a formula, called with the operation's arguments and ``out_val``; a second one is refused."""

    def add(formula: Formula) -> Formula:
        if name in _FORMULAS:
            raise ValueError(f"{name} has a formula already")
        _FORMULAS[name] = formula
        return formula

    return add


for _packet, _formula in flop_registry.items():
    _name = getattr(_packet, "_qualified_op_name", "")
    if _name in MATMULS:
        register(_name)(_formula)


@register("aten::convolution")
def convolution_flops(x: torch.Tensor, weight: torch.Tensor, *args: Any, out_val: torch.Tensor) -> int:
    """Each weight meets each output position once, or each input position where the convolution is transposed.

    The weight is [out, in / groups, ...], transposed [in, out / groups, ...]: groups are accounted for by its size.
    """
    transposed = bool(args[4])
    positions = x.shape if transposed else out_val.shape
    return 2 * positions[0] * prod(positions[2:]) * weight.numel()


@register("aten::convolution_backward")
def convolution_backward_flops(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *args: Any, **_: Any) -> int:
    """The input's gradient and the weight's each cost as much as forward, where they are asked for."""
    transposed, output_mask = bool(args[4]), args[7]
    positions = x.shape if transposed else grad.shape
    return 2 * positions[0] * prod(positions[2:]) * weight.numel() * (bool(output_mask[0]) + bool(output_mask[1]))


@register("aten::_grouped_mm")
def grouped_mm_flops(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Every row of ``a`` meets one group's matrix, whatever the sizes of the groups."""
    return 2 * a.numel() * b.shape[-1]


def attention_flops(query: Sequence[int], key: Sequence[int], value_dim: int, causal: bool) -> int:
    """Forward: scores and their product with the values; a causal mask leaves half. Shapes [..., length, dim]."""
    *heads, length, dim = query
    flops = 2 * prod(heads) * length * key[-2] * (dim + value_dim)
    return flops // 2 if causal else flops


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """FLOPs of one call of an operator overload; ``None`` when there is no formula for it."""
    schema = func._schema
    formula = _FORMULAS.get(schema.name)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    return 0 if schema.name in MOVES or _is_view(schema) or _is_factory(schema) else None


def moved_bytes(func: Any, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """Bytes that a call reads and writes if every tensor crosses the memory bus once; 0 for a view."""
    schema = func._schema
    if _is_view(schema) or schema.name in UNMOVED:
        return 0
    return sum(t.nbytes for t in read) + sum(t.nbytes for t in written)


def rate_dtype(tensors: Sequence[torch.Tensor]) -> str:
    """Name of the dtype of the first floating-point tensor, "" if there is none."""
    return next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "")


def _is_view(schema: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _is_factory(schema: Any) -> bool:
    return not any("Tensor" in str(argument.type) for argument in schema.arguments)
