"""The products that a calibration times: for each kind a grid of sizes, and what to run at a point of it.

Operations are described as the tracer would log them, so that a rate means the same when it is measured and when it is
used.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.nn import functional

from profiler.calibrate_numbers import DTYPES, MOST_BYTES, Grid, Numbers, Timed, backward_of
from profiler.calibrate_rows import row_grids
from profiler.kinds import rate_of
from profiler.products import attention_of

MOST_FLOPS = {torch.bfloat16: 5e12, torch.float32: 2e11}
"""Larger points of a grid are left out: they would take too long, and rates no longer change there."""


def _matmul(on: Numbers, m: int, n: int, k: int, *, odd: int = 0) -> Iterator[Timed]:
    """The three layouts of a linear layer: forward's, the input gradient's and the weight gradient's.

    With ``odd`` columns more, the rows of one operand begin at multiples of as many numbers only.
    """
    flops, moved = 2 * m * n * k, (m * k + k * n + m * n) * on.size
    if flops > MOST_FLOPS[on.dtype] or moved > MOST_BYTES:
        return
    x, g, t = (on.random(a, b) for a, b in ((m, k), (m, k + odd), (k, m + odd)))
    w, v, y = (on.random(a, b) for a, b in ((n + odd, k), (k + odd, n), (k, n)))
    name = "matmul_unaligned" if odd else "matmul"
    shape = (1, m, n, k, odd * on.size if odd else 16)

    def run() -> None:
        torch.mm(x, w.t())
        torch.mm(g, v)
        torch.mm(t[:, :m].t() if odd else t.t(), y)

    yield Timed(f"{name}/{on.name}", run, (on.op("aten::mm", flops, moved, shape),) * 3)


def _unaligned(on: Numbers, m: int, n: int, k: int, alignment: int) -> Iterator[Timed]:
    return _matmul(on, m, n, k, odd=alignment // on.size)


def _batched(on: Numbers, batch: int, m: int, n: int, k: int) -> Iterator[Timed]:
    flops, moved = 2 * batch * m * n * k, batch * (m * k + k * n + m * n) * on.size
    if flops > MOST_FLOPS[on.dtype] or moved > MOST_BYTES:
        return
    a, b, c = (on.random(batch, *s) for s in ((m, k), (k, n), (n, k)))

    def run() -> None:
        torch.bmm(a, b)
        torch.bmm(a, c.transpose(1, 2))

    ops = (on.op("aten::bmm", flops, moved, (batch, m, n, k, 16)),) * 2
    yield Timed(f"batched_matmul/{on.name}", run, ops)


def _attention(on: Numbers, sort: str, heads: int, length: int, dim: int) -> Iterator[Timed]:
    """Forward and backward, from projections of [batch, length, heads, dim] as models have them."""
    causal, masked, dropped = (part in sort for part in ("_causal", "_masked", "_dropout"))
    many = min(heads, 16)
    batch = heads // many
    work = attention_of((batch, many, length, dim), (batch, many, length, dim), dim, causal)
    size = batch * many * length * dim * on.size
    if work.backward_flops > MOST_FLOPS[on.dtype] or 8 * size > MOST_BYTES:
        return
    trained = tuple(on.random(batch, length, many, dim, grad=True) for _ in range(3))
    q, k, v = (t.transpose(1, 2) for t in trained)
    mask = torch.zeros(1, 1, length, length, device=on.place) if masked else None

    def forward() -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, dropout_p=0.1 * dropped
        )

    shape = (heads, length, length, dim, int(causal), int(masked), int(dropped))
    name = on.name
    yield Timed(f"attention{sort}/{name}", forward, (on.op("attention", work.flops, 4 * size, shape),))
    backward = on.op("attention_backward", work.backward_flops, 8 * size, shape)
    yield Timed(f"attention{sort}_backward/{name}", backward_of(forward(), trained), (backward,))


def _convolution(on: Numbers, sort: str, positions: int, inner: int, outer: int, kernel: int) -> Iterator[Timed]:
    """A square kernel: an odd one keeps the image's size, an even one cuts it into patches.

    ``sort`` is "", "grouped_" or "depthwise", with "last" for images with their channels innermost.
    """
    last, depthwise = sort.endswith("last"), sort.startswith("depthwise")
    groups = inner if depthwise else 32 if sort.startswith("grouped") else 1
    ins, outs = (inner, inner) if depthwise else (inner * groups, outer * groups)
    width = int(kernel**0.5)
    stride = 1 if width % 2 else width
    side = int((positions / 16) ** 0.5)
    flops = 2 * positions * (ins // groups) * outs * kernel
    sizes = [n * on.size for n in (positions * stride**2 * ins, positions * outs, ins // groups * outs * kernel)]
    if 2 * flops > MOST_FLOPS[on.dtype] or sum(sizes) > MOST_BYTES / 4:
        return
    layout = torch.channels_last if last else torch.contiguous_format
    x = on.random(16, ins, side * stride, side * stride).to(memory_format=layout).requires_grad_()
    w = on.random(outs, ins // groups, width, width).to(memory_format=layout).requires_grad_()
    forward = partial(functional.conv2d, x, w, padding=0 if stride > 1 else width // 2, stride=stride, groups=groups)
    shape = (positions, ins, outs, kernel, groups, int(last))
    ahead = on.op("aten::convolution", flops, sum(sizes), shape)
    back = on.op("aten::convolution_backward", 2 * flops, sum(sizes) + sizes[0] + sizes[2], shape)
    yield Timed(f"{rate_of(ahead)[0]}/{on.name}", forward, (ahead,))
    yield Timed(f"{rate_of(back)[0]}/{on.name}", backward_of(forward(), (x, w)), (back,))


def _depthwise(on: Numbers, sort: str, positions: int, channels: int, kernel: int) -> Iterator[Timed]:
    return _convolution(on, f"depthwise{sort}", positions, channels, channels, kernel)


def _recurrent(on: Numbers, batch: int, width: int) -> Iterator[Timed]:
    steps = 64
    layer = torch.nn.LSTM(width, width, device=on.place, dtype=on.dtype)
    x = on.random(steps, batch, width, grad=True)
    flops = 2 * steps * batch * 4 * width * 2 * width
    moved = (5 * steps * batch * width + 4 * width * width) * on.size
    out = layer(x)[0]
    inputs = (x, *layer.parameters())
    ahead, back = ((n, f, moved, (batch, width)) for n, f in (("recurrent", flops), ("recurrent_backward", 2 * flops)))
    yield Timed(f"recurrent/{on.name}", lambda: layer(x), (on.op(*ahead),))
    yield Timed(f"recurrent_backward/{on.name}", backward_of(out, inputs), (on.op(*back),))


_SIZES = (16.0, 64.0, 256.0, 512.0, 768.0, 1024.0, 2048.0, 3072.0, 4096.0, 16384.0)
_ODD = (64.0, 256.0, 1024.0, 4096.0, 16384.0)
_BATCHED = ((8.0, 64.0, 512.0), (64.0, 256.0, 1024.0), (64.0, 256.0, 1024.0), (64.0, 256.0, 1024.0))
_HEADS = ((16.0, 128.0, 512.0), (64.0, 256.0, 1024.0, 4096.0), (64.0, 128.0))
_DROPPED = ((16.0, 128.0, 512.0), (64.0, 256.0, 1024.0), (64.0,))
_IMAGES = ((1024.0, 16384.0, 262144.0), (3.0, 32.0, 128.0, 512.0), (16.0, 64.0, 512.0), (1.0, 9.0, 49.0))
_IMAGES_LAST = ((1024.0, 16384.0, 262144.0), (3.0, 64.0, 512.0), (16.0, 64.0, 512.0), (1.0, 9.0))
_PATCHES = ((1024.0, 32768.0), (3.0, 64.0, 512.0), (64.0, 768.0), (4.0, 64.0, 256.0))
_GROUPED = ((1024.0, 16384.0, 262144.0), (4.0, 32.0), (4.0, 32.0), (1.0, 9.0))
_DEPTHWISE = ((1024.0, 16384.0, 262144.0), (32.0, 128.0, 512.0), (9.0, 49.0))
_RECURRENT = ((8.0, 32.0, 128.0), (128.0, 512.0, 1024.0))


def _whole(prepare: Callable[..., Iterator[Timed]], *fixed: Any) -> Callable[..., Iterator[Timed]]:
    return lambda *sizes: prepare(*fixed, *map(int, sizes))


def important_grids(place: str = "cuda") -> Iterator[Grid]:
    """What takes most of a language model's step in 16 bits, behind what is quickly done; these are timed first."""
    on = Numbers(torch.bfloat16, place)
    yield from row_grids(on)
    yield Grid(f"matmul/{on.name}", (_SIZES,) * 3, _whole(_matmul, on))
    for sort in ("_causal", "_masked", ""):
        yield Grid(f"attention{sort}/{on.name}", _HEADS, _whole(_attention, on, sort))


def other_grids(place: str = "cuda") -> Iterator[Grid]:
    """Everything else that is timed on the device, beside the optimizers; what is quickly done comes first."""
    on = Numbers(torch.float32, place)
    yield from row_grids(on)
    yield Grid(f"matmul/{on.name}", (_SIZES,) * 3, _whole(_matmul, on))
    for sort in ("", "_causal", "_masked"):
        yield Grid(f"attention{sort}/{on.name}", _HEADS, _whole(_attention, on, sort))
    for dtype in DTYPES:
        on = Numbers(dtype, place)
        name = on.name
        alignments = tuple(float(n) for n in (2, 4, 8) if n >= on.size)
        yield Grid(f"matmul_unaligned/{name}", (*(_ODD,) * 3, alignments), _whole(_unaligned, on))
        yield Grid(f"batched_matmul/{name}", _BATCHED, _whole(_batched, on))
        yield Grid(f"convolution/{name}", _IMAGES, _whole(_convolution, on, ""))
        yield Grid(f"convolution_last/{name}", _IMAGES_LAST, _whole(_convolution, on, "last"))
        yield Grid(f"patch_convolution/{name}", _PATCHES, _whole(_convolution, on, ""))
        for sort in ("", "_last"):
            yield Grid(f"grouped_convolution{sort}/{name}", _GROUPED, _whole(_convolution, on, f"grouped{sort}"))
            yield Grid(f"depthwise{sort}/{name}", _DEPTHWISE, _whole(_depthwise, on, sort))
        yield Grid(f"recurrent/{name}", _RECURRENT, _whole(_recurrent, on))
    for on, sort in product((Numbers(dtype, place) for dtype in DTYPES), ("_dropout", "_causal_dropout")):
        yield Grid(f"attention{sort}/{on.name}", _DROPPED, _whole(_attention, on, sort))


def grids(place: str = "cuda") -> Iterator[Grid]:
    """All of them."""
    yield from important_grids(place)
    yield from other_grids(place)
