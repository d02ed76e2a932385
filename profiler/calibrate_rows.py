"""What a calibration times beside products: elementwise work, copies, and what works by rows."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional

from profiler.calibrate_numbers import DTYPES, Grid, Numbers, Timed, backward_of
from profiler.events import Op
from profiler.kinds import rate_of
from profiler.rows import TRANSPOSED, UNLIKE

BYTES_AXIS = tuple(float(1 << n) for n in range(14, 31, 2))
MOST_ROW_BYTES = 1.1e9
ROW = 1024
"""Elements of the last dimension where a kernel works by rows, and their number does not count."""
VOCABULARY = 8192


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


def _elementwise_unlike(on: Numbers, size: float) -> Iterator[Timed]:
    """As rotary embeddings and biases ask for: heads that lie apart times what is broadcast over them."""
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    x, y, bias = on.random(rows, 16, ROW // 16).transpose(0, 1), on.random(rows, ROW // 16), on.random(ROW)
    flat, out = on.random(rows, ROW), on.random(16, rows, ROW // 16)

    def run() -> None:
        torch.mul(x, y)
        torch.add(flat, bias)
        torch.add(x, out)

    one = rows * ROW * on.size
    moved = (("aten::mul", 2 * one + y.nbytes), ("aten::add", 2 * one), ("aten::add", 3 * one))
    yield _timed(on, run, *(on.op(n, rows * ROW, b, (UNLIKE,)) for n, b in moved))


def _elementwise_transposed(on: Numbers, size: float) -> Iterator[Timed]:
    x, y = _two_squares(on, size / 1.5)
    yield _timed(on, lambda: torch.add(x, y.t()), on.op("aten::add", x.numel(), 3 * x.nbytes, (TRANSPOSED,)))


def _copy(on: Numbers, size: float) -> Iterator[Timed]:
    """To the other dtype, and to the same."""
    other = DTYPES[on.dtype == DTYPES[0]]
    x = on.random(max(int(size) // (2 * on.size) // ROW, 1), ROW)

    def run() -> None:
        x.to(other)
        x.clone()

    cast = on.op("aten::_to_copy", 0, x.numel() * (on.size + Numbers(other, on.place).size))
    yield _timed(on, run, cast, on.op("aten::clone", 0, 2 * x.nbytes))


def _copy_unlike(on: Numbers, size: float) -> Iterator[Timed]:
    """Heads that are brought together."""
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    x = on.random(rows, 16, ROW // 16).transpose(0, 1)
    yield _timed(on, x.contiguous, on.op("aten::clone", 0, 2 * x.nbytes, (UNLIKE,)))


def _copy_transposed(on: Numbers, size: float) -> Iterator[Timed]:
    """Of each image, as between tokens and channels."""
    x = _two_squares(on, size)[0]
    side = x.shape[0]
    images = x.view(-1, side // 2, side).transpose(1, 2)
    yield _timed(
        on,
        lambda: images.clone(memory_format=torch.contiguous_format),
        on.op("aten::clone", 0, 2 * x.nbytes, (TRANSPOSED,)),
    )


def _two_squares(on: Numbers, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    side = max(int((size / (2 * on.size)) ** 0.5) // 8 * 8, 8)
    return on.random(side, side), on.random(side, side)


def _padded(on: Numbers, size: float) -> Iterator[Timed]:
    """The gradient of a half: zeros, and a copy."""
    half = max(int(size) // (3 * on.size) // ROW, 1)
    x = on.random(half, ROW // 2)
    run = partial(torch.ops.aten.slice_backward, x, (half, ROW), 1, 0, ROW // 2, 1)
    yield _timed(on, run, on.op("aten::slice_backward", 0, 3 * x.nbytes))


def _reduction(on: Numbers, kept: int, width: int) -> Iterator[Timed]:
    """Over rows, as normalisations do."""
    if kept * width * on.size > MOST_ROW_BYTES:
        return
    x = on.random(kept, width)
    yield _timed(on, lambda: x.sum(-1), on.op("aten::sum", x.numel(), x.nbytes + kept * on.size, (kept, width, 0)))


def _columns(on: Numbers, kept: int, width: int) -> Iterator[Timed]:
    """Over columns, as the gradient of a bias does."""
    if kept * width * on.size > MOST_ROW_BYTES:
        return
    x = on.random(width, kept)
    yield _timed(on, lambda: x.sum(0), on.op("aten::sum", x.numel(), x.nbytes + kept * on.size, (kept, width, 1)))


def _timed(on: Numbers, run: Callable[[], object], *ops: Op) -> Timed:
    return Timed(f"{rate_of(ops[0])[0]}/{on.name}", run, ops)


def _both_ways(
    on: Numbers,
    name: str,
    layer: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    passes: tuple[float, float],
    shape: tuple[int, ...] = (),
    back: str = "_backward",
) -> Iterator[Timed]:
    """A layer forward and backward, which move ``passes`` times the bytes of its input."""
    out = layer(*inputs)
    trained = tuple(t for t in inputs if t.requires_grad)
    for end, run, count in (("", lambda: layer(*inputs), passes[0]), (back, backward_of(out, trained), passes[1])):
        yield _timed(on, run, on.op(f"aten::{name}{end}", inputs[0].numel(), count * inputs[0].nbytes, shape))


def _norm(on: Numbers, rows: int, width: int) -> Iterator[Timed]:
    if 2 * rows * width * on.size > MOST_ROW_BYTES:
        return
    inputs = tuple(on.random(*s, grad=True) for s in ((rows, width), (width,), (width,)))

    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (width,), w, b)

    yield from _both_ways(on, "native_layer_norm", layer, inputs, (2, 3), (rows, width))


def _batch_norm(on: Numbers, last: bool, positions: int, channels: int) -> Iterator[Timed]:
    if 2 * positions * channels * on.size > MOST_ROW_BYTES:
        return
    side = int((positions / 16) ** 0.5)
    layout = torch.channels_last if last else torch.contiguous_format
    x = on.random(16, channels, side, side).to(memory_format=layout).requires_grad_()
    w, b = (torch.ones(channels, device=on.place, requires_grad=True) for _ in range(2))
    mean, var = torch.zeros(channels, device=on.place), torch.ones(channels, device=on.place)

    def layer(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(x, mean, var, w, b, training=True)

    yield from _both_ways(on, "native_batch_norm", layer, (x, w, b), (2, 3), (positions, channels, int(last)))


def _softmax(on: Numbers, rows: int, width: int) -> Iterator[Timed]:
    if 2 * rows * width * on.size > MOST_ROW_BYTES:
        return
    x = on.random(rows, width, grad=True)
    softmax = partial(functional.log_softmax, dim=-1)
    yield from _both_ways(on, "_log_softmax", softmax, (x,), (2, 3), (rows, width, 0), "_backward_data")


def _spatial_softmax(on: Numbers, rows: int, width: int) -> Iterator[Timed]:
    if 2 * rows * width * on.size > MOST_ROW_BYTES:
        return
    x = on.random(8, width, rows // 8, grad=True)
    softmax = partial(functional.log_softmax, dim=1)
    yield from _both_ways(on, "_log_softmax", softmax, (x,), (2, 3), (rows, width, 1), "_backward_data")


def _pool(on: Numbers, size: float) -> Iterator[Timed]:
    side = max(int((size / on.size / (64 * 16)) ** 0.5) // 2 * 2, 2)
    x = on.random(16, 64, side, side, grad=True)
    indices = 8 / on.size
    passes = (1 + 0.25 + 0.25 * indices, 0.25 + 0.25 * indices + 1)
    yield from _both_ways(on, "max_pool2d_with_indices", lambda x: functional.max_pool2d(x, 2), (x,), passes)


def _resample(on: Numbers, size: float) -> Iterator[Timed]:
    """Images of four times the side, interpolated."""
    side = max(int((size / on.size / (17 * 64 * 16)) ** 0.5), 1)
    x = on.random(16, 64, side, side, grad=True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(x, scale_factor=4, mode="bilinear")

    yield from _both_ways(on, "upsample_bilinear2d", layer, (x,), (17, 17))


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
    yield Timed(f"loss/{on.name}", backward_of(out, (x,)), (on.op("aten::nll_loss_backward", 0, x.nbytes),))


def _embedding(on: Numbers, tokens: int, rows: int) -> Iterator[Timed]:
    """Tokens in random order, from a table of so many rows."""
    if max(2 * tokens, rows) * ROW * on.size > MOST_ROW_BYTES:
        return
    table = on.random(rows, ROW, grad=True)
    chosen = torch.randint(0, rows, (tokens,), device=on.place)
    out = functional.embedding(chosen, table)
    back = on.op("aten::embedding_dense_backward", 0, out.nbytes + table.nbytes, (tokens, rows))
    yield _timed(on, backward_of(out, (table,)), back)


def _looked_up(on: Numbers, size: float) -> Iterator[Timed]:
    """Tokens in random order, from a table of 32 Mi elements."""
    rows = max(int(size) // (2 * on.size) // ROW, 1)
    table = on.random(32 * ROW, ROW)
    tokens = torch.randint(0, len(table), (rows,), device=on.place)
    look = partial(functional.embedding, tokens, table)
    yield _timed(on, look, on.op("aten::embedding", 0, 2 * rows * ROW * on.size))


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


def _sort(on: Numbers, size: float) -> Iterator[Timed]:
    """Of whole numbers, with their order."""
    x = torch.randint(0, 1 << 20, (max(int(size) // 24, 2),), device=on.place)
    yield _timed(on, x.sort, on.op("aten::sort", 0, 3 * x.nbytes))


_SORTED_BYTES = tuple(float(1 << n) for n in range(10, 29, 3))
_NORMS = ((64.0, 1024.0, 8192.0, 131072.0), (32.0, 128.0, 768.0, 2048.0, 8192.0))
_IMAGES = ((1024.0, 16384.0, 131072.0, 1048576.0), (16.0, 64.0, 256.0, 1024.0))
_ROWS = ((64.0, 1024.0, 8192.0, 131072.0), (32.0, 256.0, 2048.0, 32768.0))
_ANY_ROWS = ((1.0, 64.0, 1024.0, 8192.0, 131072.0), (32.0, 256.0, 2048.0, 32768.0, 1048576.0))
_COLUMNS = ((32.0, 256.0, 1024.0, 4096.0, 32768.0), (32.0, 512.0, 4096.0, 32768.0, 262144.0))
_SPATIAL = ((4096.0, 65536.0, 1048576.0), (8.0, 32.0, 128.0))
_TABLES = ((256.0, 4096.0, 32768.0), (512.0, 8192.0, 65536.0))
_BY_BYTES: dict[str, Callable[[Numbers, float], Iterator[Timed]]] = {
    "elementwise": _elementwise,
    "elementwise_unlike": _elementwise_unlike,
    "elementwise_transposed": _elementwise_transposed,
    "copy": _copy,
    "copy_unlike": _copy_unlike,
    "copy_transposed": _copy_transposed,
    "padded": _padded,
    "pool": _pool,
    "resample": _resample,
    "dropout": _dropout,
    "loss": _loss,
    "embedding": _looked_up,
    "index": _index,
    "scan": _scan,
}
_BY_ROWS: dict[str, tuple[tuple[tuple[float, ...], ...], Callable[..., Iterator[Timed]]]] = {
    "reduction": (_ANY_ROWS, _reduction),
    "reduction_columns": (_COLUMNS, _columns),
    "norm": (_NORMS, _norm),
    "batch_norm": (_IMAGES, lambda on, *sizes: _batch_norm(on, False, *sizes)),
    "batch_norm_last": (_IMAGES, lambda on, *sizes: _batch_norm(on, True, *sizes)),
    "softmax": (_ROWS, _softmax),
    "softmax_spatial": (_SPATIAL, _spatial_softmax),
    "embedding_backward": (_TABLES, _embedding),
}


def row_grids(on: Numbers) -> Iterator[Grid]:
    """Everything that is timed beside products and optimizers."""
    for kind, prepare in _BY_BYTES.items():
        yield Grid(f"{kind}/{on.name}", (BYTES_AXIS,), partial(prepare, on))
    yield Grid(f"sort/{on.name}", (_SORTED_BYTES,), partial(_sort, on))
    for kind, (axes, by_rows) in _BY_ROWS.items():
        yield Grid(f"{kind}/{on.name}", axes, _on_whole_numbers(by_rows, on))


def _on_whole_numbers(prepare: Callable[..., Iterator[Timed]], on: Numbers) -> Callable[..., Iterator[Timed]]:
    return lambda *sizes: prepare(on, *map(int, sizes))
