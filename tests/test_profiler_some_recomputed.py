"""The first blocks recomputed and the others not: the peak by the rule beside that of a trace of just that."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from memplan.activations import Way, activations_of
from offload.plan import Tier
from profiler.checkpoints import checkpoints_on_host
from profiler.gradients_taken import gradients_taken
from profiler.replay import allocated_peak, training_loop
from profiler.run import profile_model
from profiler.study import ENGINES_STATE
from profiler.trace import trace_step
from tests.models import GPT


class Stages(nn.Module):
    """Blocks that are larger in the middle or at an end, with a head that takes much or little."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(Wide(32, width) for width in widths)
        self.head = nn.Linear(32, classes)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.stem(pixels)
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(x), labels)


class Wide(nn.Module):
    """Keeps more for backward the wider it is."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, width), nn.Linear(width, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(x)))


ROWS = 1 << 16
"""So many that what the libraries hold beside tensors is little."""
Training = tuple[nn.Module, tuple[torch.Tensor, ...]]


def stages(*widths: int, classes: int) -> Training:
    return Stages(widths, classes), (torch.zeros(ROWS, 32), torch.zeros(ROWS, dtype=torch.int64))


def gpt() -> Training:
    return GPT(layers=6), (torch.zeros(ROWS // 16, 16, dtype=torch.int64),)


class Pyramid(nn.Module):
    """Blocks that end in what the next one keeps too, the first of which may shrink what it is given."""

    def __init__(self, blocks: int, pool: int, *, residual: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Relu(32, pool if i == 0 else 1, residual=residual) for i in range(blocks))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = functional.relu(x.requires_grad_())
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean() + labels.sum()


class Relu(nn.Module):
    """Without residual its output is all that it keeps of itself."""

    def __init__(self, size: int, pool: int, *, residual: bool) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(size, size), nn.Linear(size, size)
        self.pool, self.residual = pool, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(0, (-1, self.pool)).mean(1) if self.pool > 1 else x
        y = self.two(functional.relu(self.one(x)))
        return functional.relu(x + y if self.residual else y)


class Skips(nn.Module):
    """The second half of the blocks is given what came out of the first half, through a gate that keeps it."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Wide(32, 128) for _ in range(blocks))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        kept = []
        for i, block in enumerate(self.blocks):
            x = block(x * kept.pop().sigmoid() if i >= len(self.blocks) / 2 and kept else x)
            if i < len(self.blocks) // 2:
                kept.append(x)
        return x.square().mean() + labels.sum()


def rows(model: nn.Module) -> Training:
    return model, (torch.zeros(ROWS, 32), torch.zeros(ROWS))


MODELS = {
    "equal blocks": lambda: stages(*[256] * 6, classes=10),
    "equal blocks and a large head": lambda: stages(*[256] * 6, classes=4000),
    "larger towards the end": lambda: stages(64, 64, 128, 128, 512, 512, classes=10),
    "larger at the start": lambda: stages(512, 512, 128, 128, 64, 64, classes=10),
    "larger in the middle": lambda: stages(64, 512, 512, 64, 64, classes=100),
    "a language model": gpt,
    "blocks that end in what the next one keeps": lambda: rows(Pyramid(6, 1, residual=True)),
    "the same without residuals": lambda: rows(Pyramid(6, 1, residual=False)),
    "a first block that keeps less than its input": lambda: rows(Pyramid(6, 8, residual=True)),
    "skips through a gate": lambda: rows(Skips(8)),
}


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return model(*batch)


def traced_peaks(
    model: nn.Module, batch: tuple[torch.Tensor, ...], blocks: tuple[str, ...]
) -> Iterator[tuple[Tier, int]]:
    """Of a trace in which only these blocks are recomputed, by where their inputs wait."""
    trace = trace_step(model, batch, loss_of, "bf16", blocks, bool(blocks), ())
    taken = tuple(gradients_taken(trace.events, {p.name: p.bytes for p in trace.parameters}))
    for tier, events in ((Tier.GPU, taken), (Tier.HOST, checkpoints_on_host(taken))):
        loop = training_loop(replace(trace, events=tuple(taken if events is None else events)), "adamw")
        yield tier, allocated_peak(loop, leave_out=ENGINES_STATE)


@pytest.mark.parametrize("name", MODELS)
def test_the_peak_with_some_blocks_recomputed_is_never_too_low_and_close(name: str) -> None:
    model, batch = MODELS[name]()
    profile = profile_model(model, batch, precision="bf16")
    assert len(profile.blocks) >= 5
    size = profile.batch_size
    for count in range(1, len(profile.blocks)):
        for tier, expected in traced_peaks(model, batch, profile.blocks[:count]):
            found = activations_of(profile, Way(size, count, tier), "cuda")
            assert found is not None
            assert expected * 0.999 <= found.peak_bytes <= expected * 1.09, (count, tier, expected)


class FirstToAll(nn.Module):
    """All blocks are given what the first one is."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(32, 32), nn.ModuleList(Wide(32, 128) for _ in range(6))
        for block in self.blocks:
            block.forward = partial(_beside, block.forward)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        first = x = self.stem(x)
        for block in self.blocks:
            x = block(x, beside=first)
        return x.square().mean() + labels.sum()


def _beside(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    return forward(x + beside)


def test_an_input_that_other_blocks_are_given_too_does_not_leave_the_device() -> None:
    profile = profile_model(*rows(FirstToAll()), precision="bf16")
    (point,) = (p for p in profile.activations if p.checkpoints_on_host and p.batch_size == ROWS)
    assert point.device_input_bytes[0] == point.input_bytes[0] > 0
    assert not any(point.device_input_bytes[1:])
