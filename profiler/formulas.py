"""FLOPs of operations by formula.

[Note: What counts] Everything that computes floating numbers: products (``profiler.products``), two to a multiply-add,
and what works number by number (``profiler.elementwise``). Products are nearly all of it: for a decoder of N
parameters and T tokens they are the 6 N T that people know, and its attention. What computes integers or truth
values counts 0. Complex numbers count as the real ones that they are made of.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from profiler.elementwise import FORMULAS, FREE, PER_FIRST, PER_RESULT
from profiler.kinds import plain_name
from profiler.products import PRODUCTS

MATMULS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm"})
"""Products that cuBLAS carries out in a workspace of its own."""

Count = Callable[[tuple[Any, ...], dict[str, Any], Any], int]
"""FLOPs from the arguments, by place and by name, and the result."""

COMPLEX_PRODUCT = 4
"""A complex multiply-add is four real ones."""
_COMPLEX_POINTWISE = {"mul": 6, "div": 6}
"""FLOPs of one complex number; of other operations 2, one for each of its parts."""


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int | None:
    """FLOPs of one call of an operator overload; ``None`` when there is no formula for it.

    What a person registers with ``torch.utils.flop_counter.register_flop_formula`` for an operator of theirs counts.
    """
    count = _count_of(func)
    if count is not None:
        return count(args, kwargs, out)
    registered = flop_registry.get(func._overloadpacket)
    return int(registered(*args, **kwargs, out_val=out)) if registered else None


def rate_dtype(tensors: Sequence[torch.Tensor]) -> str:
    """Name of the dtype of the first floating-point tensor, "" if there is none."""
    return next((str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()), "")


def is_view(func: Any) -> bool:
    """Whether an operation's result is another look at its argument."""
    schema = func._schema
    return torch.Tag.inplace_view in func.tags or any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )


@cache
def _count_of(func: Any) -> Count | None:
    schema = func._schema
    name = plain_name(schema.name)
    if name in PRODUCTS:
        return _by_name(func, PRODUCTS[name], COMPLEX_PRODUCT)
    if name in FORMULAS:
        return _by_name(func, FORMULAS[name], 1)
    name = name.removeprefix("_foreach_")
    copies = name.endswith("_copy") and "::" not in name
    if name in FREE or copies or is_view(func) or _is_factory(schema):
        return _nothing
    if name in PER_FIRST:
        return _per_first(PER_FIRST[name])
    if name in PER_RESULT or torch.Tag.pointwise in func.tags or _is_pointwise(name):
        return _per_result(PER_RESULT.get(name, 1), _COMPLEX_POINTWISE.get(name, 2))
    return None


def _by_name(func: Any, formula: Callable[[Mapping[str, Any], Any], int], complex_factor: int) -> Count:
    """A formula that is called with the arguments by name, defaults filled in."""
    names = [argument.name for argument in func._schema.arguments]
    defaults = {a.name: a.default_value for a in func._schema.arguments if a.has_default_value()}

    def count(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        flops = int(formula({**defaults, **dict(zip(names, args, strict=False)), **kwargs}, out))
        return flops * complex_factor if complex_factor > 1 and _first(out).is_complex() else flops

    return count


def _nothing(_: tuple[Any, ...], __: dict[str, Any], ___: Any) -> int:
    return 0


def _per_first(flops: int) -> Count:
    def count(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        result = _first(out)
        parts = 2 if result.is_complex() else int(result.is_floating_point())
        return flops * parts * sum(t.numel() for t in _operand(args, kwargs)) if parts else 0

    return count


def _per_result(flops: int, complex_flops: int) -> Count:
    def count(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
        operand = _operand(args, kwargs)
        results = _tensors(out) or operand  # operations on lists in place return nothing
        # Those have a result for each of their inputs; of others one counts, beside it may be a mask.
        numbers = sum(t.numel() for t in results[: len(operand) or 1])
        if results and results[0].is_complex():
            return complex_flops * numbers
        return flops * numbers if results and results[0].is_floating_point() else 0

    return count


def _operand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[torch.Tensor]:
    """The tensors of the first argument, none where it is a number."""
    return _tensors(args[0] if args else next(iter(kwargs.values())))


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return [t for t in value if isinstance(t, torch.Tensor)] if isinstance(value, (list, tuple)) else ()


def _first(value: Any) -> torch.Tensor:
    return _tensors(value)[0]


def _is_pointwise(name: str) -> bool:
    """Whether an overload of PyTorch's operation is marked as pointwise; those in place and on lists often are not."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def _is_factory(schema: Any) -> bool:
    return not any("Tensor" in str(argument.type) for argument in schema.arguments)
