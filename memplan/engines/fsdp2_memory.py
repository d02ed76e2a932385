"""What FSDP2 (``fully_shard``) holds and moves, counted from how PyTorch 2.11 to 2.13 carries it out.

The model is kept in fp32. Each parameter is cut along its first dimension, each shard padded to the largest one. A
unit's shards are cast to the compute precision, gathered before its forward and again before its backward, and its
gradients reduced in fp32. The root unit is gathered once a micro-batch and stays whole until its backward ends.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from memplan.engines.held import ATTACH, BACKWARD, FORWARD, STEP, Held
from memplan.engines.pinned import rounded
from memplan.engines.traffic import Traffic
from memplan.units import owner
from offload.plan import Precision
from offload.residency import UnitShape
from profiler.profile import ParameterProfile

STORED_BYTES = 4
"""Of one parameter, one gradient and one moment where they stay: fp32."""
MOMENTS = 2
PAGE_BYTES = 4096
FOR_LOOP_COPIES = 3
"""Temporaries of torch's one-tensor-at-a-time Adam, in sizes of its largest tensor."""


@dataclass(frozen=True)
class FSDP2Setup:
    """How FSDP2 is set up."""

    gpus: int
    """Of all nodes together."""
    nodes: int
    shard_gpus: int
    """Ranks that share one copy of the model; 0 stands for all."""
    precision: Precision
    """fp32 computes in fp32; the others gather and compute in bf16 over the same fp32 shards."""
    offload: bool
    """``CPUOffloadPolicy``: parameters, gradients and optimizer state wait in pinned host memory, Adam runs there."""
    reshard_after_forward: bool
    micro_batches: int = 1
    """Of one step; their gradients are reduced each time."""
    fused: bool = True
    """torch's fused AdamW, as in Hugging Face's and torchtitan's defaults; its foreach form makes a copy in the
    step."""

    @property
    def shards(self) -> int:
        """Parts that each parameter is cut into."""
        return self.shard_gpus or self.gpus

    @property
    def replicas(self) -> int:
        """Copies of the model, each over ``shards`` ranks."""
        return self.gpus // self.shards

    @property
    def compute_bytes(self) -> int:
        """Of one gathered weight, and of its gradient before the reduction."""
        return 4 if self.precision is Precision.FP32 else 2


@dataclass(frozen=True)
class _Unit:
    """Elements of one unit's shards on the fullest rank, padding included, parameter by parameter."""

    name: str
    shards: tuple[int, ...]
    trained: tuple[int, ...]
    """Those of ``shards`` that are trainable."""


def fsdp2_held(units: Sequence[UnitShape], parameters: Sequence[ParameterProfile], setup: FSDP2Setup) -> Held:
    """Bytes that FSDP2 holds in the steady state: ``units`` in forward order, each one ``fully_shard``.

    Attaching assumes that every rank builds the whole model in fp32 on the CPU first. On the host everything stays
    from the first step on: the caching allocator of pinned memory keeps what the gradients return, and rounds each
    tensor up to a power of two. In backward not everything is there at once: where logits are the peak, no gradient
    has come yet, and what is held is what forward held.
    """
    cut = _cut(units, parameters, setup.shards)
    ranks = setup.gpus // setup.nodes
    shards = sum(sum(u.shards) for u in cut) * STORED_BYTES
    trained = sum(sum(u.trained) for u in cut) * STORED_BYTES
    resident = 0 if setup.offload else shards + MOMENTS * trained
    gradients = 0 if setup.offload else trained
    foreach = 0 if setup.offload or setup.fused else trained
    waiting = gradients if setup.micro_batches > 1 else 0
    host = pinned = 0
    if setup.offload:
        pinned = sum(_pinned(n) for u in cut for n in (*u.shards, *u.trained))
        # Beside these one gradient on its way into the sum of earlier ones, or the temporaries of an update.
        copies = max(setup.micro_batches > 1, 0 if setup.fused else FOR_LOOP_COPIES)
        largest = max((n for u in cut for n in u.trained), default=0) * STORED_BYTES
        host = pinned + MOMENTS * trained + copies * largest
    attach_gpu, attach_host = _attach(cut, setup)
    return Held(
        gpu={
            ATTACH: attach_gpu,
            FORWARD: resident + waiting + _forward(cut, setup),
            BACKWARD: resident + _backward(cut, setup, waiting),
            STEP: resident + gradients + foreach,
        },
        host={ATTACH: ranks * attach_host, FORWARD: ranks * host, BACKWARD: ranks * host, STEP: ranks * host},
        pinned_bytes=ranks * pinned,
        nvme_bytes=0,
    )


def fsdp2_traffic(units: Sequence[UnitShape], parameters: Sequence[ParameterProfile], setup: FSDP2Setup) -> Traffic:
    """What one rank moves in a step. Offloaded shards travel in fp32 and are cast on the device.

    Offloaded, torch's Adam updates on the CPU after backward, and nothing runs beside it.
    """
    cut = _cut(units, parameters, setup.shards)
    micro, others = setup.micro_batches, setup.shards - 1
    shards = sum(sum(u.shards) for u in cut)
    trained = sum(sum(u.trained) for u in cut)
    again = sum(sum(u.shards) for u in cut if u.name) if setup.reshard_after_forward else 0
    all_reduced = 2 * (setup.replicas - 1) * trained // setup.replicas
    moved = micro * STORED_BYTES if setup.offload else 0
    return Traffic(
        h2d_forward_bytes=moved * shards,
        h2d_backward_bytes=moved * again,
        d2h_backward_bytes=moved * trained,
        h2d_step_bytes=0,
        d2h_step_bytes=0,
        nvme_read_bytes=0,
        nvme_write_bytes=0,
        cpu_update_elements=trained if setup.offload else 0,
        gpu_update_elements=0 if setup.offload else trained,
        gather_bytes=micro * others * (shards + again) * setup.compute_bytes,
        reduce_bytes=micro * (others * trained + all_reduced) * STORED_BYTES,
    )


def _cut(units: Sequence[UnitShape], parameters: Sequence[ParameterProfile], shards: int) -> list[_Unit]:
    """The units' parameters, sharded; the root unit comes first."""
    paths = [u.name for u in units if u.name]
    members: dict[str, list[ParameterProfile]] = defaultdict(list)
    for parameter in parameters:
        members[owner((parameter.name, *parameter.aliases), paths)].append(parameter)
    return [
        _Unit(
            path,
            tuple(_shard(p.shape, shards) for p in members[path]),
            tuple(_shard(p.shape, shards) for p in members[path] if p.trainable),
        )
        for path in ("", *paths)
        if path in members
    ]


def _shard(shape: tuple[int, ...], shards: int) -> int:
    """Elements of one shard with its padding."""
    return -(-shape[0] // shards) * prod(shape[1:]) if shape else 1


def _pinned(elements: int) -> int:
    """What torch's allocator of pinned memory takes for these elements of fp32."""
    size = elements * STORED_BYTES
    return max(PAGE_BYTES, rounded(size)) if size else 0


def _attach(cut: Sequence[_Unit], setup: FSDP2Setup) -> tuple[int, int]:
    """(on the GPU, in one rank's host memory) while the units, the root last, are sharded one after the other.

    Each passes whole through the GPU, offloaded or not, beside the shards that are cut from it.
    """
    left = sum(sum(u.shards) for u in cut) * setup.shards * STORED_BYTES
    gpu, host, kept, pinned = 0, left, 0, 0
    for unit in sorted(cut, key=lambda u: not u.name):
        whole = sum(unit.shards) * setup.shards * STORED_BYTES
        own = sum(unit.shards) * STORED_BYTES
        left -= whole
        if setup.offload:
            copied = max(unit.shards, default=0) * STORED_BYTES
            pinned += sum(_pinned(n) for n in unit.shards)
            gpu, host = max(gpu, whole + copied), max(host, left + pinned + copied)
        else:
            kept += own
            gpu = max(gpu, kept + whole)
    return gpu, host


def _whole(unit: _Unit, setup: FSDP2Setup) -> int:
    """Bytes of the gathered unit."""
    return sum(unit.shards) * setup.shards * setup.compute_bytes


def _cast(unit: _Unit, setup: FSDP2Setup) -> int:
    """Bytes that are made on the way from shards to what is gathered: copies on the device, casts."""
    each = (STORED_BYTES if setup.offload else 0) + (setup.compute_bytes if setup.compute_bytes < STORED_BYTES else 0)
    if setup.shards == 1:  # one parameter after the other, the last one's copy still there
        return max(unit.shards, default=0) * (each + (setup.compute_bytes if each else 0))
    return sum(unit.shards) * each


def _forward(cut: Sequence[_Unit], setup: FSDP2Setup) -> int:
    """Gathered weights and their buffers. A gather's buffer is let go only when the next unit has been gathered."""
    sizes = [_whole(u, setup) for u in cut]
    root = sizes[0] if cut and not cut[0].name else 0
    buffers = sizes if setup.shards > 1 else [0] * len(sizes)
    peak, before, stay = 0, 0, root
    for unit, size, buffer in zip(cut, sizes, buffers, strict=True):
        own = 0 if not unit.name else size
        peak = max(peak, stay + buffer + max(before, own) + _cast(unit, setup))
        before = buffer
        stay += 0 if setup.reshard_after_forward else own
    return peak


def _backward(cut: Sequence[_Unit], setup: FSDP2Setup, waiting: int) -> int:
    """Gathered weights, the buffer of the unit fetched ahead, gradients, and the one reduction that is in flight.

    ``waiting`` are sharded gradients of earlier micro-batches, to which the output of each reduction is added.
    """
    inner = [u for u in cut if u.name]
    sizes = [_whole(u, setup) for u in inner]
    root = next((u for u in cut if not u.name), _Unit("", (), ()))
    root_gradients = sum(root.trained) * setup.shards
    always = _whole(root, setup) + root_gradients * setup.compute_bytes
    stay = 0 if setup.reshard_after_forward else sum(sizes)
    peak, reducing, sharded = 0, 0, 0
    for i in reversed(range(len(inner))):
        gradients, output = sum(inner[i].trained) * setup.shards, sum(inner[i].trained) * STORED_BYTES
        fetched = ahead = 0
        if setup.reshard_after_forward:
            ahead = sizes[i - 1] if i and setup.shards > 1 else 0
            buffer = sizes[i] if setup.shards > 1 else 0
            fetched = sizes[i] + max(ahead, buffer) + _cast(inner[i], setup)
        computing = stay + fetched + reducing
        stay -= 0 if setup.reshard_after_forward else sizes[i]
        # Where nodes hold replicas, the output of an offloaded unit's reduction is kept until the next one.
        reducing = gradients * STORED_BYTES + (output if setup.offload and setup.replicas > 1 else 0)
        held = always + (waiting or sharded) + gradients * setup.compute_bytes
        peak = max(peak, held + max(computing, stay + ahead + reducing + output))
        sharded += 0 if setup.offload else output
    end = root_gradients * (setup.compute_bytes + STORED_BYTES) + sum(root.trained) * STORED_BYTES
    return max(peak, (waiting or sharded) + max(always + reducing, end))
