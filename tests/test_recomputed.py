"""A model's own checkpoint runs a unit several times before the first of these calls has had its backward."""

import copy
import ctypes
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from offload.engine import Engine
from offload.recomputed import RecomputedCalls
from offload.weights import WeightMover
from tests.plans import RESIDENT, H
from tests.test_engine_odd_models import plan_of, vectors

UNITS = dict.fromkeys(("first", "shared", "between", "last"), (H, H, H))


class Segmented(nn.Module):
    """One segment has a layer twice, with another one between."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.shared, self.between, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.reentrant = reentrant

    def segment(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.shared(torch.tanh(self.between(torch.tanh(self.shared(x))))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(checkpoint(self.segment, self.first(x), use_reentrant=self.reentrant)).square().mean()


def spoil_what_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever lets go of a unit finds its slot taken at once, and for good, as it may be."""
    unuse = WeightMover.unuse

    def spoiling(self: WeightMover, name: str) -> None:
        unuse(self, name)
        if (slot := self._slot_of.get(name)) is not None:
            if slot.arrived is not None:
                slot.arrived.synchronize()
            self._vacate(slot)
            self._rings.ring(self._states[name]).remove(slot)
            ctypes.memset(slot.buffer.data_ptr(), 0xFF, slot.buffer.nbytes)  # NaN; the first pass is watched

    monkeypatch.setattr(WeightMover, "unuse", spoiling)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", [(), ("between",)])
def test_a_unit_stays_until_the_backward_of_all_calls_that_ran_again(
    reentrant: bool, recompute: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_what_is_not_in_use(monkeypatch)
    torch.manual_seed(0)
    model = Segmented(reentrant)
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    plan = plan_of(model, {"": RESIDENT, **UNITS}, recompute=recompute)
    with Engine(model, plan, torch.optim.AdamW(model.parameters(), lr=1e-2)) as engine:
        for x in vectors():
            plain(x).backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.backward(engine(x))
            engine.step()
        state = engine.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("events", "over"),
    [
        ("b e b e", "1 1"),  # two calls, none of which runs again
        ("b c e b c e", "1 1"),  # recompute by unit
        ("c c b e b e", "0 1"),  # a segment that ends with another unit
        ("b c c e b e", "0 1"),  # one that ends with this
        ("c c b c e b c e", "0 1"),  # both kinds, one inside of the other
        ("c e", "1"),  # its output told nothing
        ("e", "1"),
    ],
)
def test_calls_are_counted_once(events: str, over: str) -> None:
    calls = RecomputedCalls()
    calls.begin_pass()
    told: list[bool] = []
    does: dict[str, Any] = {
        "b": lambda: calls.begin_backward("unit"),
        "c": lambda: calls.called("unit"),
        "e": lambda: told.append(calls.end_backward("unit")),
    }
    for event in events.split():
        does[event]()
    assert told == [said == "1" for said in over.split()]
