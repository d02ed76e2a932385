"""What it costs the CPU to issue operations in the blocks that models are made of.

[Note: Varied work] One operation repeated finds its code and data in the processor's caches, and its module has little
Python of its own. Blocks of varied operations take longer than the sum of their parts; by how much is measured on three
of them, which stand for transformers, gated transformers with rotary embeddings, and convolutional networks.
"""

import gc
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from math import exp, log
from statistics import mean, median

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from profiler.events import BACKWARD, FORWARD
from profiler.issues import issues_of
from profiler.trace import trace_step

FEW, MANY = 2, 10
ROUNDS = 7
WIDTH, HEADS, LENGTH = 16, 2, 8
_GROUPS = {FORWARD: ("forward/", "call"), BACKWARD: ("backward/", "gradient")}


class Transformer(nn.Module):
    """Attention with biases and dropout, and an MLP, each after a normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.act, self.dropout = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        y = self.before(x)
        q, k, v = (
            layer(y).view(*y.shape[:-1], HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(y))
        return x + self.dropout(self.down(self.act(self.up(self.between(x)))))


class Gated(nn.Module):
    """Root mean square normalisation, rotary embeddings, causal attention and a gated MLP, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.ones(WIDTH) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.angle = nn.Buffer(torch.ones(LENGTH, WIDTH // HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, length, width] to the same."""
        y = self._scaled(x, self.scales[0])
        q, k, v = (
            layer(y).view(*y.shape[:-1], HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        q, k = self._turned(q), self._turned(k)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        y = self._scaled(x, self.scales[1])
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))

    def _scaled(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return x * self.angle + torch.cat((-x[..., half:], x[..., :half]), -1) * self.angle


class Convolutional(nn.Module):
    """Two convolutions with normalisations, around which the input goes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(2))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, width, side, side] to the same."""
        y = self.act(self.norms[0](self.first(x)))
        return self.act(self.norms[1](self.second(y)) + x)


class _Chain(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], times: int, repeated: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(times))
        self.repeated = repeated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.repeated else block(x)
        return x


BLOCKS: tuple[tuple[Callable[[], nn.Module], tuple[int, ...], str], ...] = (
    (Transformer, (2, LENGTH, WIDTH), "fp32"),
    (Transformer, (2, LENGTH, WIDTH), "amp"),
    (Gated, (2, LENGTH, WIDTH), "fp32"),
    (Convolutional, (2, WIDTH, LENGTH, LENGTH), "fp32"),
)
"""Each with the shape of its input, and the precision that it is trained in."""


def in_blocks(known: Mapping[str, float]) -> dict[str, float]:
    """The known costs as they are in blocks: all of a phase are multiplied by the same number."""
    ratios: dict[str, list[float]] = {FORWARD: [], BACKWARD: []}
    for block, shape, precision in BLOCKS:
        taken = _block_seconds(block, shape, precision)
        for phase, more in _more_issues(block, shape, precision).items():
            expected = sum(known.get(name, known[f"{phase}/elementwise"]) * count for name, count in more.items())
            ratios[phase].append(log(taken[phase] / expected))
    scales = {name: exp(mean(found)) for phase, found in ratios.items() for name in _GROUPS[phase]}
    return {
        name: cost * next(s for start, s in scales.items() if name.startswith(start)) for name, cost in known.items()
    }


def checkpoint_seconds(known: Mapping[str, float]) -> float:
    """Of a block that backward repeats, beside the operations."""
    block, shape, precision = BLOCKS[0]
    plain = sum(_block_seconds(block, shape, precision).values())
    whole = sum(_block_seconds(block, shape, precision, repeated=True).values())
    again = _more_issues(block, shape, precision)[FORWARD]
    return max(whole - plain - sum(known.get(n, known["forward/elementwise"]) * c for n, c in again.items()), 0.0)


@cache
def _more_issues(block: Callable[[], nn.Module], shape: tuple[int, ...], precision: str) -> dict[str, dict[str, float]]:
    """What one block issues, by phase."""
    few, many = (_issues(block, shape, precision, times) for times in (FEW, MANY))
    return {
        phase: {name: (count - few[phase][name]) / (MANY - FEW) for name, count in many[phase].items()}
        for phase in (FORWARD, BACKWARD)
    }


def _issues(
    block: Callable[[], nn.Module], shape: tuple[int, ...], precision: str, times: int
) -> dict[str, Counter[str]]:
    model = _Chain(block, times, repeated=False)
    return issues_of(trace_step(model, torch.randn(shape), lambda m, x: m(x).sum(), precision).events)


def _block_seconds(
    block: Callable[[], nn.Module], shape: tuple[int, ...], precision: str, repeated: bool = False
) -> dict[str, float]:
    """Of one block, by phase."""
    few, many = (_seconds(_Chain(block, times, repeated), shape, precision) for times in (FEW, MANY))
    return {phase: max((many[phase] - few[phase]) / (MANY - FEW), 1e-6) for phase in few}


def _seconds(model: nn.Module, shape: tuple[int, ...], precision: str) -> dict[str, float]:
    """The garbage collector runs, as it does in a program."""
    model, x = model.cuda(), torch.randn(shape, device="cuda")
    taken: dict[str, list[float]] = {FORWARD: [], BACKWARD: []}
    collecting = gc.isenabled()
    gc.enable()
    for _ in range(ROUNDS + 2):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16) if precision == "amp" else nullcontext():
            out = model(x)
        taken[FORWARD].append(time.perf_counter() - begun)
        loss = out.sum()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        loss.backward()
        taken[BACKWARD].append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    if not collecting:
        gc.disable()
    return {phase: median(seconds[2:]) for phase, seconds in taken.items()}
