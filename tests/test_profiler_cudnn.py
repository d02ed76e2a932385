"""The passing blocks of convolutions, as the allocator of a GPU was asked for them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from profiler.cudnn import Passing, passing_blocks

aten = torch.ops.aten
MiB = 1 << 20


def blocks(direction, x, weight, stride=1, padding=0, groups=1, dtype=torch.float32, layout=torch.contiguous_format):
    """Of "forward", or of the gradients for ("input", "weight")."""
    x = torch.empty(x, dtype=dtype, device="meta").to(memory_format=layout)
    weight = torch.empty(weight, dtype=dtype, device="meta").to(memory_format=layout)
    dims = x.dim() - 2
    rest = ([stride] * dims, [padding] * dims, [1] * dims, False, [0] * dims, groups)
    args = (x, weight, None, *rest)
    y = aten.convolution.default(*args).to(memory_format=layout)
    if direction == "forward":
        return passing_blocks(aten.convolution.default, args, y)
    mask = ["input" in direction, "weight" in direction, False]
    args = (y, x, weight, None, *rest, mask)
    out = aten.convolution_backward.default(*args)
    return passing_blocks(aten.convolution_backward.default, args, out)


RESNET = {
    "strided": (((64, 128, 56, 56), (128, 128, 3, 3), 2, 1), [123.063, 123.063, 130.938]),
    "wide": (((64, 64, 56, 56), (64, 64, 3, 3), 1, 1), [98.141, 98.141, 100.110]),
    "pointwise": (((64, 512, 28, 28), (256, 512, 1, 1)), [0, 0, 32]),
    "pointwise, unaligned": (((64, 512, 7, 7), (2048, 512, 1, 1)), [30.625, 30.625, 38.625]),
    "pointwise, strided": (((64, 512, 28, 28), (1024, 512, 1, 1), 2), [147, 147, 155.001]),
}


@pytest.mark.parametrize("case", RESNET)
def test_workspaces_of_a_resnet_are_those_that_were_measured(case):
    sizes, measured = RESNET[case]
    (forward,) = blocks("forward", *sizes).after
    backward = blocks(("input", "weight"), *sizes).after
    assert [sum(b) / MiB for b in (forward, *backward)] == pytest.approx(measured, abs=0.1)


@given(
    st.integers(1, 3), st.sampled_from([16, 32]), st.integers(5, 9), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_channels_last_and_depthwise_convolutions_copy_nothing(batch, width, size, dtype):
    x, weight = (batch, width, size, size), (width, width, 3, 3)
    for direction in ("forward", "input"):
        last = blocks(direction, x, weight, 1, 1, dtype=dtype, layout=torch.channels_last)
        depthwise = blocks(direction, x, (width, 1, 3, 3), 1, 1, width, dtype=dtype)
        assert last == depthwise == Passing((), ((0,),))


def test_a_gradient_that_is_not_asked_for_takes_nothing():
    sizes = (4, 16, 8, 8), (16, 16, 3, 3), 1, 1
    both = blocks(("input", "weight"), *sizes).after
    assert blocks(("input",), *sizes).after == both[:1]
    assert blocks(("weight",), *sizes).after == both[1:]


def test_three_channels_are_padded_to_sixteen_bytes():
    sizes = (8, 3, 64, 64), (64, 3, 7, 7), 2, 3
    for dtype, channels in ((torch.float32, 4), (torch.bfloat16, 8)):
        size = dtype.itemsize
        padded = (8 * channels * 64 * 64 + 8 * 64 * 32 * 32 + 64 * channels * 49) * size
        assert blocks("forward", *sizes, dtype=dtype).after == ((padded,),)


def test_one_dimensional_and_grouped_convolutions_copy_like_others():
    x, weight = (2, 32, 100), (64, 8, 3)
    assert blocks("forward", x, weight, groups=4).after == ((4 * (2 * 32 * 100 + 2 * 64 * 98 + 64 * 8 * 3),),)


def test_what_is_not_contiguous_is_copied_around_the_call():
    x = torch.empty(2, 16, 8, 8, device="meta").transpose(2, 3)[..., :7]
    weight = torch.empty(16, 16, 3, 3, device="meta")
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert passing_blocks(aten.convolution.default, args, aten.convolution.default(*args)).around == (x.nbytes,)


def test_other_operations_take_nothing():
    x = torch.empty(4, 4)
    assert passing_blocks(aten.mm.default, (x, x), x @ x) == Passing()
