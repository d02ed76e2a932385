"""``memplan doctor``: what is wrong or slow on this machine, and the command that mends it."""

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml
import torch

from memplan.cgroup import memory_limit
from memplan.formatting import format_bytes
from memplan.machine import memlock_bytes, nvml_handles, usable_cores

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 10)
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "ceph"})
LITTLE_DISK_BYTES = 10 << 30
SPARE_GPU_BYTES = 1 << 30
"""Of a GPU's memory, what driver and desktop hold without being in anyone's way."""


@dataclass(frozen=True)
class Check:
    """One fact about the machine. ``status`` is ok, info, warn or fail; ``remedy`` is what mends it.

    Every warn and fail has a remedy.
    """

    name: str
    status: str
    detail: str
    remedy: str | None = None


def checks(nvme_dir: Path | None = None) -> list[Check]:
    """Everything that can be told without changing anything; the disk is ``nvme_dir``'s, or that of temporary files."""
    directory = nvme_dir if nvme_dir is not None else Path(tempfile.gettempdir())
    return [*_software(), *_gpus(), *_memory(), *_cores(), *_disk(directory)]


def _software() -> Iterator[Check]:
    old = sys.version_info[:2] < OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    yield Check(
        "Python",
        "fail" if old else "ok",
        platform.python_version(),
        f"install Python {wanted} or newer: uv python install {wanted}" if old else None,
    )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    old = version < OLDEST_TORCH
    yield Check(
        "PyTorch",
        "fail" if old else "ok",
        f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'the CPU'}",
        f"pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'" if old else None,
    )


def _gpus() -> Iterator[Check]:
    handles = nvml_handles()
    if not handles:
        if torch.version.cuda and not torch.cuda.is_available():
            yield Check("GPU", "info", "PyTorch is built for CUDA, but no driver answers", "nvidia-smi")
        else:
            yield Check("GPU", "info", "none; the CPU is the compute device")
        return
    driver = int(_ask(pynvml.nvmlSystemGetCudaDriverVersion) or 0)
    supported = f"{driver // 1000}.{driver % 1000 // 10}"
    built = torch.version.cuda
    if built is None:
        yield Check(
            "CUDA driver",
            "warn",
            f"the driver runs CUDA {supported}, but PyTorch is built for the CPU only",
            "pip install --force-reinstall torch",
        )
    elif not torch.cuda.is_available():
        yield Check(
            "CUDA driver",
            "fail",
            f"the driver runs CUDA {supported}, PyTorch is built for {built} and can not use it",
            f"update the NVIDIA driver, or: pip install --force-reinstall torch --index-url "
            f"https://download.pytorch.org/whl/cu{supported.replace('.', '')}",
        )
    else:
        yield Check("CUDA driver", "ok", f"runs CUDA {supported}, PyTorch is built for {built}")
    for index, handle in enumerate(handles):
        yield from _gpu(index, handle)


def _gpu(index: int, handle: Any) -> Iterator[Check]:
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    name = f"GPU {index}"
    if memory is not None:
        taken = memory.used > SPARE_GPU_BYTES
        yield Check(
            f"{name} memory",
            "warn" if taken else "ok",
            f"{_ask(pynvml.nvmlDeviceGetName, handle)}: {format_bytes(memory.free)} free of "
            f"{format_bytes(memory.total)}" + (", the rest is in use by others" if taken else ""),
            "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv" if taken else None,
        )
    now = _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle)
    most = _ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    if now is not None and most is not None:
        narrow = now < most
        yield Check(
            f"{name} link",
            "warn" if narrow else "ok",
            f"PCIe x{now}, the card can do x{most}",
            "move the card to a slot of full width; see: nvidia-smi topo -m" if narrow else None,
        )


def _memory() -> Iterator[Check]:
    total, limit = int(psutil.virtual_memory().total), memory_limit()
    tight = limit is not None and limit < total
    yield Check(
        "Host memory",
        "info" if tight else "ok",
        f"{format_bytes(psutil.virtual_memory().available)} available of {format_bytes(total)}"
        + (f"; the control group allows {format_bytes(limit)}" if tight and limit is not None else ""),
        "raise the container's limit: docker run --memory, or resources.limits.memory" if tight else None,
    )
    locked = memlock_bytes()
    # Only transfers to a GPU need pinned memory.
    short = locked is not None and locked < total // 2 and torch.cuda.is_available()
    yield Check(
        "Locked memory",
        "warn" if short else "ok",
        "no limit"
        if locked is None
        else f"limit {format_bytes(locked)}" + (", too little to pin the host tier" if short else ""),
        "ulimit -l unlimited (containers: docker run --ulimit memlock=-1)" if short else None,
    )


def _cores() -> Iterator[Check]:
    allowed, present, threads = usable_cores(), os.cpu_count() or 1, torch.get_num_threads()
    crowded = threads > allowed
    yield Check(
        "Cores",
        "warn" if crowded else "ok",
        f"{allowed} of {present} usable, PyTorch uses {threads} threads",
        f"export OMP_NUM_THREADS={allowed}" if crowded else None,
    )


def _disk(directory: Path) -> Iterator[Check]:
    if not directory.is_dir():
        yield Check("NVMe directory", "fail", f"{directory} is not a directory", f"mkdir -p {directory}")
        return
    kind, free = _filesystem(directory), psutil.disk_usage(str(directory)).free
    status, detail, remedy = "ok", f"{directory} is on {kind}", None
    if kind in IN_MEMORY:
        status, detail = "warn", f"{directory} is on {kind}: it takes host memory, not disk"
    elif kind in NETWORK:
        status, detail = "warn", f"{directory} is on {kind}: a network mount is slow"
    if status == "warn":
        remedy = "name a directory on a local disk: memplan plan ... --nvme DIR (see: df -hT)"
    yield Check("NVMe file system", status, detail, remedy)
    little = free < LITTLE_DISK_BYTES
    yield Check(
        "NVMe space",
        "warn" if little else "ok",
        f"{format_bytes(free)} free in {directory}",
        f"du -xhd1 {directory} | sort -h" if little else None,
    )
    try:
        direct = _direct_io(directory)
    except OSError as error:
        yield Check("NVMe access", "fail", f"{directory}: {error.strerror}", f"chmod u+rwx {directory}")
        return
    yield Check(
        "Direct I/O",
        "ok" if direct else "warn",
        f"works in {directory}" if direct else f"{directory} does not support it; reads go through the page cache",
        None if direct else "name a directory on ext4 or xfs: memplan plan ... --nvme DIR",
    )


def _filesystem(directory: Path) -> str:
    """Kind of the file system, by the longest mount point that the directory lies under."""
    there = directory.resolve()
    mounts = [m for m in psutil.disk_partitions(all=True) if there.is_relative_to(m.mountpoint)]
    return max(mounts, key=lambda m: len(m.mountpoint)).fstype if mounts else "an unknown file system"


def _direct_io(directory: Path) -> bool:
    """Whether a file can be opened past the page cache; raises OSError where none can be made."""
    handle, name = tempfile.mkstemp(prefix=".memplan-doctor-", dir=directory)
    os.close(handle)
    try:
        os.close(os.open(name, os.O_RDWR | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    finally:
        Path(name).unlink()
    return True


def _ask(question: Callable[..., Any], *handle: Any) -> Any:
    """NVML's answer; ``None`` where this GPU does not know."""
    try:
        return question(*handle)
    except pynvml.NVMLError:
        return None
