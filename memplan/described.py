"""Machines as people say they are: limits on what is here, a GPU by its name, a file from elsewhere."""

from dataclasses import dataclass, replace
from pathlib import Path

from memplan.described_disk import with_described_disk, with_disk_here
from memplan.errors import MachineError
from memplan.formatting import format_bytes
from memplan.gpus import HostLink
from memplan.machine import CONTEXT_BYTES, Machine, at_most, detect
from memplan.sharding import ASSUMED_INTER_NODE_BYTES_PER_SECOND
from memplan.sizes import MOST_COUNT, parse_bytes, parse_rate
from profiler.device import Device, find_device
from profiler.errors import ProfilerError
from profiler.typed import parsed

USUAL_WIDTH = 16
"""Lanes between host and card: every device that there is a description of has so many."""
NETWORK_ASSUMED = (
    f"Nobody said how fast the network between the nodes is: {ASSUMED_INTER_NODE_BYTES_PER_SECOND / 1e9:g} GB/s a GPU "
    "are assumed. Say it by --network."
)


@dataclass(frozen=True)
class _Wishes:
    """The other options, read."""

    gpus: int | None
    nodes: int | None
    gpu_bytes: int | None
    host_bytes: int | None


def find_machine(
    name: str | None = None,
    *,
    gpus: int | None = None,
    nodes: int | None = None,
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
    nvme: str | None = None,
    network: str | None = None,
) -> Machine:
    """The machine that the options mean: this one, the one in a file (``name`` ends in .json), or so many GPUs by name.

    ``gpus`` are those of each of ``nodes``, ``host_memory`` and ``nvme`` what each node has, ``network`` what each GPU
    can send to other nodes, as ``50GB/s``. Raises MachineError.
    """
    if name is None or name.endswith(".json"):
        base = detect() if name is None else load_machine(Path(name))
        return describe(base, gpus, gpu_memory, host_memory, nvme, nodes, network)
    try:
        device = find_device(name)
    except ProfilerError as error:
        near = str(error).partition("; ")[2]
        raise MachineError(f"--machine {name} is no GPU that is known, and no .json file; {near}") from error
    wishes = _wishes(gpus, nodes, gpu_memory, host_memory)
    return _with_network(with_described_disk(_of_device(device, wishes), nvme), network)


def load_machine(path: Path) -> Machine:
    """The machine in a file, described: one of its own, or the ``machine`` of a calibration. Raises MachineError."""
    try:
        data = parsed(path)
    except OSError as error:
        raise MachineError(f"the machine file {path} can not be read: {error.strerror}") from error
    except ProfilerError as error:
        raise MachineError(
            f"the machine file {path} is no JSON that can be read ({error}); memplan calibrate writes one"
        ) from error
    inner = data.get("machine") if isinstance(data, dict) else None
    machine = Machine.from_dict(inner if isinstance(inner, dict) else data, str(path))
    context = CONTEXT_BYTES if machine.device == "cuda" else 0
    return replace(machine, described=True, context_bytes=machine.context_bytes or context)


def describe(
    base: Machine,
    gpus: int | None = None,
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
    nvme: str | None = None,
    nodes: int | None = None,
    network: str | None = None,
) -> Machine:
    """``base`` with what a person says instead; raises MachineError where that can not be.

    Sizes are those of ``parse_bytes``, ``nvme`` is read by ``parse_nvme``, ``network`` by ``parse_rate``. More GPUs
    than are here describe another machine, and only of a described one there can be several ``nodes``, each with so
    many ``gpus``. ``gpu_memory`` is then the size of the card, of which the driver's context takes its part. On GPUs
    that are here, and on the CPU, it is a budget for training and may not exceed what is free. ``host_memory`` may
    exceed what can be had now where memory may grow.
    """
    wishes = _wishes(gpus, nodes, gpu_memory, host_memory)
    more = wishes.gpus is not None and (base.device == "cpu" or wishes.gpus > base.gpus_per_node)
    if more or (base.described and base.device == "cuda"):
        return _with_network(with_described_disk(_describe_gpus(base, wishes), nvme), network)
    if (wishes.nodes or 1) > 1:
        raise MachineError(
            f"--nodes {wishes.nodes} describes machines that are not here: say what they are by --machine NAME, "
            "or by --gpus and --gpu-memory"
        )
    base = _with_network(base, network)
    machine = with_described_disk(base, nvme) if base.described else with_disk_here(base, nvme)
    if base.device == "cpu":
        return _cut_host_memory(machine, wishes.gpu_bytes, wishes.host_bytes)
    at_most("--gpu-memory", wishes.gpu_bytes, base.gpu_bytes, f"free on each {base.gpu_name}")
    machine = replace(
        machine,
        gpus=wishes.gpus or base.gpus,
        gpu_bytes=base.gpu_bytes if wishes.gpu_bytes is None else wishes.gpu_bytes,
        nvlink=None if wishes.gpus == 1 else base.nvlink,
    )
    if wishes.host_bytes is None:
        return machine
    return _grown(replace(machine, host_bytes=wishes.host_bytes), machine.host_bytes, wishes.host_bytes)


def _wishes(
    gpus: int | None, nodes: int | None, gpu_memory: str | int | None, host_memory: str | int | None
) -> _Wishes:
    for option, count in (("--gpus", gpus), ("--nodes", nodes)):
        if count is not None and count < 1:
            raise MachineError(f"{option} is {count}; it must be at least 1")
        if count is not None and count > MOST_COUNT:
            raise MachineError(f"{option} is {count}; at most {MOST_COUNT:,} can be planned for")
    gpu_bytes = None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory")
    if gpu_bytes == 0:
        raise MachineError("--gpu-memory is 0; training needs some memory to compute in")
    return _Wishes(gpus, nodes, gpu_bytes, None if host_memory is None else parse_bytes(host_memory, "--host-memory"))


def _of_device(device: Device, wishes: _Wishes) -> Machine:
    """Nodes of GPUs that are known by name. Of their host nothing is known but what is said."""
    gpus, nodes = wishes.gpus or 1, wishes.nodes or 1
    at_most("--gpu-memory", wishes.gpu_bytes, device.memory_bytes, f"that {device.name} has")
    context = device.context_bytes or CONTEXT_BYTES
    memory = min(wishes.gpu_bytes or device.memory_bytes, int(device.memory_bytes * device.usable_share))
    host, remarks = wishes.host_bytes, []
    if host is None:
        host = gpus * device.memory_bytes
        remarks.append(
            f"Nobody said how much host memory there is: {format_bytes(host)} a node are assumed, as much as its GPUs "
            "have. Say it by --host-memory."
        )
    link = None
    if device.pcie_generation is not None:
        link = HostLink(device.pcie_generation, USUAL_WIDTH, device.c2c_bytes_per_second)
    return Machine(
        device="cuda",
        gpus=gpus * nodes,
        gpu_name=device.name,
        gpu_bytes=_less_context(memory, context),
        host_bytes=host,
        nvme_dir=None,
        nvme_bytes=0,
        memlock_bytes=None,
        cores=None,
        described=True,
        context_bytes=context,
        nodes=nodes,
        link=link,
        nvlink=device.nvlink_bytes_per_second if gpus > 1 else None,
        remarks=tuple(remarks),
    )


def _describe_gpus(base: Machine, wishes: _Wishes) -> Machine:
    """GPUs that are not here, in the host that is ``base``'s."""
    gpu_bytes, host_bytes = wishes.gpu_bytes, wishes.host_bytes
    if gpu_bytes is None and base.device == "cpu":
        raise MachineError(
            f"--gpus {wishes.gpus} describes GPUs that are not here: say which by --machine NAME, or how "
            "large each is, --gpu-memory 24GiB"
        )
    context = base.context_bytes or CONTEXT_BYTES
    if base.described and base.device == "cuda":
        at_most("--gpu-memory", gpu_bytes, base.gpu_bytes + context, f"of each {base.gpu_name}")
    remarks = base.remarks
    if host_bytes is None:
        host_bytes = _host_memory(base)
        if not base.described:
            remarks += (f"Each node is planned with the host memory of this one, {format_bytes(host_bytes)}.",)
    gpus, nodes = wishes.gpus or base.gpus_per_node, wishes.nodes or base.nodes
    nvlink = base.nvlink
    if nvlink is None and base.gpus_per_node == 1 and base.known_device is not None:
        nvlink = base.known_device.nvlink_bytes_per_second
    return replace(
        base,
        device="cuda",
        gpus=gpus * nodes,
        nodes=nodes,
        gpu_bytes=base.gpu_bytes if gpu_bytes is None else _less_context(gpu_bytes, context),
        host_bytes=host_bytes,
        described=True,
        context_bytes=context,
        nvlink=None if gpus == 1 else nvlink,
        numa_nodes=base.numa_nodes if base.described else (),
        remarks=remarks,
    )


def _with_network(machine: Machine, network: str | None) -> Machine:
    """``machine`` with what joins its nodes: as said now, or in its file, or else with a remark on what is assumed."""
    rate = machine.inter_node_bytes_per_second if network is None else parse_rate(network, "--network")
    if machine.nodes == 1:
        if network is not None:
            raise MachineError(f"--network {network} joins several nodes, and this is one: say how many by --nodes")
        return machine
    remarks = tuple(remark for remark in machine.remarks if remark != NETWORK_ASSUMED)
    return replace(
        machine,
        inter_node_bytes_per_second=rate,
        remarks=remarks if rate is not None else (*remarks, NETWORK_ASSUMED),
    )


def _less_context(memory_bytes: int, context_bytes: int) -> int:
    if memory_bytes <= context_bytes:
        raise MachineError(
            f"--gpu-memory is {format_bytes(memory_bytes)}; the driver's context alone takes "
            f"{format_bytes(context_bytes)}"
        )
    return memory_bytes - context_bytes


def _host_memory(base: Machine) -> int:
    """All of it, where the CPU computes the GPU tier's share too."""
    return base.host_bytes + (base.gpu_bytes if base.device == "cpu" else 0)


def _cut_host_memory(base: Machine, gpu_bytes: int | None, host_bytes: int | None) -> Machine:
    """The CPU computes: two budgets of the same memory."""
    if gpu_bytes is None and host_bytes is None:
        return base
    total = _host_memory(base)
    if gpu_bytes is None:
        gpu_bytes = max(0, total - (host_bytes or 0))
    if host_bytes is None:
        host_bytes = max(0, total - gpu_bytes)
    return _grown(replace(base, gpu_bytes=gpu_bytes, host_bytes=host_bytes), total, gpu_bytes + host_bytes)


def _grown(machine: Machine, present: int, wanted: int) -> Machine:
    """``machine``, with a remark where it wants memory that can not be had now; MachineError where none will come."""
    if wanted <= present:
        return machine
    options = "--host-memory" if machine.device == "cuda" else "--gpu-memory and --host-memory together"
    if machine.host_growth_bytes is not None:
        advice = "" if machine.device == "cuda" else "; add --gpus N to describe a machine with GPUs"
        at_most(options, wanted, present + machine.host_growth_bytes, f"that can be had here{advice}")
    remark = (
        f"{options} asks for {format_bytes(wanted)}, and {format_bytes(present)} can be had now. "
        "The plan holds if this machine's memory grows as it is used; if it does not, training runs out of it."
    )
    return replace(machine, remarks=(*machine.remarks, remark))
