"""Bytes that an operation reads and writes if every number crosses the memory bus once.

A tensor is read at most once, and of a storage at most as much as it holds: an expanded tensor, or one given twice,
costs no more than the numbers that are there. An operation that works in place reads and writes. What can not be seen
from the sizes of the arguments is told here: what is written only, what is read in part, and what is given for its
shape only.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from profiler.formulas import is_view
from profiler.kinds import plain_name

Rule = Callable[[Sequence[Any], Sequence[torch.Tensor], Sequence[torch.Tensor]], int]
"""Bytes from the arguments by place, the tensors among all arguments, and the results."""


def moved_bytes(func: Any, args: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """Of one call of an operator overload; 0 for a view. ``read`` are all tensors that it is given, in order."""
    return _rule_of(func)(args, read, written)


def traffic(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the numbers in the tensors, none of them twice."""
    if len(tensors) == 1:
        return min(_own_bytes(tensors[0]), tensors[0].untyped_storage().nbytes())
    parts: dict[int, list[int]] = {}
    for tensor in {id(t): t for t in tensors}.values():
        storage = tensor.untyped_storage()
        parts.setdefault(storage._cdata, [storage.nbytes(), 0])[1] += _own_bytes(tensor)
    return sum(min(whole, used) for whole, used in parts.values())


def _own_bytes(tensor: torch.Tensor) -> int:
    """Of a tensor's numbers, an expanded dimension's once."""
    strides = tensor.stride()
    if 0 not in strides:
        return tensor.nbytes
    sizes = zip(tensor.shape, strides, strict=True)
    return prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


def _all(_: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    return traffic(read) + traffic(written)


def _nothing(_: Sequence[Any], __: Sequence[torch.Tensor], ___: Sequence[torch.Tensor]) -> int:
    return 0


def _written_only(_: Sequence[Any], __: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    return traffic(written)


def _into_first(_: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """What is overwritten is not read."""
    return traffic(read[1:]) + traffic(written)


def _into_result(_: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """The result is given as an argument, which is not read."""
    return traffic([t for t in read if not any(t is w for w in written)]) + traffic(written)


def _lists_in_place(args: Sequence[Any], read: Sequence[torch.Tensor], _: Sequence[torch.Tensor]) -> int:
    return traffic(read) + traffic(args[0])


def _chosen(_: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """Of the first argument as much is read as is written."""
    result = traffic(written)
    return min(result, traffic(read[:1])) + traffic(read[1:]) + result


def _without(*places: int) -> Rule:
    """The arguments at ``places`` are there for their shapes."""

    def rule(args: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
        return traffic([t for t in read if not any(t is args[place] for place in places)]) + traffic(written)

    return rule


def _nll(_: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    """Of each row one number is read."""
    scores, targets = read[:2]
    return targets.numel() * scores.element_size() + traffic(read[1:]) + traffic(written)


def _scattered(passes: int) -> Rule:
    """Numbers go to places of the first argument: they are read with their indices, and the places written.

    ``passes`` is 2 where the places are read too. A result of its own is first a copy, except in backward: autograd
    adds to zeros in their place, only before a dispatch mode, such as the tracer's, it does not.
    """

    def rule(_: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
        target, given = read[0], read[1:]
        in_place = written[0] is target or torch._C._current_autograd_node() is not None
        copied = 0 if in_place else 2 * traffic(written)
        places = min(max(t.numel() for t in given) * target.element_size(), traffic(read[:1]))
        return copied + traffic(given) + passes * places

    return rule


def _put(args: Sequence[Any], read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> int:
    accumulates = len(args) > 3 and args[3]
    return _scattered(2 if accumulates else 1)(args, read, written)


_UNREAD = {
    1: "nll_loss_backward nll_loss2d_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward "
    "avg_pool2d_backward avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
    "adaptive_max_pool2d_backward adaptive_max_pool3d_backward reflection_pad1d_backward reflection_pad2d_backward "
    "reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward",
}
_RULES: list[tuple[Rule, str]] = [
    (
        _nothing,
        "empty empty_like empty_strided empty_permuted new_empty new_empty_strided _unsafe_view _reshape_alias lift "
        "resize resize_as set record_stream _assert_async _assert_tensor_metadata _efficientzerotensor detach",
    ),
    (
        _written_only,
        "zero fill zeros_like ones_like full_like new_zeros new_ones new_full rand_like randn_like randint_like "
        "normal uniform random exponential geometric cauchy log_normal",
    ),
    (_into_first, "copy bernoulli"),
    (_chosen, "embedding index index_select gather take _unsafe_index masked_select"),
    (_nll, "nll_loss_forward nll_loss2d_forward"),
    (_scattered(2), "index_add index_reduce scatter_add scatter_reduce"),
    (_scattered(1), "scatter index_copy"),
    (_put, "index_put _index_put_impl _unsafe_index_put put"),
    *((_without(place), names) for place, names in _UNREAD.items()),
]
_BY_NAME = {name: rule for rule, names in _RULES for name in names.split()}


@cache
def _rule_of(func: Any) -> Rule:
    schema = func._schema
    name = plain_name(schema.name)
    if is_view(func):
        return _nothing
    if name in _BY_NAME:
        return _BY_NAME[name]
    if any(argument.is_out for argument in schema.arguments):
        return _into_result
    return _lists_in_place if not schema.returns and schema.is_mutable else _all
