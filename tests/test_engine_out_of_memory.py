"""The device runs out of memory in a step: the sentence says where, and the same engine goes on with less."""

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import DeviceMemoryError, OffloadError
from offload.plan import Budget, Precision, Prediction
from offload.shortage import shortage
from tests.models import GPT, FrozenGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for, units_of
from tests.test_engine_equals_pytorch import assert_same

UNITS = ("h.0", "h.1", "h.3", "wte", "ln_f")
"""The first, a middle and the last block, and the first and the last unit."""
LARGE, SMALL = 8, 4
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 4.00 GiB"


def fail() -> None:
    raise torch.OutOfMemoryError(SAID)


class Failing(torch.autograd.Function):
    """Identity whose backward runs out of memory while ``large``."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, large: bool) -> torch.Tensor:
        ctx.large = large
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        if ctx.large:
            fail()
        return gradient, None


class Held:
    """What a graph keeps for its backward."""


class Keeping(torch.autograd.Function):
    """Identity; the graph keeps ``held``."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, held: Held) -> torch.Tensor:
        ctx.held = held
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return gradient, None


class BehindGPT(FrozenGPT):
    """Runs out between its first block and the second, a frozen one, of which backward comes first."""

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(Failing.apply(x, len(tokens) == LARGE) if block is self.h[1] else x)
        return self.head(self.ln_f(x))


def runs_out(model: GPT, unit: str, phase: str, again: bool) -> None:
    """Make a part of the unit run out of memory with LARGE batches; ``again``: only in the recompute."""
    module = model.get_submodule(unit)
    inner = module.down if hasattr(module, "down") else module
    forward = inner.forward
    calls = 0

    def forward_of_large(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        large = len(x) == LARGE
        calls += large
        if phase == "forward" and large and calls == 1 + again:
            fail()
        y = forward(x)
        return Failing.apply(y, large and calls == 1) if phase == "backward" else y

    inner.forward = forward_of_large


def engine_for(model: nn.Module, tmp_path: Path, placements: tuple = EVERY_TIER, **changes: object) -> Engine:
    plan = plan_for(model, placements, tmp_path, **changes)
    return Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2), max_grad_norm=0.5)


def step(engine: Engine, tokens: torch.Tensor) -> float:
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return loss.item()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("unit", UNITS)
def test_after_it_the_engine_goes_on_as_if_nothing_had_been(
    unit: str, phase: str, recompute: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = GPT()
    changes = {"recompute": tuple(u for u in units_of(model) if u.startswith("h."))} if recompute else {}
    other = copy.deepcopy(model)
    runs_out(model, unit, phase, again=False)
    large, small = batches(1, LARGE)[0], batches(6, SMALL, seed=4)
    with engine_for(model, tmp_path, **changes) as engine, engine_for(other, tmp_path, **changes) as undisturbed:
        for tokens in small[:2]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        with pytest.raises(DeviceMemoryError, match=f"in the {phase} of unit {unit}"):
            step(engine, large)
        for tokens in small[2:]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        assert engine.global_step == undisturbed.global_step == 6
        assert engine.overflow_count == 0
        whole = undisturbed.state_dict()
        assert all(torch.equal(whole[n], t) for n, t in engine.state_dict().items())


@pytest.mark.parametrize("unit", ["h.0", "h.3"])
def test_a_recompute_that_runs_out_is_part_of_backward(unit: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    other = copy.deepcopy(model)
    runs_out(model, unit, "forward", again=True)
    recompute = tuple(u for u in units_of(model) if u.startswith("h."))
    with (
        engine_for(model, tmp_path, recompute=recompute) as engine,
        engine_for(other, tmp_path, recompute=recompute) as undisturbed,
    ):
        with pytest.raises(DeviceMemoryError, match=f"in the backward of unit {unit}"):
            step(engine, batches(1, LARGE)[0])
        for tokens in batches(3, SMALL):
            assert step(engine, tokens) == step(undisturbed, tokens)


@pytest.mark.parametrize("placement", [RESIDENT, (G, G, H), (H, H, H)])
def test_what_runs_out_behind_a_frozen_unit_is_no_part_of_it(placement: tuple, tmp_path: Path) -> None:
    model = BehindGPT()
    assert not any(p.requires_grad for p in model.h[1].parameters())
    said = pytest.raises(DeviceMemoryError, match="in the backward: ")
    with engine_for(model, tmp_path, (placement,)) as engine, said:
        step(engine, batches(1, LARGE)[0])


@pytest.mark.parametrize("placement", [RESIDENT, (H, H, H)])
def test_outside_of_all_passes_no_unit_computes(placement: tuple, tmp_path: Path) -> None:
    model = GPT()
    model.wte.never = nn.Parameter(torch.ones(3))  # so its last gradient never comes
    with engine_for(model, tmp_path, (placement,)) as engine:
        loss = engine(batches(1)[0])
        assert engine.computing is None
        engine.backward(loss)
        assert engine.computing is None


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_micro_batches_of_a_step_begin_anew(phase: str, at: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    other = copy.deepcopy(model)
    runs_out(model, "h.1", phase, again=False)
    changes = {"gradient_accumulation_steps": 3}
    small = batches(9, SMALL)
    with engine_for(model, tmp_path, **changes) as engine, engine_for(other, tmp_path, **changes) as undisturbed:
        for tokens in small[:3]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        for tokens in batches(at, SMALL, seed=9):
            step(engine, tokens)
        with pytest.raises(DeviceMemoryError):
            step(engine, batches(1, LARGE)[0])
        for tokens in small[3:]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        assert engine.global_step == 3


def test_an_evaluation_that_runs_out_disturbs_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    other = copy.deepcopy(model)
    runs_out(model, "h.2", "forward", again=False)
    with engine_for(model, tmp_path) as engine, engine_for(other, tmp_path) as undisturbed:
        for tokens in batches(2):
            assert step(engine, tokens) == step(undisturbed, tokens)
        with torch.no_grad(), pytest.raises(DeviceMemoryError, match=r"forward of unit h\.2"):
            engine(batches(1, LARGE)[0])
        for tokens in batches(2):
            assert step(engine, tokens) == step(undisturbed, tokens)


def test_the_memory_of_the_failed_pass_is_free_while_the_error_is_handled(tmp_path: Path) -> None:
    """Who tries again inside of ``except`` must not find the activations of the first try."""
    model = GPT()
    held: list[weakref.ref] = []
    forward = model.h[3].forward

    def keep(x: torch.Tensor) -> torch.Tensor:
        held.append(weakref.ref(x))
        if len(x) == LARGE:
            fail()
        return forward(x)

    model.h[3].forward = keep
    with engine_for(model, tmp_path, (RESIDENT,)) as engine:
        try:
            step(engine, batches(1, LARGE)[0])
        except DeviceMemoryError:
            gc.collect()
            assert held[0]() is None
            step(engine, batches(1, SMALL)[0])


@pytest.mark.parametrize("placement", [RESIDENT, (H, H, H)])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_no_garbage_holds_the_memory_of_the_failed_pass(phase: str, placement: tuple, tmp_path: Path) -> None:
    """Who tries again behind ``except`` must not wait for the garbage collector, which does not know of devices."""
    model = GPT()
    runs_out(model, "h.3", phase, again=False)
    held: list[weakref.ref] = []

    def keep(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        kept = Held()
        held.append(weakref.ref(kept))
        return Keeping.apply(output, kept)

    model.h[0].register_forward_hook(keep)
    with engine_for(model, tmp_path, (placement,)) as engine:
        gc.collect()
        gc.disable()
        try:
            with contextlib.suppress(DeviceMemoryError):
                engine.backward(engine(batches(1, LARGE)[0]))
            assert len(held) == 1
            assert held[0]() is None
        finally:
            gc.enable()


def test_it_is_an_error_of_the_runtime_and_a_memory_error_made_from_torchs() -> None:
    with pytest.raises(MemoryError) as caught:
        model = GPT()
        with Engine(model, plan_for(model, ((G, H, H),))) as engine:
            runs_out(model, "h.0", "forward", again=False)
            engine(batches(1, LARGE)[0])
    assert isinstance(caught.value, OffloadError)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p, "Give the engine micro-batches smaller than 4, or plan again with --gpu-memory below 24 GiB"),
        (lambda p: p, "which recomputes activations and offloads more of the model"),
        (lambda p: p, "expected a peak of 20 GiB, at most 22 GiB"),
        (lambda p: p, "when it asked for 2.00 GiB more"),
        (lambda p: p, "this engine can go on"),
        (lambda p: replace(p, micro_batch_size=1), "Plan again with"),
        (lambda p: replace(p, recompute=("h.0",)), "which offloads more of the model"),
    ],
)
def test_the_sentence_says_what_was_predicted_what_was_there_and_what_to_change(change: Callable, said: str) -> None:
    plan = replace(
        plan_for(GPT(), (RESIDENT,)),
        budget=Budget(24 << 30, 1, 1),
        prediction=Prediction(20 << 30, 0, 0, 0, None, None, gpu_upper_bytes=22 << 30),
    )
    error = shortage(torch.OutOfMemoryError(SAID), change(plan), "the forward of unit h.3", 23 << 30)
    assert "in the forward of unit h.3: 23 GiB were allocated when" in str(error)
    assert said in str(error)


def test_an_update_that_runs_out_is_not_said_to_be_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    with (
        pytest.raises(DeviceMemoryError, match=r"in the update: .* go on from a checkpoint"),
        engine_for(model, tmp_path, (RESIDENT,)) as engine,
    ):
        monkeypatch.setattr(engine._updater, "begin", lambda *_: fail())
        step(engine, batches(1)[0])


def runs_out_once_in_an_update(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that of the third piece from now on."""
    updater, calls = engine._updater, [0]

    def once(update: Callable) -> Callable:
        def run(*args: object) -> None:
            calls[0] += 1
            if calls[0] == 3:
                fail()
            update(*args)

        return run

    for name in ("_update_on_host", "_update_on_device"):
        monkeypatch.setattr(updater, name, once(getattr(updater, name)))


def first_error(engine: Engine, tokens: torch.Tensor) -> str:
    """Of a step and of what waits for its update."""
    with pytest.raises(DeviceMemoryError) as caught:
        step(engine, tokens)
        engine.finish()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


@pytest.mark.parametrize("placement", [RESIDENT, (G, G, H), (G, H, H), (H, H, H), (H, G, H), (N, H, N)])
def test_an_update_that_runs_out_is_refused_until_a_checkpoint_is_loaded(
    placement: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GPT()
    other, data = copy.deepcopy(model), batches(5)
    with engine_for(model, tmp_path, (placement,)) as engine, engine_for(other, tmp_path, (placement,)) as undisturbed:
        for tokens in data[:2]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        engine.save_checkpoint(tmp_path / "good").wait()
        runs_out_once_in_an_update(engine, monkeypatch)
        said = first_error(engine, data[2])
        assert "ran out of memory in the update of " in said
        assert "unit" in said
        for use in (
            lambda: engine(data[2]),
            lambda: engine.backward(torch.ones((), requires_grad=True)),
            engine.step,
            engine.finish,
            engine.state_dict,
            lambda: engine.gathered(model),
            lambda: engine.save_checkpoint(tmp_path / "bad"),
        ):
            with pytest.raises(DeviceMemoryError, match="The update is half done: go on from a checkpoint"):
                use()
        assert not (tmp_path / "bad").exists()
        engine.load_checkpoint(tmp_path / "good")
        for tokens in data[2:]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        whole = undisturbed.state_dict()
        assert all(torch.equal(whole[n], t) for n, t in engine.state_dict().items())


@pytest.mark.parametrize("placement", [RESIDENT, (H, H, H)])
def test_behind_a_half_done_update_loaded_weights_begin_without_moments(
    placement: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain, data = copy.deepcopy(model), batches(5)
    with engine_for(model, tmp_path, (placement,)) as engine:
        for tokens in data[:2]:
            step(engine, tokens)
        good = engine.state_dict()
        runs_out_once_in_an_update(engine, monkeypatch)
        first_error(engine, data[2])
        with pytest.raises(DeviceMemoryError, match="half done"):
            engine.load_state_dict({"wte.weight": good["wte.weight"]}, strict=False)
        engine.load_state_dict(good)
        for tokens in data[2:]:
            step(engine, tokens)
        found = engine.state_dict()
    plain.load_state_dict(good)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for tokens in data[2:]:
        plain(tokens).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(found, plain, 1e-6)


@pytest.mark.parametrize("told", [False, True])
def test_after_an_update_that_ran_out_close_gives_everything_back(
    told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT()
    engine = engine_for(model, tmp_path, ((N, H, N),))
    runs_out_once_in_an_update(engine, monkeypatch)
    if told:
        first_error(engine, batches(1)[0])
        engine.close()
    else:
        step(engine, batches(1)[0])
        with pytest.raises(DeviceMemoryError, match="The update is half done"):
            engine.close()
    with pytest.raises(OffloadError, match="closed"):
        engine.finish()
    assert not any(t.name.startswith("memplan-") for t in threading.enumerate())


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_real_memory_runs_out_and_comes_back(phase: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model, hoards = GPT(), []
    other = copy.deepcopy(model)

    class Hoarding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor, large: bool) -> torch.Tensor:
            ctx.large = large
            if large and phase == "forward":
                hoards.append(torch.empty(1 << 50, device="cuda"))
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient: torch.Tensor) -> tuple:
            if ctx.large and phase == "backward":
                hoards.append(torch.empty(1 << 50, device="cuda"))
            return gradient, None

    forward = model.h[1].forward
    model.h[1].forward = lambda x: Hoarding.apply(forward(x), len(x) == LARGE)
    with (
        engine_for(model, tmp_path, precision=Precision.BF16, device="cuda") as engine,
        engine_for(other, tmp_path, precision=Precision.BF16, device="cuda") as undisturbed,
    ):
        for tokens in batches(2):
            assert step(engine, tokens) == step(undisturbed, tokens)
        with pytest.raises(DeviceMemoryError, match=rf"{phase} of unit h\.1.*reserved"):
            step(engine, batches(1, LARGE)[0])
        for tokens in batches(3):
            assert step(engine, tokens) == step(undisturbed, tokens)
