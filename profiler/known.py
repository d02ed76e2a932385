"""The numbers of small tensors, as far as they follow from the example batch alone.

Fake tensors have shapes and no numbers, but forward may ask for some: the longest of the lengths, whether a mask
masks anything, how often to repeat a row. Such integers come from the batch through a few cheap operations, which are
therefore also done for real. What depends on weights, or on chance, stays unknown.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from profiler.packing import sizes_of_steps
from profiler.trees import tensors_in

aten = torch.ops.aten

MOST_ELEMENTS = 1 << 22
"""Of a tensor that is followed: enough for an attention mask, and little time."""
UNINITIALIZED = frozenset({"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::empty_like"})


class KnownValues:
    """Real tensors that belong to fake ones. A view of a known tensor is a view of its real one."""

    def __init__(self) -> None:
        self._real = WeakTensorKeyDictionary()
        self._spoiled: dict[int, torch.Tensor] = {}
        """By storage, those whose fake ones have been written to by something unknown; kept, so that none is reused."""

    def tell(self, fakes: Any, reals: Any) -> None:
        """Give the numbers of a tree of fake tensors."""
        for fake, real in zip(tree_leaves(fakes), tree_leaves(reals), strict=True):
            if isinstance(fake, torch.Tensor) and _has_numbers(real) and _worthwhile(fake):
                with _disable_current_modes():
                    # A copy, because forward may write into its inputs.
                    self._real[fake] = real.detach().cpu().clone()

    def of(self, tree: Any) -> Any:
        """The tree with real tensors in the place of the fake ones, or None if one is unknown."""
        known = True

        def real(tensor: torch.Tensor) -> Any:
            nonlocal known
            found = self._find(tensor)
            known = known and found is not None
            return found

        out = tree_map_only(torch.Tensor, real, tree)
        return out if known else None

    def follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Do an operation for real as well, if all it reads is known; otherwise forget what it writes."""
        made = tensors_in(out)
        known = self.of((args, kwargs)) if self._certain(func, args, kwargs) and all(map(_worthwhile, made)) else None
        if known is None:
            if func._schema.is_mutable:
                self._spoil(func, args, kwargs)
            return
        results = tensors_in(self.run(func, *known))
        for fake, real in zip(made, results, strict=True):
            self._real[fake] = real

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operation on real tensors."""
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with _disable_current_modes():
            return func(*args, **kwargs)

    def plain(self, real: torch.Tensor) -> Any:
        """A real tensor's numbers as a NumPy array."""
        with _disable_current_modes():
            return real.numpy().copy()

    def count(self, mask: torch.Tensor) -> int:
        """How many elements a real mask selects."""
        with _disable_current_modes():
            return int(mask.count_nonzero())

    def _certain(self, func: Any, args: Any, kwargs: Any) -> bool:
        if func._schema.name in UNINITIALIZED or torch.Tag.nondeterministic_seeded in func.tags:
            return False
        return all(self._find(t) is not None for t in tensors_in((args, kwargs)))

    def _find(self, tensor: torch.Tensor) -> torch.Tensor | None:
        if not isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor if tensor.device.type == "cpu" and _worthwhile(tensor) else None
        real = self._real.get(tensor)
        if real is None or real.untyped_storage()._cdata in self._spoiled:
            return None
        return real

    def _spoil(self, func: Any, args: Any, kwargs: Any) -> None:
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor) and (real := self._real.get(tensor)) is not None:
                        self._spoiled[real.untyped_storage()._cdata] = real


def known_selection(values: KnownValues, func: Any, args: Any, kwargs: Any) -> Any:
    """The fake result of an operation whose size depends on numbers, or None if they are not known."""
    if func is aten.index.Tensor:
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                mask = values.of(index)
                if mask is None:
                    return None
                count = values.count(mask)
                indices += [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]
            else:
                indices.append(index)
        return func(args[0], indices)
    if func is aten.masked_select.default:
        mask = values.of(args[1])
        if mask is None:
            return None
        repeats = torch.broadcast_shapes(args[0].shape, mask.shape).numel() // max(mask.numel(), 1)
        return args[0].new_empty(values.count(mask) * repeats)
    if func is aten._pack_padded_sequence.default and values.of(args[1]) is not None:
        return _packed(values, *args)
    if func is aten._ctc_loss.Tensor and (lengths := values.of(args[3])) is not None:
        return _alignments(args[0], values.run(aten.max.default, (lengths,), {}))
    known = values.of((args, kwargs))
    if known is None:
        return None
    return tree_map_only(
        torch.Tensor,
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu"),
        values.run(func, *known),
    )


def assumed_result(values: KnownValues, func: Any, args: Any, kwargs: Any) -> tuple[Any, str] | None:
    """The fake result where numbers are not known, and what was taken for granted; None for other operations."""
    if func is aten._pack_padded_sequence.default:
        return _packed(values, *args), "all sequences are taken to be as long as the longest"
    if func is aten._ctc_loss.Tensor:
        longest = args[1].shape[1] if args[1].dim() > 1 else args[1].numel() // args[3].numel()
        return _alignments(args[0], longest), f"all targets are taken to be {longest} long"
    if func in (aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default):
        tensor = args[0]
        counted = [tensor.new_empty(tensor.numel(), dtype=torch.int64) for _ in range(2)]
        flat = tensor.new_empty(tensor.shape if func is aten.unique_dim.default else tensor.numel())
        return (flat, counted[0].view(tensor.shape), counted[1]), "all values are taken to be different"
    if func is aten.repeat_interleave.Tensor:
        length = kwargs.get("output_size") or args[0].numel()
        return args[0].new_empty(length), "every row is taken to be repeated once"
    if func is aten.bincount.default:
        least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
        length = max(least, 1)
        return args[0].new_empty(length, dtype=torch.int64), f"a count is taken to have {length} bins"
    return None


def _alignments(log_probabilities: torch.Tensor, longest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses, and the logarithms of the paths' probabilities, which alternate between labels and blanks."""
    with _disable_current_modes():
        states = 2 * int(longest) + 1
    steps, batch = log_probabilities.shape[:2]
    return log_probabilities.new_empty(batch), log_probabilities.new_empty(batch, steps, states)


def _packed(values: KnownValues, sequences: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> Any:
    """Fake rows, and real sizes of the steps of time, which the recurrent kernels read from memory."""
    real = values.of(lengths)
    with _disable_current_modes():
        sizes = sizes_of_steps(sequences, real, batch_first)
        rows = int(sizes.sum())
    return sequences.new_empty(rows, *sequences.shape[2:]), sizes


def _has_numbers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and value.layout is torch.strided


def _worthwhile(tensor: torch.Tensor) -> bool:
    return tensor.numel() <= MOST_ELEMENTS
