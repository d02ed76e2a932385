"""A block that runs again in backward has the buffers that it began with, and leaves those that came later."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from offload.engine import Engine
from offload.second_run import SecondRun
from tests.plans import RESIDENT, H
from tests.test_engine_odd_models import assert_trains_as_plain, plan_of, vectors


class Averaging(nn.Module):
    """Keeps a mean of what it computes, and uses it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(8, 8), how
        self.register_buffer("mean", torch.ones(8))
        self.register_buffer("last", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.linear(x)
        if self.training:
            new = x.detach().mean(0)
            if self.how == "reassigned":
                self.mean = 0.9 * self.mean + 0.1 * new
            elif self.how == "changed in place":
                self.mean.mul_(0.9).add_(new, alpha=0.1)
            elif self.how == "changed by its data":
                self.mean.data.mul_(0.9).add_(new, alpha=0.1)
            else:
                self.mean.mul_(0.5 if self.last is None else 0.9).add_(new)
                self.last = self.mean = self.mean + 0.1 * new
        return torch.tanh(x * self.mean) * 2


class Three(nn.Module):
    """Blocks of one kind between two layers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.last(x).square().mean()


PATHS = tuple(f"blocks.{i}" for i in range(3))
UNITS = {"": RESIDENT} | dict.fromkeys((*PATHS, "last"), (H, H, H))
KINDS = {
    **{
        how: lambda how=how: Averaging(how) for how in ("reassigned", "changed in place", "changed by its data", "both")
    },
    # A bias before it, that of the layer before too, would have no gradient but what rounding leaves, of which AdamW
    # makes whole steps.
    "batch norm": lambda: nn.Sequential(nn.Tanh(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))),
    "spectral norm by hooks": lambda: nn.Sequential(spectral_norm(nn.Linear(8, 8))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_that_forward_changes_are_those_of_training_without_recompute(kind: str, device: str) -> None:
    torch.manual_seed(0)
    model = Three(*(KINDS[kind]() for _ in PATHS))
    assert_trains_as_plain(model, plan_of(model, UNITS, recompute=PATHS, device=device), vectors())


def test_two_forwards_before_their_backward_each_run_again_as_they_ran(device: str) -> None:
    torch.manual_seed(0)
    model = Three(*(Averaging("reassigned") for _ in PATHS))
    plain = copy.deepcopy(model).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    plan = plan_of(model, UNITS, recompute=PATHS, device=device)
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for x, y in zip(vectors(), reversed(vectors()), strict=True):
            (plain(x.to(device)) + plain(y.to(device))).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(x) + engine(y))
            engine.step()
        state = engine.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor.cpu(), rtol=1e-5, atol=1e-6)


def test_large_buffers_that_never_change_are_not_kept() -> None:
    block = nn.Linear(8, 8)
    block.register_buffer("table", torch.zeros(64, 64))
    block.register_buffer("count", torch.zeros(()))
    changing: dict[bool, set[tuple[int, str]]] = {}
    for _ in range(2):
        call = SecondRun(block, changing)
        with call.first():
            block.count.add_(1)
        assert [copy.numel() for copy in call._copies.values()] == [1]
    with call.second():
        assert block.count == 1
        block.count.add_(1)
    assert block.count == 2
