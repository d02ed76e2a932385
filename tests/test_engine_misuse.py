"""What people do around an engine that it can not do with them: each ends in a sentence, never in other numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError
from tests.models import GPT
from tests.plans import RESIDENT, H, plan_for
from tests.test_checkpoint import batches, losses_of

ON_HOST = ((H, H, H),)


@pytest.mark.parametrize("placements", [ON_HOST, (RESIDENT,)])
def test_a_model_that_an_engine_has_is_refused_by_another(placements: tuple) -> None:
    model = GPT()
    with (
        Engine(model, plan_for(model, placements)),
        pytest.raises(OffloadError, match=r"another engine has parameter wte\.weight now: close that one first"),
    ):
        Engine(model, plan_for(model, (RESIDENT,)))


def test_a_model_whose_numbers_went_with_its_engine_trains_on_only_when_others_are_loaded(tmp_path: Path) -> None:
    data = batches(4)
    model = GPT()
    with Engine(model, plan_for(model, ON_HOST)) as engine:
        losses_of(engine, data[:2])
        engine.save_checkpoint(tmp_path).wait()
        numbers = engine.state_dict()
        expected = losses_of(engine, data[2:3])
    for load in (lambda e: e.load_checkpoint(tmp_path), lambda e: e.load_state_dict(numbers)):
        with Engine(model, plan_for(model, ON_HOST)) as engine:
            for use in (lambda e: e(data[0]), lambda e: e.state_dict(), lambda e: e.save_checkpoint(tmp_path)):
                with pytest.raises(OffloadError, match=r"the numbers of wte\.weight went with an engine"):
                    use(engine)
            load(engine)
            assert losses_of(engine, data[2:3]) == expected


def test_a_model_whose_weights_stayed_on_the_gpu_tier_goes_on_in_another_engine() -> None:
    model = GPT()
    with Engine(model, plan_for(model, (RESIDENT,))) as engine:
        losses_of(engine, batches(1))
        expected = engine(batches(1)[0]).item()
    with Engine(model, plan_for(model, ON_HOST)) as engine:
        assert engine(batches(1)[0]).item() == expected


def test_a_model_that_a_plan_for_another_did_not_get_into_an_engine_is_still_its_own() -> None:
    model, other = GPT(), GPT(layers=3)
    with pytest.raises(OffloadError):
        Engine(model, plan_for(other, ON_HOST))
    with Engine(model, plan_for(model, ON_HOST)) as engine:
        losses_of(engine, batches(1))


def test_parameters_of_an_optimizer_that_are_not_the_models_are_refused() -> None:
    model, weight = GPT(), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([*model.parameters(), weight])
    with pytest.raises(OffloadError, match="the optimizer has 1 parameters that are not the model's"):
        Engine(model, plan_for(model, ON_HOST), optimizer)


def test_parameters_that_come_to_the_optimizer_later_are_refused_before_an_update() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.h.parameters())
    with Engine(model, plan_for(model, ON_HOST), optimizer) as engine:
        losses_of(engine, batches(1))
        optimizer.add_param_group({"params": list(model.wte.parameters())})
        with pytest.raises(OffloadError, match=r"parameters came to the optimizer or left it after Engine\(\)"):
            losses_of(engine, batches(1))


def test_state_that_is_loaded_into_the_optimizer_later_is_refused_before_an_update() -> None:
    plain = GPT()
    trained = torch.optim.AdamW(plain.parameters())
    plain(batches(1)[0]).backward()
    trained.step()
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    with Engine(model, plan_for(model, ON_HOST), optimizer) as engine:
        optimizer.load_state_dict(trained.state_dict())
        with pytest.raises(OffloadError, match=r"the optimizer was given state after Engine\(\)"):
            losses_of(engine, batches(1))


USES: dict[str, Callable[[Engine], object]] = {
    "forward": lambda engine: engine(batches(1)[0]),
    "state_dict": lambda engine: engine.state_dict(),
    "zero_grad": lambda engine: engine.zero_grad(),
    "gradient_norm": lambda engine: engine.gradient_norm,
    "finish": lambda engine: engine.finish(),
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_engine_says_that_it_is_closed(use: str) -> None:
    model = GPT()
    with Engine(model, plan_for(model, ON_HOST)) as engine:
        losses_of(engine, batches(1))
    with pytest.raises(OffloadError, match="this engine is closed"):
        USES[use](engine)
    assert not hasattr(engine, "something_else")
    engine.close()
