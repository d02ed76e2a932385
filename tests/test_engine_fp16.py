"""Training in fp16 is the loop with fp32 masters and ``torch.amp.GradScaler``, its skipped steps too."""

import copy
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from memplan.train import TrainingOptions, prepare_run, train
from offload import contents
from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Precision
from profiler.source import load_source
from tests.models import GPT, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for
from tests.slow import slow_down
from tests.test_engine_equals_pytorch import assert_same, distance, optimizer_of, scheduler_of
from tests.test_engine_nonfinite import MODEL

STEPS, POISONED = 20, (3, 7)
LARGE = 2.0**24
"""A first scale at which several steps overflow."""


def scaler_of(first: float = 65536.0, interval: int = 4) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=first, growth_interval=interval)


def poisoning(model: nn.Module) -> Callable[[int], None]:
    """Makes a gradient infinite in the poisoned steps; told the number of each step, from 1."""
    now = 0

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, math.inf) if now in POISONED else gradient

    model.h[3].down.bias.register_hook(hook)

    def tell(step: int) -> None:
        nonlocal now
        now = step

    return tell


class Plain:
    """The loop that people write: an fp16 model, fp32 copies of its parameters, and a GradScaler."""

    def __init__(self, model: nn.Module, scaler: torch.amp.GradScaler, max_norm: float | None = None) -> None:
        self.model, self.scaler, self.max_norm = model, scaler, max_norm
        self.masters = copy.deepcopy(model)
        model.half()
        self.optimizer = optimizer_of(self.masters)
        self.scheduler = scheduler_of(self.optimizer)
        self.skipped: list[int] = []
        self.norms: list[float] = []

    def step(self, number: int, micro_batches: list[torch.Tensor]) -> None:
        for tokens in micro_batches:
            self.scaler.scale(self.model(tokens) / len(micro_batches)).backward()
        trained = [(p, m) for p, m in zip(self.model.parameters(), self.masters.parameters(), strict=True)]
        for parameter, master in trained:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.scaler.unscale_(self.optimizer)
        gradients = [m.grad for _, m in trained if m.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.masters.parameters(), self.max_norm)
        self.scaler.step(self.optimizer)
        before = self.scaler.get_scale()
        self.scaler.update()
        if self.scaler.get_scale() < before:
            self.skipped.append(number)
        else:
            self.scheduler.step()
        with torch.no_grad():
            for parameter, master in trained:
                parameter.copy_(master)


def train_both(
    model: nn.Module,
    placements: tuple,
    path: Path,
    first: float,
    max_norm: float | None,
    accumulation: int,
    device: str = "cpu",
    **changes: object,
) -> tuple[Plain, dict[str, torch.Tensor], int]:
    """Twenty steps by both; returns the plain loop, the engine's masters and its count of skipped steps."""
    plain = Plain(copy.deepcopy(model).to(device), scaler_of(first), max_norm)
    changes |= {"gradient_accumulation_steps": accumulation}
    plan = plan_for(model, placements, path, Precision.FP16, device, **changes)
    optimizer = optimizer_of(model)
    data = batches(STEPS * accumulation, batch_size=2, length=6)
    tells = [poisoning(m) for m in (model, plain.model)]
    with Engine(model, plan, optimizer, scheduler_of(optimizer), max_norm, grad_scaler=scaler_of(first)) as engine:
        for step in range(1, STEPS + 1):
            for tell in tells:
                tell(step)
            micro_batches = data[(step - 1) * accumulation : step * accumulation]
            for tokens in micro_batches:
                engine.backward(engine(tokens))
                engine.step()
            plain.step(step, [tokens.to(device) for tokens in micro_batches])
        assert engine.overflow_count == 0
        return plain, engine.state_dict(), engine.skipped_steps


@pytest.mark.parametrize(
    ("kind", "first", "accumulation", "max_norm"),
    [
        (GPT, LARGE, 1, None),
        (GPT, 65536.0, 2, 0.05),
        (TiedGPT, LARGE, 2, 0.05),
        (FrozenGPT, 65536.0, 1, 0.05),
        (SkippingGPT, LARGE, 1, None),
        (LoopingGPT, 65536.0, 1, None),
    ],
)
def test_twenty_steps_are_those_of_fp32_masters_and_a_gradscaler(
    kind: type[GPT], first: float, accumulation: int, max_norm: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    plain, found, skipped = train_both(kind(), EVERY_TIER, tmp_path, first, max_norm, accumulation)
    assert set(POISONED) <= set(plain.skipped)
    assert first < LARGE or len(plain.skipped) > 4
    assert skipped == len(plain.skipped)
    frozen = {n for n, p in plain.masters.named_parameters() if not p.requires_grad}
    names = [n for n, _ in plain.masters.named_parameters() if n not in frozen]
    whole = [
        torch.cat([t[n].detach().flatten() for n in names]) for t in (found, dict(plain.masters.named_parameters()))
    ]
    # The last bit of a clipped gradient depends on the order of the norm's sum.
    assert distance(*whole) <= (1e-6 if max_norm is None else 1e-3)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("slow", [None, "update", "streamed", "down", "everything"])
def test_a_shared_update_and_slow_lanes_change_nothing(
    share: float, slow: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if slow is not None:
        slow_down(monkeypatch, slow)
    torch.manual_seed(0)
    placements = ((H, H, H), (G, G, H), (G, G, G), (H, H, N))
    plain, found, skipped = train_both(GPT(), placements, tmp_path, LARGE, None, 1, gpu_update_share=share)
    assert skipped == len(plain.skipped) > 4
    assert_same(found, plain.masters, 1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("placement", EVERY_TIER)
def test_a_skipped_step_changes_no_bit_of_the_state(placement: tuple, share: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plan = plan_for(model, (placement,), tmp_path, Precision.FP16, gpu_update_share=share)
    optimizer = optimizer_of(model)
    tell = poisoning(model)
    scheduler = scheduler_of(optimizer)
    with Engine(model, plan, optimizer, scheduler, grad_scaler=scaler_of()) as engine:
        states = []
        for step, tokens in enumerate(batches(POISONED[0], batch_size=2, length=6), start=1):
            tell(step)
            engine.backward(engine(tokens))
            engine.step()
            engine.finish()
            numbers = [contents.read(s, plan.state_format, engine.store) for s in engine.states]
            whole = torch.cat([t for c in numbers for t in (c.weights, *c.moments.values())])
            states.append((whole, dict(engine.hyperparameters.steps), scheduler.last_epoch, engine.global_step))
        assert engine.skipped_steps == 1
        assert engine.gradient_norm is not None
        assert not math.isfinite(engine.gradient_norm)
    before, after = states[-2:]
    assert torch.equal(before[0], after[0])
    assert before[1:3] == after[1:3]
    assert before[3] + 1 == after[3]
    assert not torch.equal(states[0][0], before[0])


@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_the_norm_is_that_of_the_unscaled_gradients(max_norm: float | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = Plain(copy.deepcopy(model), scaler_of(), max_norm)
    plan = plan_for(model, EVERY_TIER, tmp_path, Precision.FP16)
    with Engine(model, plan, optimizer_of(model), None, max_norm, grad_scaler=scaler_of()) as engine:
        tokens = batches(1, batch_size=2, length=6)[0]
        engine.backward(engine(tokens))
        engine.step()
        plain.step(1, [tokens])
        assert engine.gradient_norm == pytest.approx(plain.norms[0], rel=1e-5)


def test_a_checkpoint_keeps_the_scale_and_training_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    data = batches(8, batch_size=2, length=6)

    def engine_of(first: float) -> Engine:
        torch.manual_seed(0)
        model = GPT()
        optimizer = optimizer_of(model)
        plan = plan_for(model, EVERY_TIER, tmp_path, Precision.FP16)
        return Engine(model, plan, optimizer, scheduler_of(optimizer), grad_scaler=scaler_of(first, interval=3))

    def train(engine: Engine, some: list[torch.Tensor]) -> None:
        for tokens in some:
            engine.backward(engine(tokens))
            engine.step()

    with engine_of(LARGE) as engine:
        train(engine, data[:5])
        path = engine.save_checkpoint(tmp_path / "checkpoints").wait()
        assert engine.loss_scale is not None
        scale = engine.loss_scale.state_dict()
        train(engine, data[5:])
        expected, counted = engine.state_dict(), engine.hyperparameters.steps
    with engine_of(2.0) as engine:
        engine.load_checkpoint(path.parent, path.name)
        assert engine.loss_scale is not None
        assert engine.loss_scale.state_dict() == scale
        assert scale["scale"] < LARGE
        train(engine, data[5:])
        found = engine.state_dict()
        assert engine.hyperparameters.steps == counted
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_masters_are_exact_where_fp16_has_no_such_number() -> None:
    torch.manual_seed(0)
    model = GPT()
    with torch.no_grad():
        model.head.weight[0] = torch.tensor([1e-9, 1e-5, 70000.0, math.pi] * 8)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with Engine(model, plan_for(model, ((H, H, H), RESIDENT), None, Precision.FP16)) as engine:
        found = engine.state_dict()
        with engine.gathered(model.head):
            assert torch.equal(model.head.weight.float(), before["head.weight"].half().float())
    assert all(torch.equal(found[name], tensor) for name, tensor in before.items())


def test_a_scaler_that_is_of_no_use_is_refused() -> None:
    model = GPT()
    with pytest.raises(OffloadError, match="for plans in fp16, and this one is in bf16"):
        Engine(model, plan_for(model, (RESIDENT,), None, Precision.BF16), grad_scaler=scaler_of())
    with pytest.raises(OffloadError, match="not enabled"):
        Engine(
            model,
            plan_for(model, (RESIDENT,), None, Precision.FP16),
            grad_scaler=torch.amp.GradScaler("cpu", enabled=False),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_on_a_gpu_steps_are_skipped_and_made_as_by_a_gradscaler(placements: tuple, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain, found, skipped = train_both(GPT(), placements, tmp_path, LARGE, None, 1, "cuda")
    assert skipped == len(plain.skipped) > 4
    expected = {n: p.detach().cpu() for n, p in plain.masters.named_parameters()}
    # Matrix products of other shapes may round otherwise.
    assert distance(*(torch.cat([t[n].flatten() for n in expected]) for t in (found, expected))) <= 1e-3


def test_a_run_goes_on_after_a_bad_batch_and_counts_the_skipped_step(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    source = load_source(tmp_path / "net.py", None)
    model = source.build()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    plan = replace(plan_for(GPT(), (RESIDENT,), None, Precision.FP16), parameter_shapes=shapes)
    plan = replace(plan, placements=plan.placements[:1])
    plan = replace(plan, prediction=replace(plan.prediction, gpu_peak_bytes=1 << 30, gpu_upper_bytes=1 << 30))
    prepare_run(tmp_path / "run", resume=False)
    options = TrainingOptions(4, 1e-2, 1.0, 0, resume=False, dashboard=False)
    assert train(source, plan, tmp_path / "run", options, Console(file=io.StringIO())) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    # This loss is in fp16 itself, which has no number as large as the first scale. The third batch is infinite.
    assert [e["skipped_steps"] for e in steps] == [1, 1, 2, 2]
    assert math.isfinite(steps[3]["loss"])
    assert math.isfinite(steps[3]["gradient_norm"])
    notes = [e["message"] for e in events if e["event"] == "note"]
    assert any("step 1 are not finite" in note and "skipped" in note for note in notes)
