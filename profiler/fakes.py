"""Fake tensors in the place of a model's own, for the time of a trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._functorch import config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from profiler.errors import ProfilerError

_MODULE_INTERNALS = frozenset(nn.Module().__dict__)


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors raise when a compiled extension asks for their memory, in place of ending the process."""
    with config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(mode: FakeTensorMode, tensor: torch.Tensor, cast: torch.dtype | None = None) -> torch.Tensor:
    """A fake CPU tensor with the shape and strides of a real (or meta) one; floating numbers in dtype ``cast``."""
    if tensor.layout is not torch.strided:
        raise ProfilerError(
            f"a tensor of shape {tuple(tensor.shape)} is {tensor.layout}; only dense ones can be traced:"
            " call to_dense() on it"
        )
    dtype = cast if cast is not None and tensor.is_floating_point() else tensor.dtype
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")


def fake_batch(mode: FakeTensorMode, batch: Any, cast: torch.dtype | None) -> Any:
    """The batch with fake tensors, its floating ones in dtype ``cast``."""
    return tree_map_only(torch.Tensor, lambda t: fake_tensor(mode, t, cast), batch)


@contextmanager
def faked(
    model: nn.Module, mode: FakeTensorMode, cast: torch.dtype | None, unused: Callable[[str], bool]
) -> Iterator[None]:
    """Put fake tensors in the place of every parameter, buffer and other tensor that the modules hold.

    Shared tensors stay shared. Parameters and buffers are cast as ``model.to(cast)`` would. Afterwards every
    module has the very attributes it had before, whatever happened in between. Modules at ``unused`` paths keep theirs.
    """
    modules = list(model.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in modules):
        raise ProfilerError("the model has a part compiled by torch.jit; profile it before it is compiled")
    paths = dict(model.named_modules())
    used = [m for path, m in paths.items() if not unused(path)]
    # Whoever passes over a module may still change the module itself, though nothing below it.
    touched = [m for path, m in paths.items() if not path or not unused(path.rpartition(".")[0])]
    before = [(module, dict(module.__dict__), _registries(module)) for module in touched]
    modes = [(module, module.training) for module in modules]
    memo: dict[int, Any] = {}
    try:
        for module in used:
            _replace_registered(module, mode, cast, memo)
        for module in used:  # a second pass, because these may hold any module's parameters
            _replace_others(module, mode, memo)
        if not model.training:
            model.train()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, attributes, registries in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, content in registries.items():
                registry = module.__dict__[name]
                registry.clear()
                registry.update(content)


def _registries(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Copies of the module's parameters, buffers, children and hooks, which forward may add to."""
    own = module.__dict__
    return {name: dict(own[name]) for name in _MODULE_INTERNALS if isinstance(own.get(name), dict)}


def _replace_registered(
    module: nn.Module, mode: FakeTensorMode, cast: torch.dtype | None, memo: dict[int, Any]
) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = _convert(parameter, mode, cast, memo)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = _convert(buffer, mode, cast, memo)


def _replace_others(module: nn.Module, mode: FakeTensorMode, memo: dict[int, Any]) -> None:
    for name, value in module.__dict__.items():
        if name not in _MODULE_INTERNALS:
            module.__dict__[name] = _copied(value, lambda t: _convert(t, mode, None, memo), memo)


def _convert(tensor: torch.Tensor, mode: FakeTensorMode, cast: torch.dtype | None, memo: dict[int, Any]) -> Any:
    if id(tensor) not in memo:
        if nn.parameter.is_lazy(tensor):
            raise ProfilerError("a lazy module has no shapes yet; run the model once on a batch before profiling it")
        fake = fake_tensor(mode, tensor, cast)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return memo[id(tensor)]


def _copied(value: Any, convert: Callable[[torch.Tensor], Any], memo: dict[int, Any]) -> Any:
    """Plain containers are copied, so that what forward puts into them does not outlive the trace."""
    if isinstance(value, torch.Tensor):
        return convert(value)
    if type(value) not in (list, tuple, dict):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, tuple):
        return tuple(_copied(v, convert, memo) for v in value)
    copy: Any = memo.setdefault(id(value), type(value)())
    if isinstance(value, dict):
        copy.update((k, _copied(v, convert, memo)) for k, v in value.items())
    else:
        copy.extend(_copied(v, convert, memo) for v in value)
    return copy
