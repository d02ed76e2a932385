"""Passing over the blocks of a run while a step is traced; ``profiler.unfold`` puts them back."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from profiler.events import FORWARD, LOSS, Back
from profiler.recorder import Recorder
from profiler.runs import Run, parents
from profiler.unfold import CannotUnfoldError


class Folding:
    """Watches the blocks of some runs, and lets the tensor that they hand on pass by those that need not run.

    It keeps no tensor: what it remembers of a call are shapes and plain values.
    """

    def __init__(self, model: nn.Module, runs: Iterable[Run], recorder: Recorder) -> None:
        self.runs = tuple(runs)
        self._recorder = recorder
        self._blocks: dict[str, nn.Module] = {}
        self._template: dict[str, str] = {}
        self._given: dict[str, Hashable] = {}
        self._returned: dict[str, Any] = {}
        for run in self.runs:
            for position, path in enumerate(run.blocks):
                self._blocks[path] = model.get_submodule(path)
                if position in run.skipped:
                    self._template[path] = run.blocks[run.skipped.start - run.period + position % run.period]

    def forward_of(self, path: str) -> Callable[..., Any] | None:
        """What to call in place of a block's forward, if the block is one to pass over."""
        return partial(self._pass, path) if path in self._template else None

    def inside(self, path: str) -> bool:
        """Whether a module is a block that is passed over, or in one: then nothing of it is used."""
        return bool(self._template) and any(above in self._template for above in parents(path))

    def called(self, path: str, args: Any, kwargs: Any) -> None:
        """A module is about to run, with these arguments."""
        if path in self._blocks and self._recorder.phase in (FORWARD, LOSS):
            self._given[path] = _signature((args, kwargs))

    def returned(self, path: str, output: Any) -> None:
        """A module has run, or was passed over."""
        if path not in self._blocks or self._recorder.phase not in (FORWARD, LOSS):
            return
        self._returned[path] = _form(output)
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(partial(self._back, path))

    def with_likes(self, names: Iterable[str]) -> frozenset[str]:
        """The names of parameters, and what they are called in the blocks that were passed over."""
        found = set(names)
        for path, like in self._template.items():
            found |= {path + name[len(like) :] for name in names if name.startswith(like + ".")}
        return frozenset(found)

    def _back(self, path: str, _: torch.Tensor) -> None:
        self._recorder.events.append(Back(path))

    def _pass(self, path: str, *args: Any, **kwargs: Any) -> Any:
        like = self._template[path]
        if self._given[path] != self._given.get(like) or not torch.is_grad_enabled():
            raise CannotUnfoldError(f"{path} is not called as its like is")
        if any(len(m._forward_hooks) + len(m._forward_pre_hooks) > 2 for m in self._blocks[path].modules()):
            raise CannotUnfoldError(f"something listens to {path}")
        given = [t for t in _tensors((args, kwargs)) if t.requires_grad]
        if len(given) != 1:
            raise CannotUnfoldError(f"{path} is not one of a chain")
        with self._recorder.paused():
            passed = _Pass.apply(given[0])
        return _formed(self._returned[like], _signature(given[0]), passed)


class _Pass(torch.autograd.Function):
    """The tensor itself, with a place of its own in the graph."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _signature(tree: Any) -> Hashable:
    """What two calls' arguments must have in common: shapes, plain values, the same other objects."""
    if isinstance(tree, torch.Tensor):
        return (tree.shape, tree.stride(), tree.dtype, tree.requires_grad)
    if type(tree) in (tuple, list):
        return tuple(_signature(item) for item in tree)
    if type(tree) is dict:
        return tuple((name, _signature(item)) for name, item in tree.items())
    if tree is None or isinstance(tree, bool | int | float | str):
        return (type(tree), tree)
    return (type(tree), id(tree))


def _form(tree: Any) -> Any:
    """What a block returned, with signatures in the place of tensors."""
    if isinstance(tree, torch.Tensor):
        return _Returned(_signature(tree))
    if type(tree) in (tuple, list):
        return type(tree)(_form(item) for item in tree)
    return tree if tree is None or isinstance(tree, bool | int | float | str) else _Returned(None)


def _formed(form: Any, signature: Hashable, tensor: torch.Tensor) -> Any:
    """A form with ``tensor`` in the place of its one tensor, which must have that signature."""
    if isinstance(form, _Returned):
        if form.signature != signature:
            raise CannotUnfoldError("a block hands on something else than it was given")
        return tensor
    return type(form)(_formed(item, signature, tensor) for item in form) if type(form) in (tuple, list) else form


class _Returned:
    """Stands for a tensor that a block returned."""

    def __init__(self, signature: Hashable) -> None:
        self.signature = signature
