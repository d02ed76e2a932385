"""State that comes to the device ahead of its update, where something comes between: plain training all the same."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from offload.engine import Engine
from offload.plan import Buckets, Plan, Precision
from offload.streams import Lane
from offload.visits import be_patient
from tests.models import GPT, SkippingGPT, batches
from tests.plans import G, H, plan_for
from tests.test_engine_equals_pytorch import assert_same

ON_HOST = ((H, H, H), (G, G, H), (G, H, H), (H, G, H))
AHEAD = {
    "some of it": {"gpu_update_share": 0.6, "buckets": Buckets(1, 5000, 16384, update_slots=9)},
    "all of it": {"gpu_update_share": 1.0, "buckets": Buckets(1, 5000, 16384, update_slots=60)},
}
ways = pytest.mark.parametrize("way", AHEAD)


def both(
    kind: type[GPT], way: str | None, tmp_path: Path, placements: tuple = ON_HOST, **changes: Any
) -> tuple[Engine, GPT, torch.optim.Optimizer]:
    """An engine, and the same model with plain AdamW."""
    torch.manual_seed(0)
    model = kind()
    plain = copy.deepcopy(model)
    plan: Plan = plan_for(model, placements, tmp_path, **(AHEAD[way] if way else {}), **changes)
    engine = Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2), max_grad_norm=0.05)
    return engine, plain, torch.optim.AdamW(plain.parameters(), lr=1e-2)


def step_plainly(plain: GPT, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def slow_down(name: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every job of a lane begin late."""
    submit = Lane.submit

    def slow_submit(lane: Lane, job: Any, after: Any = ()) -> Any:
        def slow_job() -> None:
            time.sleep(seconds)
            job()

        return submit(lane, slow_job if lane.name == name else job, after)

    monkeypatch.setattr(Lane, "submit", slow_submit)


@ways
@pytest.mark.parametrize("kind", [GPT, SkippingGPT])
def test_one_more_backward_pass_before_the_step_adds_to_gradients_that_stayed(
    kind: type[GPT], way: str, tmp_path: Path
) -> None:
    engine, plain, optimizer = both(kind, way, tmp_path)
    with engine:
        for first, second in zip(*[iter(batches(6))] * 2, strict=True):
            for tokens in (first, second):
                engine.backward(engine(tokens))
                plain(tokens).backward()
            engine.step()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)


class Half(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor, first: bool) -> torch.Tensor:
        return x + torch.tanh(self.first(x) if first else self.second(x))


class BraidedGPT(GPT):
    """All blocks are half used before any is used whole: their gradients are incomplete at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Half(32) for _ in range(5))

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for first in (True, False):
            for block in self.h:
                x = block(x, first)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("way", [None, *AHEAD])
def test_gradients_that_must_make_room_before_they_are_complete_are_whole_in_the_end(
    way: str | None, tmp_path: Path
) -> None:
    engine, plain, optimizer = both(BraidedGPT, way, tmp_path, ((H, H, H),))
    with engine:
        for tokens in batches(4):
            engine.backward(engine(tokens))
            plain(tokens).backward()
            engine.step()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)


@ways
def test_gradients_that_are_forgotten_leave_nothing_behind(way: str, tmp_path: Path) -> None:
    engine, plain, optimizer = both(GPT, way, tmp_path)
    with engine:
        for forgotten, tokens in zip(*[iter(batches(6))] * 2, strict=True):
            engine.backward(engine(forgotten))
            engine.zero_grad()
            engine.backward(engine(tokens))
            plain(tokens).backward()
            engine.step()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)


@ways
def test_parameters_that_are_written_to_between_backward_and_step_are_updated_as_they_are_then(
    way: str, tmp_path: Path
) -> None:
    engine, plain, optimizer = both(GPT, way, tmp_path)
    with engine:
        for tokens in batches(4):
            engine.backward(engine(tokens))
            plain(tokens).backward()
            with engine.gathered("wte.weight", "h.0", "h.3.up.weight"):
                for module, name in ((engine.model.wte, "weight"), (engine.model.h[0].qkv, "weight")):
                    getattr(module, name).mul_(0.9)
                engine.model.h[3].up.weight.add_(0.01)
            with torch.no_grad():
                plain.wte.weight.mul_(0.9)
                plain.h[0].qkv.weight.mul_(0.9)
                plain.h[3].up.weight.add_(0.01)
            engine.step()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)


@ways
def test_a_checkpoint_that_is_saved_meanwhile_has_the_numbers_of_its_step(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down("copying", 0.05, monkeypatch)
    data, found = batches(7), []
    for kept in (None, way):
        engine, *_ = both(GPT, kept, tmp_path, precision=Precision.BF16)
        with engine:
            for number, tokens in enumerate(data):
                if number == 3:
                    saving = engine.save_checkpoint(tmp_path / str(kept))
                engine.backward(engine(tokens))
                engine.step()
            saving.wait()
            end = engine.state_dict()
        again, *_ = both(GPT, None, tmp_path, precision=Precision.BF16)
        with again:
            again.load_checkpoint(tmp_path / str(kept))
            found.append((again.state_dict(), end))
    for expected, here in zip(found[0], found[1], strict=True):
        for name, tensor in expected.items():
            assert torch.equal(tensor, here[name]), name


@ways
def test_loading_a_checkpoint_after_backward_forgets_what_came_ahead(way: str, tmp_path: Path) -> None:
    engine, plain, optimizer = both(GPT, way, tmp_path)
    data = batches(5)
    with engine:
        engine.save_checkpoint(tmp_path / "first").wait()
        for tokens in data[:2]:
            engine.backward(engine(tokens))
            engine.step()
        engine.backward(engine(data[2]))
        engine.load_checkpoint(tmp_path / "first")
        for tokens in data[3:]:
            engine.backward(engine(tokens))
            engine.step()
            plain(tokens).backward()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)


def test_a_patient_lane_sleeps_until_its_stream_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking  # one that spins would take a core from the update on the host

        def record(self) -> None:
            told.append("recorded")

        def synchronize(self) -> None:
            told.append("over")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    be_patient(torch.device("cpu"))
    assert not told
    be_patient(torch.device("cuda", 0))
    assert told == ["recorded", "over"]


@pytest.mark.parametrize("slots", [3, 9, 60])
@pytest.mark.parametrize("slow", ["leaving", "home", "streamed", "update", "nobody"])
def test_elements_that_change_hands_are_those_that_were_left(
    slots: int, slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the share moves in the first steps; here it is moved by hand, back and forth."""
    slow_down(slow, 0.02, monkeypatch)
    torch.manual_seed(0)
    model = GPT(layers=2)
    plain = copy.deepcopy(model)
    plan = plan_for(model, ON_HOST, tmp_path, gpu_update_share=0.6, buckets=Buckets(1, 8000, 16384, update_slots=slots))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2), max_grad_norm=0.05) as engine:
        streamed = engine._streamed
        assert streamed is not None
        for share, tokens in zip((0.9, 0.2, 0.7, 0.4, 1.0, 0.0, 0.5), batches(7), strict=True):
            streamed._split.device_share = share
            streamed.deal_again()
            engine.backward(engine(tokens))
            engine.step()
            plain(tokens).backward()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)
