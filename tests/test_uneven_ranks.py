"""Ranks whose batches leave parameters without a gradient train with the others, and none waits for another forever."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from offload.call_order import CallOrder
from offload.engine import Engine
from offload.errors import OffloadError
from tests.models import GPT, LoopingGPT
from tests.plans import G, H, plan_for
from tests.ranks import on_ranks
from tests.test_engine_equals_pytorch import optimizer_of
from tests.test_engine_ranks import PLACEMENTS, Case, UnevenBlock, assert_all_train_alike, global_batches, parts_of

GPU, HOST = PLACEMENTS["gpu"], PLACEMENTS["host"]
MIXED = ((H, H, H), (G, G, G))
"""Every other unit never leaves the device, where nothing but a gradient tells of its backward."""


class RareGPT(GPT):
    """A part of every block is used by some batches only: more blocks of one shape than there are gradient slots."""

    def __init__(self) -> None:
        super().__init__(layers=6)
        for i in range(6):
            self.h[i] = UnevenBlock(32, 4)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            block.used = bool(tokens[0, 0] % 2)
        return super().run(tokens)


class LoopingRareGPT(RareGPT):
    """Every block is called twice, and its part is used the second time only."""

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for used in (False, bool(tokens[0, 0] % 2)):
            for block in self.h:
                block.used = used
                x = block(x)
        return self.head(self.ln_f(x))


class TowersGPT(RareGPT):
    """Two blocks have inputs that need no gradient, one of them in the middle of the order."""

    def __init__(self) -> None:
        super().__init__()
        self.wte.requires_grad_(False)
        self.wpe.requires_grad_(False)

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        start = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        x = y = start
        for i, block in enumerate(self.h):
            block.used = bool(tokens[0, 0] % 2)
            x, y = (block(x), y) if i < 3 else (x, block(y))
        return self.head(self.ln_f(x + y))


class LendingGPT(RareGPT):
    """A block's parameter is used ahead of all blocks, too, so its gradient comes when the block is over."""

    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1])) + self.h[4].sometimes.bias
        for block in self.h:
            block.used = bool(tokens[0, 0] % 2)
            x = block(x)
        return self.head(self.ln_f(x))


class ReentrantLoopingGPT(LoopingGPT):
    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in (*self.h, *self.h):
            x = checkpoint(block, x, use_reentrant=True)
        return self.head(self.ln_f(x))


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [2, 3])
def test_a_part_of_every_block_may_be_used_by_some_ranks_only(world: int, tmp_path: Path) -> None:
    cases = [
        Case(stage, kept, RareGPT, accumulation=a, steps=4 // a + 1)
        for stage, kept, a in product((1, 2, 3), (GPU, HOST), (1, 3))
    ]
    for tokens in global_batches(2, world):
        uses = [bool(part[0, 0] % 2) for part in tokens.chunk(world)]
        assert len(set(uses)) == 2, "the ranks must differ"
    # One process that adds its samples in another order is as far from itself (3e-5, in one bias).
    assert_all_train_alike(world, cases, tmp_path, within=1e-4)


@pytest.mark.timeout(240)
def test_it_may_be_so_where_units_stay_run_twice_or_have_inputs_without_gradient(tmp_path: Path) -> None:
    blocks = {"recompute": tuple(f"h.{i}" for i in range(6))}
    cases = [
        *(Case(stage, MIXED, RareGPT, steps=3) for stage in (0, 1, 2, 3)),
        *(Case(stage, HOST, kind, steps=3) for stage, kind in product((2, 3), (LoopingRareGPT, TowersGPT))),
        *(Case(stage, HOST, RareGPT, steps=3, changes=blocks) for stage in (1, 3)),
    ]
    assert_all_train_alike(2, cases, tmp_path)


@pytest.mark.timeout(240)
def test_a_gradient_that_comes_after_the_backward_of_its_unit_counts(tmp_path: Path) -> None:
    assert_all_train_alike(2, [Case(0, GPU, LendingGPT, accumulation=a, steps=3) for a in (1, 3)], tmp_path)


def train_lending(rank: int, world: int, directory: str) -> list[str]:
    said = []
    for stage in (1, 2):
        model = LendingGPT()
        engine = Engine(model, plan_for(model, GPU, Path(directory), gpus=world, zero_stage=stage), optimizer_of(model))
        (tokens,) = parts_of(global_batches(1, world), world, rank)
        with pytest.raises(OffloadError) as caught:
            engine(tokens)
        engine._release()
        said.append(str(caught.value))
    return said


@pytest.mark.timeout(120)
def test_a_parameter_that_is_read_before_its_ranks_have_brought_it_together_is_refused(tmp_path: Path) -> None:
    for said in on_ranks(2, train_lending, str(tmp_path)):
        assert all(
            "reads a parameter" in sentence and "outside of the forward of its module" in sentence for sentence in said
        )


def train_reentrant(rank: int, world: int, directory: str) -> str:
    model = ReentrantLoopingGPT()
    plan = plan_for(model, HOST, Path(directory), gpus=world, zero_stage=2)
    engine = Engine(model, plan, optimizer_of(model))
    (tokens,) = parts_of(global_batches(1, world), world, rank)
    try:
        engine.backward(engine(tokens))
    except OffloadError as error:
        return str(error)
    finally:
        engine._release()
    return "lost"


@pytest.mark.timeout(120)
def test_a_gradient_after_the_sum_over_the_ranks_is_refused(tmp_path: Path) -> None:
    for said in on_ranks(2, train_reentrant, str(tmp_path)):
        assert "one more gradient after it was summed over the ranks" in said


def order_of(*calls: str) -> tuple[CallOrder, dict[str, Any]]:
    order, ends = CallOrder(), {}
    for name in calls:
        order.called(name)
        ends[name] = order.ended()
    return order, ends


def test_a_unit_is_over_when_the_backward_of_one_that_was_called_before_begins() -> None:
    order, ends = order_of("a", "b", "c")
    assert order.over(ends["c"]) == []
    assert order.over(ends["a"]) == ["c", "b"]
    assert order.over(ends["a"]) == []


def test_a_unit_is_over_when_its_first_call_is() -> None:
    order, ends = order_of("a", "b", "c", "b")
    assert order.over(ends["c"]) == []
    assert order.over(ends["a"]) == ["c", "b"]


def test_a_call_of_an_earlier_pass_tells_nothing() -> None:
    order, ends = order_of("a", "b")
    order.begin_pass()
    order.called("a")
    order.called("b")
    assert order.over(ends["a"]) == []
    assert order.over(order.ended() - 1) == ["b"]
