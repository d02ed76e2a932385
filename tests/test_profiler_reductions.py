"""Buffers of reductions, against sizes seen on a GPU and the kernel's own rules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from profiler.reductions import NOTHING, PartialSums, reduction_scratch, softmax_scratch_bytes

aten = torch.ops.aten
MIB = 1 << 20


def workspace(shape, dims, dtype=torch.bfloat16, func=aten.sum.dim_IntList, keepdim=False) -> int:
    return scratch(shape, dims, dtype, func, keepdim).bytes


def scratch(shape, dims, dtype=torch.bfloat16, func=aten.sum.dim_IntList, keepdim=False) -> PartialSums:
    x = torch.empty(shape, dtype=dtype, device="meta")
    args = (x, dims, keepdim) if func is not aten.linalg_vector_norm.default else (x, 2, dims, keepdim)
    return reduction_scratch(func, args, {}, func(*args))


def test_the_gradient_of_a_bias_takes_what_an_h200_showed():
    # A vision transformer's second linear layer, batch 32 of 197 patches, and its output's bias.
    assert workspace((6304, 3072), [0]) == 132 * MIB
    assert workspace((6304, 768), [0]) == pytest.approx(37.125 * MIB)
    assert workspace((6304, 3072), [0], keepdim=True) == 132 * MIB
    assert workspace((32, 197, 3072), [0, 1]) == 132 * MIB


def test_16_bits_are_summed_in_fp32_and_64_bits_in_themselves():
    assert workspace((6304, 3072), [0], torch.float32) == 132 * MIB
    assert workspace((6304, 3072), [0], torch.float64) == 264 * MIB


@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((6304, 3072), [1]),  # over the fastest dimension
        ((6304, 3072), [0, 1]),  # to one number
        ((512, 3072), [0]),  # too few rows to share
        ((6304, 1), [1]),  # nothing
        ((0, 8), [0]),
    ],
)
def test_sums_that_are_not_shared_by_blocks_take_nothing(shape, dims):
    assert workspace(shape, dims) == 0


def test_other_operations_take_nothing_and_norms_are_sums():
    x = torch.empty(6304, 3072, device="meta")
    assert reduction_scratch(aten.mul.Tensor, (x, x), {}, x * x) == NOTHING
    assert workspace((6304, 3072), [0], torch.float32, aten.linalg_vector_norm.default) == 132 * MIB
    assert reduction_scratch(aten.sum.default, (x,), {}, x.sum()) == NOTHING


@given(st.integers(1, 20000), st.integers(1, 20000))
def test_a_buffer_holds_a_whole_number_of_partial_sums_for_every_output(rows, columns):
    taken = workspace((rows, columns), [0], torch.float32)
    assert taken >= 0
    if taken:
        assert rows >= 256
        assert taken % (4 * columns) == 0
        # Each share is of a block's width of numbers; no thread sums fewer than 16 rows.
        assert taken // (4 * columns) <= rows * 128 // 16


SHAPES = {
    "rows of every sample kept apart": (lambda batch, rows, columns: (batch, rows, columns), 1),
    "samples side by side": (lambda batch, rows, columns: (rows, batch, columns), 0),
    "all rows of all samples": (lambda batch, rows, columns: (batch * rows, columns), 0),
}


@pytest.mark.parametrize("how", SHAPES)
@given(st.integers(1, 600), st.integers(1, 6000), st.sampled_from([1, 3, 8, 64, 96, 512, 1024, 4100]), st.data())
def test_no_smaller_batch_holds_more_than_the_most_that_a_larger_one_knows(how, batch, rows, columns, data):
    shape, dim = SHAPES[how]
    smaller = data.draw(st.integers(1, batch))
    found = scratch(shape(batch, rows, columns), [dim])
    assert found.bytes <= found.most_bytes
    assert scratch(shape(smaller, rows, columns), [dim]).bytes <= found.most_bytes


def test_a_batch_that_shares_no_output_knows_what_a_smaller_one_does():
    assert scratch((300, 4096, 1024), [1]).bytes == 0
    assert scratch((264, 4096, 1024), [1]).bytes == 528 * MIB <= scratch((300, 4096, 1024), [1]).most_bytes


def test_softmax_copies_what_does_not_lie_together_and_multiplies_in_backward():
    x = torch.empty(4, 8, 16, device="meta")
    apart = x.transpose(1, 2)
    assert softmax_scratch_bytes(aten._log_softmax.default, (x, 1, False)) == 0
    assert softmax_scratch_bytes(aten._log_softmax.default, (apart, 1, False)) == x.nbytes
    assert softmax_scratch_bytes(aten._log_softmax_backward_data.default, (apart, apart, 1, x.dtype)) == 2 * x.nbytes
    assert softmax_scratch_bytes(aten._softmax_backward_data.default, (x, x, 1, x.dtype)) == x.nbytes
    assert softmax_scratch_bytes(aten._softmax_backward_data.default, (x, apart, 1, x.dtype)) == 2 * x.nbytes
    assert softmax_scratch_bytes(aten._safe_softmax.default, (x, -1)) == x.numel()
    assert softmax_scratch_bytes(aten.mul.Tensor, (x, x)) == 0
