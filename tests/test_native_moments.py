"""Moments in bf16 or 8 bits, compiled: to the last bit what torch's operations make around the compiled update."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import arithmetic
from offload.arithmetic import HOWS, host_update
from offload.masters import over_masters
from offload.moments import code_map, dynamic_sizes, over_moments
from offload.native import NativeUpdate, native_update
from offload.native_moments import TOO_LOW, lines
from offload.optimizer import UpdateSpan
from offload.plan import MomentFormat, OptimizerKind, Precision, StateFormat
from offload.residency import state_bytes
from offload.rules import AdagradStep, AdamStep, AdamWStep, LionStep, MomentumStep, UpdateStep
from offload.state import OptimizerState, carve_state, weight_dtype

pytestmark = pytest.mark.skipif(native_update() is None, reason="no C compiler")

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FEWER = [MomentFormat.BF16, MomentFormat.EIGHT_BIT]
FORMS = [
    StateFormat(precision, kind, moments)
    for precision in (Precision.FP32, Precision.BF16)
    for kind in OptimizerKind
    if kind.moments
    for moments in FEWER
]
FORM_NAMES = [f"{form.precision}-{form.optimizer}-{form.moments}" for form in FORMS]
SIZES = [1, 63, 64, 65, 10_007, 2 * 65_536 + 100]
Numbers = tuple[torch.Tensor, torch.Tensor, OptimizerState]


def compiled() -> NativeUpdate:
    update = native_update()
    assert update is not None
    return update


def numbers(form: StateFormat, masters: torch.Tensor, gradient: torch.Tensor, seed: int) -> Numbers:
    """These masters, whose lower halves are drawn where they are remainders, with a state of zeros."""
    dtype, n = weight_dtype(form.precision), len(masters)
    state = carve_state(torch.zeros(state_bytes(n, form), dtype=torch.uint8), n, form)
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15, generator=torch.Generator().manual_seed(seed))
        state.remainder.masked_fill_(masters.to(dtype) == 0, 0)  # nothing is a little less than zero's bits
    if state.master is not None:
        state.master.copy_(masters)
    return masters.to(dtype), gradient.to(dtype), state


def same(one: Numbers, other: Numbers) -> None:
    """To the last bit; but where a number is NaN, which NaN it is does not count, nor what is below its upper half."""
    lost = one[0].isnan()
    for a, b in zip((one[0], *one[2].tensors()), (other[0], *other[2].tensors()), strict=True):
        if a.dtype == torch.int16:
            a, b = a.masked_fill(lost, 0), b.masked_fill(lost, 0)
        elif a.is_floating_point():
            assert torch.equal(a.isnan(), b.isnan())
            bits = torch.int16 if a.itemsize == 2 else torch.int32
            a, b = (t.masked_fill(t.isnan(), 0).view(bits) for t in (a, b))
        assert torch.equal(a, b)


def both_ways(form: StateFormat, make: Callable[[], Numbers], hows: list[UpdateStep], clip: float = 0.7) -> Numbers:
    """Updates on one thread and on two, held to those in torch's operations around the fp32 update."""
    before = torch.get_num_threads()
    expected, found, on_two = make(), make(), make()
    for how in hows:
        over_moments(compiled())(*expected, how, clip)
        compiled()(*found, how, clip)
        try:
            torch.set_num_threads(2)
            compiled()(*on_two, how, clip)
        finally:
            torch.set_num_threads(before)
        same(found, expected)
        same(on_two, expected)
    return found


def steps(how: UpdateStep) -> list[UpdateStep]:
    """The first three."""
    return [replace(how, step=step) if hasattr(how, "step") else how for step in (1, 2, 3)]


def spread(n: int, seed: int, decades: float) -> torch.Tensor:
    """Of both signs, over so many decades, some of them zero, and blocks that are."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn(n, generator=draw) * 10.0 ** (decades * torch.randn(n, generator=draw)).clamp(-45, 37)
    found[torch.rand(n, generator=draw) < 0.1] = 0
    found[64:128] = 0
    return found


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_updates_of_any_size_are_those_of_the_widened_moments(form: StateFormat, elements: int) -> None:
    both_ways(
        form,
        lambda: numbers(form, spread(elements, 1, 0), spread(elements, 2, 2), 3),
        steps(HOWS[form.optimizer]),
    )


RULES = st.one_of(
    st.builds(
        AdamWStep,
        st.floats(1e-6, 1e-1), st.floats(0, 0.99), st.floats(0, 0.9999), st.sampled_from([0.0, 1e-8, 1e-6]),
        st.floats(0, 0.5), st.integers(1, 10**6),
    ),
    st.builds(
        AdamStep,
        st.floats(1e-6, 1e-1), st.floats(0, 0.99), st.floats(0, 0.9999), st.just(1e-8), st.floats(0, 0.5), st.just(9),
    ),
    st.builds(LionStep, st.floats(1e-6, 1e-1), st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0, 0.5)),
    st.builds(
        MomentumStep,
        st.floats(1e-6, 1e-1), st.floats(0, 0.99), st.floats(0, 1), st.booleans(), st.floats(0, 0.5), st.integers(1, 3),
    ),
    st.builds(
        AdagradStep,
        st.floats(1e-6, 1e-1), st.floats(0, 1), st.floats(0, 1e-3), st.floats(0, 1), st.floats(0, 0.5),
        st.integers(1, 3),
    ),
)  # fmt: skip
KINDS = {
    AdamWStep: OptimizerKind.ADAMW,
    AdamStep: OptimizerKind.ADAM,
    LionStep: OptimizerKind.LION,
    MomentumStep: OptimizerKind.SGD_MOMENTUM,
    AdagradStep: OptimizerKind.ADAGRAD,
}


@settings(max_examples=150, deadline=None)
@given(
    RULES, st.sampled_from([Precision.FP32, Precision.BF16]), st.sampled_from(FEWER), st.integers(1, 300),
    st.integers(0, 2**31), st.floats(0, 25), st.floats(0, 25), st.floats(1e-3, 2),
)  # fmt: skip
def test_extreme_numbers_make_no_difference(
    how: UpdateStep, precision: Precision, moments: MomentFormat, elements: int,
    seed: int, masters: float, gradients: float, clip: float,
) -> None:  # fmt: skip
    """Subnormal ones, and such that overflow: blocks of any scale."""
    form = StateFormat(precision, KINDS[type(how)], moments)
    both_ways(
        form,
        lambda: numbers(form, spread(elements, seed, masters), spread(elements, seed + 1, gradients), seed),
        [how, how],
        clip,
    )


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 199), st.sampled_from([0x7FC00000, 0x7FFF0000, -1, 0x7F800000, -0x800000]))),
    st.lists(st.tuples(st.integers(0, 199), st.sampled_from([0x7FC00000, 0x7FFF0000, -1, 0x7F800000, -0x800000]))),
)
def test_what_is_not_finite_is_stored_alike(form: StateFormat, in_gradients: list, in_masters: list) -> None:
    def make() -> Numbers:
        gradient, masters = spread(200, 1, 1), spread(200, 2, 0)
        for tensor, places in ((gradient, in_gradients), (masters, in_masters)):
            for place, bits in places:
                tensor.view(torch.int32)[place] = bits
        return numbers(form, masters, gradient, 3)

    both_ways(form, make, steps(HOWS[form.optimizer]))


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_every_code_is_widened_alike(form: StateFormat) -> None:
    """That of no number too."""
    n = 256 * 64

    def make() -> Numbers:
        found = numbers(form, spread(n, 1, 0), spread(n, 2, 1), 3)
        draw = torch.Generator().manual_seed(4)
        for moment in found[2].moments:
            if moment.dtype == torch.bfloat16:
                moment.uniform_(generator=draw)
            else:
                moment.view(torch.uint8).copy_(torch.arange(n) % 256)
        for scale in found[2].scales:
            scale.copy_(spread(len(scale), 5, 15).abs())
        return found

    both_ways(form, make, steps(HOWS[form.optimizer])[1:])


def around(sizes: torch.Tensor) -> torch.Tensor:
    """The numbers of a map, neighbours of each, and what lies a little above it; 1 leads every block."""
    bits = sizes.view(torch.int32)[:, None] + torch.arange(-4, 5)
    near = bits.flatten().clamp(0, 0x3F800000).to(torch.int32).view(torch.float32)
    above = sizes[:-1, None] + sizes.diff()[:, None] * torch.linspace(0, TOO_LOW, 9)
    every = torch.cat([near, above.flatten()])
    blocks = torch.nn.functional.pad(every, (0, -len(every) % 63)).view(-1, 63)
    return torch.cat([torch.ones(len(blocks), 1), blocks], 1).flatten()


@pytest.mark.parametrize("sign", [1, -1])
def test_next_to_the_numbers_of_the_maps_both_find_the_same_neighbours(sign: int) -> None:
    signed = sign * around(torch.tensor(dynamic_sizes(signed=True)))
    form = StateFormat(Precision.FP32, OptimizerKind.SGD_MOMENTUM, MomentFormat.EIGHT_BIT)
    whole = MomentumStep(0.1, 0.0, 0.0, nesterov=False, weight_decay=0.0, step=2)  # its buffer is the gradient
    for _ in range(20):  # of what is a little above a number few are rounded up
        masters = torch.randn(len(signed))
        found = both_ways(form, lambda masters=masters: numbers(form, masters.clone(), signed, 0), [whole], 1.0)
        assert len(found[2].moments[0].unique()) == 128
    squares = around(torch.tensor(dynamic_sizes(signed=False))).sqrt() * sign
    form = replace(form, optimizer=OptimizerKind.ADAGRAD)
    sums = AdagradStep(0.1, 0.0, 1e-10, 0.0, 0.0, step=1)  # of one square
    for _ in range(20):
        masters = torch.randn(len(squares))
        found = both_ways(form, lambda masters=masters: numbers(form, masters.clone(), squares, 0), [sums], 1.0)
        assert len(found[2].moments[0].unique()) == 256


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_lines_rounded_down_are_the_index_or_one_less(dtype: torch.dtype) -> None:
    known, last = code_map(dtype, CPU).sizes, len(code_map(dtype, CPU).sizes) - 2
    some = torch.arange(0, 0x3F800001, 997, dtype=torch.int32).view(torch.float32)
    ratios = torch.cat([some, around(known), known[:-1] + known.diff() / 2])
    index = (torch.bucketize(ratios, known, right=True) - 1).clamp(0, last)
    single = torch.tensor(lines(signed=dtype == torch.int8))
    lowest = torch.full_like(ratios, 256.0)
    for slope, offset in single:
        lowest = torch.minimum(lowest, (ratios.double() * slope.double() + offset.double()).float())
    less = index - lowest.clamp(max=last).to(torch.int64)
    assert sorted(less.unique().tolist()) == [0, 1]


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_an_update_in_pieces_is_the_update_of_all(form: StateFormat) -> None:
    whole, cut = (numbers(form, spread(5000, 1, 0), spread(5000, 2, 1), 3) for _ in range(2))
    for how in steps(HOWS[form.optimizer]):
        compiled()(*whole, how, 0.7)
        for a, b in pairwise([0, 64, 192, 1024, 4032, 5000]):
            compiled()(cut[0][a:b], cut[1][a:b], cut[2].span(a, b), how, 0.7)
        same(whole, cut)
    assert all(moment.view(torch.uint8).any() for moment in whole[2].moments)


@pytest.mark.parametrize("form", FORMS, ids=FORM_NAMES)
def test_nothing_behind_the_last_element_is_touched(form: StateFormat) -> None:
    weight, gradient, state = numbers(form, torch.ones(128), torch.ones(128), 0)
    compiled()(weight[:100], gradient[:100], state.span(0, 100), HOWS[form.optimizer], 1.0)
    assert (weight[100:] == 1).all()
    assert not any(moment[100:].any() for moment in state.moments)
    assert all(moment[:100].view(torch.uint8).any() for moment in state.moments)


@pytest.mark.parametrize("moments", FEWER)
def test_masters_beside_fp16_weights_are_updated_alike(moments: MomentFormat) -> None:
    form = StateFormat(Precision.FP16, OptimizerKind.ADAMW, moments)
    found, expected = (numbers(form, spread(10_007, 1, 0), spread(10_007, 2, 0.5), 3) for _ in range(2))
    for how in steps(HOWS[form.optimizer]):
        over_masters(compiled())(*found, how, 0.7)
        over_masters(over_moments(compiled()))(*expected, how, 0.7)
        same(found, expected)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("form", FORMS[:10], ids=FORM_NAMES[:10])
def test_beside_a_gpu_it_is_used_and_where_the_cpu_computes_it_is_not(form: StateFormat, precision: Precision) -> None:
    form = replace(form, precision=precision)
    assert host_update(CUDA, form) is compiled()
    assert host_update(CPU, form) is not compiled()


def test_where_a_bit_differs_moments_are_widened_around_the_compiled_update(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(
        weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, how: UpdateStep, clip: float | torch.Tensor
    ) -> None:
        compiled()(weight, gradient, state, how, clip)
        if state.moments[0].dtype == torch.int8:
            state.moments[0][-1] += 1

    def failing(
        weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, how: UpdateStep, clip: float | torch.Tensor
    ) -> None:
        if state.moments[0].dtype == torch.int8:
            raise AttributeError("no such function")
        compiled()(weight, gradient, state, how, clip)

    form = StateFormat(Precision.BF16, OptimizerKind.ADAMW, MomentFormat.EIGHT_BIT)
    wrongs: list[UpdateSpan] = [off, failing]
    for wrong in wrongs:
        monkeypatch.setattr(arithmetic, "native_update", lambda wrong=wrong: wrong)
        used = host_update(CUDA, form)
        assert used is not wrong
        found, expected = (numbers(form, spread(300, 1, 0), spread(300, 2, 1), 3) for _ in range(2))
        used(*found, HOWS[form.optimizer], 0.7)
        over_moments(compiled())(*expected, HOWS[form.optimizer], 0.7)
        same(found, expected)
        assert host_update(CUDA, replace(form, moments=MomentFormat.BF16)) is wrong
