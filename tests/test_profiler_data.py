"""Forward passes that ask for numbers: those that follow from the batch are right, others are assumed and stated."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from profiler import ProfilerError, profile_model
from profiler.known import KnownValues
from profiler.obliging import obliging_fakes
from profiler.packing import sizes_of_steps

WIDTH = 4
ROWS = torch.tensor([[1, 2, 3], [4, 0, 0]])
"""Lengths 3 and 1, four tokens that are not 0, the largest 4."""


class Probe(nn.Module):
    """``what(probe, batch)`` is its forward; ``layer`` turns rows of 4 numbers into rows of 4."""

    def __init__(self, what: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.what = what
        self.embed, self.layer = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rnn = nn.LSTM(WIDTH, 2 * WIDTH, batch_first=True)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.what(self, batch)


def profiled(what: Callable[..., torch.Tensor], batch: Any = ROWS):
    return profile_model(Probe(what), batch, loss=lambda outputs, _: outputs.float().mean(), batch_size=1)


def flops_of(profile, path: str) -> int:
    return next(layer.forward_flops for layer in profile.layers if layer.path == path)


def rows_of_linear(profile) -> int:
    return flops_of(profile, "layer") // (2 * WIDTH * WIDTH)


KNOWN: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "the longest of the lengths": (lambda m, x: m.layer(m.embed(x)[:, : max((x > 0).sum(1).tolist())]), 6),
    "a slice up to a number": (lambda m, x: m.layer(m.embed(x)[:, : int(x[0, 1])]), 4),
    "a boolean mask": (lambda m, x: m.layer(m.embed(x)[x > 0]), 4),
    "masked_select": (lambda m, x: m.layer(m.embed(x).masked_select((x > 0)[..., None]).view(-1, WIDTH)), 4),
    "nonzero": (lambda m, x: m.layer(m.embed(x.flatten()[x.flatten().nonzero().squeeze(1)])), 4),
    "where of one argument": (lambda m, x: m.layer(m.embed(torch.where(x > 0)[0])), 4),
    "unique": (lambda m, x: m.layer(m.embed(x.unique())), 5),
    "repeat_interleave": (lambda m, x: m.layer(m.embed(x[0]).repeat_interleave(x[0], 0)), 6),
    "bincount": (lambda m, x: m.layer(m.embed(x.flatten().bincount())), 5),
    "a tensor changed in place": (lambda m, x: (x.masked_fill_(x == 4, 1), m.layer(m.embed(x[:, : x.max()])))[1], 6),
    "numpy": (lambda m, x: m.layer(m.embed(x)[:, : int(np.asarray(x).max()) - 2]), 4),
    "a tensor made in forward": (lambda m, x: m.layer(m.embed(x)[: torch.tensor([1, 2]).max() - 1]), 3),
}


@pytest.mark.parametrize("what", KNOWN)
def test_what_follows_from_the_batch_is_known(what):
    forward, rows = KNOWN[what]
    real = Probe(forward)
    inputs = []
    real.layer.register_forward_hook(lambda _, args, __: inputs.append(args[0].numel() // WIDTH))
    real(ROWS.clone())
    assert inputs == [rows]
    profile = profiled(forward)
    assert rows_of_linear(profile) == rows
    assert profile.assumptions == ()


ASSUMED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "a value": (lambda m, x: m.layer(m.embed(x)) if m.embed(x).sum() > 0 else x, "taken to be True"),
    "allclose": (lambda m, x: m.layer(m.embed(x)) if m.embed(x).allclose(m.embed(x)) else x, "taken to be True"),
    "a mask": (lambda m, x: m.layer(m.embed(x)[m.embed(x).sum(-1) > 0]), "taken to select everything"),
    "unique": (lambda m, x: m.layer(m.embed(m.embed(x).argmax(-1).unique())), "taken to be different"),
    "repeats": (lambda m, x: m.layer(m.embed(x)[0].repeat_interleave(m.embed(x[0]).argmax(-1), 0)), "repeated once"),
    "counts": (lambda m, x: m.layer(m.embed(m.embed(x).argmax(-1).flatten().bincount(minlength=7))), "7 bins"),
    "parts": (lambda m, x: m.layer(m.embed(x[0]).split(m.embed(x[0]).argmax(-1).tolist()[:2])[0]), "to be equal"),
    "numbers for NumPy": (lambda m, x: m.layer(m.embed(x) + float(m.embed(x).detach().numpy().max())), "to be zeros"),
    "a formatted number": (lambda m, x: (f"{m.embed(x).mean():.3f}", m.layer(m.embed(x)))[1], "taken to be 1.0"),
}


@pytest.mark.parametrize("what", ASSUMED)
def test_what_depends_on_weights_is_assumed_and_stated(what):
    forward, sentence = ASSUMED[what]
    profile = profiled(forward)
    assert any(sentence in assumption for assumption in profile.assumptions)
    assert profile.forward_flops > 0


def test_a_loop_that_ends_when_data_says_so_is_refused_with_advice():
    def forward(m, x):
        y = m.layer(m.embed(x))
        while y.norm() > 1:
            y = y / 2
        return y

    with pytest.raises(ProfilerError, match="largest number of rounds"):
        profiled(forward)


FINE: dict[str, Callable[..., torch.Tensor]] = {
    "masked_scatter": lambda m, x: m.layer(m.embed(x).masked_scatter((x > 0)[..., None], torch.zeros(24))),
    "topk with a k from the batch": lambda m, x: m.layer(m.embed(x)).topk(int(x[0, 1]))[0],
    "one_hot": lambda m, x: m.layer(nn.functional.one_hot(x, WIDTH).float()),
    "Fourier transforms": lambda m, x: torch.fft.irfft(torch.fft.rfft(m.layer(m.embed(x))) * torch.ones(3) * 1j),
    "rotation by complex numbers": lambda m, x: torch.view_as_real(
        torch.view_as_complex(m.layer(m.embed(x)).unflatten(-1, (2, 2))) * torch.polar(torch.ones(2), torch.ones(2))
    ),
    "eigenvalues": lambda m, x: torch.linalg.eigvals(m.layer(m.embed(x))[0].t() @ m.embed(x)[0]).real,
    "vmap": lambda m, x: torch.vmap(m.layer)(m.embed(x)),
    "cuda by name": lambda m, x: m.layer(m.embed(x).to("cuda").cuda() + torch.zeros(WIDTH, device="cuda")),
    "a compiled function": lambda m, x: torch.compile(torch.sin)(m.layer(m.embed(x))),
    "a copy that leaves the graph": lambda m, x: m.layer(m.embed(x).clone().detach().requires_grad_()),
}


@pytest.mark.parametrize("what", FINE)
def test_unusual_forward_passes_trace(what):
    profile = profiled(FINE[what])
    assert profile.forward_flops > 0
    assert profile.assumptions == ()


@pytest.mark.parametrize("lengths", ["known", "unknown"])
def test_packed_sequences_take_the_rows_that_are_no_padding(lengths):
    def forward(m, x):
        x = m.embed(x)
        count = (ROWS > 0).sum(1) if lengths == "known" else (x.sum(-1) > 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, count.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = m.rnn(packed)
        return nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True)[0]

    profile = profiled(forward)
    rows = 4 if lengths == "known" else ROWS.numel()
    assert flops_of(profile, "rnn") == 2 * rows * 4 * 2 * WIDTH * (WIDTH + 2 * WIDTH)
    assert ["as long as the longest" in s for s in profile.assumptions] == ([] if lengths == "known" else [True])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_steps_of_packed_sequences_are_those_of_torch(lengths, batch_first):
    ordered = torch.tensor(sorted(lengths, reverse=True))
    padded = torch.zeros(len(lengths), int(ordered[0]), 2)
    padded = padded if batch_first else padded.transpose(0, 1)
    expected = nn.utils.rnn.pack_padded_sequence(padded, ordered, batch_first=batch_first).batch_sizes
    assert torch.equal(sizes_of_steps(padded, ordered, batch_first), expected)


def test_connectionist_loss_keeps_the_states_of_the_longest_target():
    steps, targets = 12, torch.tensor([[1, 2, 3], [1, 0, 0]])

    def forward(m, x):
        scores = m.layer(m.embed(x.new_zeros(steps, 2))).log_softmax(-1)
        return nn.functional.ctc_loss(scores, targets, torch.full((2,), steps), (targets > 0).sum(1))

    profile = profiled(forward)
    assert profile.assumptions == ()
    assert profile.layers[0].activation_bytes >= 2 * steps * (2 * 3 + 1) * 4


def test_writing_what_is_unknown_makes_a_tensor_and_its_views_unknown():
    mode, values = FakeTensorMode(), KnownValues()
    with mode:
        fake, unknown = torch.zeros(4, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        view = fake[:2]
    values.tell(fake, torch.arange(4))
    values.follow(torch.ops.aten.slice.Tensor, (fake, 0, 0, 2), {}, view)
    assert values.of(view).tolist() == [0, 1]
    values.follow(torch.ops.aten.copy_.default, (view, unknown), {}, view)
    assert values.of(fake) is None


def test_fake_tensors_are_as_strict_as_ever_afterwards():
    before = dict(vars(FakeTensor))
    with obliging_fakes(KnownValues(), print):
        assert "numpy" in vars(FakeTensor)
    assert dict(vars(FakeTensor)) == before


@torch.library.custom_op("memplan_tests::twice", mutates_args=())
def twice(rows: torch.Tensor) -> torch.Tensor:
    return rows * 2


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Linear(WIDTH, WIDTH))


REFUSED: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "an operation without a fake kernel": (
        lambda m, x: m.layer(twice(m.embed(x))),
        r'memplan_tests::twice has no fake kernel.*\n    @torch.library.register_fake\("memplan_tests::twice"\)\n'
        r"    def _\(rows\): return torch.empty_like\(rows\)",
    ),
    "a compiled extension": (
        lambda m, x: (m.embed(x).data_ptr(), m.layer(m.embed(x)))[1],
        "asks for the memory of a tensor.*torch.library.custom_op",
    ),
    "a sparse tensor": (lambda m, x: torch.sparse.mm(torch.eye(4).to_sparse(), m.embed(x)[0].t()), "sparse_coo"),
    "a nested tensor": (
        lambda m, x: m.layer(torch.nested.nested_tensor(list(m.embed(x)))),
        "nested tensors can not be traced; give the batch as padded tensors",
    ),
    "a module that is cast": (lambda m, x: m.half().layer(m.embed(x)), r"do that in build_model\(\)"),
    "no gradient": (lambda m, x: m.layer(m.embed(x)).detach(), "look for no_grad"),
    "an error after an assumption": (
        lambda m, x: m.layer(m.embed(x)[m.embed(x).sum(-1) > 0]).view(4, WIDTH),
        "is invalid for input of size 24; before that, a mask in the model .* is taken to select everything",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_be_traced_ends_in_a_sentence(what):
    forward, sentence = REFUSED[what]
    with pytest.raises(ProfilerError, match=sentence):
        profiled(forward)


def test_hooks_that_forward_adds_are_gone_after_the_trace():
    def forward(m, x):
        m.layer.register_forward_hook(lambda *_: None)
        return m.layer(m.embed(x))

    model = Probe(forward)
    profile_model(model, ROWS, loss=lambda outputs, _: outputs.mean())
    assert not model.layer._forward_hooks
