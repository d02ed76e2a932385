"""Scaled dot-product attention with the memory of CUDA's kernels instead of a quadratic score matrix.

[Note: Which kernel] As PyTorch 2.11 chooses on a Hopper GPU. In 16 bits cuDNN's attention: it keeps its inputs, its
output and the fp32 logarithms of the softmax's sums, one a row. Where the mask learns or heads are wider than 128 it
can not, and flash attention takes what has no mask, the memory-efficient kernel the rest, as it does in fp32: it keeps
the same, its rows padded to 32, and the mask. What neither takes goes the quadratic way: heads wider than 256, a mask
whose last dimension does not lie together, fewer key than query heads in fp32 or with a mask that learns. Backward
accumulates the query's gradient in fp32. Older GPUs take flash attention in 16 bits, which holds about the same.
"""

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from profiler.products import attention_of
from profiler.shapes import attention_shape


class Report(Protocol):
    """Hears of what the dispatcher does not show."""

    def __call__(
        self,
        name: str,
        flops: int,
        tensors: Sequence[torch.Tensor],
        shape: tuple[int, ...] = (),
        lasting_bytes: int = 0,
        repeated_flops: int = 0,
    ) -> None:
        """An operation ran; ``tensors`` are those that it reads and writes."""


LARGEST_FUSED_HEAD = 256
LARGEST_CUDNN_HEAD = 128
HALF = (torch.bfloat16, torch.float16)
ALIGNED_ELEMENTS = 8
"""Of a mask's rows, and of a head, that the kernels want."""
MASK_GRADIENT_ELEMENTS = 16
"""To which the memory-efficient kernel pads the rows of a mask's gradient."""


class Kernel(Enum):
    """What computes attention."""

    CUDNN = "cudnn"
    FLASH = "flash"
    EFFICIENT = "efficient"


def attention_kernel(report: Report) -> Callable[..., torch.Tensor]:
    """A stand-in for ``aten::scaled_dot_product_attention`` on fake tensors."""

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        kernel = _kernel(query, key, value, attn_mask)
        if kernel is None:
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
        dim = value.shape[-1]
        if dim % ALIGNED_ELEMENTS:
            query, key, value = (pad(t, (0, -t.shape[-1] % ALIGNED_ELEMENTS)) for t in (query, key, value))
        if attn_mask is not None:
            attn_mask = _mask_for(kernel, attn_mask, query, key)
        out: torch.Tensor = _FusedAttention.apply(
            query, key, value, attn_mask, is_causal, dropout_p > 0, kernel, report
        )
        return out[..., :dim] if dim % ALIGNED_ELEMENTS else out

    return attention


def _kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> Kernel | None:
    """``None`` where no fused kernel can."""
    if not (query.dim() == key.dim() == value.dim() == 4) or query.dtype not in (*HALF, torch.float32):
        return None
    if any(t.stride(-1) != 1 for t in (query, key, value) if t.shape[-1] > 1):
        return None
    width, half = max(query.shape[-1], value.shape[-1]), query.dtype in HALF
    aligned = query.shape[-1] % ALIGNED_ELEMENTS == 0 == value.shape[-1] % ALIGNED_ELEMENTS
    if half and aligned and width <= LARGEST_CUDNN_HEAD and not (mask is not None and mask.requires_grad):
        return Kernel.CUDNN
    if width > LARGEST_FUSED_HEAD:
        return None
    if half and mask is None:
        return Kernel.FLASH
    if query.shape[1] != key.shape[1] or (mask is not None and mask.stride(-1) != 1):
        return None
    return Kernel.EFFICIENT


def _mask_for(kernel: Kernel, mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask as the kernel reads it: numbers to add, for the memory-efficient one in aligned rows."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype)
    if kernel is Kernel.EFFICIENT:
        if any(stride % ALIGNED_ELEMENTS for stride in mask.stride()[:-1]):
            mask = pad(mask, (0, -mask.shape[-1] % ALIGNED_ELEMENTS))[..., : mask.shape[-1]]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return mask


class _FusedAttention(torch.autograd.Function):
    """Allocates what a fused kernel would and computes nothing. Shapes [batch, heads, length, dim]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        dropout: bool,
        kernel: Kernel,
        report: Report,
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        # The kernels work on [batch, length, heads, dim]. If that is how the output is written, joining the heads
        # afterwards copies nothing; cuDNN and flash attention write it as the query lies.
        if kernel is Kernel.EFFICIENT:
            out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
            rows = -(-length // 32) * 32
        else:
            ctx.random = [query.new_empty((), dtype=torch.int64) for _ in range(2)]  # seed and offset of dropout
            like = query.transpose(1, 2)[..., : value.shape[-1]]
            out = torch.empty_like(like).transpose(1, 2)
            rows = length
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        ctx.report, ctx.kernel = report, kernel
        ctx.work = attention_of(query.shape, key.shape, value.shape[-1], causal)
        ctx.shape = attention_shape(query.shape, key.shape, causal, mask is not None, dropout)
        tensors = [t for t in (query, key, value, out, sums, mask) if t is not None]
        report("attention", ctx.work.flops, tensors, ctx.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, sums, mask = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (query, key, value)]
        for_mask = _mask_gradient(mask) if mask is not None and ctx.needs_input_grad[3] else None
        held = _held_in_backward(ctx.kernel, query, key, value, sums)
        moved = [*grad_out, query, key, value, out, sums, *held, *grads, *([] if mask is None else [mask])]
        again = ctx.work.score_flops
        ctx.report("attention_backward", ctx.work.backward_flops, moved, ctx.shape, repeated_flops=again)
        return (*grads, for_mask, None, None, None, None)


def _mask_gradient(mask: torch.Tensor) -> torch.Tensor:
    padded = -(-mask.shape[-1] // MASK_GRADIENT_ELEMENTS) * MASK_GRADIENT_ELEMENTS
    return mask.new_empty(*mask.shape[:-1], padded)[..., : mask.shape[-1]]


def _held_in_backward(
    kernel: Kernel, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sums: torch.Tensor
) -> list[torch.Tensor]:
    """The rows' sums of gradient times output and, in 16 bits, an fp32 gradient of the query."""
    if kernel is Kernel.CUDNN:
        return [query.new_empty(query.numel() + sums.numel(), dtype=torch.float32)]
    held = [torch.empty_like(sums)]
    if query.dtype in HALF:
        held.append(torch.empty_like(query, dtype=torch.float32))
    if kernel is Kernel.FLASH and key.shape[1] != query.shape[1]:
        shape = (*query.shape[:2], *key.shape[2:])
        held += [key.new_empty(shape), value.new_empty((*shape[:3], value.shape[-1]))]
    return held
