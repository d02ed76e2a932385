"""What the training thread itself takes, a unit and phase: the engine beside plain PyTorch, with blocks so small that
computing is nothing.

    python -m benchmarks.host_time [--device cuda] [--steps 60]

Needs no GPU. Prints and saves microseconds a block of forward, backward and step, the lower quartile of the steps, and
what the engine adds to plain PyTorch: clipping and AdamW(foreach), recompute by torch.utils.checkpoint. The update of
the step before is over when a step begins, so that no step waits for it.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.common import save
from offload.engine import Engine
from offload.plan import Precision, Tier
from tests.models import GPT
from tests.plans import plan_for

LAYERS, WIDTH, HEADS = 24, 64, 4
WARM_STEPS = 3
PHASES = ("forward", "backward", "step")
PLACEMENTS = {"gpu": (Tier.GPU,) * 3, "state on the host": (Tier.GPU, Tier.GPU, Tier.HOST), "host": (Tier.HOST,) * 3}

Parts = Generator[None, None, None]
"""One training, a phase each time that it is asked."""


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"µs a block  {'':36}" + "".join(f"{phase:>10}" for phase in PHASES))
    for recompute in (False, True):
        suffix = ", recomputed" if recompute else ""
        alone = measured(partial(plain, args.device, recompute), args.steps)
        rows.append(row_of(f"plain PyTorch{suffix}", alone))
        for name, placement in PLACEMENTS.items():
            taken = measured(partial(by_engine, args.device, recompute, placement), args.steps)
            rows.append(row_of(f"engine, {name}{suffix}", taken))
            rows.append(
                row_of(f"  {name}{suffix}, more than plain", [a - b for a, b in zip(taken, alone, strict=True)])
            )
    print(save("host-time", rows, device=args.device, layers=LAYERS, width=WIDTH, steps=args.steps))


def measured(training: Callable[[], Parts], steps: int) -> list[float]:
    """Microseconds a block of each phase."""
    parts = training()
    rows = []
    for _ in range(WARM_STEPS + steps):
        row = []
        for _ in PHASES:
            begun = time.perf_counter()
            next(parts)
            row.append((time.perf_counter() - begun) / LAYERS * 1e6)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        next(parts)
        rows.append(row)
    parts.close()
    return [statistics.quantiles(column)[0] for column in zip(*rows[WARM_STEPS:], strict=True)]


def plain(device: str, recompute: bool) -> Parts:
    """A model alone."""
    model, tokens = _setup()
    model, tokens = model.to(device), tokens.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    for block in model.h if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    while True:
        loss = model(tokens)
        yield
        loss.backward()
        yield
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield
        yield


def by_engine(device: str, recompute: bool, placement: tuple[Tier, Tier, Tier]) -> Parts:
    """The same by the engine, everything in one placement."""
    model, tokens = _setup()
    blocks = tuple(f"h.{i}" for i in range(LAYERS)) if recompute else ()
    plan = plan_for(model, (placement,), None, Precision.FP32, device, recompute=blocks)
    with Engine(model, plan, torch.optim.AdamW(model.parameters()), max_grad_norm=1.0) as engine:
        tokens = tokens.to(device)
        while True:
            loss = engine(tokens)
            yield
            engine.backward(loss)
            yield
            engine.step()
            yield
            engine.finish()
            yield


def _setup() -> tuple[GPT, torch.Tensor]:
    torch.manual_seed(0)
    return GPT(LAYERS, WIDTH, HEADS), torch.randint(0, 61, (1, 9))


def row_of(name: str, microseconds: list[float]) -> dict[str, Any]:
    """A line of the table, printed, and as a row of the result."""
    print(f"{name:48}" + "".join(f"{value:10.0f}" for value in microseconds), flush=True)
    return {
        "way": name.strip(),
        **{f"{p}_microseconds": round(m, 1) for p, m in zip(PHASES, microseconds, strict=True)},
    }


if __name__ == "__main__":
    main()
