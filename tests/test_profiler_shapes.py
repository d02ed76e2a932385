"""The sizes that an operation is logged with."""

import torch
from torch import nn

from profiler.events import BACKWARD, FORWARD, LOSS, Op
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
    assert forward == [(2 * 16, 4, 8, 9, 2)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 8, 2, stride=2))
    assert shapes(model, torch.zeros(2, 3, 5, 5), CONV, FORWARD)[1] == (2 * 25, 4, 8, 4, 1)
    backward = shapes(model, torch.zeros(2, 3, 5, 5), "aten::convolution_backward", BACKWARD)
    assert backward == [(2 * 25, 4, 8, 4, 1), (2 * 25, 3, 4, 1, 1)]


def test_attention_says_heads_lengths_and_causality_in_both_directions():
    def forward(model, x):
        x = model(x)
        return nn.functional.scaled_dot_product_attention(x, x[:, :, :16], x[:, :, :16], is_causal=True).sum()

    for name, phase in (("attention", LOSS), ("attention_backward", BACKWARD)):
        assert shapes(nn.Linear(8, 8), torch.zeros(2, 4, 32, 8), name, phase, forward) == [(8, 32, 16, 8, 1, 0)]
