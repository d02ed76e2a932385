"""Moments in fewer bits: widened to fp32 for an update, and rounded again. Torch's own operations, on any device. Pure.

Any update of fp32 moments does for them, as any update of fp32 weights does for masters (``masters``): a piece at a
time is widened, updated, and rounded. What is faster (``native``) is held to it.

[Note: moments in fewer bits]
A moment is an average that moves by a small share of the way to each new gradient: with beta2 = 0.999 by a thousandth.
Two neighbours in bf16 are four to eight thousandths apart, in 8 bits more. Rounded to the nearest, a second moment that
should shrink never would, and one that should grow would do so only for gradients twice as large. So updates round
stochastically: up with the probability of what is above the lower neighbour, which is right on average. The numbers
that are drawn must be the same wherever, in whatever pieces and on whichever rank an element is updated, so they are a
hash of what the update begins with, the element's master and its gradient, and of the step's number. Everything else,
as loading, rounds to the nearest; what was stored stays as it is then, to the last bit.

Eight bits are those of Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021: a block of elements is
divided by its largest magnitude, its scale, and each is one of 256 numbers of a map that spreads its precision over
seven decades (``dynamic_sizes``). Two things differ. Blocks are small: 64 elements, 1.0625 bytes each, because
parameters, shards and chunks begin at multiples of 64 in any case, so a block is the same elements under every plan.
And the map of second moments has no zero: an element with small gradients in a block with a large one would be
divided by eps alone in a step that brings it none (the zero-point problem of Li et al., Memory Efficient Optimizers
with 4-bit States, 2023). A number that is not finite makes its block so.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch.nn import functional as F  # noqa: N812

from offload.optimizer import CPU_ELEMENTS, DEVICE_ELEMENTS, UpdateSpan, join_master
from offload.plan import MOMENT_BLOCK_ELEMENTS
from offload.rules import UpdateStep
from offload.state import OptimizerState

ONCE_ON_DEVICE = DEVICE_ELEMENTS // 4
"""Elements widened at a time on a device: what that takes beside the update is then no more than an update alone."""
DECADES = 7
ONE_BITS = 0x3F800000
"""Of 1 in fp32: bits of numbers between 0 and 1 are in the same order as they."""


def dynamic_sizes(*, signed: bool) -> list[float]:
    """The numbers from 0, or above it, to 1 that 8 bits can be, in order: 128 with a sign beside them, or 256 without.

    Decade E is that below 10^-E. Beside a sign it has 2^(6 - E) values, the midpoints of as many equal parts of the
    decade; the largest of all is 1, so that the scale of a block is kept exactly, and the smallest is 0. Squares need
    no sign: one more bit halves every part and adds an eighth decade; 1 comes on top, and there is no 0.
    """
    last = DECADES - 1 if signed else DECADES
    parts = [(e, 2 ** (last - e)) for e in range(last, -1, -1)]
    values = [10.0**-e * (0.1 + 0.9 * (i + 0.5) / n) for e, n in parts for i in range(n)]
    return [0.0, *values[:-1], 1.0] if signed else [*values, 1.0]


def over_moments(update: UpdateSpan) -> UpdateSpan:
    """``update``, which knows fp32 moments; others are widened for it, and rounded stochastically."""

    def updated(
        weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, how: UpdateStep, clip: float | torch.Tensor
    ) -> None:
        for part in _pieces(len(weight), weight.device):
            span = state.span(part.start, part.stop)
            wide = span._replace(moments=widened(span), scales=())
            draw = _drawn(weight[part], gradient[part], span.remainder, how.seed)
            update(weight[part], gradient[part], wide, how, clip)
            # One half of a hash for each of two moments.
            for i, moment in enumerate(wide.moments):
                _store(span, i, moment, draw.bitwise_right_shift(16 * i).bitwise_and_(0xFFFF))

    return updated


def move(target: OptimizerState, source: OptimizerState) -> None:
    """Copy a state into one whose moments may be in another format; they are rounded to the nearest."""
    if [t.dtype for t in target.moments] == [s.dtype for s in source.moments]:
        _copy(target, source)
        return
    _copy(target._replace(moments=(), scales=()), source._replace(moments=(), scales=()))
    for part in _pieces(len(target.moments[0]), torch.device("cpu")):
        here = target.span(part.start, part.stop)
        for i, moment in enumerate(widened(source.span(part.start, part.stop))):
            _store(here, i, moment.to(here.moments[i].device))


def widened(state: OptimizerState) -> tuple[torch.Tensor, ...]:
    """Its moments in fp32: those of the state itself where they are."""
    scales: tuple[torch.Tensor | None, ...] = state.scales or (None,) * len(state.moments)
    return tuple(
        moment.float() if scale is None else dequantized(moment, scale)
        for moment, scale in zip(state.moments, scales, strict=True)
    )


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers of a span that begins with a block."""
    values = code_map(codes.dtype, codes.device).values.index_select(0, codes.to(torch.int32).bitwise_and_(0xFF))
    return _blocks(values).mul_(scales[:, None]).flatten()[: len(codes)]


def _store(state: OptimizerState, i: int, moment: torch.Tensor, draw: torch.Tensor | None = None) -> None:
    """Put the i-th moment into a state: rounded up where ``draw``, below 2^16, says so, or else to the nearest."""
    target = state.moments[i]
    if state.scales:
        _quantize(target, state.scales[i], moment, draw)
    elif target.dtype == torch.bfloat16 and draw is not None:
        # What is added to the lower half carries into the upper one as often as that half is large.
        bits = moment.view(torch.int32).add(draw).bitwise_right_shift_(16)
        target.view(torch.int16).copy_(bits)
        target.masked_fill_(moment.isnan(), torch.nan)
    else:
        target.copy_(moment)


def _quantize(codes: torch.Tensor, scales: torch.Tensor, moment: torch.Tensor, draw: torch.Tensor | None) -> None:
    blocks, known = _blocks(moment), code_map(codes.dtype, codes.device)
    size = blocks.abs()
    scales.copy_(size.amax(1)).masked_fill_(scales.isnan(), torch.nan)  # which NaN it was is nobody's choice
    ratio = size.div_(torch.where(scales == 0, 1.0, scales)[:, None]).flatten()[: len(moment)]
    index = known.first.index_select(0, ratio.view(torch.int32).bitwise_right_shift(16).clamp_(0, len(known.first) - 1))
    index.add_(ratio >= known.sizes.index_select(0, index + 1)).clamp_(max=len(known.sizes) - 2)
    below, above = known.sizes.index_select(0, index), known.sizes.index_select(0, index + 1)
    apart = above.sub_(below)
    edge = apart.mul_(0.5) if draw is None else apart.mul_(draw).mul_(2.0**-16)
    index.add_(ratio.sub_(below) > edge)
    codes.copy_(index.mul_(moment.sign().to(torch.int32)) if codes.dtype == torch.int8 else index)


def _drawn(weight: torch.Tensor, gradient: torch.Tensor, remainder: torch.Tensor | None, seed: int) -> torch.Tensor:
    """32 bits for each element, that follow from its master, its gradient and the step: ``lowbias32`` of their mix."""
    master = weight if remainder is None else join_master(weight, remainder)
    bits = gradient.float().view(torch.int32).mul(_int32(0x9E3779B1))
    bits.add_(master.view(torch.int32).mul(_int32(0x85EBCA6B))).add_(_int32(seed * 0xC2B2AE35))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        # Shifted as unsigned numbers are.
        bits.bitwise_xor_(bits.bitwise_right_shift(shift).bitwise_and_((1 << (32 - shift)) - 1)).mul_(_int32(factor))
    return bits


def _int32(number: int) -> int:
    """Its lowest 32 bits as a signed number."""
    return (number + 2**31) % 2**32 - 2**31


class CodeMap(NamedTuple):
    """The map of codes of one type, as it is looked up here. A search in it would take ten times as long."""

    values: torch.Tensor
    """By code, as an unsigned byte."""
    sizes: torch.Tensor
    """The numbers that are not negative, in order: a code without its sign counts in them."""
    first: torch.Tensor
    """By the upper 16 bits of a ratio: where the largest of ``sizes`` is that is not above all such ratios. The next
    one may be, but no more than one: sizes are further apart than these bits can tell."""


@cache
def code_map(dtype: torch.dtype, device: torch.device) -> CodeMap:
    """That of signed numbers for int8, that of squares for uint8."""
    sizes = torch.tensor(dynamic_sizes(signed=dtype == torch.int8))
    values = sizes if dtype == torch.uint8 else torch.cat([sizes, sizes[:1], -sizes[1:].flip(0)])
    ratios = torch.arange(1 + (ONE_BITS >> 16), dtype=torch.int32).bitwise_left_shift_(16).view(torch.float32)
    first = torch.bucketize(ratios, sizes, out_int32=True, right=True).sub_(1).clamp_(0, len(sizes) - 2)
    return CodeMap(values.to(device), sizes.to(device), first.to(device))


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """A row a block, the last one filled with zeros."""
    return F.pad(flat, (0, -len(flat) % MOMENT_BLOCK_ELEMENTS)).view(-1, MOMENT_BLOCK_ELEMENTS)


def _pieces(elements: int, device: torch.device) -> Iterator[slice]:
    """Spans so small that what is made of one stays in the cache of a CPU, or small beside the model on a device."""
    at_once = CPU_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else ONCE_ON_DEVICE
    return (slice(start, min(start + at_once, elements)) for start in range(0, elements, at_once))


def _copy(target: OptimizerState, source: OptimizerState) -> None:
    for t, s in zip(target.tensors(), source.tensors(), strict=True):
        t.copy_(s)
