"""Which kind of kernel carries an operation out: operations of a kind share a rate and a cost of issuing."""

from math import sqrt
from typing import Final

from profiler.events import Op
from profiler.shapes import WIDEST_LOAD_BYTES

VIEW: Final = "view"
"""No kernel at all."""
SYNCHRONISING: Final = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "_pin_memory"})
"""The CPU waits for their results."""

_KINDS = {
    "matmul": "mm addmm bmm baddbmm addbmm _scaled_mm _grouped_mm mv addmv dot vdot addr",
    "attention": "attention attention_backward _flash_attention_forward _flash_attention_backward "
    "_efficient_attention_forward _efficient_attention_backward",
    "convolution": "convolution convolution_backward",
    "recurrent": "recurrent recurrent_backward _cudnn_rnn _cudnn_rnn_backward",
    "copy": "_to_copy clone copy cat stack repeat roll flip expand_copy constant_pad_nd split_with_sizes_copy "
    "slice_backward select_backward unfold_backward slice_scatter select_scatter fill zeros ones full zeros_like "
    "ones_like full_like new_zeros new_ones new_full arange zero lift_fresh_copy tril triu",
    "reduction": "sum mean amax amin max min prod any all norm linalg_vector_norm std var var_mean std_mean logsumexp "
    "argmax argmin",
    "norm": "native_layer_norm native_group_norm _fused_rms_norm rms_norm",
    "batch_norm": "native_batch_norm _native_batch_norm_legit cudnn_batch_norm _batch_norm_with_update batch_norm",
    "softmax": "_softmax _log_softmax _safe_softmax",
    "loss": "nll_loss_forward nll_loss nll_loss2d_forward nll_loss2d _ctc_loss",
    "embedding": "embedding embedding_dense",
    "index": "index index_select gather scatter scatter_add index_put _index_put_impl index_add index_copy "
    "masked_scatter scatter_reduce _unsafe_index _unsafe_index_put index_fill take",
    "pool": "max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d max_pool3d_with_indices "
    "avg_pool3d adaptive_max_pool2d _adaptive_avg_pool3d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "upsample_nearest1d upsample_linear1d upsample_nearest3d upsample_trilinear3d _upsample_nearest_exact2d "
    "grid_sampler_2d grid_sampler_3d im2col col2im reflection_pad1d reflection_pad2d replication_pad2d",
    "dropout": "native_dropout",
    "scan": "cumsum cumprod logcumsumexp sort topk argsort unique _unique2 kthvalue median bincount searchsorted "
    "multinomial randperm _fft_r2c _fft_c2c _fft_c2r",
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

    A matrix product's are (m, n, k), a batch's (batch, m, n, k); attention's (heads of the batch, length, dim);
    a convolution's (positions, channels in, channels out, elements of the kernel), a grouped one's with the channels
    of one group; a recurrent layer's (batch, width); anything else's the bytes that it moves.
    """
    kind = kind_of(op)
    if not op.shape:
        return kind, (op.bytes,)
    backward = "_backward" if kind.endswith("_backward") else ""
    if kind == "matmul":
        batch, m, n, k, alignment = op.shape
        if batch > 1:
            return "batched_matmul", (batch, m, n, k)
        return "matmul" if alignment >= WIDEST_LOAD_BYTES else "matmul_unaligned", (m, n, k)
    if kind.startswith("attention"):
        heads, queries, keys, dim, causal, masked = op.shape
        sort = "_masked" if masked else "_causal" if causal else ""
        return f"attention{sort}{backward}", (heads, sqrt(queries * keys), dim)
    if kind.startswith("convolution"):
        positions, channels, out, kernel, groups = op.shape
        if groups == channels > 1:
            return f"depthwise{backward}", (positions, channels, kernel)
        sort = "grouped_" if groups > 1 else ""
        return f"{sort}convolution{backward}", (positions, channels // groups, out // groups, kernel)
    return kind, op.shape


def _base_kind(name: str) -> str:
    if name in _KEPT_BACKWARD or not name.endswith(_BACKWARD_SUFFIXES):
        return _BASE_KIND.get(name, "elementwise")
    for suffix in _BACKWARD_SUFFIXES:
        base = name.removesuffix(suffix)
        if base != name:
            break
    kind = _BASE_KIND.get(base, _BASE_KIND.get(base + "_forward", "elementwise"))
    return kind if kind in ("elementwise", "loss", "dropout", "matmul") else f"{kind}_backward"
