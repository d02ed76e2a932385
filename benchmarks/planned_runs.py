"""Training by a plan for a few steps under its own budget, and the largest micro-batch that its placements allow."""

import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch

from benchmarks.planned_models import Model, build
from offload.engine import Engine
from offload.plan import Buckets, Plan, Tier
from offload.split import TRIES

STEPS, WARM_UP = 3, 2
"""Steps that are timed, and those before them; where CPU and GPU share the update, and no disk is slower than both, its
share settles first."""


@contextmanager
def capped(gpu_bytes: int) -> Iterator[None]:
    """The allocator may hold no more than this."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()  # what the run before left in cycles
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, gpu_bytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


def train_on(engine: Engine, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One micro-batch as people's loops have it: on the device as it was given, until its backward is over."""
    given = {k: v.cuda(non_blocking=True) for k, v in batch.items()}
    loss = engine(**given).loss
    engine.backward(loss)
    engine.step()
    return loss


def run_plan(model: Model, found: Plan) -> dict[str, Any]:
    """Train by a plan for a few steps under its own budget."""
    on_disk = any(Tier.NVME in (p.parameters, p.optimizer) for p in found.placements)
    warm_up = WARM_UP + (2 * TRIES if found.gpu_update_share and not on_disk else 0)
    torch.cuda.reset_peak_memory_stats()
    before = psutil.Process().memory_info().rss
    row: dict[str, Any] = {"out_of_memory": None}
    with capped(found.budget.gpu_bytes):
        row["gpu_before_bytes"] = torch.cuda.memory_allocated()
        network = build(model)
        built = psutil.Process().memory_info().rss
        engine = None
        try:
            engine = Engine(network, found, torch.optim.AdamW(network.parameters(), lr=1e-4), max_grad_norm=1.0)
            seconds, issued = [], []
            batches = [
                {k: v.pin_memory() for k, v in model.batch(found.micro_batch_size).items()}
                for _ in range(found.gradient_accumulation_steps)
            ]
            for step in range(warm_up + STEPS):
                if step == warm_up:
                    retries = torch.cuda.memory_stats()["num_alloc_retries"]
                begun = time.perf_counter()
                for batch in batches:
                    loss = train_on(engine, batch)
                issued.append(time.perf_counter() - begun)
                loss.item()
                seconds.append(time.perf_counter() - begun)
            held = engine.meter.peak_bytes()
            row |= {
                "seconds": statistics.median(seconds[warm_up:]),
                # Nearly all of the seconds where a step waits for the CPU; retries where it waits for the allocator.
                "issued_seconds": statistics.median(issued[warm_up:]),
                "allocator_retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries,
                "gpu_peak_bytes": torch.cuda.max_memory_allocated(),
                "gpu_reserved_bytes": torch.cuda.max_memory_reserved(),
                "host_bytes": held.get("host", 0),
                "host_grown_bytes": psutil.Process().memory_info().rss - before,
                "model_built_bytes": built - before,
                "nvme_bytes": held.get("nvme", 0),
                "overflow_slots": engine.overflow_count,
            }
        except torch.OutOfMemoryError as error:
            row["out_of_memory"] = str(error).splitlines()[0]
        except Exception as error:  # noqa: BLE001 - one failure must not end the others
            row["out_of_memory" if "memory" in str(error) else "failed"] = f"{type(error).__name__}: {error}"[:200]
        finally:
            if engine is not None:
                engine.close()
            del engine, network
    return row


def largest_batch(model: Model, found: Plan, most: int) -> int:
    """The largest micro-batch that really runs with these placements, by bisection."""
    buckets = replace(found.buckets, update_slots=Buckets().update_slots)  # more only fill the room that is left
    alone = replace(found, gradient_accumulation_steps=1, buckets=buckets)
    with capped(found.budget.gpu_bytes):
        network = build(model)
        engine = Engine(network, alone, max_grad_norm=1.0)
        try:
            low, high = found.micro_batch_size, most
            if not _runs(engine, model, low):
                return 0
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if _runs(engine, model, middle) else (low, middle)
        finally:
            engine.close()
            del engine, network
    return low


def _runs(engine: Engine, model: Model, size: int) -> bool:
    try:
        for _ in range(2):
            train_on(engine, model.batch(size))
        torch.cuda.synchronize()
    except Exception as error:
        if "memory" not in str(error):
            raise
        print(f"    {model.name}, batch {size}: {str(error)[:300]}", flush=True)
    else:
        return True
    engine.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return False
