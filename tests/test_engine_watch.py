"""A parameter changed behind the engine's back is found before training goes on with half of it."""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Precision
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for

MIRRORED, AWAY, DISK = (G, G, H), (H, H, H), (N, H, N)


def engine_for(model: nn.Module, placement: tuple, tmp_path: Path, precision: Precision = Precision.FP32) -> Engine:
    plan = plan_for(model, (placement,), tmp_path, precision)
    return Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2))


def model_of() -> GPT:
    torch.manual_seed(0)
    return GPT()


def step(engine: Engine, tokens: torch.Tensor) -> float:
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return loss.item()


@torch.no_grad()
def in_place(model: GPT) -> None:
    model.h[1].up.weight.add_(1)


@torch.no_grad()
def through_a_view(model: GPT) -> None:
    model.h[1].up.weight.detach()[2:5].zero_()


def in_data(model: GPT) -> None:
    model.h[1].up.weight.data.zero_()


def assigned(model: GPT) -> None:
    model.h[1].up.weight.data = torch.ones(128, 32)


def replaced(model: GPT) -> None:
    model.h[1].up.weight = nn.Parameter(torch.ones(128, 32))


def converted(model: GPT) -> None:
    model.h[1].half()


def loaded(model: GPT) -> None:
    model.h[1].load_state_dict(GPT().h[1].state_dict())


@pytest.mark.parametrize("how", [in_place, through_a_view, assigned, replaced, converted, loaded])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_changed_parameter_whose_update_runs_elsewhere_is_found_named_and_set_back(
    how: Callable[[GPT], None], precision: Precision, tmp_path: Path
) -> None:
    model = model_of()
    other = copy.deepcopy(model)
    with (
        engine_for(model, MIRRORED, tmp_path, precision) as engine,
        engine_for(other, MIRRORED, tmp_path, precision) as undisturbed,
    ):
        data = batches(6)
        for tokens in data[:2]:
            assert step(engine, tokens) == step(undisturbed, tokens)
        engine.finish()
        how(model)
        with pytest.raises(OffloadError, match=r"parameter h\.1\..*engine\.gathered"):
            engine(data[2])
        for tokens in data[2:]:
            assert step(engine, tokens) == step(undisturbed, tokens)


@pytest.mark.parametrize("placement", [AWAY, DISK])
@pytest.mark.parametrize("how", [assigned, replaced, converted])
def test_a_parameter_that_is_away_is_not_replaced_unnoticed(
    how: Callable[[GPT], None], placement: tuple, tmp_path: Path
) -> None:
    model = model_of()
    with engine_for(model, placement, tmp_path) as engine:
        step(engine, batches(1)[0])
        before = engine.state_dict()
        how(model)
        with pytest.raises(OffloadError, match=r"parameter h\.1\."):
            engine.state_dict()
        assert all(torch.equal(before[n], t) for n, t in engine.state_dict().items())
        step(engine, batches(1)[0])


@pytest.mark.parametrize("placement", [MIRRORED, AWAY, DISK])
@pytest.mark.parametrize("how", [in_place, loaded])
def test_what_is_away_or_being_updated_can_not_be_written_to(
    how: Callable[[GPT], None], placement: tuple, tmp_path: Path
) -> None:
    model = model_of()
    with engine_for(model, placement, tmp_path) as engine:
        step(engine, batches(1)[0])
        with pytest.raises(RuntimeError, match="single memory location"):
            how(model)


@pytest.mark.parametrize("fill", [in_data, through_a_view])
@pytest.mark.parametrize("placement", [MIRRORED, AWAY, DISK])
def test_what_is_away_or_being_updated_is_not_a_number_again_after_it_was_filled(
    fill: Callable[[GPT], None], placement: tuple, tmp_path: Path
) -> None:
    model = model_of()
    with engine_for(model, placement, tmp_path) as engine:
        step(engine, batches(1)[0])
        fill(model)
        try:
            step(engine, batches(1)[0])
        except OffloadError as error:
            assert "was changed in place" in str(error)
            step(engine, batches(1)[0])
        with torch.no_grad():
            assert model.h[1].up.weight.isnan().all()


@pytest.mark.parametrize("placement", [MIRRORED, (G, H, N)])
def test_weights_on_the_device_are_not_a_number_until_their_update_is_waited_for(
    placement: tuple, tmp_path: Path, device: str
) -> None:
    """Whatever reads them, a penalty or an average, must not take them for those of the step before."""
    model = model_of()
    plain = copy.deepcopy(model).to(device)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    waits = [lambda e, x: e.finish(), lambda e, x: e.state_dict(), lambda e, x: e.model(x)]
    plan = plan_for(model, (placement,), tmp_path, device=device)
    optimizer_of_model = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Engine(model, plan, optimizer_of_model) as engine, torch.no_grad():
        for tokens, wait in zip([x.to(device) for x in batches(3)], waits, strict=True):
            with torch.enable_grad():
                plain(tokens).backward()
                step(engine, tokens)
            optimizer.step()
            optimizer.zero_grad()
            read = {n: p for n, p in model.named_parameters() if n.startswith("h.1.")}
            assert all(p.isnan().all() for p in read.values())
            wait(engine, tokens)
            for name, parameter in read.items():
                torch.testing.assert_close(parameter, plain.get_parameter(name))


def test_a_write_to_weights_that_still_lie_in_a_slot_is_found(tmp_path: Path) -> None:
    """After an evaluation the last units are still on the device, and look as if they could be written to."""
    model = model_of()
    with engine_for(model, AWAY, tmp_path) as engine:
        step(engine, batches(1)[0])
        before = engine.state_dict()
        with torch.no_grad():
            engine(batches(1)[0])
            model.h[3].up.weight.add_(1)
        with pytest.raises(OffloadError, match=r"h\.3\.up\.weight was changed in place"):
            engine(batches(1)[0])
        assert all(torch.equal(before[n], t) for n, t in engine.state_dict().items())


@pytest.mark.parametrize("placement", [RESIDENT, MIRRORED, AWAY])
@pytest.mark.parametrize("key", ["h.1", "h.1.up", "head"])
def test_another_module_in_the_place_of_one_is_found_named_and_set_back(
    key: str, placement: tuple, tmp_path: Path
) -> None:
    model = model_of()
    parent, _, child = key.rpartition(".")
    with engine_for(model, placement, tmp_path) as engine:
        step(engine, batches(1)[0])
        before = engine.state_dict()
        was = model.get_submodule(key)
        setattr(model.get_submodule(parent), child, copy.deepcopy(was))
        with pytest.raises(OffloadError, match=rf"another module took the place of {re.escape(key)} after Engine\(\)"):
            step(engine, batches(1)[0])
        assert model.get_submodule(key) is was
        assert all(torch.equal(before[n], t) for n, t in engine.state_dict().items())
        step(engine, batches(1)[0])


def test_a_wrapper_of_a_module_may_take_its_place(tmp_path: Path) -> None:
    model, plain = model_of(), model_of()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with engine_for(model, AWAY, tmp_path) as engine:
        model.h[1] = nn.Sequential(model.h[1])
        for tokens in batches(3):
            plain(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            step(engine, tokens)
        engine.finish()
        assert all(torch.equal(p, t) for p, t in zip(plain.parameters(), engine.state_dict().values(), strict=True))


@pytest.mark.parametrize("what", ["save", "load", "load_state_dict", "gathered", "evaluation", "close"])
def test_a_change_is_found_whatever_comes_next(what: str, tmp_path: Path) -> None:
    model = model_of()
    with engine_for(model, MIRRORED, tmp_path) as engine:
        step(engine, batches(1)[0])
        path = engine.save_checkpoint(tmp_path).wait()
        whole = engine.state_dict()
        in_place(model)
        with pytest.raises(OffloadError, match=r"h\.1\.up\.weight was changed in place"):
            if what == "save":
                engine.save_checkpoint(tmp_path).wait()
            elif what == "load":
                engine.load_checkpoint(path.parent, path.name)
            elif what == "load_state_dict":
                engine.load_state_dict(whole)
            elif what == "gathered":
                with engine.gathered(model):
                    pass
            elif what == "evaluation":
                with torch.no_grad():
                    model(batches(1)[0])
            else:
                engine.close()


def test_weights_that_have_no_other_copy_may_be_changed_as_in_plain_pytorch(tmp_path: Path) -> None:
    model = model_of()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with engine_for(model, RESIDENT, tmp_path) as engine:
        for tokens in batches(4):
            loss = plain(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert step(engine, tokens) == pytest.approx(loss.item(), rel=1e-6)
            in_place(model)
            in_place(plain)


@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
@pytest.mark.parametrize("precision", list(Precision))
def test_training_and_evaluation_are_no_changes(placements: tuple, precision: Precision, tmp_path: Path) -> None:
    model = model_of()
    with Engine(model, plan_for(model, placements, tmp_path, precision)) as engine:
        for tokens in batches(3):
            step(engine, tokens)
            with torch.no_grad():
                engine(tokens)
                model(tokens)
            engine.finish()


@pytest.mark.parametrize("placements", [(RESIDENT,), EVERY_TIER])
def test_a_model_called_with_gradients_and_a_plain_backward_are_refused(placements: tuple, tmp_path: Path) -> None:
    model = model_of()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with Engine(model, plan_for(model, placements, tmp_path), torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for tokens in batches(3):
            with pytest.raises(OffloadError, match="call the engine in its place"):
                model(tokens)
            with pytest.raises(OffloadError, match=r"call engine\.backward\(loss\)"):
                engine(tokens).backward()
            loss = plain(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert step(engine, tokens) == pytest.approx(loss.item(), rel=1e-6)
