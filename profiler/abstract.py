"""A model's shapes without its memory: building it so that large tensors are never there.

[Note: Three attempts] Building on the meta device costs nothing, but fails where the code reads numbers, such as
``torch.linspace(0, 0.1, depth).tolist()`` for the rates of drop path. Then small tensors are made for real and only
large ones on meta. Where the numbers of a large tensor are read, a real build is left, which is stopped before it
takes more memory than this machine can give.
"""

import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from profiler.errors import ProfilerError, SourceError
from profiler.trees import tensors_in

SMALL_BYTES = 1 << 20
"""Tensors up to this size are real in the second attempt."""
SHARE_OF_FREE_MEMORY = 0.8
"""What a real build may take of it: the rest is for the profiler, and for everything else that runs here."""

GIB = 1 << 30


def built_without_memory(build: Callable[[], nn.Module], where: str) -> nn.Module:
    """What ``build`` returns, its large tensors on the meta device; the real model where only that works.

    Raises SourceError if ``build`` does, and ProfilerError if the real model would take too much memory.
    """
    said = ""
    for attempt in (torch.device("meta"), _LargeOnMeta()):
        try:
            with attempt, WithoutCuda():
                return build()
        except SourceError as error:
            if str(error) == said and "meta" not in said:
                raise  # the fault lies elsewhere
            said = str(error)
    with memory_guarded(where), WithoutCuda():
        return build()


def memory_guarded(where: str) -> TorchDispatchMode:
    """A context in which code that makes more tensors than this machine can hold ends in a ProfilerError."""
    return _Bounded(int(psutil.virtual_memory().available * SHARE_OF_FREE_MEMORY), where)


class _LargeOnMeta(TorchDispatchMode):
    """Makes large tensors on meta, and small ones as ever; where the two meet, the result is on meta."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        if not tensors:
            return _made(func, args, kwargs)
        if not any(t.is_meta for t in tensors):
            return func(*args, **kwargs)
        if func._schema.is_mutable and not tensors[0].is_meta:
            return tensors[0]  # its numbers are unknown now, but its shape is right
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
        return func(*args, **kwargs)


def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    size = _bytes_of_result(func, args, kwargs)
    if size is not None and size > SMALL_BYTES:
        kwargs["device"] = torch.device("meta")
    return func(*args, **kwargs)


def _bytes_of_result(func: Any, args: Any, kwargs: dict[str, Any]) -> int | None:
    """Of what a factory function is about to make; None where that can not be told."""
    if not any(argument.name == "device" for argument in func._schema.arguments):
        return None
    # A generator belongs to a device, and no number is drawn here.
    abstract = {**{k: v for k, v in kwargs.items() if k != "generator"}, "device": torch.device("meta")}
    try:
        made = func(*args, **abstract)
    except (RuntimeError, NotImplementedError):
        return None
    return sum(t.nbytes for t in tree_leaves(made) if isinstance(t, torch.Tensor))


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    # Tensors of no dimension mix with those of any device.
    return tensor if tensor.is_meta or tensor.dim() == 0 else tensor.to("meta")


class _Bounded(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and refuses the one that would be too many."""

    def __init__(self, limit_bytes: int, where: str) -> None:
        super().__init__()
        self._limit_bytes, self._where = limit_bytes, where
        self._held_bytes = 0
        self._watches: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(t, torch.Tensor) for t in tree_leaves((args, kwargs))):
            self._check(_bytes_of_result(func, args, kwargs) or 0)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and not tensor.is_meta:
                self._watch(tensor)
        return out

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._watches:
            size = storage.nbytes()
            self._check(size)
            self._held_bytes += size
            self._watches[key] = weakref.ref(storage, lambda _: self._ended(key, size))

    def _ended(self, key: int, size: int) -> None:
        self._held_bytes -= size
        self._watches.pop(key, None)

    def _check(self, coming: int) -> None:
        if self._held_bytes + coming > self._limit_bytes:
            raise ProfilerError(
                f"{self._where} makes tensors of more than {self._limit_bytes / GIB:.1f} GiB, most of this "
                "machine's free memory, and reads their numbers, or makes them before anyone asks: let build_model() "
                "make the model, and nothing in it call .item(), .tolist(), .numpy() or .cpu() on a large tensor"
            )


def without_cuda_in(arguments: Any, instead: Any) -> Any:
    """The tuple or dict of arguments with another device in the place of CUDA."""
    if isinstance(arguments, dict):
        return {name: instead if _is_cuda(value) else value for name, value in arguments.items()}
    return tuple(instead if _is_cuda(value) else value for value in arguments)


class WithoutCuda(TorchFunctionMode):
    """A context in which tensors asked for on CUDA are made, or stay, where tensors are without it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.to:
            device = args[0].device
            return func(*without_cuda_in(args, device), **without_cuda_in(kwargs, device))
        # None is the default device, whatever that is at the moment.
        return func(*args, **without_cuda_in(kwargs, None))


def _is_cuda(value: Any) -> bool:
    kind = value.type if isinstance(value, torch.device) else value.partition(":")[0] if isinstance(value, str) else ""
    return kind == "cuda"
