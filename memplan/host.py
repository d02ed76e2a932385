"""The host: memory that can be had, cores that may be used, NUMA nodes, and the limit on locked memory."""

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from memplan.cgroup import cpu_quota, memory_headroom, memory_limit, text_of

ROOT = Path("/")
MEMORY_BLOCKS = "sys/devices/system/memory"
KERNEL_SHARE = 0.05
"""Of a machine's memory, the most that the kernel keeps out of MemTotal: image, tables, room for a crash dump."""
HOTPLUG = ("sys/bus/virtio/drivers/virtio_mem/virtio*", "sys/bus/vmbus/drivers/hv_balloon/*-*-*")
"""Devices by which a hypervisor may add memory at any time; nothing that all may read says how much."""


@dataclass(frozen=True)
class HostMemory:
    """Memory of this host, now and later."""

    total_bytes: int
    available_bytes: int
    """What can be had now, the control groups' limits considered."""
    limit_bytes: int | None
    """Of the control groups; ``None``: no limit."""
    growth_bytes: int | None
    """More that may come as memory is used, on virtual machines that start small; ``None`` where that is not known."""
    offline_bytes: int
    """Plugged in and switched off."""


def host_memory(root: Path = ROOT) -> HostMemory:
    """What can be had, and what may come.

    Memory that is there is listed in blocks under /sys/devices/system/memory, also where MemTotal does not count it
    yet: a kernel that takes memory into use as it is needed, a balloon that is not deflated, blocks that are offline.
    """
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    groups = (root / "sys/fs/cgroup", root / "proc/self/cgroup")
    headroom = memory_headroom(*groups)
    growth, offline = _growth(root, total)
    if headroom is not None:
        room = max(0, headroom - available)
        growth = room if growth is None else min(growth, room)
    return HostMemory(
        total_bytes=total,
        available_bytes=available if headroom is None else min(available, headroom),
        limit_bytes=memory_limit(*groups),
        growth_bytes=growth,
        offline_bytes=offline,
    )


@dataclass(frozen=True)
class NumaNode:
    """Cores and memory that are near each other."""

    index: int
    cores: tuple[int, ...]
    """Those that this process may use."""
    memory_bytes: int | None
    """``None`` where the system does not tell."""
    gpus: tuple[int, ...]
    """Indices of the GPUs on its PCI buses."""


def numa_nodes(bus_ids: Sequence[str | None] = (), root: Path = ROOT) -> tuple[NumaNode, ...]:
    """The nodes, with the GPUs at ``bus_ids`` on them; none where the system does not tell.

    A GPU whose bus is on no node, as in many virtual machines, is on none here.
    """
    allowed = _allowed_cores()
    homes = [bus and text_of(root / "sys/bus/pci/devices" / bus / "numa_node") for bus in bus_ids]
    block, found = _block_bytes(root), []
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        index = int(folder.name.removeprefix("node"))
        cores = parse_cores(text_of(folder / "cpulist") or "")
        gpus = tuple(i for i, home in enumerate(homes) if home == str(index))
        # The blocks that are linked here, as in ``host_memory``: the node's own MemTotal may start small, too.
        memory = block * sum(1 for _ in folder.glob("memory[0-9]*"))
        found.append(NumaNode(index, tuple(c for c in cores if c in allowed), memory or None, gpus))
    return tuple(sorted(found, key=lambda node: node.index))


def parse_cores(text: str) -> tuple[int, ...]:
    """Cores from the kernel's list of them: ``0-3,8`` are 0, 1, 2, 3 and 8."""
    ranges = (part.split("-") for part in text.split(",") if part)
    return tuple(core for ends in ranges for core in range(int(ends[0]), int(ends[-1]) + 1))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group."""
    allowed, quota = len(_allowed_cores()), cpu_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def memlock_bytes() -> int | None:
    """The limit on locked memory, ``None`` where there is none."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _growth(root: Path, total: int) -> tuple[int | None, int]:
    """(bytes that are there beyond MemTotal, bytes offline)."""
    size = _block_bytes(root)
    states = [text_of(path) for path in (root / MEMORY_BLOCKS).glob("memory[0-9]*/state")]
    offline = size * states.count("offline")
    if not states or any(any(root.glob(pattern)) for pattern in HOTPLUG):
        return None, offline
    return max(0, int(size * len(states) * (1 - KERNEL_SHARE)) - total), offline


def _block_bytes(root: Path) -> int:
    return int(text_of(root / MEMORY_BLOCKS / "block_size_bytes") or "0", 16)


def _allowed_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
