"""The update in one pass, compiled: the same as torch's own operations, and as the device's kernel."""

import ctypes
import math
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import arithmetic
from offload.arithmetic import agrees, host_update
from offload.native import native_update
from offload.optimizer import AdamWStep, join_master, update_in_torch
from offload.plan import Precision
from offload.residency import state_bytes
from offload.state import AdamState, carve_state, weight_dtype

compiled = pytest.mark.skipif(native_update() is None, reason="no C compiler")

HOWS = st.builds(
    AdamWStep,
    st.floats(1e-6, 1e-1), st.floats(0, 0.99), st.floats(0.5, 0.9999), st.sampled_from([1e-8, 1e-6]),
    st.floats(0, 0.5), st.integers(1, 1000),
)  # fmt: skip


def numbers(elements: int, precision: Precision, seed: int) -> tuple[torch.Tensor, torch.Tensor, AdamState]:
    """Weights, gradients and a state that has seen some steps."""
    torch.manual_seed(seed)
    dtype = weight_dtype(precision)
    state = carve_state(torch.zeros(elements * state_bytes(precision), dtype=torch.uint8), elements, precision)
    state.exp_avg.normal_()
    state.exp_avg_sq.uniform_()
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15)
    return torch.randn(elements).to(dtype), torch.randn(elements).to(dtype), state


def masters_of(weight: torch.Tensor, state: AdamState) -> torch.Tensor:
    return weight if state.remainder is None else join_master(weight, state.remainder)


def exact(weight: np.ndarray, gradient: np.ndarray, m: np.ndarray, v: np.ndarray, how: AdamWStep, clip: float) -> tuple:
    """AdamW in fp64: what both ways must be near to."""
    g = gradient * clip
    m = how.beta1 * m + (1 - how.beta1) * g
    v = how.beta2 * v + (1 - how.beta2) * g * g
    root = np.sqrt(v / (1 - how.beta2**how.step)) + how.eps
    step = how.learning_rate / (1 - how.beta1**how.step) * m / root
    return weight * (1 - how.learning_rate * how.weight_decay) - step, m, v


@compiled
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from(list(Precision)), HOWS, st.floats(1e-3, 1.0))
def test_one_update_is_torchs_within_the_rounding_of_a_root(
    elements: int, precision: Precision, how: AdamWStep, clip: float
) -> None:
    """torch takes roots on the CPU by a library that is up to one unit off; all else rounds alike."""
    update = native_update()
    assert update is not None
    found, expected = (numbers(elements, precision, elements) for _ in range(2))
    update(*found, how, clip)
    update_in_torch(*expected, how, clip)
    for one, other in zip(found[2][:2], expected[2][:2], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=1e-12)
    masters = [masters_of(weight, state) for weight, _, state in (found, expected)]
    torch.testing.assert_close(*masters, rtol=5e-7, atol=5e-7 * how.learning_rate)


@compiled
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_whole_vectors_of_moments_are_torchs_to_the_last_bit(precision: Precision) -> None:
    update = native_update()
    assert update is not None
    found, expected = (numbers(1 << 16, precision, 0) for _ in range(2))
    how, threads = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, 7), torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # so that every element of torch's is part of a whole vector
        update_in_torch(*expected, how, 0.3)
    finally:
        torch.set_num_threads(threads)
    update(*found, how, 0.3)
    assert torch.equal(found[2].exp_avg, expected[2].exp_avg)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # elsewhere torch does not fuse
        assert torch.equal(found[2].exp_avg_sq, expected[2].exp_avg_sq)


@compiled
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_hundred_updates_stay_as_near_to_the_exact_ones_as_torchs(precision: Precision) -> None:
    native = native_update()
    assert native is not None
    errors = []
    for update in (native, update_in_torch):
        weight, gradient, state = numbers(5000, precision, 1)
        state.exp_avg.zero_()
        state.exp_avg_sq.zero_()
        masters = masters_of(weight, state).double().numpy()
        m, v = np.zeros(5000), np.zeros(5000)
        for step in range(1, 101):
            how = AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.1, step)
            gradient.normal_()
            update(weight, gradient, state, how, 0.5)
            masters, m, v = exact(masters, gradient.double().numpy(), m, v, how, 0.5)
        errors.append((masters_of(weight, state).double() - torch.from_numpy(masters)).norm().item())
    assert errors[0] < 1.05 * errors[1]


@compiled
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 8))
def test_the_number_of_threads_and_pieces_changes_no_bit(elements: int, threads: int) -> None:
    update, how, before = native_update(), AdamWStep(1e-2, 0.9, 0.95, 1e-8, 0.1, 3), torch.get_num_threads()
    assert update is not None
    found, expected = (numbers(elements, Precision.BF16, elements) for _ in range(2))
    update(*expected, how, 0.7)
    try:
        torch.set_num_threads(threads)
        for part in (slice(0, elements // 3), slice(elements // 3, elements)):
            update(found[0][part], found[1][part], found[2].span(part.start, part.stop), how, 0.7)
    finally:
        torch.set_num_threads(before)
    for one, other in zip((found[0], *found[2]), (expected[0], *expected[2]), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@compiled
def test_no_nan_becomes_a_number_and_infinities_stay() -> None:
    update = native_update()
    assert update is not None
    bits = [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, -1]
    weight, remainder = torch.empty(5, dtype=torch.bfloat16), torch.zeros(5, dtype=torch.int16)
    masters = torch.tensor(bits, dtype=torch.int32)
    weight.view(torch.int16).copy_(masters.add(0x8000).bitwise_right_shift(16))
    remainder.copy_(masters)
    weight[2:] = torch.nan
    state = AdamState(torch.zeros(5), torch.ones(5), remainder)
    gradient = torch.zeros(5, dtype=torch.bfloat16)
    update(weight, gradient, state, AdamWStep(0.0, 0.9, 0.95, 1e-8, 0.0, 1), 1.0)
    assert weight[:2].tolist() == [math.inf, -math.inf]
    assert weight[2:].isnan().all()
    gradient.fill_(torch.nan)
    ordinary = torch.ones(5, dtype=torch.bfloat16)
    moments = AdamState(torch.zeros(5), torch.ones(5), torch.zeros(5, dtype=torch.int16))
    update(ordinary, gradient, moments, AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.0, 1), 1.0)
    assert ordinary.isnan().all()


@compiled
def test_the_library_is_built_once_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_update.cache_clear()
    try:
        assert native_update() is not None
        (library,) = (tmp_path / "memplan").iterdir()
        made = library.stat().st_mtime_ns
        native_update.cache_clear()
        assert native_update() is not None
        assert [p.stat().st_mtime_ns for p in (tmp_path / "memplan").iterdir()] == [made]
    finally:
        native_update.cache_clear()


@pytest.mark.parametrize("compiler", ["missing", "failing", "lying"])
def test_without_a_working_compiler_there_is_no_compiled_update(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cc"
    if compiler != "missing":
        # A compiler that ends well may still have made something that is not a library.
        body = (
            "exit 1" if compiler == "failing" else 'while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done; : > "${2:-x}"'
        )
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    native_update.cache_clear()
    try:
        assert native_update() is None
    finally:
        native_update.cache_clear()


@compiled
def test_the_call_lets_go_of_the_interpreter_lock() -> None:
    update, holds_the_lock = native_update(), 4  # FUNCFLAG_PYTHONAPI
    assert update is not None
    assert not any(type(function)._flags_ & holds_the_lock for function in (update._split, update._fp32))
    assert type(ctypes.pythonapi.PyErr_Clear)._flags_ & holds_the_lock


@compiled
def test_the_compiled_update_agrees_with_torchs_and_is_used_beside_a_gpu() -> None:
    update = native_update()
    assert update is not None
    assert agrees(update, torch.device("cpu"))
    assert host_update(torch.device("cuda")) is update
    assert host_update(torch.device("cpu")) is update_in_torch


def test_an_update_that_fails_or_is_another_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no such instruction")

    def without_decay(
        w: torch.Tensor, g: torch.Tensor, state: AdamState, how: AdamWStep, clip: float | torch.Tensor
    ) -> None:
        update_in_torch(w, g, state, replace(how, weight_decay=0.0), clip)

    for wrong in (failing, without_decay):
        assert not agrees(wrong, torch.device("cpu"))
        monkeypatch.setattr(arithmetic, "native_update", lambda wrong=wrong: wrong)
        assert host_update(torch.device("cuda")) is update_in_torch
    assert agrees(update_in_torch, torch.device("cpu"))
