"""Sums of gradients that autograd makes in place."""

import torch
from torch import nn

from profiler.accumulation import added_in_place
from profiler.events import BACKWARD, Alloc, Category, Free, Op, Save
from profiler.trace import trace_step


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x + self.second(x).relu())


def alloc(number, category=Category.ACTIVATION):
    return Alloc(number, 512, category, "", BACKWARD)


ADD = Op("aten::add", None, 1536, "float32", "", BACKWARD)


def test_the_gradients_that_meet_in_a_residual_network_are_added_without_another_storage():
    trace = trace_step(Residual(), torch.zeros(64, 8), lambda m, x: m(x).sum())
    names = [e.name if isinstance(e, Op) else e for e in trace.events]
    at = names.index("aten::add", next(i for i, e in enumerate(trace.events) if getattr(e, "phase", "") == BACKWARD))
    assert not isinstance(names[at - 1], Alloc)


def test_a_sum_takes_the_place_and_the_name_of_its_first_summand():
    events = [alloc(1), alloc(2), alloc(3, Category.GRADIENT), ADD, Free(2, BACKWARD), Free(1, BACKWARD), Save(3, "")]
    kept = [alloc(1, Category.GRADIENT), alloc(2), ADD, Free(2, BACKWARD), Save(1, "")]
    assert added_in_place(events, {3: 1}) == kept


def test_sums_of_sums_stay_where_the_first_was():
    first = [alloc(1), alloc(2), alloc(3), ADD, Free(1, BACKWARD)]
    second = [alloc(4), ADD, Free(3, BACKWARD), Free(4, BACKWARD)]
    assert added_in_place([*first, *second], {3: 1, 4: 3}) == [alloc(1), alloc(2), ADD, ADD, Free(1, BACKWARD)]


def test_a_summand_that_is_needed_elsewhere_is_left_alone():
    events = [alloc(1), alloc(2), alloc(3), ADD, Free(2, BACKWARD), ADD, Free(1, BACKWARD)]
    assert added_in_place(events, {3: 1}) == events
