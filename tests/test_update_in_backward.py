"""Updates that begin in backward: the same training, and no step that stays half done unseen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as reentrant

from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Buckets, Precision
from offload.updater import Updater
from tests.loops import losses_of
from tests.models import GPT, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for, units_of
from tests.slow import slow_down
from tests.test_engine_equals_pytorch import assert_same, optimizer_of, scheduler_of, train_plainly

STEPS = 20


def engine_of(model: nn.Module, placements: tuple, path: Path, **changes: Any) -> Engine:
    optimizer = optimizer_of(model)
    plan = plan_for(model, placements, path, **changes)
    return Engine(model, plan, optimizer, scheduler_of(optimizer), update_in_backward=True)


def train(engine: Engine, data: list) -> list[float]:
    losses = losses_of(engine, data)
    assert engine.overflow_count == 0
    return losses


def check_equal(kind: type[GPT], placements: tuple, path: Path, steps: int, **changes: Any) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    accumulation = changes.get("gradient_accumulation_steps", 1)
    data = batches(steps * accumulation)
    with engine_of(model, placements, path, **changes) as engine:
        losses, found = train(engine, data), engine.state_dict()
    assert losses == pytest.approx(train_plainly(plain, data, accumulation, None), rel=1e-6)
    assert_same(found, plain, 1e-6)


@pytest.mark.parametrize("kind", [GPT, TiedGPT, FrozenGPT, SkippingGPT, LoopingGPT])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_twenty_steps_end_where_plain_adamw_does(kind: type[GPT], accumulation: int, tmp_path: Path) -> None:
    check_equal(kind, EVERY_TIER, tmp_path, STEPS, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("placement", EVERY_TIER)
def test_in_every_placement_with_and_without_recompute(placement: tuple, recompute: bool, tmp_path: Path) -> None:
    blocks = tuple(u for u in units_of(GPT()) if u.startswith("h.")) if recompute else ()
    check_equal(GPT, (placement,), tmp_path, 5, recompute=blocks)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_with_a_shared_update(share: float, tmp_path: Path) -> None:
    placements = ((H, H, H), (G, G, H), (G, H, H), (H, G, H), (G, G, G), (H, H, N))
    check_equal(GPT, placements, tmp_path, STEPS, gpu_update_share=share, buckets=Buckets(1, 1000, 16384))


@pytest.mark.parametrize("slow", ["up", "returns", "down", "update", "streamed", "disk", "everything"])
@pytest.mark.parametrize("kind", [GPT, LoopingGPT])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_slow_transfers_change_nothing(
    slow: str, kind: type[GPT], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, slow)
    check_equal(kind, EVERY_TIER[1:], tmp_path, 4, gpu_update_share=share)


def test_updates_really_begin_in_backward_and_the_root_s_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, begun = GPT(), []
    begin = Updater.begin

    def told(updater: Updater, updates: Any, clip: Any) -> None:
        begun.extend(u.state.unit.name for u in updates)
        begin(updater, updates, clip)

    monkeypatch.setattr(Updater, "begin", told)
    with engine_of(model, ((H, H, H), RESIDENT), Path(), gradient_accumulation_steps=2) as engine:
        tokens = batches(1)[0]
        engine.backward(engine(tokens))
        assert begun == []
        engine.step()
        assert begun == []
        engine.backward(engine(tokens))
        assert begun[:6] == ["head", "ln_f", "h.3", "h.2", "h.1", "h.0"]
        assert "" not in begun
        in_backward = len(begun)
        engine.step()
    units = [u for u in units_of(model) if u]
    assert sorted(begun[:in_backward]) == sorted(units)
    assert len(begun) == len(set(begun))


class BehindItsParameters(nn.Module):
    """Of a block whose last use of a weight is for the gradient of its input, when its own is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slow = x
        for _ in range(3):
            slow = torch.sin(slow * self.weight.detach())
        return x + slow + self.weight


class LateGPT(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.h.append(BehindItsParameters())


@pytest.mark.parametrize("placement", [RESIDENT, (H, H, H), (G, G, H)])
def test_weights_that_backward_still_needs_are_those_of_forward(placement: tuple, tmp_path: Path) -> None:
    check_equal(LateGPT, (placement,), tmp_path, 5)


def fail_in_backward(model: nn.Module) -> torch.utils.hooks.RemovableHandle:
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("the middle of backward")

    return model.h[1].up.weight.register_hook(fail)


def test_after_a_failure_in_backward_nothing_goes_on_but_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(6)
    with engine_of(model, EVERY_TIER, tmp_path) as engine:
        train(engine, data[:2])
        path = engine.save_checkpoint(tmp_path / "checkpoints").wait()
        handle = fail_in_backward(model)
        with pytest.raises(RuntimeError, match="the middle of backward"):
            train(engine, data[2:3])
        handle.remove()
        refused = "the updates of 4 of 9 units had begun .* load a checkpoint"
        for use in (
            lambda: engine(data[2]),
            lambda: model.eval()(data[2]),
            engine.state_dict,
            lambda: engine.save_checkpoint(tmp_path / "checkpoints").wait(),
        ):
            with pytest.raises(OffloadError, match=refused), torch.no_grad():
                use()
        engine.load_checkpoint(path.parent, path.name)
        train(engine, data[2:])
        found = engine.state_dict()
    train_plainly(plain, data, 1, None)
    assert_same(found, plain, 1e-6)


def test_a_failure_before_the_first_update_is_no_harm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(3)
    with engine_of(model, EVERY_TIER, tmp_path) as engine:
        handle = model.head.weight.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(engine, data[:1])
        handle.remove()
        train(engine, data)
        found = engine.state_dict()
    train_plainly(plain, data, 1, None)
    assert_same(found, plain, 1e-6)


def test_between_backward_and_step_the_model_is_not_to_be_used(tmp_path: Path) -> None:
    model, tokens = GPT(), batches(1)[0]
    with engine_of(model, EVERY_TIER, tmp_path) as engine:
        engine.backward(engine(tokens))
        for use in (lambda: engine(tokens), engine.state_dict, lambda: engine.gathered(model)):
            with pytest.raises(OffloadError, match=r"call step\(\) first"):
                use()
        engine.step()
        engine(tokens)
        engine.backward(engine(tokens))
        engine.zero_grad()
        with pytest.raises(OffloadError, match="load a checkpoint"):
            engine(tokens)


class ReentrantGPT(GPT):
    """One block is called twice, each call recomputed by a backward within backward."""

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in (*self.h, self.h[3]):
            x = reentrant(block, x, use_reentrant=True)
        return self.head(self.ln_f(x))


def test_a_gradient_that_comes_in_parts_is_refused(tmp_path: Path) -> None:
    model = ReentrantGPT()
    with (
        pytest.raises(OffloadError, match=r"unit 'h\.3' got one more gradient .*use_reentrant=False"),
        engine_of(model, (RESIDENT,), tmp_path) as engine,
    ):
        train(engine, batches(1))


@pytest.mark.parametrize(
    ("changes", "max_norm", "why"), [({}, 1.0, "clipping"), ({"precision": Precision.FP16}, None, "loss scale")]
)
def test_it_is_refused_where_all_gradients_are_needed_first(changes: dict, max_norm: float | None, why: str) -> None:
    model = GPT()
    with pytest.raises(OffloadError, match=f"{why}.* needs all gradients before the first update"):
        Engine(model, plan_for(model, (RESIDENT,), **changes), max_grad_norm=max_norm, update_in_backward=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("placements", [(RESIDENT,), ((H, H, H),), EVERY_TIER])
def test_on_a_gpu_it_changes_no_bit(placements: tuple, tmp_path: Path) -> None:
    found = []
    for early in (False, True):
        torch.manual_seed(0)
        model = GPT(width=256)
        optimizer = optimizer_of(model)
        plan = plan_for(model, placements, tmp_path, Precision.BF16, "cuda")
        with Engine(model, plan, optimizer, scheduler_of(optimizer), update_in_backward=early) as engine:
            train(engine, batches(STEPS))
            found.append(engine.state_dict())
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
