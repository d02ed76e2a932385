"""The machine that a plan is for, as data, and what is here now.

Reserves, so that what is offered can really be had:

- beside the allocator's memory the CUDA driver keeps ``CONTEXT_BYTES`` for each process;
- the interpreter, the framework and its libraries take ``HOST_RESERVE_BYTES`` of host memory in each process;
- ``NVME_RESERVE_SHARE`` of a file system's free space is left to others;
- where the CPU is the compute device, both memory tiers are cut from the same host memory;
- a directory in memory (tmpfs) takes its bytes from the host tier.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pynvml
import torch

from memplan.disks import Disk, Mounts, inspect
from memplan.errors import MachineError
from memplan.file_rules import DISK, LINK, MACHINE, NUMA_NODE, check_values
from memplan.formatting import format_bytes
from memplan.gpus import Gpu, HostLink, all_joined, find_gpus
from memplan.host import ROOT, HostMemory, NumaNode, host_memory, memlock_bytes, numa_nodes, usable_cores
from offload.figures import place, shown
from profiler.device import Device, find_device
from profiler.errors import ProfilerError

SCHEMA = "memplan.machine/1"
CONTEXT_BYTES = 790_000_000
"""Measured beside the allocator on one H200."""
HOST_RESERVE_BYTES = {"cuda": 1_800_000_000, "cpu": 500_000_000}
"""Host memory of a plain training process that offloads nothing."""
NVME_RESERVE_SHARE = 0.05
CPU_STAGING_SHARE = 1 / 16
"""Of the host memory, kept as host tier where the CPU computes and nobody said how to cut it."""
UNEVEN_SHARE = 0.9
"""GPUs with less than this of the others' free memory are worth a remark."""


@dataclass(frozen=True)
class Machine:
    """The memory and processors that a plan may use: one node, or several alike."""

    device: str
    """``cuda``, or ``cpu``: the GPU tier is then a budget of ordinary memory."""
    gpus: int
    """Of all nodes together."""
    gpu_name: str | None
    gpu_bytes: int
    """Bytes that training may hold on each GPU."""
    host_bytes: int
    """Bytes of one node's memory that training may hold beside the interpreter and the framework."""
    nvme_dir: Path | None
    nvme_bytes: int
    """Of one node."""
    memlock_bytes: int | None
    """How much this user may lock in memory; ``None``: no limit."""
    cores: int | None
    """Of one node, those that this process may use; ``None``: nobody said."""
    described: bool = False
    """The GPUs are not here: nothing can be measured or run on them."""
    context_bytes: int = 0
    """Taken off the memory of a described GPU for the driver's context."""
    nodes: int = 1
    """Machines alike that work together; ``gpus`` is of all of them."""
    link: HostLink | None = None
    """Between a GPU and its host: the slowest. ``None``: not known, or no GPU."""
    nvlink: float | None = None
    """Bytes per second that a GPU can send over NVLink, where it joins all GPUs of a node; else ``None``."""
    inter_node_bytes_per_second: float | None = None
    """That a GPU can send to other nodes while the others of its node do too; ``None``: nobody said, or one node."""
    numa_nodes: tuple[NumaNode, ...] = ()
    """Of this host; none where the system does not tell, or the machine is described."""
    disk: Disk | None = None
    """What ``nvme_dir`` is on, where that is here."""
    nvme_bytes_per_second: float | None = None
    """Of a described disk, reading and writing."""
    host_growth_bytes: int | None = 0
    """Host memory that may come as memory is used, beyond ``host_bytes``; ``None``: not known."""
    remarks: tuple[str, ...] = ()
    """What a person should know who plans with this machine, in sentences."""

    @property
    def gpus_per_node(self) -> int:
        """GPUs that share a host."""
        return self.gpus // self.nodes

    @property
    def known_device(self) -> Device | None:
        """What is known of such a GPU; ``None`` for one that nobody described, a slice of one, and the CPU."""
        try:
            return None if self.gpu_name is None else find_device(self.gpu_name)
        except ProfilerError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self), default=str))}

    @classmethod
    def from_dict(cls, data: Any, source: str = "the machine file") -> "Machine":
        """What ``to_dict`` wrote; raises MachineError, naming ``source``, for anything else."""
        schema = data.get("schema") if isinstance(data, dict) else None
        if not isinstance(schema, str) or not schema.startswith(SCHEMA.partition("/")[0] + "/"):
            raise MachineError(f"{source} describes no machine; memplan calibrate writes one that does")
        if schema != SCHEMA:
            raise MachineError(
                f"{source} is a machine file from another version: {shown(schema)[1:-1]}, and this version "
                f"reads {SCHEMA}; write it again with this one's memplan calibrate"
            )
        machine = _from_fields({name: value for name, value in data.items() if name != "schema"}, source)
        if machine.gpus % machine.nodes:
            raise MachineError(f"{source}: gpus is {machine.gpus}; it must be a multiple of nodes, {machine.nodes}")
        return machine


def detect(nvme_dir: Path | None = None, *, nvml: Any = pynvml, root: Path = ROOT) -> Machine:
    """What is here now; ``nvme_dir`` offers a directory as the NVMe tier.

    ``nvml`` and ``root`` are for tests: who is asked about GPUs, and where /sys is. Raises MachineError for a directory
    of no use. A machine without a CUDA GPU is one whose compute device is the CPU.
    """
    memory, remarks = host_memory(root), []
    if torch.cuda.is_available():
        found = _memory_known(find_gpus(nvml))
        machine = _with_gpus(found, memory)
        remarks += _gpu_remarks(found)
    else:
        found = ()
        host = max(0, memory.available_bytes - HOST_RESERVE_BYTES["cpu"])
        staging = int(host * CPU_STAGING_SHARE)
        machine = _plain("cpu", 1, host - staging, staging)
    if memory.growth_bytes:
        remarks.append(
            f"Of this machine's memory {format_bytes(memory.available_bytes)} can be had now; "
            f"{format_bytes(memory.growth_bytes)} more may come as it is used. Plan with it by --host-memory."
        )
    machine = replace(
        machine,
        numa_nodes=numa_nodes([gpu.bus_id for gpu in found], root),
        host_growth_bytes=memory.growth_bytes,
        remarks=tuple(remarks),
    )
    return with_directory(machine, nvme_dir, None) if nvme_dir is not None else machine


def with_directory(machine: Machine, directory: Path, size: int | None, mounts: Mounts | None = None) -> Machine:
    """``machine``, which is here, with ``size`` bytes of a directory as NVMe tier, by default what is free there.

    Raises MachineError where that can not be.
    """
    disk = _disk(directory, mounts)
    at_most("--nvme", size, _usable_bytes(disk), f"free in {directory}")
    return with_disk(machine, disk, size)


def _usable_bytes(disk: Disk) -> int:
    return int(disk.free_bytes * (1 - NVME_RESERVE_SHARE))


def with_disk(machine: Machine, disk: Disk, size: int | None) -> Machine:
    """``machine`` with ``size`` bytes of a disk as NVMe tier, by default what is free; one in memory takes the host's.

    Raises MachineError where the host has not so much.
    """
    free = _usable_bytes(disk)
    if disk.in_memory:
        total = machine.host_bytes + (machine.gpu_bytes if machine.device == "cpu" else 0)
        size = min(free, total // 2) if size is None else size
        machine = _without_host_memory(machine, size, disk.directory)
    return replace(
        machine,
        nvme_dir=disk.directory,
        nvme_bytes=free if size is None else size,
        disk=disk,
        remarks=(*machine.remarks, *([f"{disk.trouble}."] if disk.trouble else [])),
    )


def at_most(what: str, wanted: int | None, present: int, where: str) -> None:
    """Raises MachineError where more is wanted than is present."""
    if wanted is not None and wanted > present:
        raise MachineError(f"{what} asks for {format_bytes(wanted)}, more than the {format_bytes(present)} {where}")


def _plain(device: str, gpus: int, gpu_bytes: int, host_bytes: int) -> Machine:
    return Machine(
        device=device,
        gpus=gpus,
        gpu_name=None,
        gpu_bytes=gpu_bytes,
        host_bytes=host_bytes,
        nvme_dir=None,
        nvme_bytes=0,
        memlock_bytes=memlock_bytes(),
        cores=usable_cores(),
    )


def _memory_known(found: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """CUDA's own answers where NVML gave none, or sees other GPUs than CUDA: slices of a GPU."""
    if len(found) == torch.cuda.device_count() and all(gpu.free_bytes is not None for gpu in found):
        return tuple(found)
    gpus = []
    for i in range(torch.cuda.device_count()):
        known = found[i] if len(found) == torch.cuda.device_count() else Gpu.unknown()
        free, total = torch.cuda.mem_get_info(i)
        gpus.append(replace(known, name=torch.cuda.get_device_name(i), free_bytes=free, total_bytes=total))
    return tuple(gpus)


def _with_gpus(found: Sequence[Gpu], memory: HostMemory) -> Machine:
    free = min(gpu.free_bytes or 0 for gpu in found)
    reserve = HOST_RESERVE_BYTES["cuda"] * len(found)
    machine = _plain("cuda", len(found), max(0, free - CONTEXT_BYTES), max(0, memory.available_bytes - reserve))
    machine = replace(machine, gpu_name=found[0].name)
    links = [gpu.link for gpu in found if gpu.link is not None]
    known = machine.known_device
    link = min(links, key=lambda link: link.bytes_per_second, default=None)
    if link is not None and known is not None:
        link = replace(link, c2c_bytes_per_second=known.c2c_bytes_per_second)
    # The speed that NVML tells is that of the signals; the maker's is what is left for data.
    speeds = [gpu.nvlink_bytes_per_second for gpu in found] + [known.nvlink_bytes_per_second if known else None]
    nvlink = min((speed for speed in speeds if speed is not None), default=None) if all_joined(found) else None
    return replace(machine, link=link, nvlink=nvlink)


def _gpu_remarks(found: Sequence[Gpu]) -> list[str]:
    said = []
    names = list(dict.fromkeys(gpu.name for gpu in found if gpu.name))
    if len(names) > 1:
        said.append(
            f"The GPUs are of several kinds ({', '.join(names)}); all count as the first, with the least memory."
        )
    least, most = (pick((gpu.free_bytes or 0, i) for i, gpu in enumerate(found)) for pick in (min, max))
    if least[0] < UNEVEN_SHARE * most[0]:
        said.append(
            f"GPU {least[1]} has {format_bytes(least[0])} free where GPU {most[1]} has {format_bytes(most[0])}; "
            "every GPU is planned with the least. CUDA_VISIBLE_DEVICES leaves one out."
        )
    if len(found) > 1 and any(gpu.nvlinks for gpu in found) and not all_joined(found):
        said.append("NVLink joins some of the GPUs and not all; they are planned as if it were not there.")
    return said


def _disk(directory: Path, mounts: Mounts | None) -> Disk:
    if not directory.exists():
        raise MachineError(f"the NVMe directory {directory} does not exist; create it or name another")
    if not directory.is_dir():
        raise MachineError(f"the NVMe directory {directory} is not a directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise MachineError(f"the NVMe directory {directory} is not writable for this user")
    try:
        return inspect(directory.resolve(), mounts)
    except OSError as error:
        raise MachineError(f"the NVMe directory {directory} can not be used: {error.strerror}") from error


def _without_host_memory(machine: Machine, size: int, directory: Path) -> Machine:
    """Less host memory: ``size`` of it is what a directory in memory takes."""
    where = f"of host memory, which is what {directory} takes"
    if machine.device == "cuda":
        at_most("--nvme", size, machine.host_bytes, where)
        return replace(machine, host_bytes=machine.host_bytes - size)
    total = machine.gpu_bytes + machine.host_bytes
    at_most("--nvme", size, total, where)
    host = machine.host_bytes * (total - size) // total if total else 0
    return replace(machine, host_bytes=host, gpu_bytes=total - size - host)


def _from_fields(data: dict[str, Any], source: str) -> Machine:
    """What a file says, each value of its kind; raises MachineError."""
    check_values(data, MACHINE, Machine, source)
    link, disk, directory = data.get("link"), data.get("disk"), data.get("nvme_dir")
    nodes = data.get("numa_nodes", ())
    if link is not None:
        check_values(link, LINK, HostLink, source, "link")
    if disk is not None:
        check_values(disk, DISK, Disk, source, "disk")
    for i, node in enumerate(nodes):
        check_values(node, NUMA_NODE, NumaNode, source, place("numa_nodes", i))
    return Machine(
        **{
            **data,
            "nvme_dir": None if directory is None else Path(directory),
            "link": None if link is None else HostLink(**link),
            "disk": None if disk is None else Disk(**{**disk, "directory": Path(disk["directory"])}),
            "numa_nodes": tuple(
                NumaNode(n["index"], tuple(n["cores"]), n["memory_bytes"], tuple(n["gpus"])) for n in nodes
            ),
            "remarks": tuple(data.get("remarks", ())),
        }
    )
