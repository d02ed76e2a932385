"""The kernels that a calibration times: for each kind of operation a grid of sizes, and what to run at a point of it.

Operations are described as the tracer would log them, so that a rate means the same when it is measured and when it is
used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from profiler.events import FORWARD, Op
from profiler.products import attention_of

DTYPES = (torch.bfloat16, torch.float32)
MOST_FLOPS = {torch.bfloat16: 5e12, torch.float32: 4e11}
"""Larger points of a grid are left out: they would take too long, and rates no longer change there."""
MOST_BYTES = 4e9

BYTES_AXIS = tuple(float(1 << n) for n in range(14, 31, 2))
ROW = 1024
"""Elements of the last dimension where a kernel works by rows."""
VOCABULARY = 8192


class Timed(NamedTuple):
    """One thing to time: what to run, and the operations that one run carries out."""

    name: str
    """Of the rate."""
    run: Callable[[], object]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Grid:
    """Sizes, and what is timed at each of them."""

    name: str
    axes: tuple[tuple[float, ...], ...]
    prepare: Callable[..., Iterator[Timed]]
    """Called with one size an axis; yields what to time there, nothing where a point is too large."""


class Numbers(NamedTuple):
    """Of which dtype the tensors of a grid are, and on which device."""

    dtype: torch.dtype
    place: str

    @property
    def name(self) -> str:
        """Of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return torch.empty((), dtype=self.dtype).element_size()

    def random(self, *shape: int, grad: bool = False) -> torch.Tensor:
        """A tensor of random numbers."""
        return torch.randn(shape, device=self.place).to(self.dtype).requires_grad_(grad)

    def op(self, name: str, flops: float, moved: float, shape: tuple[int, ...] = ()) -> Op:
        """An operation on such numbers as the tracer logs it."""
        return Op(name, int(flops), int(moved), self.name, "", FORWARD, False, shape)


def _backward(out: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """Runs backward from ``out`` again and again."""
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def _matmul(on: Numbers, m: int, n: int, k: int, *, odd: int = 0) -> Iterator[Timed]:
    """The three layouts of a linear layer: forward's, the input gradient's and the weight gradient's.

    With ``odd`` the rows of one operand do not begin at multiples of 16 bytes.
    """
    flops, moved = 2 * m * n * k, (m * k + k * n + m * n) * on.size
    if flops > MOST_FLOPS[on.dtype] or moved > MOST_BYTES:
        return
    x, g, t = (on.random(a, b) for a, b in ((m, k), (m, k + odd), (k, m + odd)))
    w, v, y = (on.random(a, b) for a, b in ((n + odd, k), (k + odd, n), (k, n)))
    name = "matmul_unaligned" if odd else "matmul"
    shape = (1, m, n, k, on.size if odd else 16)

    def run() -> None:
        torch.mm(x, w.t())
        torch.mm(g, v)
        torch.mm(t[:, :m].t() if odd else t.t(), y)

    yield Timed(f"{name}/{on.name}", run, (on.op("aten::mm", flops, moved, shape),) * 3)


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
    causal, masked = sort == "_causal", sort == "_masked"
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
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)

    shape = (heads, length, length, dim, int(causal), int(masked))
    name = on.name
    yield Timed(f"attention{sort}/{name}", forward, (on.op("attention", work.flops, 4 * size, shape),))
    backward = on.op("attention_backward", work.backward_flops, 8 * size, shape)
    yield Timed(f"attention{sort}_backward/{name}", _backward(forward(), trained), (backward,))


def _convolution(on: Numbers, sort: str, positions: int, inner: int, outer: int, kernel: int) -> Iterator[Timed]:
    """A square kernel with stride 1 that keeps the image's size; ``sort`` is "", "grouped_" or "depthwise"."""
    depthwise = sort == "depthwise"
    groups = {"": 1, "grouped_": 32, "depthwise": inner}[sort]
    ins, outs = (inner, inner) if depthwise else (inner * groups, outer * groups)
    side = int((positions / 16) ** 0.5)
    width = int(kernel**0.5)
    flops = 2 * positions * (ins // groups) * outs * kernel
    sizes = [n * on.size for n in (positions * ins, positions * outs, ins // groups * outs * kernel)]
    if 2 * flops > MOST_FLOPS[on.dtype] or sum(sizes) > MOST_BYTES / 2:
        return
    x = on.random(16, ins, side, side, grad=True)
    w = on.random(outs, ins // groups, width, width, grad=True)
    forward = partial(functional.conv2d, x, w, padding=width // 2, groups=groups)
    name = sort if depthwise else f"{sort}convolution"
    shape = (positions, ins, outs, kernel, groups)
    ahead = on.op("aten::convolution", flops, sum(sizes), shape)
    back = on.op("aten::convolution_backward", 2 * flops, sum(sizes) + sizes[0] + sizes[2], shape)
    yield Timed(f"{name}/{on.name}", forward, (ahead,))
    yield Timed(f"{name}_backward/{on.name}", _backward(forward(), (x, w)), (back,))


def _depthwise(on: Numbers, positions: int, channels: int, kernel: int) -> Iterator[Timed]:
    return _convolution(on, "depthwise", positions, channels, channels, kernel)


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
    yield Timed(f"recurrent_backward/{on.name}", _backward(out, inputs), (on.op(*back),))


def _elementwise(on: Numbers, size: float) -> Iterator[Timed]:
    count = int(size) // (3 * on.size) // 8 * 8
    x, y = on.random(count), on.random(count)
    name, one = on.name, count * on.size

    def run() -> None:
        torch.add(x, y)
        torch.mul(x, y)
        functional.gelu(x)

    ops = tuple(
        on.op(n, count, b) for n, b in (("aten::add", 3 * one), ("aten::mul", 3 * one), ("aten::gelu", 2 * one))
    )
    yield Timed(f"elementwise/{name}", run, ops)


def _copy(on: Numbers, size: float) -> Iterator[Timed]:
    """To the other dtype and, transposed, to contiguous."""
    other = DTYPES[on.dtype == DTYPES[0]]
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    x = on.random(rows, ROW)

    def run() -> None:
        x.to(other)
        x.view(rows, 16, ROW // 16).transpose(0, 1).contiguous()

    cast = on.op("aten::_to_copy", 0, x.numel() * (on.size + Numbers(other, on.place).size))
    yield Timed(f"copy/{on.name}", run, (cast, on.op("aten::clone", 0, 2 * x.nbytes)))


def _reduction(on: Numbers, size: float) -> Iterator[Timed]:
    """Over rows, as normalisations do, and over columns, as the gradient of a bias does."""
    x = on.random(max(int(size) // on.size // ROW, 1), ROW)

    def run() -> None:
        x.mean(-1)
        x.sum(0)

    yield Timed(f"reduction/{on.name}", run, (on.op("aten::sum", x.numel(), x.nbytes),) * 2)


_OPERATIONS = {
    "norm": "aten::native_layer_norm",
    "batch_norm": "aten::native_batch_norm",
    "softmax": "aten::_softmax",
    "pool": "aten::max_pool2d_with_indices",
}


def _both_ways(
    name: str,
    on: Numbers,
    layer: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    passes: tuple[float, float],
) -> Iterator[Timed]:
    """A layer forward and backward, which move ``passes`` times the bytes of its input."""
    out = layer(*inputs)
    trained = tuple(t for t in inputs if t.requires_grad)
    for end, run, count in (("", lambda: layer(*inputs), passes[0]), ("_backward", _backward(out, trained), passes[1])):
        part = on.op(f"{_OPERATIONS[name]}{end}", inputs[0].numel(), count * inputs[0].nbytes)
        yield Timed(f"{name}{end}/{on.name}", run, (part,))


def _norm(on: Numbers, size: float) -> Iterator[Timed]:
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    x, w, b = (on.random(*s, grad=True) for s in ((rows, ROW), (ROW,), (ROW,)))
    yield from _both_ways("norm", on, lambda x, w, b: functional.layer_norm(x, (ROW,), w, b), (x, w, b), (2, 3))


def _batch_norm(on: Numbers, size: float) -> Iterator[Timed]:
    """Of 64 channels."""
    side = max(int((size / (2 * on.size) / (64 * 16)) ** 0.5), 1)
    x = on.random(16, 64, side, side, grad=True)
    w, b = (torch.ones(64, device=on.place, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(64, device=on.place), torch.ones(64, device=on.place)

    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(x, mean, var, w, b, training=True)

    yield from _both_ways("batch_norm", on, layer, (x, w, b), (2, 3))


def _softmax(on: Numbers, size: float) -> Iterator[Timed]:
    x = on.random(max(int(size) // (2 * on.size) // ROW, 1), ROW, grad=True)
    yield from _both_ways("softmax", on, lambda x: functional.log_softmax(x, -1), (x,), (2, 3))


def _pool(on: Numbers, size: float) -> Iterator[Timed]:
    side = max(int((size / on.size / (64 * 16)) ** 0.5) // 2 * 2, 2)
    x = on.random(16, 64, side, side, grad=True)
    indices = 8 / on.size
    passes = (1 + 0.25 + 0.25 * indices, 0.25 + 0.25 * indices + 1)
    yield from _both_ways("pool", on, lambda x: functional.max_pool2d(x, 2), (x,), passes)


def _dropout(on: Numbers, size: float) -> Iterator[Timed]:
    x = on.random(int(size) // (3 * on.size) // 8 * 8)
    moved = 2 * x.nbytes + x.numel()
    yield Timed(
        f"dropout/{on.name}", lambda: torch.native_dropout(x, 0.1, True), (on.op("aten::native_dropout", 0, moved),)
    )


def _loss(on: Numbers, size: float) -> Iterator[Timed]:
    """The backward of the negative log-likelihood, which fills a gradient as large as the logits."""
    rows = max(int(size) // on.size // VOCABULARY, 1)
    x = on.random(rows, VOCABULARY, grad=True)
    target = torch.zeros(rows, device=on.place, dtype=torch.int64)
    out = functional.nll_loss(x, target)
    yield Timed(f"loss/{on.name}", _backward(out, (x,)), (on.op("aten::nll_loss_backward", 0, x.nbytes),))


def _embedding(on: Numbers, size: float) -> Iterator[Timed]:
    """Tokens in random order, from a table of 32 Mi elements."""
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    table = on.random(32 * ROW, ROW, grad=True)
    tokens = torch.randint(0, len(table), (rows,), device=on.place)
    layer = partial(functional.embedding, tokens, table)
    one, name = rows * ROW * on.size, on.name
    yield Timed(f"embedding/{name}", layer, (on.op("aten::embedding", 0, 2 * one),))
    moved = one + table.nbytes
    yield Timed(
        f"embedding_backward/{name}", _backward(layer(), (table,)), (on.op("aten::embedding_dense_backward", 0, moved),)
    )


def _index(on: Numbers, size: float) -> Iterator[Timed]:
    """Rows chosen by an index tensor, and their scattered sum."""
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    x = on.random(rows, ROW)
    order = torch.randperm(rows, device=on.place)
    out = torch.zeros_like(x)

    def run() -> None:
        x[order]
        out.index_add_(0, order, x)

    ops = (on.op("aten::index", 0, 2 * x.nbytes), on.op("aten::index", 0, 3 * x.nbytes))
    yield Timed(f"index/{on.name}", run, ops)


def _scan(on: Numbers, size: float) -> Iterator[Timed]:
    x = on.random(max(int(size) // (2 * on.size) // ROW, 1), ROW)
    yield Timed(f"scan/{on.name}", lambda: x.cumsum(-1), (on.op("aten::cumsum", 0, 2 * x.nbytes),))


_FINE = (16.0, 64.0, 128.0, 256.0, 512.0, 768.0, 1024.0, 2048.0, 3072.0, 4096.0, 8192.0, 16384.0)
_COARSE = (16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0)
_ODD = (64.0, 256.0, 1024.0, 4096.0, 16384.0)
_BATCHED = ((8.0, 64.0, 512.0), (64.0, 256.0, 1024.0), (64.0, 256.0, 1024.0), (64.0, 256.0, 1024.0))
_HEADS = ((16.0, 128.0, 512.0), (64.0, 256.0, 1024.0, 4096.0), (32.0, 64.0, 128.0))
_IMAGES = ((1024.0, 16384.0, 262144.0), (3.0, 32.0, 128.0, 512.0), (16.0, 64.0, 512.0), (1.0, 9.0, 49.0))
_GROUPED = ((1024.0, 16384.0, 262144.0), (4.0, 32.0), (4.0, 32.0), (1.0, 9.0))
_DEPTHWISE = ((1024.0, 16384.0, 262144.0), (32.0, 128.0, 512.0), (9.0, 49.0))
_RECURRENT = ((8.0, 32.0, 128.0), (128.0, 512.0, 1024.0))
_BY_BYTES: dict[str, Callable[..., Iterator[Timed]]] = {
    "elementwise": _elementwise,
    "copy": _copy,
    "reduction": _reduction,
    "norm": _norm,
    "batch_norm": _batch_norm,
    "softmax": _softmax,
    "pool": _pool,
    "dropout": _dropout,
    "loss": _loss,
    "embedding": _embedding,
    "index": _index,
    "scan": _scan,
}


def _whole(prepare: Callable[..., Iterator[Timed]], *fixed: Any, **options: Any) -> Callable[..., Iterator[Timed]]:
    return lambda *sizes: prepare(*fixed, *map(int, sizes), **options)


def grids(place: str = "cuda") -> Iterator[Grid]:
    """Everything that is timed on the device, beside the optimizers."""
    for dtype in DTYPES:
        on = Numbers(dtype, place)
        name = on.name
        fine = _FINE if dtype == torch.bfloat16 else _COARSE
        yield Grid(f"matmul/{name}", (fine,) * 3, _whole(_matmul, on))
        yield Grid(f"matmul_unaligned/{name}", (_ODD,) * 3, _whole(_matmul, on, odd=1))
        yield Grid(f"batched_matmul/{name}", _BATCHED, _whole(_batched, on))
        for sort in ("", "_causal", "_masked"):
            yield Grid(f"attention{sort}/{name}", _HEADS, _whole(_attention, on, sort))
        yield Grid(f"convolution/{name}", _IMAGES, _whole(_convolution, on, ""))
        yield Grid(f"grouped_convolution/{name}", _GROUPED, _whole(_convolution, on, "grouped_"))
        yield Grid(f"depthwise/{name}", _DEPTHWISE, _whole(_depthwise, on))
        yield Grid(f"recurrent/{name}", _RECURRENT, _whole(_recurrent, on))
        for kind, prepare in _BY_BYTES.items():
            yield Grid(f"{kind}/{name}", (BYTES_AXIS,), _whole(prepare, on))
