"""What whoever makes an engine gave it by mistake is said at once, in a sentence."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Plan, Precision
from tests.models import GPT, batches
from tests.plans import RESIDENT, H, plan_for

AWAY = (H, H, H)


class Mixed(nn.Module):
    """A module of another type inside."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).to(self.b.weight.dtype)).float().square().mean()


def plan_of(model: nn.Module, precision: Precision = Precision.FP32) -> Plan:
    return plan_for(model, (AWAY,), precision=precision, units=["", "a", "b"])


@pytest.mark.parametrize("norm", ["1", float("nan"), -1, -0.5, [1.0], torch.ones(2)])
def test_a_norm_to_clip_to_that_is_none_is_refused_before_anything_is_allocated(norm: Any) -> None:
    model = GPT()
    with pytest.raises(OffloadError, match=r"^max_grad_norm is .*; it must be .* a number of at least 0, or None"):
        Engine(model, plan_for(model, (RESIDENT,)), max_grad_norm=norm)
    assert not model.h[0].up.weight.isnan().any()


def test_a_norm_that_is_assigned_later_is_looked_at_before_it_clips() -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,))) as engine:
        engine.backward(engine(batches(1)[0]))
        engine.max_grad_norm = -1.0
        with pytest.raises(OffloadError, match=r"^max_grad_norm is -1\.0; it must be"):
            engine.step()
        engine.max_grad_norm = 1.0
        engine.step()
        assert engine.global_step == 1


@pytest.mark.parametrize("norm", [None, 0, 1, 0.5, float("inf")])
def test_a_norm_to_clip_to_is_a_number_of_at_least_zero_or_none(norm: float | None) -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,)), max_grad_norm=norm) as engine:
        engine.backward(engine(batches(1)[0]))
        engine.step()
        assert engine.global_step == 1


@pytest.mark.parametrize("given", [[1], None, 3, [("head.weight", torch.zeros(1))]])
def test_what_is_no_state_dict_is_refused_by_the_name_of_its_type(given: Any) -> None:
    model = GPT()
    with (
        Engine(model, plan_for(model, (RESIDENT,))) as engine,
        pytest.raises(OffloadError, match=rf"takes tensors by name, .*, not a {type(given).__name__}$"),
    ):
        engine.load_state_dict(given)


def test_keys_of_a_state_dict_that_are_no_names_are_named() -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,))) as engine:
        tensors = engine.state_dict()
        with pytest.raises(OffloadError, match="the model has no 7"):
            engine.load_state_dict({**tensors, 7: torch.zeros(1)})


@pytest.mark.parametrize(
    ("dtype", "precision", "said"),
    [
        (torch.bfloat16, Precision.FP32, r"\(fp32\): b.weight and 1 more, of bfloat16, become float32\."),
        (torch.float64, Precision.AMP, r"\(amp\): b.weight and 1 more, of float64, become float32\."),
        (torch.bfloat16, Precision.BF16, r"\(bf16\): a.weight and 1 more, of float32, become bfloat16\."),
        (
            torch.float16,
            Precision.BF16,
            r"a.weight and 1 more, of float32, become bfloat16; b.weight and 1 more, of float16, become bfloat16\.",
        ),
    ],
)
def test_parameters_of_several_types_are_said_to_become_that_of_the_plan(
    dtype: torch.dtype, precision: Precision, said: str
) -> None:
    model = Mixed(dtype)
    with pytest.warns(RuntimeWarning, match=said) as found, Engine(model, plan_of(model, precision)):
        kept = torch.bfloat16 if precision is Precision.BF16 else torch.float32
        assert {p.dtype for p in model.parameters()} == {kept}
    assert [Path(w.filename).name for w in found] == [Path(__file__).name]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_parameters_of_one_type_are_not_warned_of(precision: Precision) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = Mixed(torch.float32).to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Engine(model, plan_of(model, precision)).close()


def train_both(engine: Engine, plain: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> None:
    """One step of each."""
    plain(tokens).backward()
    optimizer.step()
    optimizer.zero_grad()
    engine.backward(engine(tokens))
    engine.step()


def assert_equal(engine: Engine, plain: nn.Module) -> None:
    found = engine.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.state_dict().items())


def clamp(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-1e-4, 1e-4)


@pytest.mark.parametrize("tiers", [RESIDENT, AWAY])
def test_a_hook_after_accumulation_acts_as_without_the_engine_or_is_refused(tiers: tuple) -> None:
    model, plain = GPT(), GPT()
    plain.load_state_dict(model.state_dict())
    for parameter in (model.h[0].up.weight, plain.h[0].up.weight):
        parameter.register_post_accumulate_grad_hook(clamp)
    with pytest.raises(OffloadError, match=r"^parameter h\.0\.up\.weight has a hook .* not the sum of 2: remove it"):
        Engine(model, plan_for(model, (tiers,), gradient_accumulation_steps=2))
    optimizer = torch.optim.AdamW(plain.parameters())
    plan = plan_for(model, (tiers,))
    with Engine(model, plan, torch.optim.AdamW(model.parameters())) as engine:
        for tokens in batches(3):
            train_both(engine, plain, optimizer, tokens)
        assert_equal(engine, plain)


def test_a_hook_after_accumulation_that_comes_late_is_named_and_the_step_can_be_done_without_it() -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,))) as engine:
        loss = engine(batches(1)[0])
        handle = model.h[1].up.weight.register_post_accumulate_grad_hook(clamp)
        with pytest.raises(OffloadError, match=r"^parameter h\.1\.up\.weight got a hook .*: register it before Engine"):
            engine.backward(loss)
        handle.remove()
        engine.backward(loss)
        engine.step()
        assert engine.global_step == 1


def test_what_has_no_backward_is_refused_by_what_it_is() -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,))) as engine:
        with pytest.raises(OffloadError, match=r"^backward\(\) takes the loss, a tensor, and was given a NoneType; "):
            engine.backward(None)
        with torch.no_grad():
            loss = engine(batches(1)[0])
        with pytest.raises(OffloadError, match=r"^this loss has no gradient: it was computed under no_grad"):
            engine.backward(loss)


def test_parameters_may_go_from_one_group_to_another_between_steps() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": list(model.h.parameters())}, {"params": list(model.head.parameters()), "lr": 0.0}]

    model, plain = GPT(), GPT()
    plain.load_state_dict(model.state_dict())
    ours, theirs = (torch.optim.AdamW(groups(m), lr=1e-2) for m in (model, plain))
    with Engine(model, plan_for(model, (AWAY,)), ours) as engine:
        for step, tokens in enumerate(batches(4)):
            if step == 2:
                for optimizer in (ours, theirs):
                    first, second = optimizer.param_groups
                    first["params"], second["params"] = second["params"], first["params"]
            train_both(engine, plain, theirs, tokens)
        assert_equal(engine, plain)


def test_a_parameter_that_leaves_the_optimizer_is_found() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    with Engine(model, plan_for(model, (AWAY,)), optimizer) as engine:
        engine.backward(engine(batches(1)[0]))
        optimizer.param_groups[0]["params"].pop()
        with pytest.raises(OffloadError, match="came to the optimizer or left it after Engine"):
            engine.step()


@pytest.mark.parametrize("given", [torch.zeros(61, 32, device="meta"), torch.zeros(61, 32, dtype=torch.complex64)])
def test_tensors_without_numbers_for_a_parameter_are_named(given: torch.Tensor) -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,))) as engine:
        tensors = engine.state_dict()
        with pytest.raises(OffloadError, match=r"wte\.weight is (on meta|complex), and has no numbers for it"):
            engine.load_state_dict({**tensors, "wte.weight": given})


class Fusing(nn.Linear):
    """Its state_dict has one tensor for weight and bias, as checkpoints of an earlier version had."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_state_dict_post_hook(self.fuse)

    @staticmethod
    def fuse(_: nn.Module, tensors: dict[str, Any], prefix: str, __: Any) -> None:
        both = tensors.pop(f"{prefix}weight"), tensors.pop(f"{prefix}bias")[:, None]
        tensors[f"{prefix}both"] = torch.cat(both, dim=1)


def test_what_a_state_dict_computes_of_parameters_that_are_away_is_refused_and_whole_inside_of_gathered() -> None:
    model = nn.Sequential(Fusing())
    with Engine(model, plan_for(model, (AWAY,), units=["0"])) as engine:
        with pytest.raises(OffloadError, match=r"^state_dict\(\) has 0\.both, which .*: take `with engine\.gathered"):
            engine.state_dict()
        with engine.gathered(model):
            assert model.state_dict()["0.both"].isfinite().all()
