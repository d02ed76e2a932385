"""``memplan doctor``: what is wrong or slow on this machine, and the command that mends it."""

import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml
import torch

from memplan.disks import inspect
from memplan.formatting import format_bytes
from memplan.gpus import Gpu, HostLink, all_joined, cuda_driver, find_gpus
from memplan.host import ROOT, NumaNode, host_memory, memlock_bytes, numa_nodes, usable_cores

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 10)
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


def checks(nvme_dir: Path | None = None, *, nvml: Any = pynvml, root: Path = ROOT) -> list[Check]:
    """Everything that can be told without changing anything; the disk is ``nvme_dir``'s, or that of temporary files.

    ``nvml`` and ``root`` are for tests, as in ``memplan.machine.detect``.
    """
    directory = nvme_dir if nvme_dir is not None else Path(tempfile.gettempdir())
    gpus = find_gpus(nvml)
    nodes = numa_nodes([gpu.bus_id for gpu in gpus], root)
    driver = _driver(cuda_driver(nvml)) if gpus else _no_gpu()
    return [
        *_software(),
        driver,
        *(check for index, gpu in enumerate(gpus) for check in _gpu(index, gpu)),
        *_between(gpus),
        *_memory(root),
        *_cores(),
        *_numa(nodes),
        *_disk(directory),
    ]


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


def _no_gpu() -> Check:
    if torch.version.cuda and not torch.cuda.is_available():
        return Check("GPU", "info", "PyTorch is built for CUDA, but no driver answers", "nvidia-smi")
    return Check("GPU", "info", "none; the CPU is the compute device")


def _driver(supported: str | None) -> Check:
    built, name = torch.version.cuda, "CUDA driver"
    if built is None:
        detail = f"the driver runs CUDA {supported}, but PyTorch is built for the CPU only"
        return Check(name, "warn", detail, "pip install --force-reinstall torch")
    if torch.cuda.is_available():
        return Check(name, "ok", f"runs CUDA {supported}, PyTorch is built for {built}")
    remedy = "update the NVIDIA driver"
    if supported is not None:
        index = f"https://download.pytorch.org/whl/cu{supported.replace('.', '')}"
        remedy += f", or: pip install --force-reinstall torch --index-url {index}"
    detail = f"the driver runs CUDA {supported}, PyTorch is built for {built} and can not use it"
    return Check(name, "fail", detail, remedy)


def _gpu(index: int, gpu: Gpu) -> Iterator[Check]:
    if gpu.free_bytes is not None and gpu.total_bytes is not None:
        taken = gpu.total_bytes - gpu.free_bytes > SPARE_GPU_BYTES
        yield Check(
            f"GPU {index} memory",
            "warn" if taken else "ok",
            f"{gpu.name}: {format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
            + (", the rest is in use by others" if taken else ""),
            "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv" if taken else None,
        )
    else:
        yield Check(f"GPU {index} memory", "info", f"{gpu.name or 'it'} does not tell the driver: a slice of a GPU")
    if gpu.link is not None and gpu.best_link is not None:
        yield _link(index, gpu.link, gpu.best_link)


def _link(index: int, now: HostLink, most: HostLink) -> Check:
    """Generations are those that card and slot can agree on: what an idle card runs at says nothing."""
    status, remedy = "ok", None
    if now.width < most.width:
        status, remedy = "warn", "move the card to a slot of full width; see: nvidia-smi topo -m"
    elif now.generation < most.generation:
        status, remedy = "info", "a slot of the card's generation, if the board has one"
    detail = f"PCIe {now.generation} x{now.width}, the card can do PCIe {most.generation} x{most.width}"
    return Check(f"GPU {index} link", status, detail, remedy)


def _between(gpus: Sequence[Gpu]) -> Iterator[Check]:
    """What is between several GPUs."""
    if len(gpus) < 2:
        return
    names = list(dict.fromkeys(str(gpu.name) for gpu in gpus))
    if len(names) > 1:
        yield Check("GPUs", "warn", f"of several kinds: {', '.join(names)}", "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    if all_joined(gpus):
        yield Check("NVLink", "ok", f"joins all {len(gpus)} GPUs, {min(gpu.nvlinks for gpu in gpus)} links each")
        return
    pairs = [f"{i}-{j}" for i, gpu in enumerate(gpus) for j in sorted(gpu.nvlink_peers) if i < j]
    down = [str(i) for i, gpu in enumerate(gpus) if not gpu.nvlinks]
    if pairs:
        detail = f"joins GPUs {', '.join(pairs)} and not all"
        yield Check("NVLink", "warn", detail, f"export CUDA_VISIBLE_DEVICES={pairs[0].replace('-', ',')}")
    elif len(down) < len(gpus):
        yield Check("NVLink", "warn", "is up and joins no two GPUs that are visible", "nvidia-smi topo -m")
    else:
        yield Check("NVLink", "info", "none: the GPUs talk over their host links")


def _memory(root: Path) -> Iterator[Check]:
    memory = host_memory(root)
    total, limit = memory.total_bytes, memory.limit_bytes
    tight = limit is not None and limit < total
    detail = f"{format_bytes(memory.available_bytes)} available of {format_bytes(total)}"
    remedy = None
    if tight and limit is not None:
        detail += f"; the control group allows {format_bytes(limit)}"
        remedy = "raise the container's limit: docker run --memory, or resources.limits.memory"
    if memory.offline_bytes:
        detail += f"; {format_bytes(memory.offline_bytes)} more are offline"
        remedy = (
            remedy or "chmem --enable --verbose, or as root: echo online > /sys/devices/system/memory/memoryN/state"
        )
    elif memory.growth_bytes:
        detail += f"; {format_bytes(memory.growth_bytes)} more may come as it is used"
        remedy = remedy or "plan with it: memplan plan ... --host-memory SIZE"
    yield Check("Host memory", "info" if remedy else "ok", detail, remedy)
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


def _numa(nodes: Sequence[NumaNode]) -> Iterator[Check]:
    """Nothing to say of a host whose memory is all equally near."""
    if len(nodes) < 2:
        return
    parts = [f"node {n.index}: {len(n.cores)} cores" + ("," + _gpu_list(n.gpus) if n.gpus else "") for n in nodes]
    yield Check("NUMA", "info", "; ".join(parts))
    for node in nodes:
        if node.gpus and not node.cores:
            yield Check(
                f"NUMA node {node.index}",
                "warn",
                f"this process may use no core near{_gpu_list(node.gpus)}",
                f"numactl --cpunodebind={node.index} --membind={node.index} memplan train ...",
            )


def _gpu_list(indices: Sequence[int]) -> str:
    return f" GPU {', '.join(map(str, indices))}" if indices else ""


def _disk(directory: Path) -> Iterator[Check]:
    if not directory.is_dir():
        yield Check("NVMe directory", "fail", f"{directory} is not a directory", f"mkdir -p {directory}")
        return
    try:
        disk = inspect(directory)
    except OSError as error:
        yield Check("NVMe access", "fail", f"{directory}: {error.strerror}", f"chmod u+rwx {directory}")
        return
    other = "name a directory on a local disk: memplan plan ... --nvme DIR (see: df -hT)"
    yield Check(
        "NVMe file system",
        "warn" if disk.trouble else "ok",
        disk.trouble or f"{directory} is on {disk.filesystem}",
        other if disk.trouble else None,
    )
    little = disk.free_bytes < LITTLE_DISK_BYTES
    yield Check(
        "NVMe space",
        "warn" if little else "ok",
        f"{format_bytes(disk.free_bytes)} free in {directory}",
        f"du -xhd1 {directory} | sort -h" if little else None,
    )
    direct = disk.direct_io
    yield Check(
        "Direct I/O",
        "ok" if direct else "warn",
        f"works in {directory}" if direct else f"{directory} does not support it; reads go through the page cache",
        None if direct else "name a directory on ext4 or xfs: memplan plan ... --nvme DIR",
    )
