"""Moments in fewer bits: what is stored is near, right on average, and the same however the update is cut."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.arithmetic import HOWS, device_update, host_update
from offload.masters import over_masters
from offload.moments import dequantized, dynamic_sizes, move, over_moments
from offload.optimizer import update_in_torch
from offload.plan import MomentFormat, OptimizerKind, Precision, StateFormat
from offload.residency import state_bytes
from offload.rules import AdamWStep
from offload.state import OptimizerState, carve_state, weight_dtype

CPU = torch.device("cpu")
FEWER = [MomentFormat.BF16, MomentFormat.EIGHT_BIT]
WITH_MOMENTS = [kind for kind in OptimizerKind if kind.moments]
BLOCK = 64


def state_of(elements: int, form: StateFormat) -> OptimizerState:
    return carve_state(torch.zeros(state_bytes(elements, form), dtype=torch.uint8), elements, form)


def wide_state(*moments: torch.Tensor) -> OptimizerState:
    return OptimizerState(moments, None)


def kept(moments: MomentFormat, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Moments as AdamW's state has them after they were stored, in fp32."""
    form = StateFormat(Precision.FP32, OptimizerKind.ADAMW, moments)
    state = state_of(len(tensors[0]), form)
    move(state, wide_state(*tensors))
    found = wide_state(*(torch.full_like(t, math.nan) for t in tensors))
    move(found, state)
    return list(found.moments)


def decades(values: list[float], decade: int) -> list[float]:
    return [v for v in values if 10.0 ** -(decade + 1) < v < 10.0**-decade]


def test_the_map_is_dynamic_tree_quantization_with_an_exact_largest_number() -> None:
    signed, squares = dynamic_sizes(signed=True), dynamic_sizes(signed=False)
    assert (len(signed), len(squares)) == (128, 256)
    assert signed == sorted(set(signed))
    assert squares == sorted(set(squares))
    assert signed[0] == 0 < squares[0]
    assert signed[-1] == squares[-1] == 1
    assert [len(decades(signed, e)) for e in range(7)] == [63, 32, 16, 8, 4, 2, 1]  # 1 is the 64th
    assert [len(decades(squares, e)) for e in range(8)] == [128, 64, 32, 16, 8, 4, 2, 1]
    for sizes, parts in ((signed[:-1], 64), (squares[:-1], 128)):
        assert [b - a for a, b in pairwise(decades(sizes, 0))] == pytest.approx(
            [0.9 / parts] * (len(decades(sizes, 0)) - 1)
        )


@given(st.integers(1, 200), st.integers(0, 2**31), st.floats(-30, 30), st.floats(0, 8))
def test_what_is_stored_is_as_near_as_the_formats_numbers_are(
    elements: int, seed: int, size: float, spread: float
) -> None:
    draw = torch.Generator().manual_seed(seed)
    scale = 10.0 ** (size + spread * torch.randn(elements, generator=draw).clamp(-1, 1))
    m = torch.randn(elements, generator=draw) * scale.clamp(1e-37, 1e37)
    v = m.abs()
    for found, moment in zip(kept(MomentFormat.BF16, m, v), (m, v), strict=True):
        assert ((found - moment).abs() <= moment.abs() * 2.0**-8).all()
    found_m, found_v = kept(MomentFormat.EIGHT_BIT, m, v)
    for start in range(0, elements, BLOCK):
        part = slice(start, start + BLOCK)
        largest = v[part].max()
        assert found_m[part].abs().max() == found_v[part].max() == largest
        for found, moment, sizes in (
            (found_m[part].abs(), v[part], dynamic_sizes(signed=True)),
            (found_v[part], v[part], dynamic_sizes(signed=False)),
        ):
            known = torch.tensor(sizes, dtype=torch.float64)
            ratio = (moment.double() / largest)[:, None]
            nearest = (known - ratio).abs().min(1).values
            assert ((found.double() / largest - ratio[:, 0]).abs() <= nearest + 1e-6 * ratio[:, 0] + 1e-12).all()
        assert (found_m[part] * m[part] >= 0).all()
        assert (found_v[part] > 0).all() or largest * 5.5e-8 < 1e-37


@pytest.mark.parametrize("moments", FEWER)
def test_what_was_stored_is_stored_again_as_it_is(moments: MomentFormat) -> None:
    torch.manual_seed(0)
    m, v = torch.randn(1000) * 1e-3, torch.randn(1000).square() * torch.rand(1000).pow(8)
    once = kept(moments, m, v)
    assert all(torch.equal(a, b) for a, b in zip(kept(moments, *once), once, strict=True))
    nothing = kept(moments, torch.zeros(100), torch.zeros(100))
    assert not any(t.any() for t in nothing)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_moment_that_is_not_finite_can_not_pass_for_a_number(bad: float) -> None:
    m = torch.ones(3 * BLOCK)
    m[BLOCK + 5] = bad
    for moments in FEWER:
        for found in kept(moments, m, m):
            assert not found[BLOCK + 5].isfinite()
            assert found[:BLOCK].isfinite().all()
            assert found[2 * BLOCK :].isfinite().all()


# An independent AdamW in plain operations, with moments that it quantizes itself: by a search in the map for the two
# neighbours, in double precision, and a hash written with Python's integers.


def drawn(master: torch.Tensor, gradient: torch.Tensor, step: int) -> list[int]:
    def bits(t: torch.Tensor) -> list[int]:
        return [n % 2**32 for n in t.view(torch.int32).tolist()]

    found = []
    for a, b in zip(bits(gradient.float()), bits(master.float()), strict=True):
        x = (a * 0x9E3779B1 + b * 0x85EBCA6B + step * 0xC2B2AE35) % 2**32
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        found.append(x ^ x >> 16)
    return found


def rounded_bf16(moment: torch.Tensor, draw: list[int]) -> torch.Tensor:
    bits = [n % 2**32 for n in moment.view(torch.int32).tolist()]
    upper = [(n + d >> 16 << 16) for n, d in zip(bits, draw, strict=True)]
    signed = [n - 2**32 if n >= 2**31 else n for n in upper]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def rounded_8bit(moment: torch.Tensor, draw: list[int], sizes: list[float]) -> torch.Tensor:
    known, found = torch.tensor(sizes), torch.zeros_like(moment)
    for start in range(0, len(moment), BLOCK):
        block = moment[start : start + BLOCK]
        scale = block.abs().max()
        if scale == 0:
            continue
        ratio = block.abs() / scale
        for i, r in enumerate(ratio):
            low = max(0, min(int((known <= r).sum()) - 1, len(sizes) - 2))
            up = float(r - known[low]) > float((known[low + 1] - known[low]) * draw[start + i] * 2.0**-16)
            found[start + i] = known[low + up] * scale * (-1 if block[i] < 0 else 1)
    return found


def plain_step(
    p: torch.Tensor,
    g: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    how: AdamWStep,
    clip: float,
    moments: MomentFormat,
) -> tuple:
    draw = drawn(p, g, how.step)
    g = g.float() * clip
    p = p * (1 - how.learning_rate * how.weight_decay)
    m, v = m.lerp(g, 1 - how.beta1), (v * how.beta2).addcmul(g, g, value=1 - how.beta2)
    denominator = v.sqrt() / (1 - how.beta2**how.step) ** 0.5 + how.eps
    p = p.addcdiv(m, denominator, value=-how.learning_rate / (1 - how.beta1**how.step))
    low, high = [d % 2**16 for d in draw], [d >> 16 for d in draw]
    if moments is MomentFormat.BF16:
        return p, rounded_bf16(m, low), rounded_bf16(v, high)
    return p, rounded_8bit(m, low, dynamic_sizes(signed=True)), rounded_8bit(v, high, dynamic_sizes(signed=False))


@pytest.mark.parametrize("moments", FEWER)
def test_updates_are_those_of_a_plain_loop_that_quantizes_by_itself(moments: MomentFormat) -> None:
    torch.manual_seed(0)
    n = 300  # four blocks, and a part of one
    form = StateFormat(Precision.FP32, OptimizerKind.ADAMW, moments)
    state, p = state_of(n, form), torch.randn(n)
    weight, m, v = p.clone(), torch.zeros(n), torch.zeros(n)
    update = host_update(CPU, form)
    for step in range(1, 13):
        how = AdamWStep(1e-2, 0.9, 0.999, 1e-8, 0.1, step)
        g = torch.randn(n) * torch.rand(n).pow(4)
        g[::7] = 0
        p, m, v = plain_step(p, g, m, v, how, 0.7, moments)
        update(weight, g.clone(), state, how, 0.7)
        found = wide_state(torch.zeros(n), torch.zeros(n))
        move(found, state)
        assert torch.equal(found.moments[0], m)
        assert torch.equal(found.moments[1], v)
        torch.testing.assert_close(weight, p, rtol=0, atol=0)


def numbers(form: StateFormat, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, OptimizerState]:
    """Weights and a state that has seen an update, and gradients."""
    draw = torch.Generator().manual_seed(seed)
    state, dtype = state_of(n, form), weight_dtype(form.precision)
    weight = torch.randn(n, generator=draw).to(dtype)
    if state.master is not None:
        state.master.copy_(weight)
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15, generator=draw)
    gradients = [torch.randn(n, generator=draw).to(dtype) for _ in range(2)]
    over_masters(host_update(CPU, form))(weight, gradients[0], state, HOWS[form.optimizer], 1.0)
    return weight, gradients[1], state


@pytest.mark.parametrize("optimizer", WITH_MOMENTS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("moments", FEWER)
def test_an_update_in_pieces_is_the_update_of_all_to_the_last_bit(
    moments: MomentFormat, precision: Precision, optimizer: OptimizerKind
) -> None:
    form, n = StateFormat(precision, optimizer, moments), 5000
    whole, cut = numbers(form, n, 1), numbers(form, n, 1)
    update, how = over_masters(host_update(CPU, form)), HOWS[optimizer]
    update(*whole, how, 0.7)
    weight, gradient, state = cut
    edges = [0, 64, 192, 1024, 4032, n]
    for a, b in pairwise(edges):
        update(weight[a:b], gradient[a:b], state.span(a, b), how, 0.7)
    assert all(
        torch.equal(a, b) for a, b in zip((weight, *state.tensors()), (whole[0], *whole[2].tensors()), strict=True)
    )
    assert not torch.equal(state.moments[0], numbers(form, n, 1)[2].moments[0])


@pytest.mark.parametrize("beta2", [0.95, 0.999])
@pytest.mark.parametrize("moments", FEWER)
def test_a_second_moment_follows_gradients_that_shrink(moments: MomentFormat, beta2: float) -> None:
    """Rounded to the nearest it stays more than twice as large, in both formats."""
    torch.manual_seed(0)
    n, steps = 1024, round(2.5 / (1 - beta2))
    size = 0.1 + torch.rand(n)
    size[::BLOCK] = 3  # the block's largest keeps its size
    shrinks = torch.arange(n) % 2 == 1
    form = StateFormat(Precision.FP32, OptimizerKind.ADAMW, moments)
    state, exact, weight = state_of(n, form), wide_state(torch.zeros(n), torch.zeros(n)), torch.randn(n)
    update, other = over_moments(update_in_torch), weight.clone()
    for step in range(1, steps + 1):
        g = torch.randn(n) * size * torch.where(shrinks & (step > steps / 4), 0.3, 1.0)
        how = AdamWStep(1e-3, 0.9, beta2, 1e-8, 0.0, step)
        update(weight, g.clone(), state, how, 1.0)
        update_in_torch(other, g, exact, how, 1.0)
    found = wide_state(torch.zeros(n), torch.zeros(n))
    move(found, state)
    share = (found.moments[1][shrinks] / exact.moments[1][shrinks]).sqrt()
    assert share.mean() == pytest.approx(1, abs=0.05)


def test_an_element_without_gradient_is_never_divided_by_eps_alone() -> None:
    """Beside a large gradient, a small one's square is less than 8 bits can tell: it must not become nothing."""
    form = StateFormat(Precision.FP32, OptimizerKind.ADAMW, MomentFormat.EIGHT_BIT)
    state, weight = state_of(BLOCK, form), torch.zeros(BLOCK)
    update = host_update(CPU, form)
    for step in range(1, 20):
        g = torch.full((BLOCK,), 1e-6 if step < 10 else 0.0)
        g[0] = 1.0
        update(weight, g, state, AdamWStep(1e-3, 0.9, 0.999, 1e-8, 0.0, step), 1.0)
    assert weight.abs().max() < 2e-2


def test_buffers_of_zeros_are_states_of_zeros_and_every_tensor_lies_where_its_type_may() -> None:
    for precision in Precision:
        for optimizer in OptimizerKind:
            for moments in MomentFormat:
                for n in (64, 101, 10_007):
                    form = StateFormat(precision, optimizer, moments)
                    state = state_of(n, form)
                    assert sum(t.nbytes for t in state.tensors()) == state_bytes(n, form)
                    assert not any(dequantized(m, s).any() for m, s in zip(state.moments, state.scales, strict=False))


def test_no_more_than_one_number_of_the_map_lies_between_ratios_with_the_same_upper_bits() -> None:
    edges = torch.arange(0x3F81, dtype=torch.int32).bitwise_left_shift(16)
    for signed in (True, False):
        sizes = torch.tensor(dynamic_sizes(signed=signed))
        first, last = (torch.bucketize((edges + rest).view(torch.float32), sizes, right=True) for rest in (0, 0xFFFF))
        assert (last - first).max() == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("moments", FEWER)
def test_host_and_device_make_the_same_update_to_the_last_bit(moments: MomentFormat, precision: Precision) -> None:
    form, device = StateFormat(precision, OptimizerKind.ADAMW, moments), torch.device("cuda")
    weight, gradient, state = numbers(form, 10_048, 2)
    there, how = (weight.cuda(), gradient.cuda(), state.each(torch.Tensor.cuda)), HOWS[form.optimizer]
    over_masters(host_update(device, form))(weight, gradient, state, how, 0.7)
    over_masters(device_update(device, form))(*there, how, torch.full((), 0.7, device=device))
    found = (there[0], *there[2].tensors())
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, (weight, *state.tensors()), strict=True))
