"""Where the runtime meets the model: module hooks and saved-tensor hooks, and nothing that changes a forward.

[Note: a unit's use]
In forward a unit is in use from its module's pre-forward hook to its forward hook. In backward it is in use from the
moment the gradient of one of the module's outputs is known, or one of its weights is unpacked, or its module runs
again (recompute), until the gradients of the module's inputs are known. That is told by a node in the graph of inputs
that are tensors, or tuples of such. What comes in lists, dicts and other objects, which a module may change, is left
alone: then the use is over when the backward of a call begins that came before ([Note: backward goes back]). Where the
weights of a unit that is trained never leave the device, its use lasts until all of its parameters have gradients.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn
from torch.distributed._composable import checkpoint, checkpoint_activation
from torch.utils.hooks import RemovableHandle

from offload.block_inputs import WaitingInput
from offload.call_order import Call
from offload.compiled import check_compiled, hookable
from offload.dtensors import Distributed
from offload.made import made_since, next_node
from offload.second_run import Changing, SecondRun
from offload.unit import Unit
from offload.weights import WeightReference

KEY_VALUE_CACHES = frozenset({"past_key_values", "past_key_value", "layer_past"})
"""What transformers' blocks call the cache among their arguments."""


class Saved(NamedTuple):
    """A tensor that stays where it is, and how often it had been changed in place when autograd saved it."""

    tensor: torch.Tensor
    version: int


Packed = Saved | WeightReference | WaitingInput | Distributed
"""What autograd keeps of a tensor that it saves."""


class Listener(Protocol):
    """Who is told of a unit's uses."""

    def begin_call(self) -> None:
        """The model is about to compute."""

    def end_call(self) -> None:
        """The model's forward is over, or has failed."""

    def begin_root_use(self) -> None:
        """A module with parameters of the root unit is about to compute."""

    def begin_use(self, name: str) -> None:
        """The unit is about to compute."""

    def called(self, name: str) -> int | None:
        """The unit is called with gradients. How many calls were before this one, where that is known."""

    def bounds(self, name: str) -> bool:
        """Whether the end of the unit's backward must be told, or its last gradient tells enough."""

    def recorded(self, name: str) -> None:
        """The unit is about to compute what has a backward."""

    def bounded(self, name: str) -> None:
        """The end of the unit's backward will be told."""

    def end_forward_use(self, name: str) -> int | None:
        """The unit's forward is over. How many calls there were by now, where that is known."""

    def begin_backward_use(self, name: str, call: Call | None) -> None:
        """The backward of one of the unit's calls is about to begin; which, where all that came later is over."""

    def end_backward_use(self, name: str) -> None:
        """The backward of one of the unit's calls is over."""

    def begin_recomputed(self, arguments: tuple[Any, ...]) -> None:
        """A block that is recomputed in backward is about to run on these."""

    def pack(self, tensor: torch.Tensor) -> Packed:
        """Autograd saves a tensor."""

    def unpack(self, packed: Packed) -> torch.Tensor:
        """Autograd needs it back."""


class _Boundary(torch.autograd.Function):
    """Identity whose backward runs when the gradients of a module's inputs are known."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.passed = passed
        ctx.set_materialize_grads(False)  # what the module does not use gets no gradient, not a zero
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        ctx.passed()
        return None, *gradients


class _Recompute:
    """A module whose activations are computed again in backward, until ``remove``."""

    def __init__(self, module: nn.Module, listener: Listener) -> None:
        names = _positions(module)

        def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not torch.is_grad_enabled():
                return None
            listener.begin_recomputed(args)
            return _without_cache(names, args, kwargs)

        called = hookable(module)
        if checkpoint.state(called) is None:
            changing: Changing = {}

            def runs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                call = SecondRun(module, changing)
                return call.first(), _second(call, called)

            checkpoint(called, context_fn=runs)
        self._state = checkpoint.state(called)
        self._state.enable_hook = True
        # What others' hooks make of the arguments they make again in the second run, so these are kept as they come.
        _pre_hooks(called).move_to_end(_until_kept(called)[-1], last=False)
        # Ahead of that one, which keeps the arguments.
        self._handle = called.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)

    def remove(self) -> None:
        """Compute it once again."""
        self._handle.remove()
        self._state.enable_hook = False


def _until_kept(called: nn.Module) -> list[int]:
    """The recompute's own hook, which keeps the arguments, behind all that come before it, by their keys."""
    keys = []
    for key, hook in _pre_hooks(called).items():
        keys.append(key)
        if _made_in(hook) == checkpoint_activation.__name__:
            break
    return keys


def _pre_hooks(called: nn.Module) -> OrderedDict[int, Callable[..., Any]]:
    return cast(OrderedDict[int, Callable[..., Any]], called._forward_pre_hooks)  # typed as a dict, which has no order


def _made_in(hook: Any) -> str | None:
    return getattr(hook, "__module__", None)


@contextmanager
def _second(call: SecondRun, called: nn.Module) -> Iterator[None]:
    """Whoever has put a hook ahead of all has changed the arguments before they were kept: not once more."""
    hooks = _pre_hooks(called)
    ahead = [k for k in _until_kept(called)[:-1] if _made_in(hooks[k]) != __name__]
    absent = {key: hooks.pop(key) for key in ahead}
    try:
        with call.second():
            yield
    finally:
        hooks.update(absent)
        for key in reversed(ahead):
            hooks.move_to_end(key, last=False)


def attach(
    units: list[Unit], recompute: tuple[str, ...], root: nn.Module, listener: Listener
) -> Iterator[RemovableHandle | _Recompute]:
    """Watch the uses of every unit, and recompute the modules of these paths; undone by the handles."""
    check_compiled(root, units)
    for path in recompute:
        yield _Recompute(root.get_submodule(path), listener)
    for unit in units:
        yield from _watch(unit, listener) if unit.name else _watch_root(unit, listener)
    # Ahead of all others, as those of units are.
    yield hookable(root).register_forward_pre_hook(lambda *_: listener.begin_call(), prepend=True)
    yield hookable(root).register_forward_hook(lambda *_: listener.end_call(), always_call=True)


def _positions(module: nn.Module) -> list[str]:
    """What its forward calls the arguments that are given by position."""
    wrapped = getattr(module, "_orig_mod", module)  # torch.compile's own forward names none
    parameters = inspect.signature(wrapped.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _without_cache(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block that runs twice would append to its key-value cache twice; training needs none.

    Some models give it by position, as GPT-2 does.
    """
    named = [*names[: len(args)], *[""] * (len(args) - len(names))]
    given = tuple(None if _is_cache(name, value) else value for name, value in zip(named, args, strict=True))
    return given, {name: None if _is_cache(name, value) else value for name, value in kwargs.items()}


def _is_cache(name: str, value: Any) -> bool:
    """Whether it is an object that a block appends to; tensors and tuples (prefix tuning's) are not."""
    return name in KEY_VALUE_CACHES and not isinstance(value, torch.Tensor | tuple)


def saved_tensors(listener: Listener) -> AbstractContextManager[Any]:
    """The hooks under which forward must run."""
    return torch.autograd.graph.saved_tensors_hooks(listener.pack, listener.unpack)


def _watch(unit: Unit, listener: Listener) -> Iterator[RemovableHandle]:
    name, frozen = unit.name, not unit.shape.trainable_elements  # then there is no last gradient
    device = unit.fields[0].parameter.device
    node, before, told = 0, None, False  # of the call that goes on

    def bound() -> None:
        nonlocal told
        told = True
        listener.bounded(name)

    def before_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal node, before, told
        listener.begin_use(name)
        if not torch.is_grad_enabled():
            return None
        node, before = next_node(), listener.called(name)
        told = not (frozen or listener.bounds(name))
        if told:
            return None
        listener.recorded(name)
        return _with_boundary(args, kwargs, lambda: listener.end_backward_use(name), bound)

    def begin_backward(call: Call | None, _: torch.Tensor) -> None:
        listener.begin_backward_use(name, call)

    def after_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        by_now = listener.end_forward_use(name)
        if not torch.is_grad_enabled():
            return
        call = None if before is None or by_now is None else Call(before, by_now, told)
        for tensor in made_since(node, output, args, kwargs):
            # A leaf's gradient comes when its users are over, ahead of others; each device has an order of its own.
            known = None if tensor.is_leaf or tensor.device != device else call
            tensor.register_hook(partial(begin_backward, known))

    # Ahead of every other hook, the recompute's too: those hooks must find the weights there.
    yield hookable(unit.module).register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True)
    yield hookable(unit.module).register_forward_hook(after_forward, with_kwargs=True)


def _watch_root(unit: Unit, listener: Listener) -> Iterator[RemovableHandle]:
    """The root unit is in use all through a pass; somebody may call a module of it outside of one."""
    owned = {id(f.parameter) for f in unit.fields}
    for module in unit.module.modules():
        if any(id(p) in owned for p in module.parameters(recurse=False)):
            yield hookable(module).register_forward_pre_hook(lambda *_: listener.begin_root_use(), prepend=True)


def _with_boundary(
    args: tuple[Any, ...], kwargs: dict[str, Any], passed: Callable[[], None], bounded: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The same inputs, with a boundary in the graph of the tensors that need a gradient; None where none does.

    Lists, dicts and other objects are passed on as they are, for a module may change them; a tensor that is given twice
    stays one tensor.
    """
    given: dict[int, torch.Tensor] = {}
    _collect((args, tuple(kwargs.values())), given)
    if not given:
        return None
    bounded()
    swapped = dict(zip(given, _Boundary.apply(passed, *given.values()), strict=True))
    return _swap(args, swapped), {name: _swap(value, swapped) for name, value in kwargs.items()}


def _collect(value: Any, given: dict[int, torch.Tensor]) -> None:
    """The tensors that need a gradient, in tuples of any depth, by identity."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        given[id(value)] = value
    elif type(value) is tuple:
        for item in value:
            _collect(item, given)


def _swap(value: Any, swapped: dict[int, torch.Tensor]) -> Any:
    if type(value) is tuple:
        return tuple(_swap(item, swapped) for item in value)
    return swapped.get(id(value), value)
