"""Hooks that a person puts on blocks act once, where a block runs again in backward too."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

from offload.engine import Engine
from offload.plan import Tier
from tests.plans import RESIDENT, H
from tests.test_engine_odd_models import plan_of, vectors

PATHS = tuple(f"blocks.{i}" for i in range(3))
AWAY = (H, H, H)
UNITS: dict[str, tuple] = {"": RESIDENT} | dict.fromkeys(PATHS, AWAY)
Given = tuple[torch.Tensor, ...]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x))) * scale


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.ModuleList(blocks), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, scale=0.5) if isinstance(block, Block) else torch.tanh(block(x))
        return self.last(x).square().mean()


def shift(_: nn.Module, args: Given) -> Given:
    return (args[0] * 0.5 + 1,)


def with_a_weight(block: Block, args: Given) -> Given:
    return (torch.tanh(args[0]) + block.up.weight.mean(),)


def noise(_: nn.Module, args: Given) -> Given:
    return (args[0] + torch.randn_like(args[0]),)


def by_name(_: nn.Module, args: Given, kwargs: dict[str, Any]) -> tuple[Given, dict[str, Any]]:
    return (torch.sin(args[0]),), {"scale": kwargs["scale"] * 3}


def after(_: nn.Module, __: Given, output: torch.Tensor) -> torch.Tensor:
    return torch.sin(output) + output * output


def after_by_name(block: Block, args: Given, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    return output * torch.tanh(block.down.weight.mean() + args[0]) * kwargs["scale"]


Adds = Callable[[nn.Module], Any]
ADDS: dict[str, Adds] = {
    "before": lambda block: block.register_forward_pre_hook(shift),
    "before, with a weight": lambda block: block.register_forward_pre_hook(with_a_weight),
    "before, with noise": lambda block: block.register_forward_pre_hook(noise),
    "before, by name": lambda block: block.register_forward_pre_hook(by_name, with_kwargs=True),
    "before, ahead of others": lambda block: block.register_forward_pre_hook(shift, prepend=True),
    "after": lambda block: block.register_forward_hook(after),
    "after, by name": lambda block: block.register_forward_hook(after_by_name, with_kwargs=True),
    "after, ahead of others": lambda block: block.register_forward_hook(after, prepend=True),
    "on gradients": lambda block: block.register_full_backward_hook(lambda _, given, __: (given[0] * 0.5,)),
    "two before, two after": lambda block: [
        *(block.register_forward_pre_hook(hook) for hook in (shift, with_a_weight)),
        *(block.register_forward_hook(after) for _ in range(2)),
    ],
}


def train(net: nn.Module, run: Callable[[torch.Tensor], None], add: Adds | None = None) -> None:
    for i, x in enumerate(vectors()):
        if i == 1 and add is not None:
            for block in net.blocks:
                add(block)
        torch.manual_seed(i)
        run(x)


def assert_trains_alike(
    net: nn.Module, plain: nn.Module, tiers: tuple, later: Adds | None = None, **changes: Any
) -> None:
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)

    def plainly(x: torch.Tensor) -> None:
        plain(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    train(plain, plainly, later)
    plan = plan_of(net, UNITS | dict.fromkeys(PATHS, tiers), recompute=PATHS, **changes)
    with Engine(net, plan, torch.optim.AdamW(net.parameters(), lr=1e-2)) as engine:

        def with_engine(x: torch.Tensor) -> None:
            engine.backward(engine(x))
            engine.step()

        train(net, with_engine, later)
        assert engine.overflow_count == 0
        state = engine.state_dict()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


def two(make: Callable[[], nn.Module] = Block) -> tuple[nn.Module, nn.Module]:
    """Alike; hooks of some blocks do not let them be copied."""
    torch.manual_seed(0)
    net, plain = (Net(*(make() for _ in PATHS)) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    return net, plain


def add_to(net: nn.Module, plain: nn.Module, add: Adds) -> None:
    for block in (*net.blocks, *plain.blocks):
        add(block)


@pytest.mark.parametrize("tiers", [RESIDENT, AWAY], ids=["resident", "away"])
@pytest.mark.parametrize("later", [False, True], ids=["before the engine", "later"])
@pytest.mark.parametrize("kind", ADDS)
def test_a_hook_of_a_recomputed_block_acts_once(kind: str, later: bool, tiers: tuple) -> None:
    net, plain = two()
    if not later:
        add_to(net, plain, ADDS[kind])
    assert_trains_alike(net, plain, tiers, ADDS[kind] if later else None)


def test_hooks_act_once_where_inputs_wait_on_the_host() -> None:
    net, plain = two()
    add_to(net, plain, ADDS["two before, two after"])
    assert_trains_alike(net, plain, AWAY, checkpoints=Tier.HOST)


def test_hooks_act_once_in_a_second_engine() -> None:
    net, plain = two()
    Engine(net, plan_of(net, dict.fromkeys(UNITS, RESIDENT), recompute=PATHS)).close()
    plain.load_state_dict(net.state_dict())
    add_to(net, plain, ADDS["before, ahead of others"])
    assert_trains_alike(net, plain, AWAY, ADDS["before"])


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_a_hook_of_a_compiled_block_acts_once() -> None:
    net, plain = two()
    add_to(net, plain, ADDS["before"])
    for block in net.blocks:
        block.compile(backend="eager")
    assert_trains_alike(net, plain, AWAY)


@pytest.mark.parametrize("kind", [spectral_norm, weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_hooks_that_compute_a_blocks_weight_compute_it_again(kind: Callable[[nn.Module], nn.Module]) -> None:
    assert_trains_alike(*two(lambda: kind(nn.Linear(8, 8))), AWAY)


def test_what_a_hook_makes_of_the_input_is_not_kept_until_backward() -> None:
    net = Net(*(Block() for _ in PATHS))
    made: list[Any] = []

    def make(_: nn.Module, args: Given) -> Given:
        result = torch.exp(args[0])
        made.append(weakref.ref(result.untyped_storage()))
        return (result,)

    for block in net.blocks:
        block.register_forward_pre_hook(make)
    with Engine(net, plan_of(net, UNITS, recompute=PATHS)) as engine:
        loss = engine(vectors(1)[0])
        assert [storage() for storage in made] == [None] * len(PATHS)
        engine.backward(loss)
        engine.step()
