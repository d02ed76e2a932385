"""Every optimizer through the tiers: the parameters that its own ``step`` makes, and only the state that it needs."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offload import checkpoint
from offload.engine import Engine
from offload.errors import CheckpointError, OffloadError
from offload.hyperparameters import default_optimizer, kind_of
from offload.lion import Lion
from offload.plan import OptimizerKind, Plan, Precision, StateFormat
from offload.residency import footprint, state_bytes
from offload.state import weight_dtype
from tests.loops import losses_of
from tests.models import GPT, SkippingGPT, batches
from tests.plans import EVERY_TIER, G, H, N, plan_for

STEPS = 20
Make = Callable[[list[dict]], torch.optim.Optimizer]
CASES: dict[str, tuple[OptimizerKind, Make]] = {
    "adam": (OptimizerKind.ADAM, lambda g: torch.optim.Adam(g, lr=1e-2, betas=(0.9, 0.95))),
    "sgd": (OptimizerKind.SGD, lambda g: torch.optim.SGD(g, lr=1e-1)),
    "momentum": (OptimizerKind.SGD_MOMENTUM, lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9, dampening=0.3)),
    "nesterov": (OptimizerKind.SGD_MOMENTUM, lambda g: torch.optim.SGD(g, lr=1e-2, momentum=0.9, nesterov=True)),
    "adagrad": (
        OptimizerKind.ADAGRAD,
        lambda g: torch.optim.Adagrad(g, lr=1e-2, lr_decay=0.1, initial_accumulator_value=0.3),
    ),
    "lion": (OptimizerKind.LION, lambda g: Lion(g, lr=1e-3)),
}


def groups(model: nn.Module) -> list[dict]:
    """Matrices decay, the others do not, at a rate of their own."""
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = [p for p in trained if p.ndim < 2]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1}, {"params": plain, "lr": 3e-3}]


def train_plainly(model: nn.Module, make: Make, data: list) -> list[float]:
    optimizer = make(groups(model))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    losses = []
    for tokens in data:
        loss = model(tokens)
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses


def engine_for(model: nn.Module, make: Make, plan: Plan) -> Engine:
    optimizer = make(groups(model))
    return Engine(model, plan, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS), 0.5)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_in_fp32_through_every_tier_end_where_its_own_steps_do(name: str, tmp_path: Path) -> None:
    kind, make = CASES[name]
    torch.manual_seed(0)
    model = SkippingGPT()
    plain = copy.deepcopy(model)
    data = batches(STEPS)
    with engine_for(model, make, plan_for(model, EVERY_TIER, tmp_path, optimizer=kind)) as engine:
        losses = losses_of(engine, data)
        found = engine.state_dict()
        assert not engine.optimizer.state
    assert losses == pytest.approx(train_plainly(plain, make, data), rel=1e-5)
    # The norm's last bit depends on the order of its sum, and where Lion's momentum is as good as zero, its sign on it.
    tolerance = 1e-3 if kind is OptimizerKind.LION else 1e-5
    for parameter_name, parameter in plain.named_parameters():
        assert apart(found[parameter_name], parameter.detach()) <= tolerance, parameter_name


def test_adagrad_begins_every_groups_sums_with_the_value_that_it_was_made_with_as_torch_does(tmp_path: Path) -> None:
    def make(given: list[dict]) -> torch.optim.Adagrad:
        given[0]["initial_accumulator_value"] = 0.7
        return torch.optim.Adagrad(given, lr=1e-2, initial_accumulator_value=0.1)

    torch.manual_seed(0)
    model = GPT()
    plain = copy.deepcopy(model)
    data = batches(3)
    with engine_for(model, make, plan_for(model, EVERY_TIER, tmp_path, optimizer=OptimizerKind.ADAGRAD)) as engine:
        losses_of(engine, data)
        found = engine.state_dict()
    train_plainly(plain, make, data)
    for parameter_name, parameter in plain.named_parameters():
        assert apart(found[parameter_name], parameter.detach()) <= 1e-5, parameter_name


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("name", CASES)
def test_masters_move_by_less_than_a_weight_of_16_bits_can_tell(
    name: str, precision: Precision, tmp_path: Path
) -> None:
    kind, make = CASES[name]
    torch.manual_seed(0)
    model = GPT()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = plan_for(model, EVERY_TIER, tmp_path, precision, optimizer=kind)
    data = batches(1) * 8
    with engine_for(model, make, plan) as engine:
        losses = losses_of(engine, data)
        after = engine.state_dict()
    assert losses[-1] < losses[0]
    changed = [n for n in before if not torch.equal(after[n].to(weight_dtype(precision)).float(), after[n])]
    assert changed


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("name", CASES)
def test_resumed_training_is_the_undisturbed_training(name: str, precision: Precision, tmp_path: Path) -> None:
    kind, make = CASES[name]
    torch.manual_seed(0)
    data = batches(8)
    model = GPT()
    with engine_for(model, make, plan_for(model, EVERY_TIER, tmp_path, precision, optimizer=kind)) as engine:
        losses_of(engine, data[:4])
        path = engine.save_checkpoint(tmp_path / "checkpoints").wait()
        undisturbed = losses_of(engine, data[4:])
    assert checkpoint.checked(path).optimizer == kind
    again = GPT()
    with engine_for(again, make, plan_for(again, EVERY_TIER[2:], tmp_path, precision, optimizer=kind)) as engine:
        engine.load_checkpoint(tmp_path / "checkpoints")
        assert losses_of(engine, data[4:]) == pytest.approx(undisturbed, rel=1e-5)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model = GPT(layers=1)
    with engine_for(model, CASES["adam"][1], plan_for(model, (EVERY_TIER[0],), optimizer=OptimizerKind.ADAM)) as engine:
        losses_of(engine, batches(1))
        engine.save_checkpoint(tmp_path).wait()
    other = GPT(layers=1)
    with engine_for(other, CASES["lion"][1], plan_for(other, (EVERY_TIER[0],), optimizer=OptimizerKind.LION)) as engine:
        before = engine.state_dict()
        with pytest.raises(CheckpointError, match="was trained with adam, and the plan is for lion"):
            engine.load_checkpoint(tmp_path)
        assert engine.global_step == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in engine.state_dict().items())


def test_a_checkpoint_that_names_no_optimizer_is_of_adamw(tmp_path: Path) -> None:
    (tmp_path / checkpoint.TRAINING).write_text("{}")
    assert checkpoint.Checkpoint(tmp_path, {}).optimizer == OptimizerKind.ADAMW


@pytest.mark.parametrize("placement", [(G, G, N), (H, H, N), (N, H, N)])
def test_what_has_no_state_keeps_none_on_disk(placement: tuple, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind, make = CASES["sgd"]
    model = GPT(layers=1)
    plain = copy.deepcopy(model)
    data = batches(3)
    with engine_for(model, make, plan_for(model, (placement,), tmp_path, optimizer=kind)) as engine:
        assert losses_of(engine, data) == pytest.approx(train_plainly(plain, make, data), rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "fp32", "bf16", "fp16"),
    [
        (OptimizerKind.ADAMW, 8, 10, 12),
        (OptimizerKind.ADAM, 8, 10, 12),
        (OptimizerKind.LION, 4, 6, 8),
        (OptimizerKind.SGD_MOMENTUM, 4, 6, 8),
        (OptimizerKind.ADAGRAD, 4, 6, 8),
        (OptimizerKind.SGD, 0, 2, 4),
    ],
)
def test_state_is_moments_and_what_masters_need_more(kind: OptimizerKind, fp32: int, bf16: int, fp16: int) -> None:
    assert state_bytes(100, StateFormat(Precision.FP32, kind)) == 100 * fp32
    assert state_bytes(100, StateFormat(Precision.BF16, kind)) == 100 * bf16
    assert state_bytes(100, StateFormat(Precision.FP16, kind)) == 100 * fp16


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP16])
@pytest.mark.parametrize("name", CASES)
def test_the_engine_allocates_what_was_counted(name: str, precision: Precision, tmp_path: Path) -> None:
    kind, make = CASES[name]
    model = GPT()
    plan = plan_for(model, EVERY_TIER, tmp_path, precision, optimizer=kind)
    with engine_for(model, make, plan) as engine:
        shapes = [state.unit.shape for state in engine.states]
        needed = footprint(shapes, plan.placements, plan.buckets, plan.state_format)
        assert engine.meter.now_bytes()["host"] == needed.host_bytes
        for state in engine.states:
            for held in (state.device_state, state.host_state):
                if held is not None:
                    size = sum(t.nbytes for t in held.tensors())
                    assert size == state_bytes(state.unit.shape.trainable_elements, plan.state_format)


def test_an_optimizer_that_the_plan_does_not_count_is_refused() -> None:
    model = GPT(layers=1)
    plan = plan_for(model, (EVERY_TIER[0],))
    with pytest.raises(OffloadError, match="the optimizer is sgd-momentum, and the plan counts the state of adamw"):
        Engine(model, plan, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: torch.optim.RMSprop(p), "the optimizer is RMSprop; give the engine"),
        (lambda p: torch.optim.Adam(p, amsgrad=True), "Adam with amsgrad=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "SGD with maximize=True"),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), "is AdamW"),
    ],
)
def test_what_it_can_not_train_with_is_said_in_a_sentence(make: Callable, said: str) -> None:
    with pytest.raises(OffloadError, match=said):
        kind_of(make(nn.Linear(2, 2).parameters()))


@pytest.mark.parametrize("kind", OptimizerKind)
def test_the_default_of_a_kind_is_of_that_kind(kind: OptimizerKind) -> None:
    optimizer = default_optimizer(kind, nn.Linear(2, 2).parameters(), lr=0.25)
    assert kind_of(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_lion_steps_as_its_paper_says() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = Lion([parameter], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    expected, momentum = parameter.detach().clone(), torch.zeros(50, dtype=torch.float64)
    for _ in range(5):
        parameter.grad = torch.randn(50, dtype=torch.float64)
        update = torch.sign(0.9 * momentum + 0.1 * parameter.grad)
        expected = expected - 0.01 * (update + 0.1 * expected)
        momentum = 0.99 * momentum + 0.01 * parameter.grad
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"weight_decay": float("nan")}])
def test_lion_refuses_what_is_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"betas lie between 0 and 1"):
        Lion(nn.Linear(2, 2).parameters(), **wrong)
