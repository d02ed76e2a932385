"""The machine: what is there, or what a person describes.

Reserves, so that what is offered can really be had:

- beside the allocator's memory the CUDA driver keeps ``CONTEXT_BYTES`` for each process;
- the interpreter, the framework and its libraries take ``HOST_RESERVE_BYTES`` of host memory;
- ``NVME_RESERVE_SHARE`` of a file system's free space is left to others;
- where the CPU is the compute device, both memory tiers are cut from the same host memory.
"""

import os
import re
import resource
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pynvml
import torch

from memplan.cgroup import cpu_quota, memory_headroom
from memplan.errors import MachineError
from memplan.formatting import format_bytes

CONTEXT_BYTES = 790_000_000
"""Measured beside the allocator on one H200."""
HOST_RESERVE_BYTES = {"cuda": 1_800_000_000, "cpu": 500_000_000}
"""Host memory of a plain training process that offloads nothing."""
NVME_RESERVE_SHARE = 0.05
CPU_STAGING_SHARE = 1 / 16
"""Of the host memory, kept as host tier where the CPU computes and nobody said how to cut it."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgtp])(i?b)?|b)?\s*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Machine:
    """The memory and processors that a plan may use."""

    device: str
    """``cuda``, or ``cpu``: the GPU tier is then a budget of ordinary memory."""
    gpus: int
    gpu_name: str | None
    gpu_bytes: int
    """Bytes that training may hold on each GPU."""
    host_bytes: int
    """Bytes of host memory that training may hold beside the interpreter and the framework."""
    nvme_dir: Path | None
    nvme_bytes: int
    memlock_bytes: int | None
    """How much this user may lock in memory; ``None``: no limit."""
    cores: int
    described: bool = False
    """The GPUs are not here: nothing can be measured or run on them."""
    context_bytes: int = 0
    """Taken off the memory of a described GPU for the driver's context."""
    nodes: int = 1
    """Machines that work together; ``gpus`` is of all of them."""


def detect(nvme_dir: Path | None = None) -> Machine:
    """What is here now; ``nvme_dir`` offers a directory as the NVMe tier.

    Raises MachineError for a directory of no use. A machine without a CUDA GPU is one whose compute device is the CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    host = max(0, _available_host_bytes() - HOST_RESERVE_BYTES[device])
    if device == "cuda":
        names, free = zip(*(_gpu(i) for i in range(torch.cuda.device_count())), strict=True)
        gpus, gpu_name, gpu_bytes = len(free), names[0], max(0, min(free) - CONTEXT_BYTES)
    else:
        staging = int(host * CPU_STAGING_SHARE)
        gpus, gpu_name, gpu_bytes, host = 1, None, host - staging, staging
    machine = Machine(
        device=device,
        gpus=gpus,
        gpu_name=gpu_name,
        gpu_bytes=gpu_bytes,
        host_bytes=host,
        nvme_dir=None,
        nvme_bytes=0,
        memlock_bytes=memlock_bytes(),
        cores=usable_cores(),
    )
    return _with_nvme(machine, nvme_dir, None) if nvme_dir is not None else machine


def describe(
    base: Machine,
    gpus: int | None = None,
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
    nvme: str | None = None,
) -> Machine:
    """``base`` with what a person says instead; raises MachineError where that can not be.

    Sizes are those of ``parse_bytes``, ``nvme`` is ``DIR[:SIZE]``. More GPUs than are here describe another machine:
    ``gpu_memory`` is then the size of the card, of which the driver's context takes its part. On GPUs that are here,
    and on the CPU, it is a budget for training and may not exceed what is free.
    """
    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    host_bytes = None if host_memory is None else parse_bytes(host_memory, "--host-memory")
    if gpus is not None and gpus < 1:
        raise MachineError(f"--gpus is {gpus}; it must be at least 1")
    if gpu_bytes == 0:
        raise MachineError("--gpu-memory is 0; training needs some memory to compute in")
    if gpus is not None and (base.device == "cpu" or gpus > base.gpus):
        machine = _describe_gpus(base, gpus, gpu_bytes, host_bytes)
    elif base.device == "cpu":
        machine = _cut_host_memory(base, gpu_bytes, host_bytes)
    else:
        _at_most("--gpu-memory", gpu_bytes, base.gpu_bytes, f"free on each {base.gpu_name}")
        _at_most("--host-memory", host_bytes, base.host_bytes, "that can be had here")
        machine = replace(
            base,
            gpus=gpus or base.gpus,
            gpu_bytes=base.gpu_bytes if gpu_bytes is None else gpu_bytes,
            host_bytes=base.host_bytes if host_bytes is None else host_bytes,
        )
    return machine if nvme is None else _with_nvme(machine, *parse_nvme(nvme))


def parse_bytes(text: str | int, what: str = "size") -> int:
    """Bytes from ``24GiB`` (2^30 each), ``24G`` (the same, as tools of the field mean it), ``24GB`` (10^9), ``24``.

    Fractions are cut to whole bytes. Raises MachineError, naming ``what``.
    """
    if isinstance(text, int):
        if text < 0:
            raise MachineError(f"{what} is {text}; a size can not be negative")
        return text
    match = _SIZE.fullmatch(text)
    if match is None:
        raise MachineError(f"{what} is {text!r}; write a size such as 24GiB, 24GB, 512MiB or a number of bytes")
    number, prefix, suffix = match.groups()
    power = " kmgtp".index(prefix.lower()) if prefix else 0
    unit = (1000 if suffix is not None and suffix.lower() == "b" else 1024) ** power
    whole, _, fraction = number.partition(".")
    return (int(whole + fraction) * unit) // 10 ** len(fraction)


def parse_nvme(text: str) -> tuple[Path, int | None]:
    """Directory and size from ``DIR[:SIZE]``; the size is ``None`` where it is left out. Raises MachineError."""
    directory, colon, size = text.rpartition(":")
    if not colon:
        return Path(text), None
    if not directory:
        raise MachineError(f"--nvme is {text!r}; write DIR or DIR:SIZE")
    try:
        return Path(directory), parse_bytes(size, "the size in --nvme")
    except MachineError:
        if Path(text).is_dir():  # a directory whose name has a colon
            return Path(text), None
        raise


def memlock_bytes() -> int | None:
    """The limit on locked memory, ``None`` where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def nvml_handles() -> list[pynvml.c_nvmlDevice_t]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; none where there is no driver."""
    try:
        pynvml.nvmlInit()
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        if chosen is None:
            return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [
            pynvml.nvmlDeviceGetHandleByIndex(int(entry))
            if entry.strip().isdecimal()
            else pynvml.nvmlDeviceGetHandleByUUID(entry.strip())
            for entry in chosen.split(",")
            if entry.strip() not in ("", "-1")
        ]
    except pynvml.NVMLError:
        return []


def _gpu(index: int) -> tuple[str, int]:
    """Name and free bytes of one visible GPU: by NVML, which needs no context, or by CUDA where that is missing."""
    handles = nvml_handles()
    if index >= len(handles):
        return torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[0]
    try:
        return pynvml.nvmlDeviceGetName(handles[index]), int(pynvml.nvmlDeviceGetMemoryInfo(handles[index]).free)
    except pynvml.NVMLError:  # slices of a GPU do not answer
        return torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[0]


def _available_host_bytes() -> int:
    headroom = memory_headroom()
    available = int(psutil.virtual_memory().available)
    return available if headroom is None else min(available, headroom)


def _host_memory_here(base: Machine) -> int:
    return base.host_bytes + (base.gpu_bytes if base.device == "cpu" else 0)


def _describe_gpus(base: Machine, gpus: int, gpu_bytes: int | None, host_bytes: int | None) -> Machine:
    if gpu_bytes is None and base.device == "cpu":
        raise MachineError(f"--gpus {gpus} describes GPUs that are not here: say how large each is, --gpu-memory 24GiB")
    if gpu_bytes is not None and gpu_bytes <= CONTEXT_BYTES:
        raise MachineError(
            f"--gpu-memory is {format_bytes(gpu_bytes)}; the driver's context alone takes {format_bytes(CONTEXT_BYTES)}"
        )
    return replace(
        base,
        device="cuda",
        gpus=gpus,
        gpu_bytes=base.gpu_bytes if gpu_bytes is None else gpu_bytes - CONTEXT_BYTES,
        host_bytes=_host_memory_here(base) if host_bytes is None else host_bytes,
        described=True,
        context_bytes=CONTEXT_BYTES,
    )


def _cut_host_memory(base: Machine, gpu_bytes: int | None, host_bytes: int | None) -> Machine:
    """The CPU computes: two budgets of the same memory."""
    if gpu_bytes is None and host_bytes is None:
        return base
    total = _host_memory_here(base)
    advice = "that can be had here; add --gpus N to describe a machine with GPUs"
    _at_most("--gpu-memory", gpu_bytes, total, advice)
    _at_most("--host-memory", host_bytes, total, advice)
    if gpu_bytes is None:
        gpu_bytes = total - (host_bytes or 0)
    if host_bytes is None:
        host_bytes = total - gpu_bytes
    _at_most("--gpu-memory and --host-memory together", gpu_bytes + host_bytes, total, advice)
    return replace(base, gpu_bytes=gpu_bytes, host_bytes=host_bytes)


def _at_most(what: str, wanted: int | None, present: int, where: str) -> None:
    if wanted is not None and wanted > present:
        raise MachineError(f"{what} asks for {format_bytes(wanted)}, more than the {format_bytes(present)} {where}")


def _with_nvme(machine: Machine, directory: Path, size: int | None) -> Machine:
    if not directory.exists():
        raise MachineError(f"the NVMe directory {directory} does not exist; create it or name another")
    if not directory.is_dir():
        raise MachineError(f"the NVMe directory {directory} is not a directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise MachineError(f"the NVMe directory {directory} is not writable for this user")
    stat = os.statvfs(directory)
    free = int(stat.f_bavail * stat.f_frsize * (1 - NVME_RESERVE_SHARE))
    if size == 0:
        raise MachineError("the size in --nvme is 0; leave --nvme out to use no disk")
    _at_most("--nvme", size, free, f"free in {directory}")
    return replace(machine, nvme_dir=directory.resolve(), nvme_bytes=free if size is None else size)
