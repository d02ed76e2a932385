"""Ctrl-C in the middle of a pass or a step, caught: training goes on as if nothing had been, or says why it can not."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.errors import OffloadError
from offload.plan import Tier
from tests.interruptions import interrupted
from tests.models import GPT, batches
from tests.plans import EVERY_TIER, RESIDENT, G, H, N, plan_for, units_of
from tests.test_engine_equals_pytorch import assert_same

STRIDE = 97
"""Lines between two places that are tried: with the lines of a pass it has no common factor."""
AT, STEPS = 2, 4
"""Steps before the one that is interrupted, and all of them."""
DATA = batches(STEPS, length=8)
RECOMPUTED = {"recompute": ("h.0", "h.1"), "checkpoints": Tier.HOST}
KINDS: dict[str, tuple[tuple, dict, dict]] = {
    "on the device": ((RESIDENT,), {}, {}),
    "state on the host": (((G, H, H),), {}, {}),
    "on the host": (((H, H, H),), {}, {}),
    "gradients on the device": (((H, G, H),), {}, {}),
    "on disk": (((N, H, N),), {}, {}),
    "recomputed": (((H, H, H),), RECOMPUTED, {}),
    "shared update": (((G, H, H), (H, H, H)), {"gpu_update_share": 0.5}, {}),
    "updated in backward": (EVERY_TIER, {}, {"update_in_backward": True}),
}
"""Placements, what else a plan has, and what else an engine gets."""


def small() -> GPT:
    torch.manual_seed(0)
    return GPT(layers=2, width=8, heads=2, length=8)


def engine_for(kind: str, model: nn.Module, tmp_path: Path) -> Engine:
    placements, changes, more = KINDS[kind]
    plan = plan_for(model, placements, tmp_path, **changes)
    return Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2), **more)


def train(engine: Engine, tokens: torch.Tensor) -> float:
    loss = engine(tokens)
    engine.backward(loss)
    engine.step()
    return loss.item()


def undisturbed(kind: str, tmp_path: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and numbers of a training that nobody interrupts, and that is plain PyTorch's."""
    model = small()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with engine_for(kind, model, tmp_path) as engine:
        losses = [train(engine, tokens) for tokens in DATA]
        found = engine.state_dict()
    for tokens in DATA:
        plain(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(found, plain, 1e-6)
    return losses, found


def assert_goes_on(engine: Engine, first: int, expected: tuple[list[float], dict[str, torch.Tensor]], at: str) -> None:
    """Bit for bit."""
    losses, numbers = expected
    found = [train(engine, tokens) for tokens in DATA[first:]]
    assert found == losses[first:], at
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in engine.state_dict().items()), at
    assert engine.global_step == STEPS, at


def every_place(try_at: Callable[[int], str | None]) -> int:
    """Try one place after another until there are no more; how many there were."""
    tried = 0
    while try_at(1 + tried * STRIDE) is not None:
        tried += 1
    return tried


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "updated in backward"])
def test_after_an_interrupted_pass_training_goes_on_to_the_bit(kind: str, phase: str, tmp_path: Path) -> None:
    expected = undisturbed(kind, tmp_path)

    def try_at(line: int) -> str | None:
        with engine_for(kind, small(), tmp_path) as engine:
            for tokens in DATA[:AT]:
                train(engine, tokens)
            loss = engine(DATA[AT]) if phase == "backward" else None
            work = (lambda: engine(DATA[AT])) if loss is None else (lambda: engine.backward(loss))
            place = interrupted(work, line)
            if place is not None:
                engine.zero_grad()  # where it came behind the last gradient
                assert_goes_on(engine, AT, expected, f"{place} in {phase}")
            return place

    assert every_place(try_at) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_step_was_not_made_or_was_or_only_a_checkpoint_helps(kind: str, tmp_path: Path) -> None:
    expected = undisturbed(kind, tmp_path)
    refused: list[bool] = []

    def try_at(line: int) -> str | None:
        with engine_for(kind, small(), tmp_path) as engine:
            for tokens in DATA[:AT]:
                train(engine, tokens)
            good = engine.save_checkpoint(tmp_path / "checkpoints", "good").wait()
            engine.backward(engine(DATA[AT]))
            place = interrupted(engine.step, line)
            if place is None:
                return None
            try:
                engine.step()  # does nothing where it was made
                assert_goes_on(engine, AT + 1, expected, place)
                refused.append(False)
            except OffloadError as error:
                assert "half done: go on from a checkpoint" in str(error), place
                assert_refuses(engine, tmp_path)
                engine.load_checkpoint(good.parent, "good")
                assert_goes_on(engine, AT, expected, place)
                refused.append(True)
            return place

    assert every_place(try_at) > 2
    assert {*refused} == {False, True}


def assert_refuses(engine: Engine, tmp_path: Path) -> None:
    tokens = DATA[0]
    uses = (
        lambda: engine(tokens),
        lambda: engine.backward(torch.ones((), requires_grad=True)),
        engine.step,
        engine.finish,
        engine.state_dict,
        lambda: engine.save_checkpoint(tmp_path / "bad"),
        lambda: engine.gathered(engine.model),
        lambda: engine.model(tokens),
        lambda: engine.model.h[0](torch.zeros(1, 2, 8)),
    )
    for use in uses[: -1 if engine.plan.recompute else None]:  # torch's own hook there fails where one before it does
        with pytest.raises(OffloadError, match="half done: go on from a checkpoint"), torch.no_grad():
            use()
    assert not (tmp_path / "bad").exists()


def test_an_interrupted_backward_in_which_updates_had_begun_is_half_a_step(tmp_path: Path) -> None:
    kind = "updated in backward"
    expected = undisturbed(kind, tmp_path)
    refused: list[bool] = []

    def try_at(line: int) -> str | None:
        with engine_for(kind, small(), tmp_path) as engine:
            for tokens in DATA[:AT]:
                train(engine, tokens)
            good = engine.save_checkpoint(tmp_path / "checkpoints", "good").wait()
            loss = engine(DATA[AT])
            place = interrupted(lambda: engine.backward(loss), line)
            if place is not None:
                engine.zero_grad()
                try:
                    assert_goes_on(engine, AT, expected, place)
                    refused.append(False)
                except OffloadError as error:
                    assert "load a checkpoint" in str(error), place
                    engine.load_checkpoint(good.parent, "good")
                    assert_goes_on(engine, AT, expected, place)
                    refused.append(True)
            return place

    assert every_place(try_at) > 3
    assert {*refused} == {False, True}


@pytest.mark.parametrize("kind", ["on the host", "on disk"])
def test_an_interrupted_evaluation_leaves_the_loss_before_it_its_backward(kind: str, tmp_path: Path) -> None:
    expected = undisturbed(kind, tmp_path)

    def try_at(line: int) -> str | None:
        with engine_for(kind, small(), tmp_path) as engine:
            for tokens in DATA[:AT]:
                train(engine, tokens)
            loss = engine(DATA[AT])
            with torch.no_grad():
                place = interrupted(lambda: engine.model(DATA[0]), line)
            if place is not None:
                engine.backward(loss)
                engine.step()
                assert_goes_on(engine, AT + 1, expected, place)
            return place

    assert every_place(try_at) > 2


def test_an_interrupted_forward_costs_no_gradients_of_earlier_micro_batches(tmp_path: Path) -> None:
    def engine_of(model: nn.Module) -> Engine:
        plan = plan_for(model, ((H, H, H),), tmp_path, gradient_accumulation_steps=2)
        return Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2))

    with engine_of(small()) as engine:
        losses = [train(engine, tokens) for tokens in DATA]
        numbers = engine.state_dict()

    def try_at(line: int) -> str | None:
        with engine_of(small()) as engine:
            train(engine, DATA[0])
            place = interrupted(lambda: engine(DATA[1]), line)
            if place is not None:
                assert [train(engine, tokens) for tokens in DATA[1:]] == losses[1:], place
                assert all(torch.equal(t, numbers[n]) for n, t in engine.state_dict().items()), place
            return place

    assert every_place(try_at) > 3


def test_an_error_of_a_scheduler_leaves_the_update_whole(tmp_path: Path) -> None:
    model = small()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with engine_for("on the host", model, tmp_path) as engine:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(engine.optimizer, 1e-2, total_steps=2)
        engine.step_scheduler(scheduler)
        other = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=2)
        for number, tokens in enumerate(DATA[:3]):
            plain(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number < 2:
                train(engine, tokens)
                other.step()
            else:
                with pytest.raises(ValueError, match="Tried to step 3 times"):
                    train(engine, tokens)
        assert_same(engine.state_dict(), plain, 1e-6)
        assert engine.global_step == 3


def test_an_interrupted_load_is_refused_until_one_comes_to_its_end(tmp_path: Path) -> None:
    kind = "on the host"
    expected = undisturbed(kind, tmp_path)
    with engine_for(kind, small(), tmp_path) as engine:
        for tokens in DATA[:AT]:
            train(engine, tokens)
        good = engine.save_checkpoint(tmp_path / "checkpoints").wait()
        replace, calls = engine.replace, []

        def cut_short(*args: object) -> None:
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(args)
            replace(*args)

        engine.replace = cut_short
        with pytest.raises(KeyboardInterrupt):
            engine.load_checkpoint(good.parent)
        engine.replace = replace
        for use in (lambda: engine(DATA[0]), engine.state_dict):
            with pytest.raises(OffloadError, match="not loaded to the end: load a checkpoint"):
                use()
        engine.load_checkpoint(good.parent)
        assert_goes_on(engine, AT, expected, "load")


def test_an_interrupted_first_pass_is_watched_again_and_by_nobody_else(tmp_path: Path) -> None:
    """What watches it is left, wherever the interrupt came."""
    expected = undisturbed("on the host", tmp_path)

    def try_at(line: int) -> str | None:
        with engine_for("on the host", small(), tmp_path) as engine:
            place = interrupted(lambda: engine(DATA[0]), line)
            if place is not None:
                assert_goes_on(engine, 0, expected, place)
                assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack(), place
            return place

    assert every_place(try_at) > 3


@pytest.mark.parametrize("checkpoints", list(Tier)[:2])
def test_units_called_alone_after_an_interrupt_have_their_weights(checkpoints: Tier, tmp_path: Path) -> None:
    model = small()
    x = torch.randn(1, 2, 8)
    expected = model.h[1](x)
    changes = {"recompute": tuple(u for u in units_of(model) if u.startswith("h.")), "checkpoints": checkpoints}
    with Engine(model, plan_for(model, ((H, H, H),), tmp_path, **changes)) as engine, torch.no_grad():
        for line in range(1, 200, 7):
            interrupted(lambda: engine.model.h[1](x), line)
            assert torch.equal(engine.model.h[1](x), expected)
