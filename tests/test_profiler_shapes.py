"""The sizes that an operation is logged with."""

import torch
from torch import nn

from profiler.events import BACKWARD, FORWARD, LOSS, Op
from profiler.rows import TRANSPOSED, UNLIKE
from profiler.shapes import work_shape
from profiler.trace import trace_step

CONV = "aten::convolution"


def shapes(model, batch, name, phase, forward=lambda m, x: m(x).sum()):
    trace = trace_step(model, batch, forward)
    return [e.shape for e in trace.events if isinstance(e, Op) and e.name == name and e.phase == phase]


def test_a_linear_layer_is_three_products_of_the_same_sizes_in_another_order():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 24, bias=False))
    assert shapes(model, torch.zeros(5, 8), "aten::mm", FORWARD) == [(1, 5, 8, 8, 16), (1, 5, 24, 8, 16)]
    weight, inputs, first = shapes(model, torch.zeros(5, 8), "aten::mm", BACKWARD)
    assert {weight[:4], inputs[:4]} == {(1, 24, 8, 5), (1, 5, 8, 24)}
    assert first[:4] == (1, 8, 8, 5)


def test_odd_row_lengths_are_seen_as_badly_aligned():
    assert shapes(nn.Linear(8, 7), torch.zeros(4, 8), "aten::addmm", FORWARD) == [(1, 4, 7, 8, 4)]
    assert shapes(nn.Linear(6, 8), torch.zeros(4, 6), "aten::addmm", FORWARD) == [(1, 4, 8, 6, 8)]


def test_convolutions_say_positions_channels_kernel_and_groups():
    forward = shapes(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), torch.zeros(2, 4, 8, 8), CONV, FORWARD)
    assert forward == [(2 * 16, 4, 8, 9, 2, 0)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 2, stride=2))
    assert shapes(model, torch.zeros(2, 3, 5, 5), CONV, FORWARD)[1] == (2 * 25, 4, 8, 4, 1, 0)
    backward = shapes(model, torch.zeros(2, 3, 5, 5), "aten::convolution_backward", BACKWARD)
    assert backward == [(2 * 25, 4, 8, 4, 1, 0), (2 * 25, 3, 4, 1, 1, 0)]


def test_attention_says_heads_lengths_and_causality_in_both_directions():
    def forward(model, x):
        x = model(x)
        return nn.functional.scaled_dot_product_attention(x, x[:, :, :16], x[:, :, :16], is_causal=True).sum()

    for name, phase in (("attention", LOSS), ("attention_backward", BACKWARD)):
        assert shapes(nn.Linear(8, 8), torch.zeros(2, 4, 32, 8), name, phase, forward) == [(8, 32, 16, 8, 1, 0, 0)]


def test_products_with_vectors_say_their_sizes_as_matrices():
    matrix, row, column = torch.zeros(3, 4), torch.zeros(4), torch.zeros(3)
    assert work_shape("aten::mv", (matrix, row), column) == (1, 3, 1, 4, 16)
    assert work_shape("aten::addmv", (column, matrix, row), column) == (1, 3, 1, 4, 16)
    assert work_shape("aten::addr", (matrix, column, row), matrix) == (1, 3, 4, 1, 16)
    assert work_shape("aten::dot", (row, row), row.sum()) == (1, 1, 1, 4, 16)


def test_attention_over_packed_sequences_says_their_mean_length():
    q, k = torch.zeros(12, 4, 8), torch.zeros(24, 2, 8)
    offsets = torch.zeros(4, dtype=torch.int32)
    forward = (q, k, k, offsets, offsets, 8, 8, 0.0, True, False)
    assert work_shape("aten::_flash_attention_forward", forward, (q,)) == (12, 4, 8, 8, 1, 0, 0)
    backward = (q, q, k, k, q, q, offsets, offsets, 8, 8, 0.0, False, offsets, offsets)
    assert work_shape("aten::_flash_attention_backward", backward, (q, k, k)) == (12, 4, 8, 8, 0, 0, 0)
    dense = q.view(3, 4, 4, 8)
    masked = (dense, dense, dense, dense, None, None, 4, 4, 0.0, 0)
    assert work_shape("aten::_efficient_attention_forward", masked, (dense,)) == (12, 4, 4, 8, 0, 1, 0)


def test_what_works_by_rows_says_how_many_and_how_long():
    x = torch.zeros(4, 6, 8)
    norm = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    for name, phase in (("aten::native_layer_norm", FORWARD), ("aten::native_layer_norm_backward", BACKWARD)):
        assert shapes(norm, x, name, phase) == [(24, 8)]
    images = torch.zeros(2, 3, 8, 8)
    for model, last in (
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 0),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last), 1),
    ):
        batch = images.to(memory_format=torch.channels_last) if last else images
        for name, phase in (("aten::native_batch_norm", FORWARD), ("aten::native_batch_norm_backward", BACKWARD)):
            assert shapes(model, batch, name, phase) == [(128, 4, last)]


def test_softmax_and_reductions_say_whether_their_numbers_are_neighbours():
    x = torch.zeros(4, 6, 8)
    assert work_shape("aten::_softmax", (x, -1, False), x) == (24, 8, 0)
    assert work_shape("aten::_log_softmax", (x, 1, False), x) == (32, 6, 1)
    assert work_shape("aten::sum", (x, [-1]), x.sum(-1)) == (24, 8, 0)
    assert work_shape("aten::sum", (x, [0, 1], True), x.sum((0, 1))) == (8, 24, 1)
    assert work_shape("aten::sum", (x.transpose(1, 2), [-1]), x.sum(1)) == (32, 6, 1)
    assert work_shape("aten::mean", (x,), x.mean()) == (1, 192, 0)
    assert work_shape("aten::linalg_vector_norm", (x, 2.0, [0]), x.norm(dim=0)) == (48, 4, 1)


def test_elementwise_work_says_how_its_tensors_lie():
    x = torch.zeros(4, 6, 8)
    assert work_shape("aten::mul", (x, x), x) == ()
    assert work_shape("aten::mul", (x, 2.0), x) == ()
    assert work_shape("aten::mul", (x, torch.zeros(8)), x) == (UNLIKE,)
    apart = x.transpose(0, 1)
    assert work_shape("aten::clone", (apart,), apart.contiguous()) == (UNLIKE,)
    across = x.transpose(1, 2)
    assert work_shape("aten::clone", (across,), across.contiguous()) == (TRANSPOSED,)
    assert work_shape("aten::clone", (across,), across) == ()
    assert work_shape("aten::cat", ([x, x],), torch.cat([x, x])) == ()
