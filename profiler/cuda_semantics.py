"""Makes fake CPU tensors behave as CUDA ones would, where the two differ in what they allocate.

[Note: Standing in for CUDA] A step is traced with fake CPU tensors because fake CUDA tensors need a CUDA device.
Four things would come out wrong: autocast follows the CPU's list of operators, dropout keeps a floating-point mask,
attention takes a path with a quadratic score matrix, and recurrent layers fall into single steps. Each is mended by
registering a kernel of our own for the CPU's dispatch key, which reaches every caller, Python or C++, and by taking it
away after the trace. Meanwhile other threads meet these kernels too: do not train on the CPU while a trace runs.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.utils._pytree import tree_map_only

from profiler.attention import Report, attention_kernel
from profiler.packing import register_packing
from profiler.recurrent import recurrent_kernels

aten = torch.ops.aten

_LOWER_PRECISION = (
    "_convolution _convolution.deprecated conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input "
    "conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm "
    "baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell "
    "rnn_tanh_cell rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention"
)
LOWER_PRECISION = frozenset(_LOWER_PRECISION.split())
_FP32_RESULT = (
    "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm "
    "linalg_matrix_norm.str_ord sum sum.dim_IntList"
)
FP32_RESULT = frozenset(_FP32_RESULT.split())
"""Run with ``dtype=torch.float32`` where the caller asks for no dtype."""
_PROMOTED = "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"
PROMOTED = frozenset(_PROMOTED.split())
"""Run in the widest dtype among their arguments."""
UNTOUCHED = frozenset({"binary_cross_entropy", "norm.Scalar", "norm.ScalarOpt_dim", "norm.names_ScalarOpt_dim"})
"""On CUDA's list with a rule of their own; ``norm`` reaches ``linalg_vector_norm`` and meets the rule there."""


@contextmanager
def cuda_semantics(report: Report) -> Iterator[None]:
    """CUDA's autocast, dropout, attention and recurrent layers for CPU tensors; ``report`` hears of the last two."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every registration here overrides one, which is the point
        try:
            _register_autocast(library)
            library.impl("dropout", _dropout, "AutogradCPU")
            library.impl("linear", _linear, "AutogradCPU")
            library.impl("scaled_dot_product_attention", attention_kernel(report), "AutogradCPU")
            for name, kernel in recurrent_kernels(report):
                library.impl(name, kernel, "AutogradCPU")
            register_packing(library)
        except BaseException:
            library._destroy()
            raise
    try:
        yield
    finally:
        library._destroy()


def _register_autocast(library: torch.library.Library) -> None:
    cuda, cpu = _autocast_list("AutocastCUDA"), _autocast_list("AutocastCPU")
    for name in sorted(cuda | cpu):
        if name in LOWER_PRECISION and name in cpu:
            continue
        if name not in cuda or name in UNTOUCHED:
            kernel: Any = torch.library.fallthrough_kernel
        else:
            kernel = _autocast_kernel(_overload(name), _casting_rule(name))
        library.impl(name, kernel, "AutocastCPU")


def _autocast_list(key: str) -> set[str]:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::") for name in registered if name.startswith("aten::")}


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]


def _casting_rule(name: str) -> Rule:
    if name in LOWER_PRECISION:
        return lambda _, args, kwargs: _cast((args, kwargs), torch.get_autocast_dtype("cpu"))
    if name in FP32_RESULT:
        return _ask_for_fp32
    if name in PROMOTED:
        return _promote
    return lambda _, args, kwargs: _cast((args, kwargs), torch.float32)


def _autocast_kernel(op: Any, rule: Rule) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _ExcludeDispatchKeyGuard(DispatchKeySet(DispatchKey.AutocastCPU)):
            args, kwargs = rule(op, args, kwargs)
            return op(*args, **kwargs)

    return kernel


def _eligible(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if _eligible(t) else t, tree)


def _ask_for_fp32(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    position = [argument.name for argument in op._schema.arguments].index("dtype")
    given = kwargs.get("dtype", args[position] if position < len(args) else None)
    if given is None and args and _eligible(args[0]):
        return args[:position], {**kwargs, "dtype": torch.float32}
    return args, kwargs


def _promote(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    wide = any(_eligible(t) and t.dtype == torch.float32 for t in leaves)
    return _cast((args, kwargs), torch.float32) if wide else (args, kwargs)


def _dropout(x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    """CUDA's fused dropout, which keeps a mask of one byte an element."""
    if not train or p == 0 or x.numel() == 0:
        return x
    if p == 1:
        return x * 0
    return aten.native_dropout(x, p, True)[0]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Adds the bias in place where PyTorch does for all but its subclasses, to which fake tensors belong."""
    if bias is None or x.dim() == 2 or x.is_contiguous():
        return aten.linear.default.decompose(x, weight, bias)
    return torch.matmul(x, weight.t()).add_(bias)
