"""Models and loops that are legal PyTorch and easy to get wrong: each trains as it would without the engine."""

import copy
import gc
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError, PlanError
from offload.plan import Placement, Plan
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, plan_for

AWAY = (H, H, H)


def plan_of(model: nn.Module, units: dict[str, tuple], **changes: Any) -> Plan:
    """A plan with exactly these units, and the root unit on the device."""
    return replace(
        plan_for(GPT(), (RESIDENT,), **changes),
        parameter_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        placements=tuple(Placement(name, *tiers) for name, tiers in {"": RESIDENT, **units}.items()),
    )


def assert_trains_as_plain(
    model: nn.Module, plan: Plan, inputs: list[torch.Tensor], *, overflows: bool = False
) -> None:
    plain = copy.deepcopy(model).to(plan.device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    expected = []
    for x in inputs:
        loss = plain(x.to(plan.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    found = []
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for x in inputs:
            loss = engine(x)
            engine.backward(loss)
            engine.step()
            found.append(loss.item())
        assert overflows or engine.overflow_count == 0
        state = engine.state_dict()
    assert found == pytest.approx(expected, rel=1e-5)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name].float(), tensor.cpu().float(), rtol=1e-5, atol=1e-6)


def vectors(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 8, generator=generator) for _ in range(count)]


class Collecting(nn.Module):
    """Its layers append to a list that they are given."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, extras: list[torch.Tensor]) -> torch.Tensor:
            x = torch.tanh(self.linear(x))
            extras.append(x.square().mean())
            return x

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, extras = self.first(x), []
        for layer in self.layers:
            x = layer(x, extras)
        return x.mean() + sum(extras)


class Ignoring(nn.Module):
    """A layer does not use one of its inputs, so what leads to it gets no gradient at all."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side, self.layer = nn.Linear(8, 8), nn.Linear(8, 8), self.Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.main(x), self.side(x)).square().mean()


class SameTwice(nn.Module):
    """A layer looks at whether two of its inputs are one tensor."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + y if x is y else self.linear(x) - y

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), self.Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.layer(x, x).square().mean()


class Many(nn.Module):
    """Units whose inputs need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x).square().mean() for layer in self.layers)


class Normed(nn.Module):
    """Batch norm in recomputed blocks, and a parameter without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()) for _ in range(3))
        self.layers[0].nothing = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


LAYERS = {f"layers.{i}": AWAY for i in range(3)}


@pytest.mark.parametrize(
    ("kind", "units", "recompute"),
    [
        (Collecting, LAYERS, ()),
        (Ignoring, {"layer": AWAY, "side": AWAY}, ()),
        (SameTwice, {"layer": AWAY}, ()),
        (Many, {f"layers.{i}": AWAY for i in range(8)}, ()),
        (Normed, LAYERS, ()),
        (Normed, LAYERS, tuple(LAYERS)),
    ],
)
def test_an_odd_model_trains_as_without_the_engine(kind: type[nn.Module], units: dict, recompute: tuple) -> None:
    torch.manual_seed(0)
    model = kind()
    assert_trains_as_plain(model, plan_of(model, units, recompute=recompute), vectors())


class ChangesWhatIsNeeded(nn.Module):
    """The output of its first layer, or of a function that saved its own result, is changed when both have used it."""

    def __init__(self, changed: str) -> None:
        super().__init__()
        self.first, self.last, self.changed = nn.Linear(8, 8), nn.Linear(8, 8), changed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        z = torch.exp(y)
        out = self.last(y * z)
        if self.changed:
            {"input": y, "result": z}[self.changed].detach().mul_(2)
        return out.square().mean()


@pytest.mark.parametrize("tiers", [RESIDENT, AWAY])
@pytest.mark.parametrize("changed", ["input", "result"])
def test_what_backward_needs_must_not_change_meanwhile(changed: str, tiers: tuple) -> None:
    x = vectors(1)[0]
    with pytest.raises(RuntimeError, match="inplace operation"):
        ChangesWhatIsNeeded(changed)(x).backward()
    model = ChangesWhatIsNeeded(changed)
    with Engine(model, plan_of(model, {"first": tiers, "last": tiers})) as engine:
        loss = engine(x)
        with pytest.raises((OffloadError, RuntimeError), match=r"in place|inplace"):
            engine.backward(loss)
        model.changed = ""
        engine.backward(engine(x))  # what failed leaves nothing behind
        engine.step()


def test_a_copy_of_the_model_is_whole_inside_of_gathered() -> None:
    model = GPT()
    expected = copy.deepcopy(model.state_dict())
    with Engine(model, plan_for(model, (AWAY,))) as engine:
        with engine.gathered(model):
            twin = copy.deepcopy(model)
        engine.backward(engine(batches(1)[0]))
        engine.step()
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_failed_backward_leaves_nothing_behind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    good, bad = batches(3), batches(1, seed=9)[0]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for tokens in good:
        plain(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    with Engine(model, plan_for(model, EVERY_TIER, tmp_path), torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for tokens in good:
            loss = engine(bad)

            def fail(_: torch.Tensor) -> None:
                raise MemoryError("pretended")

            handle = model.h[1].up.weight.register_hook(fail)
            with pytest.raises(MemoryError):
                engine.backward(loss)
            handle.remove()
            engine.backward(engine(tokens))
            engine.step()
        found = engine.state_dict()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_the_norm_is_of_all_backwards_before_the_step() -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    with Engine(model, plan_for(model, (AWAY,)), max_grad_norm=1.0) as engine:
        for tokens in batches(2):
            engine.backward(engine(tokens))
            plain(tokens).backward()
        engine.step()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        assert engine.gradient_norm == pytest.approx(expected.item(), rel=1e-5)


def test_a_script_need_not_close_the_engine(tmp_path: Path) -> None:
    code = f"""
import pathlib
from offload.engine import Engine
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, plan_for
model = GPT()
engine = Engine(model, plan_for(model, EVERY_TIER, pathlib.Path({str(tmp_path)!r})))
for tokens in batches(3):
    engine.backward(engine(tokens))
    engine.step()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_scheduler_with_counted_milestones_goes_on_after_a_resume(tmp_path: Path) -> None:
    rates = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = GPT(layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 4], gamma=0.1)
        with Engine(model, plan_for(model, (RESIDENT,)), optimizer, scheduler) as engine:
            if resumed:
                engine.load_checkpoint(tmp_path)
            for step, tokens in enumerate(batches(6)[engine.global_step :], start=engine.global_step + 1):
                engine.backward(engine(tokens))
                engine.step()
                if step == 3:
                    engine.save_checkpoint(tmp_path).wait()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("how", ["scheduler", "plateau", "state", "complex", "in place", "unfrozen", "late backward"])
def test_what_the_engine_can_not_do_is_refused(how: str) -> None:
    model = GPT(layers=1)
    optimizer = torch.optim.AdamW(model.parameters())
    plan = plan_for(model, (AWAY,))
    tokens = batches(1)[0]
    with pytest.raises((OffloadError, PlanError)):
        if how == "scheduler":
            other = torch.optim.AdamW(model.parameters())
            Engine(model, plan, optimizer, torch.optim.lr_scheduler.StepLR(other, 1))
        elif how == "plateau":
            Engine(model, plan, optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
        elif how == "state":
            model(tokens).backward()
            optimizer.step()
            Engine(model, plan, optimizer)
        elif how == "complex":
            model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
            Engine(model, plan_for(model, (AWAY,)))
        elif how == "in place":
            model.wte = nn.Embedding(61, 32, max_norm=0.5)
            with Engine(model, plan_for(model, (AWAY,))) as engine:
                engine(tokens)
        elif how == "unfrozen":
            model.wpe.requires_grad_(False)
            with Engine(model, plan_for(model, (AWAY,))) as engine:
                model.wpe.requires_grad_(True)
                engine.backward(engine(tokens))
                engine.step()
        else:
            with Engine(model, plan_for(model, ((G, G, H),))) as engine:
                early = engine(tokens)
                engine.backward(engine(tokens))
                engine.step()
                engine.backward(early)


def test_a_closed_engine_holds_nothing_even_while_somebody_keeps_a_loss():
    model = GPT()
    engine = Engine(model, plan_for(model, ((G, H, H),)))
    loss = engine(batches(1)[0])
    engine.backward(loss)
    engine.step()
    held = [weakref.ref(state) for state in engine.states]
    engine.close()
    engine.close()
    gc.collect()
    assert loss.grad_fn is not None
    assert [state() for state in held] == [None] * len(held)
