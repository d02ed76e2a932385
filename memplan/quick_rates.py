"""The rates of a machine that nobody calibrated: the coarse ones measured in two seconds, or a reference."""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from memplan.errors import MachineError
from memplan.machine import Machine
from memplan.rates import Curve, Rates
from offload.optimizer import AdamWStep, update_span
from offload.plan import Precision
from offload.residency import state_bytes
from offload.state import carve_state, weight_dtype

TRAINING_SHARE = 0.57
"""Share of the matmul ceiling that training reaches.

Measured on one H200: 3.21e9 parameters, 8 x 2048 tokens, every layer recomputed, take 4.3e14 executed FLOPs in
0.978 s, of which about 0.03 s are the optimizer's: 455 of 790 TFLOP/s.
"""
REFERENCE_CALL_SECONDS = 89e-6
"""Measured on the same machine."""
COPY_BYTES = 64 << 20
UPDATE_ELEMENTS = 1 << 22
IO_BYTES = 8 << 20


REFERENCE = Rates(
    compute_flops_per_second={
        Precision.BF16: 790e12 * TRAINING_SHARE,
        Precision.AMP: 790e12 * TRAINING_SHARE,
        # Without tensor cores: the vendor's 67 TFLOP/s.
        Precision.FP32: 67e12 * TRAINING_SHARE,
    },
    device_bytes_per_second=4270e9,
    call_seconds=REFERENCE_CALL_SECONDS,
    host_to_device=Curve.flat(55.4e9),
    device_to_host=Curve.flat(55.4e9),
    duplex_share=50.9 / 55.4,
    cpu_update_seconds=dict.fromkeys(Precision, 0.34e-9),
    cpu_update_beside_links=0.50 / 0.34,
    links_beside_update=51 / 55.4,
    # 26 bytes an element through memory that copies 4270 GB/s.
    gpu_update_seconds=dict.fromkeys(Precision, 26 / 4270e9),
    streamed_update_seconds=dict.fromkeys(Precision, 0.277e-9),
    nvme_read_bytes_per_second=1.7e9,
    nvme_write_bytes_per_second=1.7e9,
    # Without a faster fabric the GPUs talk over their host links.
    collective=Curve.flat(50.9e9),
    inter_node_bytes_per_second=None,
    pinning_bytes_per_second=(1 << 30) / 0.05,
    source="Rates are a reference, measured on one H200 (PCIe 5 x16) with 16 cores; the machine described may differ.",
    spread=0.5,
)


def rates_of(machine: Machine, precision: Precision) -> Rates:
    """Measured where the machine is here, the reference where it is only described."""
    return REFERENCE if machine.described else measure_rates(machine, precision)


def measure_rates(machine: Machine, precision: Precision) -> Rates:
    """Measure this machine, in under two seconds. The NVMe directory's file is removed again."""
    to_device, to_host = _copy_rates(machine.device)
    # Without a directory nothing goes to disk, and no plan depends on its rates.
    read, write = REFERENCE.nvme_read_bytes_per_second, REFERENCE.nvme_write_bytes_per_second
    if machine.nvme_dir is not None:
        try:
            read, write = _disk_rates(machine.nvme_dir)
        except OSError as error:
            raise MachineError(f"the NVMe directory {machine.nvme_dir} can not be used: {error}") from error
    cpu_update = _update_seconds_per_element(precision)
    memory = _device_memory_rate(machine.device)
    gpu_update = cpu_update
    if machine.device == "cuda":
        # Weight, gradient and state are read, weight and state written.
        gpu_update = (3 * precision.weight_bytes + 2 * state_bytes(precision)) / memory
    name = machine.gpu_name or f"{machine.cores} CPU cores"
    return replace(
        REFERENCE,
        compute_flops_per_second={precision: _training_rate(machine.device, precision)},
        device_bytes_per_second=memory,
        call_seconds=_call_seconds(machine.device),
        host_to_device=Curve.flat(to_device),
        device_to_host=Curve.flat(to_host),
        cpu_update_seconds={precision: cpu_update},
        gpu_update_seconds={precision: gpu_update},
        nvme_read_bytes_per_second=read,
        nvme_write_bytes_per_second=write,
        collective=Curve.flat(min(to_device, to_host)),
        source=f"Rates were measured on this machine ({name}) just now.",
        spread=0.3,
    )


def _best_seconds(work: Callable[[], object], device: str = "cpu", repeats: int = 3) -> float:
    """The shortest of a few runs after a first one that warms up."""
    wait = torch.cuda.synchronize if device == "cuda" else _nothing
    work()
    wait()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _nothing() -> None:
    """The CPU has no queue to wait for."""


def _training_rate(device: str, precision: Precision) -> float:
    """FLOPs a second of forward and backward of a transformer's feed-forward block, norm and activation included."""
    tokens, width = (16384, 4096) if device == "cuda" else (1024, 384)
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    step = _block_step(tokens, width, device, dtype)
    # Two matrices of width x 4 width; backward is twice the forward.
    return 3 * 2 * tokens * 8 * width**2 / _best_seconds(step, device)


def _call_seconds(device: str) -> float:
    """Forward and backward of a module that is too small to take time by itself."""
    modules = 4
    return _best_seconds(_block_step(8, 16, device, torch.float32), device, repeats=20) / modules


def _block_step(tokens: int, width: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Forward and backward of a feed-forward block of four modules."""
    layers = (nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    block = nn.Sequential(*layers).to(device=device, dtype=dtype)
    inputs = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
    gradient = torch.ones_like(inputs)

    def step() -> None:
        block(inputs).backward(gradient)

    return step


def _copy_rates(device: str) -> tuple[float, float]:
    """Bytes a second from pinned host memory to the device, and back."""
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=device == "cuda").zero_()
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    to_device = _best_seconds(lambda: there.copy_(host, non_blocking=True), device)
    to_host = _best_seconds(lambda: host.copy_(there, non_blocking=True), device)
    return COPY_BYTES / to_device, COPY_BYTES / to_host


def _device_memory_rate(device: str) -> float:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source), device)


def _update_seconds_per_element(precision: Precision) -> float:
    """The runtime's own update, over state that is larger than the caches."""
    dtype = weight_dtype(precision)
    weight, gradient = torch.rand(UPDATE_ELEMENTS).to(dtype), torch.rand(UPDATE_ELEMENTS).to(dtype)
    raw = torch.zeros(UPDATE_ELEMENTS * state_bytes(precision), dtype=torch.uint8)
    state = carve_state(raw, UPDATE_ELEMENTS, precision)
    how = AdamWStep(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=10)
    return _best_seconds(lambda: update_span(weight, gradient, state, how, 0.5)) / UPDATE_ELEMENTS


def _disk_rates(directory: Path) -> tuple[float, float]:
    """Bytes a second of reading and writing one file, past the page cache where the file system can do that."""
    block = mmap.mmap(-1, IO_BYTES)  # aligned to a page, as direct I/O wants it
    block.write(os.urandom(IO_BYTES))
    handle, name = tempfile.mkstemp(prefix=".memplan-rate-", dir=directory)
    os.close(handle)
    offsets = range(0, COPY_BYTES, IO_BYTES)
    try:
        file = open_direct(Path(name))
        try:
            start = time.perf_counter()
            for offset in offsets:
                os.pwrite(file, block, offset)
            os.fsync(file)
            written = time.perf_counter()
            for offset in offsets:
                os.preadv(file, [block], offset)
            done = time.perf_counter()
        finally:
            os.close(file)
    finally:
        Path(name).unlink()
    return COPY_BYTES / (done - written), COPY_BYTES / (written - start)


def open_direct(path: Path) -> int:
    """A descriptor for reading and writing, with O_DIRECT where the file system knows it."""
    try:
        return os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(path, os.O_RDWR)
