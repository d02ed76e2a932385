"""Which kind of kernel carries an operation out: operations of a kind share a rate and a cost of issuing."""

from math import sqrt
from typing import Final

from profiler.events import Op
from profiler.rows import TRANSPOSED, UNLIKE
from profiler.shapes import WIDEST_LOAD_BYTES

VIEW: Final = "view"
"""No kernel at all."""
PRODUCTS: Final = frozenset({"matmul", "attention", "convolution", "recurrent"})
"""Kinds that tensor cores carry out, forward and backward."""
SYNCHRONISING: Final = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_pin_memory"})
"""The CPU waits for their results."""

_KINDS = {
    "matmul": "mm addmm bmm baddbmm addbmm _scaled_mm _grouped_mm mv addmv dot vdot addr",
    "attention": "attention attention_backward _flash_attention_forward _flash_attention_backward "
    "_efficient_attention_forward _efficient_attention_backward",
    "convolution": "convolution convolution_backward",
    "recurrent": "recurrent recurrent_backward _cudnn_rnn _cudnn_rnn_backward",
    "copy": "_to_copy clone copy cat stack repeat roll flip expand_copy constant_pad_nd split_with_sizes_copy "
    "slice_scatter select_scatter fill zeros ones full zeros_like "
    "ones_like full_like new_zeros new_ones new_full arange zero lift_fresh_copy tril triu",
    "padded": "slice_backward select_backward unfold_backward",
    "reduction": "sum mean amax amin max min prod any all norm linalg_vector_norm std var var_mean std_mean logsumexp "
    "argmax argmin",
    "norm": "native_layer_norm native_group_norm _fused_rms_norm rms_norm",
    "batch_norm": "native_batch_norm _native_batch_norm_legit cudnn_batch_norm _batch_norm_with_update batch_norm",
    "softmax": "_softmax _log_softmax _safe_softmax",
    "loss": "nll_loss_forward nll_loss nll_loss2d_forward nll_loss2d _ctc_loss",
    "embedding": "embedding embedding_dense _embedding_bag",
    "index": "index index_select gather scatter scatter_add index_put _index_put_impl index_add index_copy "
    "masked_scatter scatter_reduce _unsafe_index _unsafe_index_put index_fill take",
    "pool": "max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d max_pool3d_with_indices "
    "avg_pool3d adaptive_max_pool2d _adaptive_avg_pool3d upsample_nearest2d upsample_nearest1d upsample_nearest3d "
    "_upsample_nearest_exact2d im2col col2im reflection_pad1d reflection_pad2d replication_pad2d",
    "resample": "upsample_bilinear2d upsample_bicubic2d upsample_linear1d upsample_trilinear3d grid_sampler_2d "
    "grid_sampler_3d _upsample_bilinear2d_aa",
    "dropout": "native_dropout",
    "sort": "sort argsort unique _unique2 unique_consecutive randperm median",
    "scan": "cumsum cumprod logcumsumexp topk kthvalue bincount searchsorted multinomial _fft_r2c _fft_c2c _fft_c2r",
}
_BASE_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_KEPT_BACKWARD = frozenset({"slice_backward", "select_backward", "unfold_backward"})
_BACKWARD_SUFFIXES = ("_backward_data", "_dense_backward", "_backward")


def plain_name(name: str) -> str:
    """An operation's name without namespace and the mark of working in place."""
    name = name.removeprefix("aten::")
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def kind_of(op: Op) -> str:
    """The kind of an operation; "elementwise" for what is not known otherwise."""
    name = plain_name(op.name)
    if not op.bytes and not op.flops and name not in SYNCHRONISING:
        return VIEW
    return _base_kind(name)


def rate_of(op: Op) -> tuple[str, tuple[float, ...]]:
    """The name of an operation's rate, and the sizes that it depends on.

    A matrix product's are (m, n, k), with a fourth, the alignment, where it is bad, a batch's (batch, m, n, k);
    attention's (heads of the batch, length, dim); a convolution's (positions, channels in, channels out, elements of
    the kernel), a grouped one's with the channels of one group; a recurrent layer's (batch, width); those of what
    works by rows (rows, width), of batch normalisation (positions, channels), of the gradient of a table (tokens, rows
    of the table); anything else's the bytes that it moves.
    """
    kind = kind_of(op)
    if not op.shape:
        return kind, (op.bytes,)
    base = kind.removesuffix("_backward")
    backward = kind[len(base) :]
    if kind in ("elementwise", "copy"):
        return kind + _LAYOUTS[op.shape[0]], (op.bytes,)
    if kind == "matmul":
        return _matmul_rate(op.shape)
    if base == "attention":
        heads, queries, keys, dim, causal, masked, dropout = op.shape
        sort = "_masked" if masked else "_causal" if causal else ""
        return f"attention{sort}{'_dropout' * dropout}{backward}", (heads, sqrt(queries * keys), dim)
    if base == "convolution":
        return _convolution_rate(op.shape, backward)
    if base in _APART:
        *sizes, apart = op.shape
        return f"{base}{_APART[base] * apart}{backward}", tuple(sizes)
    if base in ("norm", "recurrent") or kind == "embedding_backward":
        return kind, op.shape
    return kind, (op.bytes,)


_LAYOUTS = {UNLIKE: "_unlike", TRANSPOSED: "_transposed"}
_APART = {"batch_norm": "_last", "softmax": "_spatial", "reduction": "_columns"}


def _matmul_rate(shape: tuple[int, ...]) -> tuple[str, tuple[float, ...]]:
    batch, m, n, k, alignment = shape
    if batch > 1:
        return "batched_matmul", (batch, m, n, k)
    return ("matmul", (m, n, k)) if alignment >= WIDEST_LOAD_BYTES else ("matmul_unaligned", (m, n, k, alignment))


def _convolution_rate(shape: tuple[int, ...], backward: str) -> tuple[str, tuple[float, ...]]:
    """An even kernel is taken to be moved by its own width, as those are that cut an image into patches."""
    positions, channels, out, kernel, groups, last = shape
    end = f"{'_last' * last}{backward}"
    if groups == channels > 1:
        return f"depthwise{end}", (positions, channels, kernel)
    sort = "grouped_" if groups > 1 else "patch_" if kernel % 2 == 0 else ""
    if sort == "patch_":
        end = backward
    return f"{sort}convolution{end}", (positions, channels // groups, out // groups, kernel)


def _base_kind(name: str) -> str:
    if name in _KEPT_BACKWARD or not name.endswith(_BACKWARD_SUFFIXES):
        return _BASE_KIND.get(name, "elementwise")
    for suffix in _BACKWARD_SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name:
            break
    kind = _BASE_KIND.get(base, _BASE_KIND.get(base + "_forward", "elementwise"))
    if kind == "dropout":
        return "elementwise"  # a product with the mask
    return kind if kind in ("elementwise", "loss", "matmul") else f"{kind}_backward"
