"""The update in one pass, compiled: the same as torch's own operations, and as the device's kernel."""

import ctypes
import math
import shutil
import stat
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload import arithmetic, native
from offload.arithmetic import agrees, host_update
from offload.native import native_update
from offload.optimizer import join_master, update_in_torch
from offload.plan import OptimizerKind, Precision, StateFormat
from offload.residency import state_bytes
from offload.rules import AdagradStep, AdamStep, AdamWStep, LionStep, MomentumStep, SgdStep, UpdateStep
from offload.state import OptimizerState, carve_state, weight_dtype

compiled = pytest.mark.skipif(native_update() is None, reason="no C compiler")

FORMS = [StateFormat(precision, kind) for precision in (Precision.FP32, Precision.BF16) for kind in OptimizerKind]
HOWS = st.builds(
    AdamWStep,
    st.floats(1e-6, 1e-1), st.floats(0, 0.99), st.floats(0.5, 0.9999), st.sampled_from([1e-8, 1e-6]),
    st.floats(0, 0.5), st.integers(1, 1000),
)  # fmt: skip


def numbers(
    elements: int, precision: Precision, seed: int, optimizer: OptimizerKind = OptimizerKind.ADAMW
) -> tuple[torch.Tensor, torch.Tensor, OptimizerState]:
    """Weights, gradients and a state that has seen some steps."""
    torch.manual_seed(seed)
    dtype, form = weight_dtype(precision), StateFormat(precision, optimizer)
    state = carve_state(torch.zeros(state_bytes(elements, form), dtype=torch.uint8), elements, form)
    for moment, fill in zip(state.moments, (torch.Tensor.normal_, torch.Tensor.uniform_), strict=False):
        fill(moment)
    if optimizer is OptimizerKind.ADAGRAD:
        state.moments[0].abs_()
    if state.remainder is not None:
        state.remainder.random_(-(2**15), 2**15)
    return torch.randn(elements).to(dtype), torch.randn(elements).to(dtype), state


def masters_of(weight: torch.Tensor, state: OptimizerState) -> torch.Tensor:
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
@given(st.integers(1, 3000), st.sampled_from([Precision.FP32, Precision.BF16]), HOWS, st.floats(1e-3, 1.0))
def test_one_update_is_torchs_within_the_rounding_of_a_root(
    elements: int, precision: Precision, how: AdamWStep, clip: float
) -> None:
    """torch takes roots on the CPU by a library that is up to one unit off; all else rounds alike."""
    update = native_update()
    assert update is not None
    found, expected = (numbers(elements, precision, elements) for _ in range(2))
    before = masters_of(expected[0], expected[2]).clone()
    update(*found, how, clip)
    update_in_torch(*expected, how, clip)
    for one, other in zip(found[2].moments, expected[2].moments, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-7, atol=1e-12)
    masters = [masters_of(weight, state) for weight, _, state in (found, expected)]
    torch.testing.assert_close(*masters, rtol=5e-7, atol=5e-7 * (masters[1] - before).abs().max().item())


@compiled
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_whole_vectors_of_moments_are_torchs_to_the_last_bit(precision: Precision) -> None:
    update = native_update()
    assert update is not None
    found, expected = (numbers(1 << 16, precision, 0) for _ in range(2))
    how = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, 7)
    in_torch_on_one_thread(expected, how, 0.3)
    update(*found, how, 0.3)
    assert torch.equal(found[2].moments[0], expected[2].moments[0])
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # elsewhere torch does not fuse
        assert torch.equal(found[2].moments[1], expected[2].moments[1])


def in_torch_on_one_thread(numbers: tuple, how: UpdateStep, clip: float) -> None:
    """So that every element is part of a whole vector."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        update_in_torch(*numbers, how, clip)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (OptimizerKind.ADAM, AdamStep(1e-2, 0.9, 0.95, 1e-8, 0.1, 3)),
        (OptimizerKind.LION, LionStep(1e-2, 0.9, 0.99, 0.1)),
        (OptimizerKind.LION, LionStep(1e-2, 0.3, 0.6, 0.0)),
        (OptimizerKind.SGD, SgdStep(1e-2, 0.0)),
        (OptimizerKind.SGD, SgdStep(1e-2, 0.1)),
        (OptimizerKind.SGD_MOMENTUM, MomentumStep(1e-2, 0.9, 0.1, nesterov=False, weight_decay=0.1, step=2)),
        (OptimizerKind.SGD_MOMENTUM, MomentumStep(1e-2, 0.9, 0.0, nesterov=True, weight_decay=0.0, step=1)),
        (OptimizerKind.ADAGRAD, AdagradStep(1e-2, 0.1, 1e-10, 0.5, 0.1, step=1)),
        (OptimizerKind.ADAGRAD, AdagradStep(1e-2, 0.1, 1e-10, 0.5, 0.0, step=4)),
    ],
)
def test_every_rule_is_torchs_but_for_the_rounding_of_a_root(
    optimizer: OptimizerKind, how: UpdateStep, precision: Precision
) -> None:
    update = native_update()
    assert update is not None
    found, expected = (numbers(1 << 16, precision, 0, optimizer) for _ in range(2))
    before = masters_of(expected[0], expected[2]).clone()
    in_torch_on_one_thread(expected, how, 0.3)
    update(*found, how, 0.3)
    one, other = (masters_of(weight, state) for weight, _, state in (found, expected))
    if how.rule in ("adam", "adagrad"):
        # Where a root is one unit off, the step is as much off, however little of the weight it leaves.
        assert ((one - other).abs() <= 5e-7 * (other.abs() + (other - before).abs())).all()
    else:
        assert torch.equal(one, other)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # elsewhere torch does not fuse
        assert all(torch.equal(one, other) for one, other in zip(found[2].moments, expected[2].moments, strict=True))


@compiled
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_hundred_updates_stay_as_near_to_the_exact_ones_as_torchs(precision: Precision) -> None:
    native = native_update()
    assert native is not None
    errors = []
    for update in (native, update_in_torch):
        weight, gradient, state = numbers(5000, precision, 1)
        for moment in state.moments:
            moment.zero_()
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
    for one, other in zip((found[0], *found[2].tensors()), (expected[0], *expected[2].tensors()), strict=True):
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
    state = OptimizerState((torch.zeros(5), torch.ones(5)), remainder)
    gradient = torch.zeros(5, dtype=torch.bfloat16)
    update(weight, gradient, state, AdamWStep(0.0, 0.9, 0.95, 1e-8, 0.0, 1), 1.0)
    assert weight[:2].tolist() == [math.inf, -math.inf]
    assert weight[2:].isnan().all()
    gradient.fill_(torch.nan)
    ordinary = torch.ones(5, dtype=torch.bfloat16)
    moments = OptimizerState((torch.zeros(5), torch.ones(5)), torch.zeros(5, dtype=torch.int16))
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


@compiled
def test_a_change_to_any_source_makes_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind in ("SOURCES", "HEADERS"):
        copies = tuple(Path(shutil.copy(path, tmp_path)) for path in getattr(native, kind))
        monkeypatch.setattr(native, kind, copies)
    native_update.cache_clear()
    try:
        assert native_update() is not None
        for number, name in enumerate(("native_update.c", "native_moments.c", "native_rules.h")):
            with (tmp_path / name).open("a") as source:
                source.write("/* Another one. */\n")
            native_update.cache_clear()
            assert native_update() is not None
            assert len(list((tmp_path / "cache" / "memplan").iterdir())) == 2 + number, name
    finally:
        native_update.cache_clear()


def test_all_sources_go_into_the_fingerprint_and_the_package() -> None:
    here = Path(native.__file__).parent
    assert {*native.SOURCES, *native.HEADERS} == {*here.glob("*.c"), *here.glob("*.h")}
    settings = tomllib.loads((here.parent / "pyproject.toml").read_text())
    assert {"*.c", "*.h"} <= set(settings["tool"]["setuptools"]["package-data"]["offload"])


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
    functions = [getattr(update._library, f"memplan_adam_{kind}") for kind in ("split", "fp32")]
    assert not any(type(function)._flags_ & holds_the_lock for function in functions)
    assert type(ctypes.pythonapi.PyErr_Clear)._flags_ & holds_the_lock


@compiled
@pytest.mark.parametrize(
    "form",
    [*FORMS, *(StateFormat(Precision.FP16, kind) for kind in OptimizerKind)],
    ids=lambda form: f"{form.precision}-{form.optimizer}",
)
def test_the_compiled_update_agrees_with_torchs_and_is_used_beside_a_gpu(form: StateFormat) -> None:
    update = native_update()
    assert update is not None
    assert agrees(update, torch.device("cpu"), form)
    assert host_update(torch.device("cuda"), form) is update
    assert host_update(torch.device("cpu"), form) is update_in_torch


def test_an_update_that_fails_or_is_another_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no such instruction")

    def without_decay(
        w: torch.Tensor, g: torch.Tensor, state: OptimizerState, how: AdamWStep, clip: float | torch.Tensor
    ) -> None:
        update_in_torch(w, g, state, replace(how, weight_decay=0.0), clip)

    form = StateFormat(Precision.BF16)
    for wrong in (failing, without_decay):
        assert not agrees(wrong, torch.device("cpu"), form)
        monkeypatch.setattr(arithmetic, "native_update", lambda wrong=wrong: wrong)
        assert host_update(torch.device("cuda"), form) is update_in_torch
    assert agrees(update_in_torch, torch.device("cpu"), form)
