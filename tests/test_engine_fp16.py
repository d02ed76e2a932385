"""Training in fp16 is the loop with fp32 masters and ``torch.amp.GradScaler``, its skipped steps too."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offload import checkpoint
from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Precision
from tests.models import GPT, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, plan_for
from tests.test_engine_equals_pytorch import assert_same, distance, optimizer_of, scheduler_of

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
    model: nn.Module, placements: tuple, path: Path, first: float, max_norm: float | None, accumulation: int, **changes
) -> tuple[Plain, dict[str, torch.Tensor], int]:
    """Twenty steps by both; returns the plain loop, the engine's masters and its count of skipped steps."""
    plain = Plain(copy.deepcopy(model), scaler_of(first), max_norm)
    plan = plan_for(
        model, placements, path, Precision.FP16, gradient_accumulation_steps=accumulation, **changes
    )  # fmt: skip
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
            plain.step(step, micro_batches)
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
    whole = [torch.cat([t[n].detach().flatten() for n in names]) for t in (found, dict(plain.masters.named_parameters()))]
    # The last bit of a clipped gradient depends on the order of the norm's sum.
    assert distance(*whole) <= (1e-6 if max_norm is None else 1e-3)
