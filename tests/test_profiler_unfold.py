"""A trace that passes over equal blocks is the trace that runs them all."""

from collections.abc import Sequence
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from profiler.events import Back, Call, Event, Free
from profiler.layers import repeated_blocks
from profiler.runs import KEPT_PERIODS, Run, runs_of
from profiler.trace import Trace, trace_step
from profiler.unfold import CannotUnfoldError, unfold
from tests.profiler_models import GPT, Block, llama, mean_square, next_token_loss, tokens


class Chain(nn.Module):
    """Blocks one after the other, with what a caller may do in between."""

    def __init__(self, blocks: Sequence[nn.Module], between=lambda x, i: x) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(blocks), between

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = self.between(block(x), i)
        return x


class Gated(nn.Module):
    """A block that scales by its own number, which only the numbers of the tensor show, or every other time by half."""

    def __init__(self, number: int, half: bool = False) -> None:
        super().__init__()
        self.number, self.half, self.layer = number, half, nn.Linear(16, 16)

    def forward(self, x):
        y = torch.tanh(self.layer(x)) * self.number
        return x + (y * 0.5).exp() if self.half else x + y


def ordered(events: Sequence[Event]) -> list[tuple[object, ...]]:
    """The events with ids by first mention, without the blocks' markers; what ends together in one order."""
    ids: dict[int, int] = {}
    out: list[tuple[object, ...]] = []
    for ends, group in groupby((e for e in events if not isinstance(e, Back)), key=lambda e: isinstance(e, Free)):
        named = [e._replace(id=ids.setdefault(e.id, len(ids))) if hasattr(e, "id") else e for e in group]
        out += sorted((type(e).__name__, *e) for e in named) if ends else [(type(e).__name__, *e) for e in named]
    return out


def both(model, batch, forward, precision="fp32", recompute=False) -> tuple[Trace, Trace, int]:
    """Folded, not folded, and how many blocks were passed over."""
    blocks = repeated_blocks(model)
    runs = runs_of(model, blocks)
    folded = trace_step(model, batch, forward, precision, blocks, recompute, runs)
    plain = trace_step(model, batch, forward, precision, blocks, recompute)
    assert not any(isinstance(e, Back) for e in plain.events)
    # Only a trace that was folded has the blocks' markers in backward.
    passed = sum(len(run.skipped) for run in runs) if any(isinstance(e, Back) for e in folded.events) else 0
    return folded, plain, passed


def assert_same(folded: Trace, plain: Trace) -> None:
    assert ordered(folded.events) == ordered(plain.events)
    assert folded.parameters == plain.parameters
    assert folded.buffer_bytes == plain.buffer_bytes
    assert folded.used_outside == plain.used_outside


def square(model, x):
    return mean_square(model(x), x)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "amp", "bf16"])
def test_a_gpt_with_dropout_unfolds_to_the_trace_of_all_its_blocks(precision, recompute):
    def forward(model, batch):
        return next_token_loss(model(batch), batch)

    folded, plain, passed = both(GPT(layers=9, dropout=0.1), tokens(), forward, precision, recompute)
    assert passed == 5
    assert_same(folded, plain)


def test_a_llama_that_checkpoints_itself_and_one_with_a_cache_unfold():
    def forward(model, batch):
        return model(input_ids=batch, labels=batch).loss

    model = llama(num_hidden_layers=8)
    folded, plain, passed = both(model, tokens(), forward)
    assert passed == 4
    assert_same(folded, plain)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    model.config.use_cache = False
    folded, plain, passed = both(model, tokens(), forward)
    assert passed == 4
    assert_same(folded, plain)


def test_blocks_of_alternating_kinds_unfold_by_pairs():
    model = Chain([Gated(i, half=bool(i % 2)) for i in range(13)])
    (run,) = runs_of(model, repeated_blocks(model))
    assert (len(run.blocks), run.period, run.skipped) == (13, 2, range(6, 10))
    folded, plain, passed = both(model, torch.randn(4, 16, requires_grad=True), square)
    assert passed == 4
    assert_same(folded, plain)


def test_the_first_block_that_does_more_than_the_others_is_no_hindrance():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x, shared):
            if "mask" not in shared:
                shared["mask"] = torch.ones(4, 8)
            return self.layer(x).sigmoid() * shared["mask"]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Mask() for _ in range(8))

        def forward(self, x):
            shared = {}
            for block in self.blocks:
                x = block(x, self.__dict__.setdefault("box", Box(shared)))
            return x

    class Box:
        def __init__(self, content):
            self.content = content

        def __contains__(self, name):
            return name in self.content

        def __getitem__(self, name):
            return self.content[name]

        def __setitem__(self, name, value):
            self.content[name] = value

    folded, plain, _ = both(Model(), torch.randn(4, 8), square)
    assert_same(folded, plain)


@pytest.mark.parametrize(
    "between",
    [
        lambda x, i: x * 2,
        lambda x, i: x if i != 5 else x.clone(),
        lambda x, i: x.relu() if i % 3 == 0 else x,
    ],
)
def test_what_a_caller_does_between_blocks_is_not_lost(between):
    folded, plain, passed = both(Chain([Gated(i) for i in range(9)], between), torch.randn(4, 16), square)
    assert passed == 0
    assert_same(folded, plain)


def test_blocks_whose_outputs_are_used_again_are_all_run():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(8))

        def forward(self, x):
            seen = []
            for block in self.blocks:
                x = block(x)
                seen.append(x)
            return torch.stack(seen).square()

    folded, plain, passed = both(Skips(), torch.randn(4, 16), square)
    assert passed == 0
    assert_same(folded, plain)


def test_blocks_with_two_inputs_to_learn_from_are_all_run():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x, memory):
            return self.layer(x) + memory

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.blocks = nn.Linear(16, 16), nn.ModuleList(Cross() for _ in range(8))

        def forward(self, x):
            memory = self.encoder(x)
            for block in self.blocks:
                x = block(x, memory)
            return x

    folded, plain, passed = both(Decoder(), torch.randn(4, 16), square)
    assert passed == 0
    assert_same(folded, plain)


def test_a_block_that_fails_fails_with_its_own_error():
    class Broken(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number, self.layer = number, nn.Linear(16, 16)

        def forward(self, x):
            if self.number == 2:
                raise RuntimeError("this is block 2")
            return self.layer(x)

    model = Chain([Broken(i) for i in range(8)])
    blocks = repeated_blocks(model)
    with pytest.raises(RuntimeError, match="this is block 2"):
        trace_step(model, torch.randn(4, 16), square, "fp32", blocks, False, runs_of(model, blocks))


def test_runs_are_found_by_kind_and_not_by_number():
    alike = Chain([Gated(i) for i in range(12)])
    assert [r.blocks for r in runs_of(alike, repeated_blocks(alike))] == [tuple(f"blocks.{i}" for i in range(12))]
    shifted = Chain([Gated(7) for _ in range(12)])
    assert len(runs_of(shifted, repeated_blocks(shifted))[0].blocks) == 12
    mixed = Chain([Gated(5 if i < 6 else 50) for i in range(12)])
    (run,) = runs_of(mixed, repeated_blocks(mixed))
    assert len(run.blocks) == 6
    tied = [Block(16, 2) for _ in range(8)]
    for block in tied:
        block.up.weight = tied[0].up.weight
    assert runs_of(Chain(tied), repeated_blocks(Chain(tied))) == ()
    few = Chain([Gated(i) for i in range(KEPT_PERIODS + 1)])
    assert runs_of(few, repeated_blocks(few)) == ()


@given(st.integers(0, 40), st.integers(1, 5))
def test_what_is_passed_over_is_whole_periods_with_some_before_and_one_after(count, period):
    run = Run(tuple(f"b.{i}" for i in range(count)), period)
    assert len(run.skipped) % period == 0
    if run.skipped:
        assert run.skipped.start == KEPT_PERIODS * period
        assert period <= count - run.skipped.stop < 2 * period


def test_events_in_which_a_block_is_missing_are_refused():
    run = Run(tuple(f"b.{i}" for i in range(6)), 1)
    with pytest.raises(CannotUnfoldError, match="not at all"):
        unfold([Call("b.0")], [run])
