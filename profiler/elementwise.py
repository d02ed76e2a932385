"""FLOPs of what works number by number: so many an element, of the result or of an argument.

[Note: One an element] A pointwise operation is one an element of its result, whatever it computes inside: an
exponential and a gelu count as an addition does. Those that people write as several operations count as those, and
norms and softmax as the arithmetic of their definitions, written beside them below. Random numbers, copies, choices
(``where``, sorting, the largest of many) and whatever results in integers or truth values are 0.
"""

from math import log2, prod
from typing import Any

import torch

from profiler.products import Arguments, Formula


def _table(groups: dict[int, str]) -> dict[str, int]:
    return {name: flops for flops, names in groups.items() for name in names.split()}


_NOTHING = (
    # asking and telling
    "_is_all_true _is_any_true "
    "_assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async _has_same_storage_numel "
    "_local_scalar_dense _fused_sdp_choice is_same_size sym_constrain_range sym_constrain_range_for_size "
    "_linalg_check_errors record_stream set resize resize_as _resize_output is_pinned is_set_to "
    # making and filling
    "empty_like new_empty new_empty_strided new_full new_ones new_zeros full_like ones_like zeros_like rand_like "
    "randn_like randint_like bernoulli normal normal_functional uniform random exponential geometric cauchy "
    "log_normal poisson binomial multinomial fill zero lift lift_fresh_copy _efficientzerotensor diag_embed "
    # moving
    "_to_copy _pin_memory _unsafe_view _reshape_alias _reshape_copy _lazy_clone clone copy _copy_from cat _chunk_cat "
    "stack _stack repeat repeat_interleave roll flip rot90 constant_pad_nd pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle unsafe_split unsafe_split_with_sizes block_diag tril triu complex "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col "
    "select_backward slice_backward diagonal_backward select_scatter slice_scatter diagonal_scatter "
    "as_strided_scatter _pack_padded_sequence _jagged_to_padded_dense_forward _padded_dense_to_jagged_forward "
    "_nested_from_padded_tensor to_padded_tensor _conj_physical conj_physical _transform_bias_rescale_qkv _coalesced "
    # choosing
    "embedding gather index index_select _unsafe_index _unsafe_masked_index take masked_select nonzero nonzero_static "
    "where masked_fill masked_scatter masked_scatter_backward index_fill index_copy scatter max_unpool2d max_unpool3d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d "
    # comparing
    "max min amax amin aminmax _aminmax argmax argmin sort topk kthvalue median nanmedian mode cummax cummin "
    "_cummax_helper _cummin_helper max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d "
    "adaptive_max_pool3d fractional_max_pool2d fractional_max_pool3d any all count_nonzero equal isin searchsorted "
    "bucketize bincount histc _unique _unique2 unique_dim unique_consecutive unique_dim_consecutive allclose"
)
FREE = frozenset(_NOTHING.split())
"""Make, fill, move, choose or compare numbers; so does what ends in ``_copy`` (a view's values, copied)."""

PER_RESULT = _table(
    {
        1: "hardswish hardswish_backward mish_backward elu_backward leaky_relu_backward hardtanh_backward "
        "hardsigmoid_backward hardshrink_backward softshrink_backward softplus_backward log_sigmoid_forward "
        "log_sigmoid_backward _prelu_kernel _prelu_kernel_backward rrelu_with_noise rrelu_with_noise_backward "
        "floor_divide polar _add_relu _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward "
        "adaptive_avg_pool3d_backward _masked_scale",
        2: "addcmul addcdiv native_dropout native_dropout_backward _fused_dropout glu glu_backward",
        3: "lerp linalg_cross mse_loss_backward smooth_l1_loss_backward huber_loss_backward",
        4: "soft_margin_loss_backward",
        5: "binary_cross_entropy_backward",
        8: "binary_cross_entropy_with_logits",
    }
)
"""FLOPs an element of the (first) result, beside the pointwise operations."""

PER_FIRST = _table(
    {
        1: "sum nansum mean prod trace cumsum cumprod embedding_dense_backward unfold_backward col2im "
        "_adaptive_avg_pool2d _adaptive_avg_pool3d segment_reduce _segment_reduce_backward "
        "max_pool2d_with_indices_backward max_pool3d_with_indices_backward adaptive_max_pool2d_backward "
        "adaptive_max_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward "
        "reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward "
        "replication_pad2d_backward replication_pad3d_backward upsample_nearest1d_backward "
        "upsample_nearest2d_backward upsample_nearest3d_backward _upsample_nearest_exact1d_backward "
        "_upsample_nearest_exact2d_backward _upsample_nearest_exact3d_backward",
        # square and add
        2: "norm linalg_vector_norm native_norm linalg__powsum",
        # difference, its square, sum; the largest taken off, exponential, sum; square, sum, product
        3: "mse_loss dist renorm embedding_renorm multi_margin_loss multi_margin_loss_backward logsumexp "
        "_weight_norm_interface",
        # sum for the mean, difference, square, sum
        4: "var var_mean std std_mean "
        # the largest taken off, exponential, sum, division; the logarithm's difference instead of the division
        "_softmax _safe_softmax _log_softmax _masked_softmax logcumsumexp _logcumsumexp "
        # product with the gradient (or exponential), sum, product, difference
        "_softmax_backward_data _log_softmax_backward_data _masked_softmax_backward "
        "smooth_l1_loss huber_loss soft_margin_loss "
        # scaled, rounded, clamped, scaled back
        "fake_quantize_per_tensor_affine_cachemask fake_quantize_per_channel_affine_cachemask "
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        # product, sum, product, difference, product
        5: "_weight_norm_interface_backward",
        8: "binary_cross_entropy",
    }
)
"""FLOPs an element of the first argument, which is the input, or in backward the gradient."""

_SOURCES = {"index_add": "source", "index_reduce": "source", "scatter_add": "src", "scatter_reduce": "src"}
_ACCUMULATED = {"index_put": "values", "_index_put_impl": "values", "_unsafe_index_put": "values", "put": "source"}


def added(name: str) -> Formula:
    """One an element that is added somewhere; numbers that only replace others are free."""

    def formula(a: Arguments, _: Any) -> int:
        return a[name].numel() if a.get("accumulate", True) else 0

    return formula


def norm_flops(a: Arguments, _: Any) -> int:
    """An element: sum, difference, square, sum, product; then the product with the weight, and the bias.

    With statistics that are given, only the difference and the product before those.
    """
    given = a.get("training") is False
    return a["input"].numel() * ((2 if given else 5) + (a.get("weight") is not None) + (a.get("bias") is not None))


def rms_norm_flops(a: Arguments, _: Any) -> int:
    """An element: square, sum, product; then the product with the weight."""
    return a["input"].numel() * (3 + (a["weight"] is not None))


def norm_backward_flops(a: Arguments, _: Any) -> int:
    """An element: the normalised input (2), two means of the gradient (3), and what they leave of it (4).

    With a weight one more, and for its gradient two, for the bias's one.
    """
    _, for_weight, for_bias = a.get("output_mask", (True, True, True))
    return a["input"].numel() * (9 + (a.get("weight") is not None) + 2 * bool(for_weight) + bool(for_bias))


def rms_norm_backward_flops(a: Arguments, _: Any) -> int:
    """An element: the normalised input (1), a mean (2), and what it leaves (3); a weight as in the other norms."""
    return a["input"].numel() * (6 + (a["weight"] is not None) + 2 * bool(a["output_mask"][1]))


def average_pool_flops(a: Arguments, out: torch.Tensor) -> int:
    """A window's elements, added and divided; in backward the same for each element of the gradient."""
    kernel, small = a["kernel_size"], a.get("grad_output", out)
    dims = 3 if small.dim() == 5 else 2
    return small.numel() * (kernel[0] ** dims if len(kernel) == 1 else prod(kernel))


def interpolation(taps: int) -> Formula:
    """A multiply-add for each of the ``taps`` numbers that make one, in backward for each that gets a share."""

    def formula(a: Arguments, out: torch.Tensor) -> int:
        return 2 * taps * a.get("grad_output", out).numel()

    return formula


def antialiased(support: int) -> Formula:
    """As many taps more in a dimension as it shrinks."""

    def formula(a: Arguments, out: torch.Tensor) -> int:
        if "grad_output" in a:
            small, sizes = a["grad_output"], a["input_size"]
        else:
            small, sizes = out, a.get("self", a.get("input")).shape
        ratios = (max(big / new, 1.0) for big, new in zip(sizes[2:], small.shape[2:], strict=True))
        return int(2 * small.numel() * prod(support * ratio for ratio in ratios))

    return formula


_SAMPLED_AXIS = {0: 2, 1: 0, 2: 4}
"""Numbers along an axis that make one, by mode: linear, nearest, cubic."""


def grid_sample_flops(a: Arguments, out: torch.Tensor) -> int:
    """A multiply-add for each number around a point; the arithmetic of its coordinates, shared by channels, is not."""
    return 2 * out.numel() * _around(a)


def grid_sample_backward_flops(a: Arguments, _: Any) -> int:
    """The same for the input's gradient and for each coordinate's."""
    dims = a["grid"].shape[-1] if a["output_mask"][1] else 0
    return 2 * a["grad_output"].numel() * _around(a) * (bool(a["output_mask"][0]) + dims)


def _around(a: Arguments) -> int:
    return int(_SAMPLED_AXIS[a["interpolation_mode"]] ** a["grid"].shape[-1])


def affine_grid_flops(a: Arguments, out: torch.Tensor) -> int:
    """Each position times the matrix of [batch, dims, dims + 1]."""
    return 2 * out.numel() * a["theta"].shape[-1]


def fft_flops(a: Arguments, out: torch.Tensor) -> int:
    """5 n log2(n) for a transform of n complex numbers, as is usual (Cooley and Tukey); half of it for real ones."""
    x = a["self"]
    real = not (x.is_complex() and out.is_complex())
    whole = x if not x.is_complex() else out
    points = prod(whole.shape[dim] for dim in a["dim"])
    return int((2.5 if real else 5.0) * whole.numel() * log2(max(points, 1)))


def nll_flops(a: Arguments, _: Any) -> int:
    """One a target: the sum of the numbers chosen."""
    return a["target"].numel()


def ctc_flops(_: Arguments, out: Any) -> int:
    """A cell of the lattice: the logarithm of a sum of three exponentials (three differences, three exponentials, two
    sums, a logarithm, a sum), and the symbol's own.
    """
    return 11 * out[1].numel()


def ctc_backward_flops(a: Arguments, _: Any) -> int:
    """The lattice from its end, its sum with the other (5 a cell), and 3 a number of the gradient."""
    return 16 * a["log_alpha"].numel() + 3 * a["log_probs"].numel()


def embedding_bag_flops(a: Arguments, _: Any) -> int:
    """One an element of the vectors that are added, in backward of their gradients."""
    vectors = a["weight"] if "weight" in a else a["grad"]
    return a["indices"].numel() * vectors.shape[1]


def distance_flops(a: Arguments, out: torch.Tensor) -> int:
    """An element of a pair: difference, power, sum; in backward one more."""
    pairs = a.get("grad", out)
    return pairs.numel() * a["x1"].shape[-1] * (4 if "grad" in a else 3)


_TAPS = {"upsample_linear1d": 2, "upsample_bilinear2d": 4, "upsample_bicubic2d": 16, "upsample_trilinear3d": 8}
_SUPPORTS = {"_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 4, "_upsample_lanczos2d_aa": 6}
_NORMS = (
    "native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_functional _batch_norm_with_update _batch_norm_with_update_functional"
)
_NORM_BACKWARDS = (
    "native_layer_norm_backward native_group_norm_backward native_batch_norm_backward cudnn_batch_norm_backward "
    "batch_norm_backward"
)
_BAGS = "_embedding_bag _embedding_bag_forward_only _embedding_bag_backward _embedding_bag_dense_backward"
_POOLS = ("avg_pool2d", "avg_pool3d")


def _all(names: str, formula: Formula) -> dict[str, Formula]:
    return dict.fromkeys(names.split(), formula)


FORMULAS: dict[str, Formula] = {
    **{name: added(source) for name, source in (_SOURCES | _ACCUMULATED).items()},
    "_unsafe_masked_index_put_accumulate": added("values"),
    **_all(_NORMS, norm_flops),
    **_all(_NORM_BACKWARDS, norm_backward_flops),
    "_native_batch_norm_legit_no_training": lambda a, out: norm_flops({**a, "training": False}, out),
    "_fused_rms_norm": rms_norm_flops,
    "_fused_rms_norm_backward": rms_norm_backward_flops,
    **{name + end: average_pool_flops for name in _POOLS for end in ("", "_backward")},
    **{name + end: interpolation(taps) for name, taps in _TAPS.items() for end in ("", "_backward")},
    **{name + end: antialiased(support) for name, support in _SUPPORTS.items() for end in ("", "_backward")},
    **_all("grid_sampler_2d grid_sampler_3d", grid_sample_flops),
    **_all("grid_sampler_2d_backward grid_sampler_3d_backward", grid_sample_backward_flops),
    **_all("_fft_r2c _fft_c2r _fft_c2c", fft_flops),
    **{f"{name}_{end}": nll_flops for name in ("nll_loss", "nll_loss2d") for end in ("forward", "backward")},
    "_ctc_loss": ctc_flops,
    "_ctc_loss_backward": ctc_backward_flops,
    **_all(_BAGS, embedding_bag_flops),
    "affine_grid_generator": affine_grid_flops,
    **_all("_cdist_forward _cdist_backward _euclidean_dist", distance_flops),
}
"""Those that depend on more than a number of elements."""
