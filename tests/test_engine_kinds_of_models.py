"""What people train, through every placement: six steps end where plain PyTorch does, to the last bit in fp32."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from offload.engine import Engine
from offload.plan import Placement, Plan
from tests.loops import losses_of
from tests.models import GPT, Block, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for, units_of

PLACEMENTS = {
    "resident": (RESIDENT,),
    "updated on the host": ((G, H, H),),
    "on the host": ((H, H, H),),
    "on disk": ((N, H, N),),
    "mixed": EVERY_TIER,
}
STEPS = 6


class Adapted(nn.Module):
    """A frozen linear map and a trained one of rank 2 beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 8)
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class LoRAGPT(GPT):
    """Nothing is trained but adapters in the blocks; the first block has none."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        for block in self.h[1:]:
            block.up, block.down = Adapted(block.up), Adapted(block.down)


class SharingGPT(GPT):
    """The first and the third block are one module, and two others share a part."""

    def __init__(self) -> None:
        super().__init__()
        self.h[2] = self.h[0]
        self.h[3].up = self.h[1].up


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))


class MoE(nn.Module):
    """Every token goes to one of six experts; those that get none are called with none, or not called at all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 6), nn.ModuleList(Expert() for _ in range(6))
        self.calls_all = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            where = (chosen == i).nonzero().flatten()
            if len(where) or self.calls_all:
                out = out.index_add(0, where, expert(flat[where]) * weight[where, None])
        return x + out.view_as(x)


class MoEGPT(GPT):
    """Mixtures of experts between its blocks."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.h = nn.ModuleList([Block(32, 4), MoE(), Block(32, 4), MoE()])
        self.calls = 0

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.h[1].calls_all = self.h[3].calls_all = self.calls % 3 == 0
        return super().run(tokens)


class DroppingGPT(GPT):
    """Blocks are left out at random, and called a random number of times."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for i, block in enumerate(self.h):
            for _ in range((self.calls * 7 + i * 5) % 3):
                x = block(x)
        return self.head(self.ln_f(x))


class GatedGPT(GPT):
    """Each block is called twice, and in some steps one of the results is cut off from the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for i, block in enumerate(self.h):
            y = block(x)
            x = x + (y.detach() if (self.calls + i) % 2 else y) + self.h[i - 1](x.detach()) / 2
        return self.head(self.ln_f(x))


KINDS = (
    GPT,
    TiedGPT,
    FrozenGPT,
    LoRAGPT,
    SharingGPT,
    MoEGPT,
    SkippingGPT,
    LoopingGPT,
    DroppingGPT,
)


def plan_of(model: nn.Module, placements: tuple, nvme: Path, **changes: object) -> Plan:
    """As ``plan_for``, with every expert a unit of its own."""
    plan = plan_for(model, placements, nvme, **changes)
    listed = []
    for p in plan.placements:
        module = model.get_submodule(p.unit)
        if isinstance(module, MoE):
            tiers = (p.parameters, p.gradients, p.optimizer)
            listed += [Placement(f"{p.unit}.experts.{i}", *tiers) for i in range(len(module.experts))]
            listed.append(Placement(f"{p.unit}.gate", *tiers))
        else:
            listed.append(p)
    return replace(plan, placements=tuple(listed))


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train_plainly(model: nn.Module, data: list[torch.Tensor]) -> list[float]:
    optimizer, losses = optimizer_of(model), []
    for tokens in data:
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("where", "recompute"), [*((w, False) for w in PLACEMENTS), ("mixed", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_plain_training(kind: type[GPT], where: str, recompute: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    data = batches(STEPS)
    blocks = tuple(u for u in units_of(model) if u.startswith("h.") and u in dict(model.named_modules()))
    plan = plan_of(model, PLACEMENTS[where], tmp_path, recompute=blocks if recompute else ())
    with Engine(model, plan, optimizer_of(model)) as engine:
        assert losses_of(engine, data) == train_plainly(plain, data)
        found = engine.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("where", PLACEMENTS)
def test_results_cut_off_from_the_loss_change_no_more_than_the_order_of_sums(where: str, tmp_path: Path) -> None:
    """What leads into a unit is summed inside first, so where it also leads elsewhere the last bit may differ."""
    torch.manual_seed(0)
    model = GatedGPT()
    plain = copy.deepcopy(model)
    data = batches(STEPS)
    with Engine(model, plan_of(model, PLACEMENTS[where], tmp_path), optimizer_of(model)) as engine:
        assert losses_of(engine, data) == pytest.approx(train_plainly(plain, data), rel=1e-5)


@pytest.mark.parametrize("where", ["on the host", "on disk"])
def test_frozen_weights_stream_and_carry_no_state(where: str, tmp_path: Path) -> None:
    model = LoRAGPT()
    placements = PLACEMENTS[where]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with Engine(model, plan_of(model, placements, tmp_path), optimizer_of(model)) as engine:
        losses_of(engine, batches(1))
        engine.finish()
        engine._up.submit(lambda: None).synchronize()  # what is fetched ahead has come
        before = engine.traffic_bytes()
        losses_of(engine, batches(1))
        engine.finish()
        engine._up.submit(lambda: None).synchronize()
        moved = {link: size - before[link] for link, size in engine.traffic_bytes().items()}
        state = sum(s.unit.shape.trainable_elements for s in engine.states)
        states = engine.states
        frozen = next(s for s in states if s.unit.name == "h.0")
    # Parameters are padded to 64 elements; none of the padding is frozen weights.
    assert trained <= state <= trained + 64 * sum(p.requires_grad for p in model.parameters())
    assert moved["device_to_host"] == 4 * state
    assert frozen.unit.shape.trainable_elements == 0
    assert frozen.state_extents in (None, [])
    # What does not change may stay on the device from step to step; what has adapters is fetched as a whole.
    assert moved["host_to_device"] >= 4 * sum(s.unit.shape.elements for s in states if s.unit.shape.trainable_elements)
