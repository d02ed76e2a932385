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
