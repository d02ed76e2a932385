"""Recurrent layers: shapes as PyTorch's, memory as cuDNN's."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from profiler.events import BACKWARD, FORWARD, Alloc, Category, Free, Op
from profiler.trace import trace_step

LAYERS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def storages(trace, phase):
    return Counter(e.bytes for e in trace.events if isinstance(e, Alloc) and e.phase == phase)


def gradients(trace):
    return [e.bytes for e in trace.events if isinstance(e, Alloc) and e.category is Category.GRADIENT]


@settings(max_examples=12)
@given(
    kind=st.sampled_from(sorted(LAYERS)),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
    bias=st.booleans(),
    packed=st.booleans(),
    precision=st.sampled_from(["fp32", "amp", "bf16"]),
)
def test_outputs_states_and_gradients_have_the_shapes_of_pytorch(
    kind, layers, bidirectional, batch_first, bias, packed, precision
):
    layer = LAYERS[kind](
        6, 5, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, dropout=0.1 * (layers - 1)
    )
    x = torch.randn(3, 3, 6)
    expected, seen = [], []

    def shapes(module, x):
        if packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=batch_first)
        y, states = module(x)
        tensors = [y.data if packed else y, *(states if kind == "lstm" else [states])]
        return tensors, sum(t.sum() for t in tensors)

    expected = [t.shape for t in shapes(layer, x)[0]]

    def forward(module, x):
        tensors, loss = shapes(module, x)
        seen.extend(t.shape for t in tensors)
        assert {t.dtype for t in tensors} == {torch.float32 if precision == "fp32" else torch.bfloat16}
        return loss

    trace = trace_step(layer, x, forward, precision)
    assert seen == expected
    assert all(p.has_gradient for p in trace.parameters)
    size = 2 if precision == "bf16" else 4
    assert sum(gradients(trace)) == size * sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_flops_are_those_of_the_matrix_products_of_every_step(kind, gates):
    model = LAYERS[kind](8, 16, 2, bidirectional=True)
    trace = trace_step(model, torch.randn(5, 3, 8), lambda m, x: m(x)[0].sum())
    forward = 2 * 5 * 3 * gates * 16 * 2 * ((8 + 16) + (2 * 16 + 16))
    ops = {e.name: e.flops for e in trace.events if isinstance(e, Op) and e.name.startswith("recurrent")}
    assert ops == {"recurrent": forward, "recurrent_backward": 2 * forward}


@pytest.mark.parametrize(
    ("precision", "reserve", "workspace"), [("fp32", 357826816, 277545536), ("bf16", 179568896, 151355968)]
)
def test_reserve_and_workspace_are_those_that_cudnn_asked_for_on_a_gpu(precision, reserve, workspace):
    model = nn.LSTM(1024, 1024, 3, dropout=0.3, batch_first=True)
    trace = trace_step(model, torch.zeros(40, 128, 1024), lambda m, x: m(x)[0].sum(), precision)
    first, second = sorted(storages(trace, FORWARD))[-2:]
    assert first == pytest.approx(workspace, rel=1e-3)
    assert second == pytest.approx(reserve, rel=1e-5)
    assert storages(trace, BACKWARD)[first] == 2


def test_weights_share_one_gradient_and_only_bf16_copies_them_in_forward():
    model = nn.LSTM(64, 64, 2)
    numel = sum(p.numel() for p in model.parameters())

    def traced(precision):
        return trace_step(model, torch.zeros(2, 2, 64), lambda m, x: m(x)[0].sum(), precision)

    assert gradients(traced("fp32")) == [4 * numel]
    assert not storages(traced("fp32"), FORWARD)[4 * numel]
    assert storages(traced("bf16"), FORWARD)[2 * numel] == 1
    assert storages(traced("amp"), FORWARD)[2 * numel] == 1
    assert len(gradients(traced("amp"))) == 8


def test_a_layer_that_is_not_trained_keeps_no_reserve():
    def most(train):
        model = nn.LSTM(64, 64)
        trace = trace_step(model, torch.zeros(50, 8, 64), lambda m, x: m.train(train)(x)[0].sum())
        ended = {e.id for e in trace.events if isinstance(e, Free) and e.phase == FORWARD}
        return max(e.bytes for e in trace.events if isinstance(e, Alloc) and e.phase == FORWARD and e.id not in ended)

    assert most(True) == 50 * 8 * 64 * 4 * 5
    assert most(False) == 50 * 8 * 64 * 4
