"""FLOP formulas against counts made by hand and against convolutions written as matrix products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from profiler.events import BACKWARD, FORWARD, Op
from profiler.formulas import attention_flops, flops_of, register
from profiler.trace import trace_step

aten = torch.ops.aten


def conv_flops_by_positions(conv: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Two for every (output element, weight that reaches it), padding included."""
    transposed = isinstance(conv, nn.ConvTranspose2d)
    positions = x if transposed else y
    per_channel = conv.weight[0].numel()
    return 2 * positions.shape[0] * positions[0, 0].numel() * conv.weight.shape[0] * per_channel


@settings(deadline=None, max_examples=15)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 3]), st.sampled_from([1, 2]), st.booleans(), st.booleans())
def test_convolution_and_its_backward_count_every_weight_at_every_position(groups, size, stride, transposed, deep):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(4, 8, size, stride=stride, padding=size // 2, groups=groups)
    x = torch.randn(2, 4, 8, 8, requires_grad=deep)
    expected = conv_flops_by_positions(conv, x, conv(x))
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), conv) if deep else conv
    trace = trace_step(model, x.detach(), lambda m, b: m(b).sum())
    module = "1" if deep else ""
    counted = {
        phase: sum(e.flops or 0 for e in trace.events if isinstance(e, Op) and e.phase == phase and e.module == module)
        for phase in (FORWARD, BACKWARD)
    }
    # Without a layer below, the input's gradient is not asked for.
    assert counted == {FORWARD: expected, BACKWARD: expected * (2 if deep else 1)}


def test_a_second_formula_for_an_operation_is_refused():
    with pytest.raises(ValueError, match="aten::mm has a formula already"):
        register("aten::mm")(lambda: 0)


def test_views_factories_and_copies_cost_nothing_and_the_rest_is_unknown():
    x = torch.ones(2, 3)
    assert flops_of(aten.t.default, (x,), {}, x.t()) == 0
    assert flops_of(aten.zeros.default, ([2],), {}, torch.zeros(2)) == 0
    assert flops_of(aten.clone.default, (x,), {}, x.clone()) == 0
    assert flops_of(aten.mm.default, (x, x.t()), {}, x @ x.t()) == 2 * 2 * 3 * 2
    assert flops_of(aten.silu.default, (x,), {}, x) is None


def test_attention_counts_scores_and_values_with_their_own_widths():
    query, key = (2, 4, 16, 8), (2, 2, 32, 8)
    assert attention_flops(query, key, 8, causal=False) == 4 * 2 * 4 * 16 * 32 * 8
    assert attention_flops(query, key, 24, causal=True) == 2 * 4 * 16 * 32 * (8 + 24)
