"""One training step through the tiers beside plain PyTorch with everything on the device, in one run, in turn.

    python -m benchmarks.offload --model 1b --batch 8 --length 2048 --nvme DIR

Every system trains the same Llama on the same tokens: bf16 weights, exact fp32 masters, AdamW, clip 1.0, every layer
recomputed. Each is built, warmed up, timed for some steps and torn down before the next, and the whole round is
repeated; a row gives the median step and its ratio to plain PyTorch's median.
"""

import argparse
import gc
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import llama, save
from offload.engine import Engine
from offload.plan import Buckets, Budget, Placement, Plan, Precision, Prediction, Tier

WARM_UP = 2
ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "eps": 1e-8}
G, H, N = Tier.GPU, Tier.HOST, Tier.NVME
SYSTEMS = {
    "resident": (G, G, G),
    "optimizer on host": (G, H, H),
    "all on host": (H, H, H),
    "optimizer on nvme": (H, H, N),
}

Step = Callable[[torch.Tensor], float]


def plain(args: argparse.Namespace) -> tuple[Step, Callable[[], None]]:
    """The loop people write: bf16 weights, fp32 masters, fused AdamW where there is one."""
    model = llama(args.model)
    masters = [p.detach().clone() for p in model.parameters()]
    model.to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, fused=torch.cuda.is_available(), **ADAMW)

    def step(tokens: torch.Tensor) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        for master in masters:
            master.grad = None
        return loss.item()

    return step, lambda: None


def through_tiers(args: argparse.Namespace, placement: tuple[Tier, Tier, Tier]) -> tuple[Step, Callable[[], None]]:
    """The engine with every unit in one placement; the root unit (the tied embedding) too."""
    model = llama(args.model)
    layers = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    plan = Plan(
        model=args.model,
        parameter_shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        precision=Precision.BF16,
        device="cuda" if torch.cuda.is_available() else "cpu",
        gpus=1,
        zero_stage=0,
        placements=tuple(Placement(unit, *placement) for unit in ("", *layers)),
        buckets=Buckets(prefetch_units=2),
        micro_batch_size=args.batch,
        gradient_accumulation_steps=1,
        recompute=tuple(layers),
        budget=Budget(0, 0, 0),
        prediction=Prediction(0, 0, 0, 0, None, None),
        nvme_dir=str(args.nvme),
    )
    engine = Engine(model, plan, torch.optim.AdamW(model.parameters(), **ADAMW), max_grad_norm=1.0)

    def step(tokens: torch.Tensor) -> float:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step, engine.close


def measure(args: argparse.Namespace, make: Callable[[], tuple[Step, Callable[[], None]]]) -> dict[str, Any]:
    """Seconds of each timed step, losses, and the device's peak."""
    cuda = torch.cuda.is_available()
    step, close = make()
    generator = torch.Generator().manual_seed(1)
    shape = (WARM_UP + args.steps, args.batch, args.length)
    data = torch.randint(0, 1000, shape, generator=generator).to("cuda" if cuda else "cpu")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for tokens in data:
        begin = time.perf_counter()
        losses.append(step(tokens))
        seconds.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    close()
    del step, close
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return {"seconds": seconds[WARM_UP:], "losses": losses, "gpu_peak_bytes": peak}


def main() -> None:
    """Measure all systems in turn, print a table, save the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--nvme", type=Path, required=True, help="a directory on the disk to measure")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS))
    args = parser.parse_args()
    makers = {"plain PyTorch": lambda: plain(args)}
    makers |= {name: (lambda p=SYSTEMS[name]: through_tiers(args, p)) for name in args.systems}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in makers}
    for _ in range(args.rounds):
        for name, make in makers.items():
            runs[name].append(measure(args, make))
    medians = {name: statistics.median(s for run in each for s in run["seconds"]) for name, each in runs.items()}
    rows = []
    for name, each in runs.items():
        ratio = medians[name] / medians["plain PyTorch"]
        peak = each[0]["gpu_peak_bytes"]
        rows.append(
            {
                "system": name,
                "step_seconds": round(medians[name], 4),
                "ratio_to_plain": round(ratio, 3),
                "gpu_peak_bytes": peak,
                "last_loss": round(each[0]["losses"][-1], 4),
            }
        )
        size = f"{peak / 1e9:6.1f} GB" if peak else ""
        print(f"{name:20} {medians[name]:8.3f} s  {ratio:6.2f} x  {size}  loss {rows[-1]['last_loss']}", flush=True)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shape = {"model": args.model, "batch": args.batch, "length": args.length}
    print(save(f"offload-{args.model}", rows, **shape, steps=args.steps, rounds=args.rounds, host_peak_bytes=host))


if __name__ == "__main__":
    main()
