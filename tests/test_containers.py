"""Blocks that are given lists, dicts and objects of their own, and that write to them: no unit stays longer in use."""

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.plans import RESIDENT, H
from tests.test_engine_odd_models import assert_trains_as_plain, plan_of, vectors
from tests.test_recomputed import spoil_what_is_not_in_use

COUNT = 8
BLOCKS = tuple(f"blocks.{i}" for i in range(COUNT))
UNITS: dict[str, tuple] = {"": RESIDENT} | dict.fromkeys(BLOCKS, (H, H, H))


@dataclass
class Data:
    x: torch.Tensor


@dataclass(frozen=True, slots=True)
class Fixed:
    parts: list[torch.Tensor]


class Pair(NamedTuple):
    x: torch.Tensor
    others: dict[str, Any]


class State:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class Odd(dict):
    """torch knows nothing of it."""


WAYS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "list": (lambda x: [x], lambda s: s[0]),
    "dict": (lambda x: {"x": x}, lambda s: s["x"]),
    "dict of lists": (lambda x: {"a": [{"x": x}, None]}, lambda s: s["a"][0]["x"]),
    "named tuple": (lambda x: Pair(x, {"n": 1}), lambda s: s.x),
    "data": (Data, lambda s: s.x),
    "frozen data with a list": (lambda x: Fixed([x]), lambda s: s.parts[0]),
    "object": (State, lambda s: s.x),
    "dict of a class of its own": (lambda x: Odd(x=x), lambda s: s["x"]),
    "user dict": (lambda x: UserDict(x=x), lambda s: s["x"]),
}


class Block(nn.Module):
    """It has a parameter that it does not use, and returns what it was given, or another of that kind."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.unused, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def computed(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x))

    def forward(self, state: Any) -> Any:
        make, read = WAYS[self.way]
        return make(self.computed(read(state)))


class Writing(Block):
    """It writes to what it was given, and returns nothing."""

    def forward(self, state: dict[str, Any]) -> None:
        assert state["self"] is state["box"][0]
        state["seen"].append(state["x"])
        state["x"] = self.computed(state["x"]) + state["beside"]


class InPlace(Block):
    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        state["x"].mul_(0.9).add_(torch.tanh(self.up(state["x"].clone())))
        return state


class Merging(Block):
    """What it does not change it returns as it was."""

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "x": self.computed(state["x"]) * state["beside"]}


class Adapted(Block):
    """The gradients of its parameters come before that of its input, which needs a weight that is frozen."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self.base = nn.Linear(8, 8).requires_grad_(False)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        base = self.base(state["x"])
        x = base + self.up(state["x"]) + self.unused(state["x"])
        return {**state, "x": x}


class Net(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], *, frozen: bool, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList(make() for _ in range(COUNT))
        self.blocks.requires_grad_(not frozen)
        self.reentrant = reentrant

    def run(self, x: torch.Tensor, beside: torch.Tensor, blocks: nn.ModuleList) -> torch.Tensor:
        kind = type(blocks[0])
        if kind is Block:
            make, read = WAYS[blocks[0].way]
            state = make(x)
            for block in blocks:
                state = block(state)
            return read(state)
        state = {"x": x, "beside": beside, "seen": [], "box": [None]}
        state["self"] = state["box"][0] = object()
        for block in blocks:
            returned = block(state)
            state = state if returned is None else returned
        if kind is InPlace:
            return x  # the very tensor
        return state["x"] + sum(seen.mean() for seen in state["seen"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        beside = torch.tanh(x)
        if self.reentrant is None:
            x = self.run(x, beside, self.blocks)
        else:
            for i in range(0, COUNT, 2):
                x = checkpoint(self.run, x, beside, self.blocks[i : i + 2], use_reentrant=self.reentrant)
        return self.last(x).square().mean()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_no_more_slots_are_made_whatever_a_block_is_given(way: str, frozen: bool, device: str) -> None:
    torch.manual_seed(0)
    net = Net(lambda: Block(way), frozen=frozen)
    assert_trains_as_plain(net, plan_of(net, UNITS, device=device), vectors())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", [Writing, InPlace, Merging])
def test_blocks_may_write_to_what_they_were_given_and_change_it_in_place(kind: type[Block], frozen: bool) -> None:
    torch.manual_seed(0)
    net = Net(lambda: kind(""), frozen=frozen)
    assert_trains_as_plain(net, plan_of(net, UNITS), vectors())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("way", ["dict", "data"])
def test_recomputed_blocks_stay_as_long_as_their_own_backward(
    way: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_what_is_not_in_use(monkeypatch)
    torch.manual_seed(0)
    net = Net(lambda: Block(way), frozen=frozen)
    assert_trains_as_plain(net, plan_of(net, UNITS, recompute=BLOCKS), vectors(), overflows=True)


def test_a_recomputed_block_stays_until_the_gradient_of_its_input_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_what_is_not_in_use(monkeypatch)
    torch.manual_seed(0)
    net = Net(lambda: Adapted("dict"), frozen=False)
    for block in net.blocks:
        block.base.requires_grad_(False)
    assert_trains_as_plain(net, plan_of(net, UNITS, recompute=BLOCKS), vectors(), overflows=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Block, Merging, Writing])
def test_blocks_of_a_models_own_checkpoint_stay_as_long_as_its_backward(
    reentrant: bool, kind: type[Block], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_what_is_not_in_use(monkeypatch)
    torch.manual_seed(0)
    net = Net(lambda: kind("dict"), frozen=True, reentrant=reentrant)
    assert_trains_as_plain(net, plan_of(net, UNITS), vectors(), overflows=True)
