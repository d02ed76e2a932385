"""What fake tensors refuse and forward passes do: leaving for NumPy or CUDA, and being printed with a format."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from profiler.abstract import without_cuda_in
from profiler.known import KnownValues


@contextmanager
def obliging_fakes(values: KnownValues, assume: Callable[[str], None]) -> Iterator[None]:
    """Let fake tensors answer ``numpy()`` with zeros, where ``values`` knows no better, and stay where they are.

    ``assume`` is told of zeros, in a phrase to which the place is added.
    """

    def numpy(tensor: torch.Tensor, **_: Any) -> Any:
        known = values.of(tensor)
        if known is None:
            assume("the numbers of a tensor that NumPy gets are taken to be zeros")
            known = values.run(torch.ops.aten.zeros.default, (tensor.shape,), {"dtype": tensor.dtype})
        return values.plain(known)

    def array(tensor: torch.Tensor, dtype: Any = None) -> Any:
        out = numpy(tensor)
        return out if dtype is None else out.astype(dtype)

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.Tensor.to(tensor, *without_cuda_in(args, tensor.device), **without_cuda_in(kwargs, tensor.device))

    def stay(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    def formatted(tensor: torch.Tensor, specification: str) -> str:
        return format(tensor.item() if tensor.dim() == 0 else str(tensor), specification)

    methods = {
        "numpy": numpy,
        "__array__": array,
        "to": to,
        "cuda": stay,
        "pin_memory": stay,
        "__format__": formatted,
    }
    own = {name: vars(FakeTensor)[name] for name in methods if name in vars(FakeTensor)}
    for name, method in methods.items():
        setattr(FakeTensor, name, method)
    try:
        yield
    finally:
        for name in methods:
            if name in own:
                setattr(FakeTensor, name, own[name])
            else:
                delattr(FakeTensor, name)


@contextmanager
def unnoticed_fakes() -> Iterator[None]:
    """Keep transformers from seeing fake tensors: it would then take the path of a model that is exported.

    On that path attention gets a mask, and other kernels, where the real step has none.
    """
    utilities = sys.modules.get("transformers.utils.import_utils")
    own = getattr(utilities, "is_fake_tensor", None)
    if utilities is None or own is None:
        yield
        return
    vars(utilities)["is_fake_tensor"] = lambda _: False
    try:
        yield
    finally:
        vars(utilities)["is_fake_tensor"] = own
