"""Which kernel computes attention, and what it holds."""

import pytest
import torch

from profiler.attention import Kernel, _kernel, _mask_for


def heads(count=4, length=64, dim=32, dtype=torch.bfloat16):
    return torch.empty(2, length, count, dim, dtype=dtype, device="meta").transpose(1, 2)


def kernel_of(query=None, key=None, mask=None):
    query = heads() if query is None else query
    key = query if key is None else key
    return _kernel(query, key, key, mask)


def mask(requires_grad=False, dtype=torch.bfloat16):
    return torch.empty(1, 4, 64, 64, dtype=dtype, device="meta").requires_grad_(requires_grad)


def test_16_bits_take_cudnn_with_and_without_a_mask_and_with_fewer_key_heads():
    assert kernel_of() is Kernel.CUDNN
    assert kernel_of(mask=mask()) is Kernel.CUDNN
    assert kernel_of(key=heads(count=2)) is Kernel.CUDNN
    assert kernel_of(heads(dim=128)) is Kernel.CUDNN


def test_what_cudnn_can_not_goes_to_flash_or_to_the_memory_efficient_kernel():
    assert kernel_of(heads(dim=256)) is Kernel.FLASH
    assert kernel_of(heads(dim=20)) is Kernel.FLASH
    assert kernel_of(heads(dim=256), mask=mask()) is Kernel.EFFICIENT
    assert kernel_of(mask=mask(requires_grad=True)) is Kernel.EFFICIENT
    assert kernel_of(heads(dtype=torch.float32)) is Kernel.EFFICIENT


@pytest.mark.parametrize(
    ("query", "key", "bias"),
    [
        (heads(dim=512), None, None),
        (heads(dtype=torch.float64), None, None),
        (heads(dtype=torch.float32), heads(count=2, dtype=torch.float32), None),
        (heads(), None, torch.empty(1, 64, 64, 4, device="meta").permute(0, 3, 1, 2).requires_grad_()),
        (torch.empty(2, 4, 32, 64, device="meta").transpose(2, 3), None, None),
        (torch.empty(4, 64, 32, device="meta"), None, None),
    ],
)
def test_what_no_fused_kernel_can_goes_the_quadratic_way(query, key, bias):
    assert kernel_of(query, key, bias) is None


def test_masks_become_numbers_in_aligned_rows():
    query = heads(count=3, length=49)
    made = _mask_for(Kernel.EFFICIENT, torch.empty(1, 3, 49, 49, device="meta", dtype=torch.bfloat16), query, query)
    assert made.shape == (2, 3, 49, 49)
    assert made.stride()[-2:] == (56, 1)
    truth = torch.empty(2, 1, 64, 64, dtype=torch.bool, device="meta")
    assert _mask_for(Kernel.CUDNN, truth, heads(), heads()).dtype == torch.bfloat16
