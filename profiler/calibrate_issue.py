"""What it costs the CPU to issue operations: tiny tensors, so that the device never holds it up.

[Note: Solving for one kind after another] A program repeats a few operations. Its trace says how many of each kind
forward and backward issue; what is left of its time after the kinds that are known already is shared by the others, so
programs come in an order in which each adds one kind. Two lengths of the program are compared, which takes away
whatever happens once.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from profiler.calibrate_timing import cpu_seconds
from profiler.events import BACKWARD, FORWARD
from profiler.issues import issues_of
from profiler.trace import trace_step

SHORT, LONG = 10, 60
ROUNDS = 15
LEAST_SECONDS = 1e-7
"""Nothing is issued in less; a difference of times can come out smaller."""


class Given(NamedTuple):
    """What a program finds beside its tensor."""

    weight: nn.Parameter
    """Of the tensor's shape."""
    indices: torch.Tensor
    """Eight of them."""


@dataclass(frozen=True)
class Program:
    """Something to repeat on a tiny tensor."""

    name: str
    shape: tuple[int, ...]
    layer: Callable[[torch.Tensor, "Given"], torch.Tensor]
    """Takes a tensor and returns one of its shape."""
    modules: bool = False
    """Whether every repetition is a module, and has a parameter, of its own."""


class _Repeated(nn.Module):
    def __init__(self, program: Program, times: int) -> None:
        super().__init__()
        self.program, self.times = program, times
        self.start = nn.Parameter(torch.randn(program.shape))
        self.indices = nn.Buffer(torch.zeros(8, dtype=torch.int64))
        self.layers = nn.ModuleList(_Own(program) for _ in range(times if program.modules else 0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.start
        if self.program.modules:
            for layer in self.layers:
                x = layer(x, self.indices)
            return x
        for _ in range(self.times):
            x = self.program.layer(x, Given(self.start, self.indices))
        return x


class _Own(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.weight = nn.Parameter(torch.randn(program.shape))

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return self.program.layer(x, Given(self.weight, indices))


def issue_programs() -> Iterator[Program]:
    """In an order in which each adds one kind of operation."""
    square, image = (8, 8), (2, 8, 8, 8)
    yield Program("views", square, lambda x, _: x.transpose(0, 1))
    yield Program("elementwise operations", square, lambda x, _: functional.gelu(x) * 0.5)
    yield Program("parameters", square, lambda x, given: x * given.weight, modules=True)
    yield Program("copies", square, lambda x, _: x.to(torch.bfloat16).to(torch.float32))
    yield Program("matrix products", square, lambda x, _: x @ x)
    yield Program("reductions", square, lambda x, _: x - x.mean(-1, keepdim=True))
    yield Program("softmax", square, lambda x, _: functional.softmax(x, -1))
    yield Program("normalisation", square, lambda x, _: functional.layer_norm(x, (8,)))
    yield Program("batch normalisation", image, lambda x, _: functional.batch_norm(x, None, None, training=True))
    yield Program("gradients of parts", square, lambda x, _: functional.pad(x[:4], (0, 0, 0, 4)))
    yield Program(
        "convolution",
        image,
        lambda x, given: functional.conv2d(x, given.weight.view(-1)[:192].view(8, 8, 3, 1), padding=(1, 0)),
    )
    yield Program("attention", (1, 1, 8, 8), lambda x, _: functional.scaled_dot_product_attention(x, x, x))
    yield Program("pooling", image, lambda x, _: functional.max_pool2d(x, 1))
    yield Program("dropout", square, lambda x, _: functional.dropout(x, 0.1))
    yield Program("embedding", square, lambda x, given: x + functional.embedding(given.indices, given.weight))
    yield Program("indexing", square, lambda x, given: x[given.indices])
    yield Program("scans", square, lambda x, _: x.cumsum(-1))


def issue_seconds(program: Program, known: Mapping[str, float]) -> dict[str, float]:
    """Seconds a call of the kinds that the program adds to the known ones."""
    counts = [_counts(program, times) for times in (SHORT, LONG)]
    times = [_times(program, times) for times in (SHORT, LONG)]
    found: dict[str, float] = {}
    for phase in (FORWARD, BACKWARD):
        more = counts[1][phase] - counts[0][phase]
        rest = times[1][phase] - times[0][phase] - sum(known[n] * count for n, count in more.items() if n in known)
        new = [name for name in more if name not in known]
        for name in new:
            found[name] = max(rest / sum(more[n] for n in new), LEAST_SECONDS)
    return found


def recurrent_issue_seconds() -> dict[str, float]:
    """Of one layer of a recurrent network, which is one call of cuDNN."""
    layer = nn.LSTM(32, 32, device="cuda")
    x = torch.randn(64, 8, 32, device="cuda", requires_grad=True)
    out = layer(x)[0]
    grad = torch.randn_like(out)
    inputs = (x, *layer.parameters())
    return {
        "forward/recurrent": cpu_seconds(lambda: layer(x)),
        "backward/recurrent_backward": cpu_seconds(lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)),
    }


def _counts(program: Program, times: int) -> dict[str, Counter[str]]:
    model = _Repeated(program, times)
    trace = trace_step(model, torch.randn(program.shape), lambda m, x: m(x).sum())
    return issues_of(trace.events)


def _times(program: Program, times: int) -> dict[str, float]:
    model = _Repeated(program, times).cuda()
    x = torch.randn(program.shape, device="cuda")
    taken: dict[str, list[float]] = {FORWARD: [], BACKWARD: []}
    for _ in range(ROUNDS + 2):
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        out = model(x)
        between = time.perf_counter()
        loss = out.sum()
        torch.cuda.synchronize()
        again = time.perf_counter()
        loss.backward()
        taken[BACKWARD].append(time.perf_counter() - again)
        taken[FORWARD].append(between - begun)
    torch.cuda.synchronize()
    return {phase: median(seconds[2:]) for phase, seconds in taken.items()}
