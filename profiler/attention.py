"""Scaled dot-product attention with the memory of CUDA's kernels instead of a quadratic score matrix.

[Note: Which kernel] In 16 bits without a mask, flash attention: it keeps its inputs, its output and the fp32
logarithms of the softmax's sums, one a row. In fp32, or with a mask, the memory-efficient kernel: the same, its rows
padded to 32, and the mask. Heads wider than 256, and in fp32 fewer key than query heads, are what neither takes:
the quadratic path remains. Backward accumulates the query's gradient in fp32.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn.functional import pad

from profiler.formulas import attention_flops
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
    ) -> None:
        """An operation ran; ``tensors`` are those that it reads and writes."""


LARGEST_FUSED_HEAD = 256
HALF = (torch.bfloat16, torch.float16)


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
        if not _fused(query, key, value, attn_mask):
            return torch.ops.aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
        dim = value.shape[-1]
        if dim % 8:
            # The kernels want rows of 16 bytes; torch pads the last dimension for them.
            query, key, value = (pad(t, (0, -t.shape[-1] % 8)) for t in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        out: torch.Tensor = _FusedAttention.apply(query, key, value, attn_mask, is_causal, report)
        return out[..., :dim] if dim % 8 else out

    return attention


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if not (query.dim() == key.dim() == value.dim() == 4) or query.dtype not in (*HALF, torch.float32):
        return False
    if max(query.shape[-1], value.shape[-1]) > LARGEST_FUSED_HEAD or (mask is not None and mask.requires_grad):
        return False
    return query.shape[1] == key.shape[1] or (query.dtype in HALF and mask is None)


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
        report: Report,
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        flash = query.dtype in HALF and mask is None
        # The kernels write [batch, length, heads, dim], so that joining the heads afterwards copies nothing.
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        rows = length if flash else -(-length // 32) * 32
        sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, mask)
        ctx.report = report
        ctx.flops = attention_flops(query.shape, key.shape, value.shape[-1], causal)
        ctx.shape = attention_shape(query.shape, key.shape, causal, mask is not None)
        tensors = [t for t in (query, key, value, out, sums, mask) if t is not None]
        report("attention", ctx.flops, tensors, ctx.shape)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, sums, mask = ctx.saved_tensors
        held = [torch.empty_like(sums)]  # the rows' sums of gradient times output
        if query.dtype in HALF:
            held.append(torch.empty_like(query, dtype=torch.float32))
        grads = [torch.empty_like(t) for t in (query, key, value)]
        if key.shape[1] != query.shape[1]:
            shape = (*query.shape[:2], *key.shape[2:])
            held += [key.new_empty(shape), value.new_empty((*shape[:3], value.shape[-1]))]
        # Five matrix products where forward has two: the scores are computed again.
        moved = [*grad_out, query, key, value, out, sums, *held, *grads, *([] if mask is None else [mask])]
        ctx.report("attention_backward", ctx.flops * 5 // 2, moved, ctx.shape)
        return (*grads, None, None, None)
