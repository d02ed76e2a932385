"""Training through the tiers is training: the same parameters as plain PyTorch, step by step."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.optimizer import split_master_
from offload.plan import Plan, Precision
from tests.models import GPT, FrozenGPT, LoopingGPT, SkippingGPT, TiedGPT, batches
from tests.plans import EVERY_TIER, RESIDENT, plan_for, units_of

MODELS = (GPT, TiedGPT, FrozenGPT, SkippingGPT, LoopingGPT)
STEPS = 20


def groups(model: nn.Module) -> list[dict]:
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim < 2]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}]


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.9, 0.95))


def scheduler_of(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def train_plainly(model: nn.Module, data: list, accumulation: int, max_norm: float | None) -> list[float]:
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    losses = []
    for start in range(0, len(data), accumulation):
        for tokens in data[start : start + accumulation]:
            loss = model(tokens)
            (loss / accumulation).backward()
            losses.append(loss.item())
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def train_through_tiers(
    model: nn.Module, plan: Plan, data: list, max_norm: float | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = optimizer_of(model)
    losses = []
    with Engine(model, plan, optimizer, scheduler_of(optimizer), max_norm) as engine:
        for tokens in data:
            loss = engine(tokens)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        assert engine.overflow_count == 0
        return losses, engine.state_dict()


def assert_same(found: dict[str, torch.Tensor], model: nn.Module, tolerance: float) -> None:
    """Every parameter within ``tolerance`` of the model's, relative to its norm."""
    for name, parameter in model.named_parameters():
        expected = parameter.detach().float()
        assert distance(found[name], expected) <= tolerance, name


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("accumulation", "max_norm"), [(1, None), (1, 0.05), (2, 0.05)])
def test_twenty_steps_in_fp32_through_every_tier_end_where_plain_adamw_does(
    kind: type[GPT], accumulation: int, max_norm: float | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    data = batches(STEPS * accumulation)
    plan = plan_for(model, EVERY_TIER, tmp_path, gradient_accumulation_steps=accumulation)
    losses, found = train_through_tiers(model, plan, data, max_norm)
    assert losses == pytest.approx(train_plainly(plain, data, accumulation, max_norm), rel=1e-6)
    assert_same(found, plain, 1e-6)


@pytest.mark.parametrize("shift", range(1, len(EVERY_TIER)))
def test_every_unit_can_be_in_every_placement(shift: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TiedGPT()
    plain = copy.deepcopy(model)
    data = batches(5)
    placements = EVERY_TIER[shift:] + EVERY_TIER[:shift]
    losses, found = train_through_tiers(model, plan_for(model, placements, tmp_path), data, 0.05)
    assert losses == pytest.approx(train_plainly(plain, data, 1, 0.05), rel=1e-6)
    assert_same(found, plain, 1e-6)


@pytest.mark.parametrize("placements", [(p,) for p in EVERY_TIER])
def test_recompute_changes_nothing(placements: tuple, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(5)
    plan = plan_for(model, placements, tmp_path, recompute=tuple(u for u in units_of(model) if u.startswith("h.")))
    losses, found = train_through_tiers(model, plan, data, 0.05)
    assert losses == pytest.approx(train_plainly(plain, data, 1, 0.05), rel=1e-6)
    assert_same(found, plain, 1e-6)


def test_amp_equals_autocast_over_fp32_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(8)
    _, found = train_through_tiers(model, plan_for(model, EVERY_TIER, tmp_path, Precision.AMP), data, 1.0)
    plain.forward = torch.autocast("cpu", torch.bfloat16)(plain.forward)
    train_plainly(plain, data, 1, 1.0)
    assert_same(found, plain, 1e-6)


def train_with_fp32_masters(model: nn.Module, data: list, max_norm: float | None) -> dict[str, torch.Tensor]:
    """The plain loop of bf16 training: fp32 masters beside bf16 weights, rounded as the split master rounds."""
    masters = {n: nn.Parameter(p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data = rounded(masters[name].detach()) if parameter.requires_grad else parameter.data.bfloat16()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [masters[n] for n, p in trained.items() if p.ndim > 1]
    plain = [masters[n] for n, p in trained.items() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    scheduler = scheduler_of(optimizer)
    for tokens in data:
        model(tokens).backward()
        for name, parameter in trained.items():
            masters[name].grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(masters.values(), max_norm)
        optimizer.step()
        scheduler.step()
        for name, parameter in trained.items():
            parameter.data.copy_(rounded(masters[name].detach()))
    return {n: m.detach() for n, m in masters.items()}


def rounded(master: torch.Tensor) -> torch.Tensor:
    weight, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_master_(master, weight, remainder)
    return weight


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("max_norm", "tolerance"),
    # The last bit of the norm depends on the order of its sum, and may tip a weight to the next bf16.
    [(None, 1e-6), (0.05, 1e-3)],
)
def test_twenty_steps_in_bf16_equal_a_loop_with_fp32_masters(
    kind: type[GPT], max_norm: float | None, tolerance: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    data = batches(STEPS)
    _, found = train_through_tiers(model, plan_for(model, EVERY_TIER, tmp_path, Precision.BF16), data, max_norm)
    masters = train_with_fp32_masters(plain, data, max_norm)
    expected = {n: masters[n] if p.requires_grad else p.float() for n, p in plain.named_parameters()}
    whole = [torch.cat([tensors[n].flatten() for n in expected]) for tensors in (found, expected)]
    assert distance(*whole) <= tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_the_same_code_trains_on_a_gpu(kind: type[GPT], placements: tuple, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model).cuda()
    data = batches(STEPS)
    losses, found = train_through_tiers(model, plan_for(model, placements, tmp_path, device="cuda"), data, 0.05)
    reference = train_plainly(plain, [tokens.cuda() for tokens in data], 1, 0.05)
    assert losses == pytest.approx(reference, rel=1e-5)
    assert_same(found, plain.cpu(), 1e-4)
