"""The update on a CUDA device as one Triton kernel, in the arithmetic of ``native_rules.h``: equal to the last bit.

So it does not matter which of the two engines updates an element. Importing this needs Triton, which comes with CUDA
builds of PyTorch.
"""

# mypy: disable-error-code="no-untyped-def"
import torch
import triton
import triton.language as tl

from offload.rules import UpdateStep
from offload.state import OptimizerState

BLOCK = 1024


@triton.jit
def _lerp(start, end, weight):
    apart = end - start
    return tl.where(weight < 0.5, tl.fma(weight, apart, start), tl.fma(weight - 1.0, apart, end))


@triton.jit
def _pulled(gradient, master, share):
    return tl.where(share != 0.0, tl.fma(share, master, gradient), gradient)


# The rules: a master, its gradient, its moments (or anything), the scalars of the rule; all anew but the gradient.


@triton.jit
def _adam(p, gradient, m, v, how):
    pull, shrink, lerp, beta2, rest2, correction2, eps, step_size = how
    g = _pulled(gradient, p, pull)
    m = _lerp(m, g, lerp)
    v = tl.fma(rest2 * g, g, v * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), correction2) + eps
    return p * shrink + tl.div_rn(step_size * m, denominator), m, v


@triton.jit
def _lion(p, gradient, m, v, how):
    shrink, lerp1, lerp2, step_size = how
    average = _lerp(m, gradient, lerp1)
    sign = tl.where(average > 0.0, 1.0, tl.where(average < 0.0, -1.0, 0.0))
    return p * shrink + step_size * sign, _lerp(m, gradient, lerp2), v


@triton.jit
def _sgd(p, gradient, m, v, how):
    pull, step_size = how
    return tl.fma(step_size, _pulled(gradient, p, pull), p), m, v


@triton.jit
def _momentum(p, gradient, m, v, how):
    pull, momentum, share, nesterov, step_size = how
    g = _pulled(gradient, p, pull)
    m = tl.fma(share, g, m * momentum)
    return tl.fma(step_size, tl.where(nesterov != 0.0, tl.fma(momentum, m, g), m), p), m, v


@triton.jit
def _adagrad(p, gradient, m, v, how):
    pull, first, initial, eps, step_size = how
    g = _pulled(gradient, p, pull)
    m = tl.fma(g, g, tl.where(first != 0.0, initial, m))
    return p + tl.div_rn(step_size * g, tl.sqrt_rn(m) + eps), m, v


RULES = {"adam": _adam, "lion": _lion, "sgd": _sgd, "momentum": _momentum, "adagrad": _adagrad}


@triton.jit
def _kernel(
    weight, remainder, gradient, first, second, elements, clip, how,
    rule: tl.constexpr, moments: tl.constexpr, split: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * block + tl.arange(0, block)
    there = i < elements
    if split:
        high = tl.load(weight + i, mask=there).to(tl.int32) << 16
        master = (high + tl.load(remainder + i, mask=there).to(tl.int32)).to(tl.float32, bitcast=True)
        g = (tl.load(gradient + i, mask=there).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        master, g = tl.load(weight + i, mask=there), tl.load(gradient + i, mask=there)
    m = tl.load(first + i, mask=there) if moments > 0 else g
    v = tl.load(second + i, mask=there) if moments > 1 else g
    new, m, v = rule(master, g * tl.load(clip), m, v, how)
    if split:
        bits = new.to(tl.int32, bitcast=True)
        # Rounding up may carry a NaN over to zero.
        nearest = tl.where(new != new, 0x7FC0, (bits + 0x8000) >> 16)
        tl.store(weight + i, nearest.to(tl.int16), mask=there)
        tl.store(remainder + i, bits.to(tl.int16), mask=there)
    else:
        tl.store(weight + i, new, mask=there)
    if moments > 0:
        tl.store(first + i, m, mask=there)
    if moments > 1:
        tl.store(second + i, v, mask=there)


def update_on_device(
    weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, how: UpdateStep, clip: float | torch.Tensor
) -> None:
    """``update_in_torch`` on the current stream of a CUDA device; ``clip`` is a scalar there."""
    assert isinstance(clip, torch.Tensor), "a clip factor on the device"
    elements, count = len(weight), len(state.moments)
    split = state.remainder is not None
    if split:
        weight, gradient = weight.view(torch.int16), gradient.view(torch.int16)
    # What a rule has not got is not touched; anything stands in its place.
    first, second = (*state.moments, *[weight] * (2 - count))
    _kernel[(triton.cdiv(elements, BLOCK),)](
        weight,
        state.remainder if split else weight,
        gradient,
        first,
        second,
        elements,
        clip,
        how.scalars,
        rule=RULES[how.rule],
        moments=count,
        split=split,
        block=BLOCK,
        # Contraction is off: every operation rounds once, but for the fused multiply-adds.
        enable_fp_fusion=False,
    )
