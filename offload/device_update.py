"""The update on a CUDA device as one Triton kernel, in the arithmetic of ``native_update.c``: equal to the last bit.

So it does not matter which of the two engines updates an element. Importing this needs Triton, which comes with CUDA
builds of PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

from offload.optimizer import AdamWStep
from offload.state import AdamState

BLOCK = 1024


@triton.jit
def _adamw(master, gradient, exp_avg, exp_avg_sq, clip, decay, lerp, beta2, rest2, correction2, eps, step_size):
    g = gradient * clip
    apart = g - exp_avg
    m = tl.where(lerp < 0.5, tl.fma(lerp, apart, exp_avg), tl.fma(lerp - 1.0, apart, g))
    v = tl.fma(rest2 * g, g, exp_avg_sq * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2) + eps
    return master * decay + tl.div_rn(step_size * m, denominator), m, v


@triton.jit
def _split_kernel(
    weight, remainder, gradient, exp_avg, exp_avg_sq, elements, clip,
    decay, lerp, beta2, rest2, correction2, eps, step_size, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * block + tl.arange(0, block)
    there = i < elements
    high = tl.load(weight + i, mask=there).to(tl.int32) << 16
    master = (high + tl.load(remainder + i, mask=there).to(tl.int32)).to(tl.float32, bitcast=True)
    g = (tl.load(gradient + i, mask=there).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    m, v = tl.load(exp_avg + i, mask=there), tl.load(exp_avg_sq + i, mask=there)
    new, m, v = _adamw(master, g, m, v, tl.load(clip), decay, lerp, beta2, rest2, correction2, eps, step_size)
    bits = new.to(tl.int32, bitcast=True)
    # Rounding up may carry a NaN over to zero.
    nearest = tl.where(new != new, 0x7FC0, (bits + 0x8000) >> 16)
    tl.store(weight + i, nearest.to(tl.int16), mask=there)
    tl.store(remainder + i, bits.to(tl.int16), mask=there)
    tl.store(exp_avg + i, m, mask=there)
    tl.store(exp_avg_sq + i, v, mask=there)


@triton.jit
def _fp32_kernel(
    weight, gradient, exp_avg, exp_avg_sq, elements, clip,
    decay, lerp, beta2, rest2, correction2, eps, step_size, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * block + tl.arange(0, block)
    there = i < elements
    master, g = tl.load(weight + i, mask=there), tl.load(gradient + i, mask=there)
    m, v = tl.load(exp_avg + i, mask=there), tl.load(exp_avg_sq + i, mask=there)
    new, m, v = _adamw(master, g, m, v, tl.load(clip), decay, lerp, beta2, rest2, correction2, eps, step_size)
    tl.store(weight + i, new, mask=there)
    tl.store(exp_avg + i, m, mask=there)
    tl.store(exp_avg_sq + i, v, mask=there)


def update_on_device(
    weight: torch.Tensor, gradient: torch.Tensor, state: AdamState, how: AdamWStep, clip: float | torch.Tensor
) -> None:
    """``update_in_torch`` on the current stream of a CUDA device; ``clip`` is a scalar there."""
    assert isinstance(clip, torch.Tensor), "a clip factor on the device"
    elements = len(weight)
    scalars = (
        1 - how.learning_rate * how.weight_decay,
        1 - how.beta1,
        how.beta2,
        1 - how.beta2,
        how.correction2,
        how.eps,
        -how.step_size,
    )
    grid = (triton.cdiv(elements, BLOCK),)
    # Contraction is off: every operation rounds once, but for the two fused multiply-adds.
    options = {"block": BLOCK, "enable_fp_fusion": False}
    moments = state.exp_avg, state.exp_avg_sq
    if state.remainder is None:
        _fp32_kernel[grid](weight, gradient, *moments, elements, clip, *scalars, **options)
    else:
        bits = (weight.view(torch.int16), state.remainder, gradient.view(torch.int16))
        _split_kernel[grid](*bits, *moments, elements, clip, *scalars, **options)
