"""Timing on a CUDA device: kernels without the CPU that issues them, and the CPU without the kernels."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

MEASURE_SECONDS = 1.5e-3
"""A kernel is repeated for about this long,"""
MOST_REPEATS = 20
"""but not more often: the driver's queue takes about a thousand launches."""
CYCLES_PER_SECOND = 2e9
"""No device's clock is much faster, so a wait of so many cycles a second is long enough."""


def device_seconds(run: Callable[[], object]) -> float:
    """Seconds that the device takes for one call, which has run before.

    The device is made to wait until all repetitions are queued, so that it never waits for the CPU.
    """
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    issue = time.perf_counter() - begun
    torch.cuda.synchronize()
    whole = time.perf_counter() - begun
    repeats = max(2, min(MOST_REPEATS, int(MEASURE_SECONDS / whole)))
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int((1.5 * repeats * issue + 100e-6) * CYCLES_PER_SECOND))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repeats


def cpu_seconds(run: Callable[[], object], rounds: int = 7, before: Callable[[], object] = lambda: None) -> float:
    """Median seconds that the CPU takes for one call, the device's queue empty before it.

    ``before`` is called ahead of each, and not timed.
    """
    before()
    run()
    taken = []
    for _ in range(rounds):
        before()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    torch.cuda.synchronize()
    return median(taken)


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection, and PyTorch's default settings of matrix products and convolutions.

    Where it is wanted after all it does not look through what was there before, which in a training it does every few
    steps, and medians of steps do not know it.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    tf32, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(tf32)
        torch.backends.cudnn.benchmark = benchmark
        gc.unfreeze()
        if collecting:
            gc.enable()
