"""The shared update in rare orders of lanes, and in steps that go wrong."""

import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from offload.allotment import Reach, allot
from offload.engine import Engine
from offload.errors import DeviceMemoryError, OffloadError
from offload.plan import Buckets, Plan
from offload.residency import UPDATE_RING
from offload.split import Took
from offload.streamed_update import StreamedUpdate
from offload.streams import Done, Lane
from offload.visits import Visit
from tests.models import GPT, Block, batches
from tests.plans import G, H, plan_for
from tests.test_engine_equals_pytorch import assert_same
from tests.test_visits import slow_down, step_plainly


def assert_trains_as_plain(model: GPT, placements: tuple, steps: int, **changes: Any) -> None:
    """Clipped, by one AdamW and the other."""
    plain = copy.deepcopy(model)
    plan: Plan = plan_for(model, placements, **changes)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2), max_grad_norm=0.05) as engine:
        for tokens in batches(steps):
            engine.backward(engine(tokens))
            engine.step()
            plain(tokens).backward()
            step_plainly(plain, optimizer)
        assert_same(engine.state_dict(), plain, 1e-6)


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
def test_a_piece_that_comes_to_another_slot_than_it_left_is_home_first(
    pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down("leaving", 0.3, monkeypatch)
    torch.manual_seed(0)
    model = GPT(layers=1)
    resident, one = (G, G, G), (H, H, H)
    placements = (resident, resident, resident, resident, resident, one)
    block = sum(-(-p.numel() // 64) * 64 for p in model.h[0].parameters())
    size = -(-block // pieces // 64) * 64
    buckets = Buckets(1, size, 16384)
    assert_trains_as_plain(model, placements, 5, gpu_update_share=1.0, buckets=buckets)


def test_a_part_without_gradient_keeps_nothing_from_coming_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's part of a unit is of a parameter that never gets a gradient."""
    torch.manual_seed(0)
    model = GPT(layers=1)
    model.h[0].unused = nn.Linear(200, 100, bias=False)
    resident = (G, G, G)
    placements = (resident, resident, resident, resident, resident, (H, H, H))
    buckets = Buckets(1, 5000, 16384, update_slots=7)
    fetched: list[int] = []
    fetching = StreamedUpdate._fetch_all

    def counted(self: StreamedUpdate, coming: Any, after: Any) -> None:
        fetched.append(len(coming))
        fetching(self, coming, after)

    monkeypatch.setattr(StreamedUpdate, "_fetch_all", counted)
    assert_trains_as_plain(model, placements, 4, gpu_update_share=0.5, buckets=buckets)
    assert len(fetched) == 4


class PartialBlock(Block):
    """Only its first layer norm gets a gradient while it is ``partial``."""

    partial = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ln_1(x) if self.partial else super().forward(x)


class PartialGPT(GPT):
    """In a partial pass no block is complete."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(PartialBlock(32, 4) for _ in range(4))

    def forward(self, tokens: torch.Tensor, partial: bool = False) -> torch.Tensor:
        for block in self.h:
            block.partial = partial
        return super().forward(tokens)


def test_gradients_that_were_called_back_and_landed_early_are_those_on_the_host() -> None:
    """One more backward pass before the step, in which blocks stay incomplete and make room for each other."""
    torch.manual_seed(0)
    model = PartialGPT()
    buckets = Buckets(1, 5000, 16384, update_slots=60)
    plan = plan_for(model, ((H, H, H),), gpu_update_share=1.0, buckets=buckets)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    engine = Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2))
    with engine:
        for tokens in batches(3):
            for partial in (False, True):
                engine.backward(engine(tokens, partial))
                plain(tokens, partial).backward()
            engine.step()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(engine.state_dict(), plain, 1e-6)


@pytest.mark.parametrize("placement", [(H, H, H), (G, G, H)])
def test_memory_that_runs_out_in_an_update_is_not_told_as_that_of_a_pass(
    placement: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")

    monkeypatch.setattr(StreamedUpdate, "_update_piece", short)
    model = GPT()
    engine = Engine(model, plan_for(model, (placement,), gpu_update_share=1.0))
    tokens = batches(1)[0]
    engine.backward(engine(tokens))
    engine.step()
    for _ in range(3):
        with pytest.raises(DeviceMemoryError, match="The update is half done"):
            engine(tokens)
    engine.close()  # what was said is not said again


def test_a_failure_reaches_every_promise_also_one_that_is_kept_meanwhile() -> None:
    class Kept(Done):
        """Another thread keeps it between the question and the answer."""

        @property
        def told(self) -> bool:
            found = super().told
            if not found:
                self.finish(None)
            return found

    update: Any = SimpleNamespace(promise=Kept())
    piece: Any = SimpleNamespace()
    visits = [Visit(update, piece, piece, Done(), None, False, last=True) for _ in range(2)]
    for visit in visits:
        visit.updated = Kept()
    for visit in visits:
        visit.fail(RuntimeError("on fire"))
        assert visit.left.told


def test_units_smaller_than_a_piece_of_the_share_are_shared_too() -> None:
    units = [Reach("", 1 << 20), *(Reach(f"h.{i}", 30 << 10) for i in range(48))]
    found = allot(units, 0.43, 16 << 10, UPDATE_RING)
    given = sum(u.elements - found.edges[u.name] for u in units if u.name in found.edges)
    assert given > 0.4 * sum(u.elements for u in units)


def test_state_that_did_not_come_home_is_told_when_the_share_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down("leaving", 0.3, monkeypatch)
    moving = Lane.move

    def broken(lane: Lane, target: torch.Tensor, source: torch.Tensor) -> None:
        if lane.name == "leaving":
            raise RuntimeError("the link is on fire")
        moving(lane, target, source)

    monkeypatch.setattr(Lane, "move", broken)
    model = GPT(layers=1)
    resident = (G, G, G)
    placements = (resident, resident, resident, resident, resident, (H, H, H))
    plan = plan_for(model, placements, gpu_update_share=1.0, buckets=Buckets(1, 1 << 16, 16384))
    engine = Engine(model, plan)
    streamed = engine._streamed
    assert streamed is not None
    told: list[BaseException] = []

    def train() -> None:
        try:
            for number, tokens in enumerate(batches(4)):
                if number == 1:
                    streamed.deal_again()
                engine.backward(engine(tokens))
                engine.step()
        except OffloadError as error:
            told.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join(20)
    assert told, "nobody is told"
    assert "RuntimeError: the link is on fire. The update is half done" in str(told[0])
    engine.close()


def test_a_step_teaches_once_however_often_its_next_gradients_are_forgotten() -> None:
    model = GPT(layers=1)
    with Engine(model, plan_for(model, ((H, H, H),), gpu_update_share=0.5)) as engine:
        streamed, tokens = engine._streamed, batches(1)[0]
        assert streamed is not None
        engine.backward(engine(tokens))
        engine.step()
        engine.finish()
        clock: Any = SimpleNamespace(read=lambda: Took(1000, 1.0))
        streamed._clock = clock
        streamed._split._moved = False  # as behind the first step, which is no try
        for _ in range(3):
            engine.backward(engine(tokens))
            engine.zero_grad()
        assert len(streamed._split._tried) == 1
