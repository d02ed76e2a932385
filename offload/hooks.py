"""Where the runtime meets the model: module hooks and saved-tensor hooks, and nothing that changes a forward.

[Note: a unit's use]
In forward a unit is in use from its module's pre-forward hook to its forward hook. In backward it is in use from the
moment the gradient of one of the module's outputs is known, or one of its weights is unpacked, or its module runs
again (recompute), until the gradients of the module's inputs are known. Where no input needs a gradient, the use
lasts to the end of the pass.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed._composable import checkpoint
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

from offload.unit import Unit
from offload.weights import WeightReference


KEY_VALUE_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past"})
"""What transformers' blocks call the cache among their keyword arguments."""


class Listener(Protocol):
    """Who is told of a unit's uses."""

    def begin_use(self, name: str) -> None:
        """The unit is about to compute."""

    def end_forward_use(self, name: str) -> None:
        """The unit's forward is over."""

    def end_backward_use(self, name: str) -> None:
        """The unit's backward is over."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | WeightReference:
        """Autograd saves a tensor."""

    def unpack(self, packed: torch.Tensor | WeightReference) -> torch.Tensor:
        """Autograd needs it back."""


class _Boundary(torch.autograd.Function):
    """Identity whose backward runs when the gradients of a module's inputs are known."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.passed = passed
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.passed()
        return None, *gradients


def attach(units: list[Unit], recompute: tuple[str, ...], root: nn.Module, listener: Listener) -> list[RemovableHandle]:
    """Watch the uses of every unit but the root, and recompute the modules of these paths; undone by the handles."""
    handles = [handle for unit in units if unit.name for handle in _watch(unit, listener)]
    for path in recompute:
        module = root.get_submodule(path)
        handles.append(module.register_forward_pre_hook(_without_cache, with_kwargs=True))
        checkpoint(module)
    return handles


def _without_cache(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block that runs twice would append to its key-value cache twice; training needs none."""
    return args, {name: None if name in KEY_VALUE_CACHES else value for name, value in kwargs.items()}


def saved_tensors(listener: Listener) -> AbstractContextManager[Any]:
    """The hooks under which forward must run."""
    return torch.autograd.graph.saved_tensors_hooks(listener.pack, listener.unpack)


def _watch(unit: Unit, listener: Listener) -> Iterator[RemovableHandle]:
    name = unit.name

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        listener.begin_use(name)
        if not torch.is_grad_enabled():
            return None
        return _with_boundary((args, kwargs), lambda: listener.end_backward_use(name))

    def after_forward(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        listener.end_forward_use(name)
        for tensor in _needing_gradient(output):
            tensor.register_hook(lambda _: listener.begin_use(name))

    # Ahead of every other hook, the recompute's too: those hooks must find the weights there.
    yield unit.module.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)
    yield unit.module.register_forward_hook(after_forward)


def _needing_gradient(tree: Any) -> list[torch.Tensor]:
    return [t for t in tree_flatten(tree)[0] if isinstance(t, torch.Tensor) and t.requires_grad]


def _with_boundary(inputs: Any, passed: Callable[[], None]) -> Any:
    """The same inputs, with a boundary in the graph of those that need a gradient; None where none does."""
    leaves, spec = tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    if not places:
        return None
    for place, tensor in zip(places, _Boundary.apply(passed, *(leaves[i] for i in places)), strict=True):
        leaves[place] = tensor
    return tree_unflatten(leaves, spec)
