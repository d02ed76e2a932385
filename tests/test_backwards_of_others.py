"""Backwards that are not the engine's own leave numbers right, and units where the plan has them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine
from tests.plans import RESIDENT, H
from tests.test_engine_odd_models import plan_of, vectors

COUNT, SEGMENT = 12, 4
PATHS = tuple(f"layers.{i}" for i in range(COUNT))
UNITS = {"": RESIDENT} | dict.fromkeys(PATHS, (H, H, H))


class Deep(nn.Module):
    """More layers than there are slots, in segments that it may run again by itself."""

    def __init__(self, segments: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(COUNT))
        self.segments = segments

    def segment(self, x: torch.Tensor, first: int) -> torch.Tensor:
        for layer in self.layers[first : first + SEGMENT]:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for first in range(0, COUNT, SEGMENT):
            if self.segments:
                x = checkpoint(self.segment, x, first, use_reentrant=self.segments == "reentrant")
            else:
                x = self.segment(x, first)
        return x


def numbers(device: str) -> list[torch.Tensor]:
    return [x.to(device) for x in vectors()]


def made(device: str, segments: str = "", recompute: tuple[str, ...] = ()) -> tuple[Engine, nn.Module]:
    """An engine, and its model as plain PyTorch has it."""
    torch.manual_seed(0)
    model = Deep(segments)
    plain = copy.deepcopy(model).to(device)
    plan = plan_of(model, UNITS, recompute=recompute, device=device)
    return Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2)), plain


def trained(engine: Engine, plain: nn.Module) -> None:
    """One more step is plain PyTorch's."""
    x = vectors()[1].to(engine.plan.device)
    expected = plain(x).square().mean()
    loss = engine(x).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    engine.backward(loss)
    engine.step()
    torch.optim.AdamW(plain.parameters(), lr=1e-2).step()
    state = engine.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("segments", "recompute", "beyond"), [("", (), 0), ("", PATHS, 0), ("by hooks", (), SEGMENT - 2)]
)
def test_a_gradient_of_inputs_is_pytorchs_and_lets_units_go(
    segments: str, recompute: tuple[str, ...], beyond: int, device: str
) -> None:
    engine, plain = made(device, segments, recompute)
    with engine:
        for x in numbers(device):
            z = x.requires_grad_()
            (found,), (expected,) = (torch.autograd.grad(f(z).sum(), z) for f in (engine, plain))
            assert torch.equal(found, expected)
        assert engine.overflow_count == beyond  # a segment that runs again needs all of its units at once
        trained(engine, plain)


def test_a_graph_that_is_kept_fetches_its_weights_again(device: str) -> None:
    engine, plain = made(device)
    with engine:
        z = numbers(device)[0].requires_grad_()
        found, expected = engine(z).square().mean(), plain(z).square().mean()
        for _ in range(2):
            gradients = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (found, expected))
            assert torch.equal(*gradients)
        engine.backward(found)
        engine.step()
        assert engine.overflow_count == 0


def test_one_that_fails_is_forgotten_in_the_next_pass(device: str) -> None:
    engine, plain = made(device)
    with engine:
        z = numbers(device)[0].requires_grad_()
        out = engine(z)
        handle = z.register_hook(lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(out.sum(), z)
        handle.remove()
        for _ in range(2):
            torch.autograd.grad(engine(z).sum(), z)
        assert engine.overflow_count == 0
        trained(engine, plain)


@pytest.mark.parametrize("alone", [False, True])
def test_a_gradient_penalty_is_plain_pytorchs(alone: bool, device: str) -> None:
    engine, plain = made(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)

    def loss(f: Engine | nn.Module, x: torch.Tensor) -> torch.Tensor:
        z = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return penalty if alone else f(x).square().mean() + penalty

    with engine:
        for x in numbers(device):
            loss(plain, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(loss(engine, x))
            engine.step()
        state = engine.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor.cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("segments", "recompute", "beyond"),
    [("", (), 0), ("", PATHS, 0), ("by hooks", (), SEGMENT - 2), ("reentrant", (), SEGMENT - 2)],
)
def test_a_frozen_critic_in_the_backward_of_another_engine_lets_units_go(
    segments: str, recompute: tuple[str, ...], beyond: int, device: str
) -> None:
    maker, plain_maker = made(device)
    critic, plain_critic = made(device, segments, recompute)
    optimizer = torch.optim.AdamW(plain_maker.parameters(), lr=1e-2)
    with maker, critic:
        for model in (critic.model, plain_critic):
            model.requires_grad_(False)
        for x in numbers(device):
            plain_critic(plain_maker(x)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            maker.backward(critic(maker(x)).square().mean())
            maker.step()
        assert (maker.overflow_count, critic.overflow_count) == (0, beyond)
        state = maker.state_dict()
    for name, tensor in plain_maker.state_dict().items():
        torch.testing.assert_close(state[name], tensor.cpu(), rtol=1e-5, atol=1e-6)
