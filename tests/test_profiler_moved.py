"""Bytes read and written, against what a kernel that touches each number once has to move."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profiler.events import BACKWARD, FORWARD, Op
from profiler.moved import moved_bytes, traffic
from profiler.trace import trace_step

ROWS, WIDTH = 8, 16
ONE = 4 * ROWS * WIDTH
"""Bytes of the tensor that most operations here work on."""


class Moved(TorchDispatchMode):
    """Bytes moved by what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = (
            [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), out)
        )
        self.bytes += moved_bytes(func, args, read, written)
        return out


def moved(run) -> int:
    with Moved() as counter:
        run()
    return counter.bytes


@pytest.mark.parametrize(
    ("size", "run"),
    [
        (0, lambda x, _: x.view(-1).unsqueeze(0).expand(3, -1).detach()),
        (0, lambda x, _: torch.ops.aten._unsafe_view(x, [WIDTH, ROWS])),
        (0, lambda x, _: x.transpose_(0, 1)),
        (0, lambda x, _: torch.empty_like(x)),
        (ONE, lambda x, _: x.zero_()),
        (ONE, lambda x, _: x.fill_(1.0)),
        (ONE, lambda x, _: torch.zeros_like(x)),
        (ONE, lambda x, _: x.normal_()),
        (ONE, lambda x, _: x.bernoulli_(0.5)),
        (2 * ONE, lambda x, _: x.clone()),
        (2 * ONE, lambda x, y: x.copy_(y)),
        (ONE + ONE // 2, lambda x, _: x.to(torch.bfloat16)),
        (2 * ONE, lambda x, _: x.mul_(2.0)),
        (3 * ONE, lambda x, y: x.add_(y)),
        (3 * ONE, lambda x, y: x + y),
        (2 * ONE, lambda x, _: x * x),
        (ONE + ONE // ROWS + ONE, lambda x, y: x + y[0]),
        (ONE // ROWS + ONE, lambda _, y: y[:1].expand(ROWS, WIDTH).contiguous()),
        (3 * ONE, lambda x, y: torch.add(x, y, out=torch.empty(0).resize_(ROWS, WIDTH))),
        (ONE + ONE // 2, lambda x, _: x[:, :8] * x[:, 8:]),
        (4 * ONE, lambda x, y: torch._foreach_mul_([x, y], 2.0)),
        (4 * ONE, lambda x, y: torch.cat([x, y])),
        (2 * ONE + ONE // 4, lambda x, _: torch.native_dropout(x, 0.5, True)),
        (3 * ONE + 4 * ONE, lambda x, y: x.addcmul(x * y, y)),
    ],
)
def test_an_operation_moves_what_it_reads_and_writes_once(size, run):
    x, y = torch.ones(ROWS, WIDTH), torch.ones(ROWS, WIDTH)
    assert moved(lambda: run(x, y)) == size


INDEX = torch.tensor([3, 3, 0])
CHOSEN = 3 * WIDTH * 4
"""Bytes of the three rows that are chosen."""


@pytest.mark.parametrize(
    ("size", "run"),
    [
        (2 * CHOSEN + INDEX.nbytes, lambda x: functional.embedding(INDEX, x)),
        (2 * CHOSEN + INDEX.nbytes, lambda x: x[INDEX]),
        (2 * CHOSEN + INDEX.nbytes, lambda x: x.index_select(0, INDEX)),
        (2 * 12 + INDEX.nbytes, lambda x: x.gather(0, INDEX[None])),
    ],
)
def test_choosing_rows_reads_as_much_as_it_writes(size, run):
    x = torch.ones(ROWS, WIDTH)
    assert moved(lambda: run(x)) == size


@pytest.mark.parametrize(
    ("size", "run"),
    [
        (3 * CHOSEN, lambda x, rows: x.index_add_(0, INDEX, rows)),
        (2 * CHOSEN, lambda x, rows: x.index_copy_(0, INDEX, rows)),
        (2 * CHOSEN, lambda x, rows: x.index_put_((INDEX,), rows)),
        (3 * CHOSEN, lambda x, rows: x.index_put_((INDEX,), rows, accumulate=True)),
        # with a result of its own, the whole is copied first
        (3 * CHOSEN + 2 * ONE, lambda x, rows: x.index_add(0, INDEX, rows)),
    ],
)
def test_scattering_rows_touches_their_places_only(size, run):
    x, rows = torch.ones(ROWS, WIDTH), torch.ones(3, WIDTH)
    assert moved(lambda: run(x, rows)) == size + INDEX.nbytes


def test_gradients_of_chosen_rows_are_zeros_and_what_is_added_to_them():
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    looked_up = functional.embedding(INDEX, x)
    gradient = torch.ones_like(looked_up)
    assert moved(lambda: torch.autograd.grad(looked_up, x, gradient)) == ONE + CHOSEN + INDEX.nbytes
    indexed = x[INDEX]
    assert moved(lambda: torch.autograd.grad(indexed, x, gradient)) == ONE + 3 * CHOSEN + INDEX.nbytes


def test_a_likelihood_reads_one_number_a_row_and_its_gradient_is_a_fill():
    logits, target = torch.zeros(ROWS, WIDTH, requires_grad=True), torch.zeros(ROWS, dtype=torch.int64)
    small = 64  # the loss, the sum of weights
    with Moved() as forward:
        loss = functional.nll_loss(logits, target)
    assert forward.bytes == pytest.approx(ROWS * 4 + target.nbytes, abs=small)
    gradient = torch.ones(())
    assert moved(lambda: torch.autograd.grad(loss, logits, gradient)) == pytest.approx(ONE + target.nbytes, abs=small)


def test_pooling_backward_does_not_read_the_input():
    x = torch.rand(1, 2, 8, 8, requires_grad=True)
    out, indices = functional.max_pool2d(x, 2, return_indices=True)
    gradient = torch.ones_like(out)
    expected = gradient.nbytes + indices.nbytes + x.nbytes
    assert moved(lambda: torch.autograd.grad(out, x, gradient)) == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6))
def test_of_a_storage_no_more_is_moved_than_it_holds(parts):
    storage = torch.zeros(8)
    views = [storage[start : start + length] for start, length in parts]
    touched = 4 * sum(length for _, length in parts)
    assert traffic(views) == min(touched, storage.nbytes)
    assert traffic([*views, *views]) == traffic(views)
    assert traffic([*views, torch.zeros(5)]) == traffic(views) + 20


def test_a_traced_linear_layer_moves_its_three_matrices_in_each_product():
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))
    trace = trace_step(model, torch.zeros(5, 8), lambda m, x: m(x).sum())
    found = {
        p: [e.bytes for e in trace.events if isinstance(e, Op) and e.name == "aten::mm" and e.phase == p]
        for p in (FORWARD, BACKWARD)
    }
    first, second = (4 * (5 * a + a * b + 5 * b) for a, b in ((8, 16), (16, 4)))
    assert found[FORWARD] == [first, second]
    # The gradient of a sum is one number, expanded.
    expanded = second - 4 * (5 * 4 - 1)
    assert found[BACKWARD] == [expanded, expanded, first]
