"""What optimizers hold, against the real ones on the CPU."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from profiler.events import Alloc, Category, Free
from profiler.optimizers import OPTIMIZERS, clip_events, optimizer_events
from profiler.trace import TracedParameter
from tests.profiler_models import really_allocated

SHAPES = ((300, 700), (700,), (64, 32, 3, 3), (1000, 500), (512, 512))
REAL = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-forloop": lambda p: torch.optim.AdamW(p, foreach=False),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, foreach=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, momentum=0.9, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}
SMALL = 64 << 10
"""Scalars and the like: on the CPU some are kept elsewhere, or computed otherwise."""


def traced(shapes, dtype="float32"):
    sizes = [torch.Size(shape).numel() * 4 for shape in shapes]
    return [
        TracedParameter(f"layer.{i}", tuple(shape), dtype, size, True)
        for i, (shape, size) in enumerate(zip(shapes, sizes, strict=True))
    ]


def balance(events):
    """(bytes left, peak bytes)"""
    sizes, held, peak = {}, 0, 0
    for event in events:
        if isinstance(event, Alloc):
            sizes[event.id] = event.bytes
            held += event.bytes
        else:
            held -= sizes.pop(event.id)
        peak = max(peak, held)
    return held, peak


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", REAL)
def test_a_step_holds_what_the_real_optimizer_does(name, first, tmp_path):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = REAL[name](parameters)
    for p in parameters:
        p.grad = torch.randn_like(p)
    if not first:
        optimizer.step()
    left, peak = really_allocated(lambda: optimizer.step(), tmp_path)
    ours = balance(optimizer_events(name, traced(SHAPES), first, itertools.count().__next__))
    assert abs(ours[0] - left) <= SMALL
    assert abs(ours[1] - peak) <= SMALL


def test_a_lion_of_the_usual_kind_holds_what_is_said(tmp_path):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    momenta = [torch.zeros_like(p) for p in parameters]
    for p in parameters:
        p.grad = torch.randn_like(p)

    def step():
        with torch.no_grad():
            for p, momentum in zip(parameters, momenta, strict=True):
                update = momentum.clone().mul_(0.9).add(p.grad, alpha=0.1).sign_()
                p.add_(update, alpha=-1e-4)
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)

    _, peak = really_allocated(step, tmp_path)
    assert abs(balance(optimizer_events("lion", traced(SHAPES), False, itertools.count().__next__))[1] - peak) <= SMALL


@settings(deadline=None)
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(st.lists(st.integers(1, 300), min_size=0, max_size=4), min_size=1, max_size=8),
)
def test_state_is_made_once_and_nothing_else_stays(name, shapes):
    ids = itertools.count()
    parameters = traced(shapes)
    for first in (True, False):
        events = list(optimizer_events(name, parameters, first, ids.__next__))
        state = sum(sum(OPTIMIZERS[name].state(p)) for p in parameters)
        assert balance(events)[0] == (state if first else 0)
        ended = {e.id for e in events if isinstance(e, Free)}
        for e in events:
            if isinstance(e, Alloc):
                assert e.category is (Category.UPDATE if e.id in ended else Category.OPTIMIZER)
        assert len({e.id for e in events}) == sum(isinstance(e, Alloc) for e in events)
    assert balance(clip_events(parameters, ids.__next__))[0] == 0


def test_8_bit_state_is_a_quarter_with_a_scale_for_each_block():
    big, small = traced([(1024, 1024), (64, 63)])
    (elements, size) = (1 << 20, 8 * 64 * 63)
    assert sum(OPTIMIZERS["adamw-8bit"].state(big)) == 2 * elements + 2 * 4 * elements // 256
    assert sum(OPTIMIZERS["adamw-8bit"].state(small)) == size
    events = list(optimizer_events("adamw-8bit", [big], False, itertools.count().__next__))
    assert not [e for e in events if isinstance(e, Free)]
