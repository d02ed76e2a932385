"""What computes: FLOPs that training reaches, a call's own time, the device's memory, and the host's by threads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from memplan.calibrate.parts import MIB, Part, best_seconds, gigabytes
from offload.plan import Precision

COPY_BYTES = 64 * MIB
HOST_COPY_BYTES = 256 * MIB
"""More than the caches hold."""


def compute(device: torch.device) -> Part:
    """FLOPs by precision, a small module's time, and the bandwidth of the device's memory."""
    kind = device.type
    flops = {precision: training_flops_per_second(kind, precision) for precision in (Precision.BF16, Precision.FP32)}
    flops[Precision.AMP] = flops[Precision.BF16]
    memory, call = device_bytes_per_second(kind), call_seconds(kind)
    head = ("forward and backward of a feed-forward block", "")
    rows = [(f"{precision.value}", f"{flops[precision] / 1e12:.3g} TFLOP/s") for precision in flops]
    rows += [("device memory, read and written", gigabytes(memory)), ("a module's call", f"{call * 1e6:.3g} µs")]
    rates = {"compute_flops_per_second": flops, "device_bytes_per_second": memory, "call_seconds": call}
    return Part(rates, {"compute": (head, *rows)})


def host_memory(threads: int, size_bytes: int = HOST_COPY_BYTES) -> Part:
    """Bytes a second, read and written, that copies in host memory reach with 1, 2, 4 ... ``threads`` threads."""
    source, target = torch.ones(size_bytes // 4), torch.ones(size_bytes // 4)
    counts = sorted({threads, *(1 << n for n in range(threads.bit_length()) if 1 << n < threads)})
    rows = []
    for count in counts:
        with team_of(count):
            rate = 2 * source.nbytes / best_seconds(lambda: target.copy_(source), repeats=2)
        rows.append((str(count), gigabytes(rate)))
    return Part(tables={"host memory": (("threads", "read and written"), *rows)})


@contextmanager
def team_of(threads: int) -> Iterator[None]:
    """This thread's operations on the host use so many threads, from the first one on."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.ones(1 << 18).add_(1)  # a team changes its size with its next work
    try:
        yield
    finally:
        torch.set_num_threads(before)


def training_flops_per_second(device: str, precision: Precision) -> float:
    """Of forward and backward of a transformer's feed-forward block, norm and activation included."""
    tokens, width = (16384, 4096) if device == "cuda" else (1024, 384)
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    step = block_step(tokens, width, device, dtype)
    # Two matrices of width x 4 width; backward is twice the forward.
    return 3 * 2 * tokens * 8 * width**2 / best_seconds(step, device)


def call_seconds(device: str) -> float:
    """Forward and backward of a module that is too small to take time by itself."""
    modules = 4
    return best_seconds(block_step(8, 16, device, torch.float32), device, repeats=20) / modules


def block_step(tokens: int, width: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of a feed-forward block of four modules."""
    layers = (nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    block = nn.Sequential(*layers).to(device=device, dtype=dtype)
    inputs = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    gradient = torch.ones_like(inputs)

    def step() -> None:
        block(inputs).backward(gradient)

    return step


def device_bytes_per_second(device: str) -> float:
    """Of the device's memory, read and written together."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES / best_seconds(lambda: target.copy_(source), device)
