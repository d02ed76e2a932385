"""Ranks: the processes that train one model together, and what they tell each other.

[Note: order of collectives]
Ranks must call collectives of one group in one order. There are four groups of the same ranks, each used by one thread
alone: gathers of weights in the order in which units are used, reductions of gradients in a fixed order, and on the
host, in step, what must be agreed on, and what is told of checkpoints. Gathers and reductions have lanes of their own,
so they overlap with computing. That units come in one order is compared once a step: [Note: units in another order] in
``offload/order.py``. The watchdog is told of each one: [Note: who is to blame] in ``offload/watchdog.py``.

[Note: two communicators on one device]
A kernel of NCCL keeps its place on the device until all ranks run the same one. Gathers and reductions are issued by
two threads, so a rank may begin with one of them and another rank with the other: that ends well only as long as
neither keeps the other from being started. Nothing may wait for the whole device meanwhile, so what would, the making
of communicators and their first connections, is over before the engine has given the device anything (``_connect``).
And streams must not wait for each other in the few queues through which they reach the device: ``CONNECTIONS``.

[Note: a bucket is a unit]
What is gathered or reduced at a time is one unit, whatever a plan's ``Buckets`` say to other engines. Joining several
would save the latency of a call each; but a unit would wait for its neighbours before it computes, or goes home, and
take a slot meanwhile, beyond those that ``offload.residency`` counts. Blocks are large enough for their calls not to
count, and what is small and in no block is in the root unit, which is one call.

[Note: the norm over a tensor axis]
Processes of one tensor axis ([Note: tensor parallel] in ``offload.axes``) have different parts of some parameters and
the same copies of the others. The square of the norm is summed over them, with the copies counted by the first alone
(``Field.counted``): so every part counts once, and all of them clip by the same number, to the last bit.
"""

import os
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist

from offload import watchdog
from offload.axes import Axes
from offload.dtensors import Share
from offload.entered import Mark
from offload.errors import OffloadError
from offload.order import Order, all_equal, common, difference, encoded
from offload.plan import Plan
from offload.shards import Shards

# Newer versions have other names for these two.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

CONNECTIONS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""For the environment, before CUDA is used: a queue for each stream of an engine, where 8 is usual and some would share
one. [Note: two communicators on one device]"""
ALIKE, NOTHING = 0.05, 1e-6
"""Of a gradient's norm, and beside it, how far two processes may be apart that computed the same: kernels add in any
order, and some gradients are rounding noise alone."""


def local_index() -> int:
    """Of this process's GPU among those that it sees: that of its local rank, or the only one, as Slurm may give it."""
    return 0 if torch.cuda.device_count() == 1 else int(os.environ.get("LOCAL_RANK", "0"))


def local_device(plan: Plan, axes: Axes | None) -> torch.device:
    """The device of this process: on a node with several GPUs that of its local rank."""
    if plan.device == "cpu":
        return torch.device("cpu")
    return torch.device(plan.device, local_index() if axes is not None else 0)


class _OnDevice:
    """What the current stream of a device was given so far, for another thread to ask about.

    A thread that has named no device asks the first one, and by that makes a context there, in memory of another rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, torch.cuda.current_stream(device).record_event()

    def query(self) -> bool:
        """Whether the device has come to it."""
        with torch.cuda.device(self._device):
            return bool(self._event.query())


class Ranks:
    """All ranks of a plan's data axis, those that share a copy of the model with this one, and its tensor axis."""

    def __init__(self, plan: Plan, device: torch.device, axes: Axes) -> None:
        self._axes, self._groups = axes, list[dist.ProcessGroup]()
        self.world, self.rank = plan.gpus, axes.data_position
        self.shards = Shards.of(plan)
        self._begun = watchdog.current() is None
        self._dog = watchdog.current() or watchdog.begin()
        self._device, self._order = device, Order()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL asks for the current one
        group, data, tensor = self.shards.group, axes.data, axes.tensor
        self.position = self.rank % group
        backend = "nccl" if device.type == "cuda" else "gloo"
        sharing = [line[first : first + group] for line in data for first in range(0, self.world, group)]
        replicas = [line[position::group] for line in data for position in range(group)]
        everybody = [tuple(range(len(axes.places)))]
        with self._dog.inside("start", "making the groups"):
            # The first is where ranks meet, and some build their models longer than a step's groups would wait.
            self._saving = self._own(everybody, "gloo", "checkpoint")
            self._gathering, self._reducing = (self._own(sharing, backend, kind) for kind in ("gather", "reduce"))
            self._replicas = self._own(replicas, backend, "reduce") if group < self.world else None
            self._agreeing = self._own(data, "gloo", "start")
            self._sharing_on_host = self._own(sharing, "gloo", "start")
            self._norms = self._own(tensor, backend, "reduce") if len(data) > 1 else None
            self._tensor = self._own(tensor, "gloo", "start") if len(data) > 1 else None
            if device.type == "cuda":
                self._connect(device)

    @classmethod
    def of(cls, plan: Plan, device: torch.device, axes: Axes | None) -> "Ranks | None":
        """A plan's; None where it is for one process."""
        return cls(plan, device, axes) if axes is not None else None

    def close(self) -> None:
        """Give the groups back."""
        if self._begun:
            watchdog.end()
        for group in self._groups:
            dist.destroy_process_group(group)

    def _own(self, sets: Sequence[Sequence[int]], backend: str, kind: str) -> dist.ProcessGroup:
        """The group of the set that this rank is in; every rank makes all of them."""
        timeout = self._dog.backstop(kind)
        groups = [dist.new_group(list(ranks), timeout=timeout, backend=backend) for ranks in sets]
        own = next(g for ranks, g in zip(sets, groups, strict=True) if self._axes.rank in ranks)
        self._groups.append(own)
        return own

    def _connect(self, device: torch.device) -> None:
        """Have NCCL connect now, which it else does in a group's first collective of each kind."""
        size = self.shards.group
        whole = torch.zeros(size, device=device)
        part = whole[self.position : self.position + 1]
        if size > 1 and self.shards.zero_stage >= 1:
            _gather(whole, part, group=self._gathering)
            _reduce_scatter(part, whole, group=self._reducing)
        for group in (self._reducing, self._replicas, self._norms):
            if group is not None:
                dist.all_reduce(whole, group=group)
        torch.cuda.synchronize(device)

    def _on_device(self, kind: str, verb: str, unit: str = "") -> AbstractContextManager[None]:
        """Inside of a collective that NCCL gives to the current stream, or gloo does here."""
        return self._dog.inside(kind, verb, unit, self._mark if self._device.type == "cuda" else None)

    def _mark(self) -> Mark:
        return _OnDevice(self._device)

    # Gathers: by the lane that does nothing else

    def gather(self, whole: torch.Tensor, unit: str) -> None:
        """Bring together what every rank has at its own place in ``whole``."""
        if len(whole):
            with self._on_device("gather", "gather", unit):
                _gather(whole, self.own(whole), group=self._gathering)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's place in what is divided evenly."""
        size = len(whole) // self.shards.group
        return whole[self.position * size : (self.position + 1) * size]

    # Reductions: by the lane that does nothing else

    def reduce(self, gradients: torch.Tensor, unit: str) -> torch.Tensor:
        """Sum gradients over the ranks that share a copy, in place; returns what this rank has of the sum."""
        with self._on_device("reduce", "reduce", unit):
            if self.shards.zero_stage == 0:
                dist.all_reduce(gradients, group=self._reducing)
                return gradients
            own = self.own(gradients)
            _reduce_scatter(own, gradients, group=self._reducing)
            return own

    def sum_over_replicas(self, own: torch.Tensor, unit: str) -> None:
        """Sum what this rank has over the others that have the same, in place."""
        if self._replicas is not None:
            with self._on_device("reduce", "sum over replicas", unit):
                dist.all_reduce(own, group=self._replicas)

    def sum_over_parts(self, square_norm: torch.Tensor) -> torch.Tensor:
        """The sum of a scalar over the parts of one copy. [Note: the norm over a tensor axis]"""
        if self.shards.zero_stage >= 1:
            with self._on_device("reduce", "norm of the gradients"):
                dist.all_reduce(square_norm, group=self._reducing)
        if self._norms is not None:
            with self._on_device("reduce", "norm over the tensor axis"):
                dist.all_reduce(square_norm, group=self._norms)
        return square_norm

    # Agreement: by the main thread

    def submitted(self, kind: str, unit: str) -> None:
        """Its lane has been given a collective of this unit: called in the order of the lane."""
        self._order.add(kind, unit)

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank; raises on all where ranks used units in different orders."""
        if not flags:
            return []
        group = self.shards.group  # ranks of other copies may have an order of their own
        mine = encoded(self._order.digest(), self.rank // group, self.world // group)
        told = torch.tensor([*mine, *flags], dtype=torch.uint8)
        with self._dog.inside("agreement", "agreement on the gradients"):
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._agreeing)
        greatest = told.tolist()
        if all_equal(greatest[: len(mine)]):
            self._order.clear()
        else:
            self._compare_orders()
        return [bool(flag) for flag in greatest[len(mine) :]]

    def _compare_orders(self) -> None:
        """[Note: units in another order]."""
        told: list[Any] = [None] * self.world
        with self._dog.inside("agreement", "comparison of the order of units"):
            dist.all_gather_object(told, self._order.told(), group=self._agreeing)
        line, group = self._axes.data[self._axes.tensor_position], self.shards.group
        copies = [range(first, first + group) for first in range(0, self.world, group)]
        found = (difference({line[i]: told[i] for i in copy}) for copy in copies)
        if (differs := next(filter(None, found), None)) is not None:
            where = f" in step {self._dog.step}" if self._dog.step else ""
            raise OffloadError(
                f"ranks used units of the plan in different orders{where}: {differs}, and each got the numbers of the "
                "other unit. The step was not made, and no weight was changed. Have all ranks call these modules in "
                "one order, or leave them to the root unit (take their units out of the plan's placements), or plan "
                "with ZeRO stage 0, 1 or 2 and weights on the GPU"
            )
        own = next(copy for copy in copies if self.rank in copy)
        self._order.drop(common([told[i] for i in own]))

    def from_first(self, tensor: torch.Tensor) -> None:
        """Have what the first rank has."""
        here = tensor.cpu()
        with self._dog.inside("start", "first values"):
            dist.broadcast(here, group=self._agreeing, group_src=0)
        if here is not tensor:
            tensor.copy_(here)

    def gather_on_host(self, whole: torch.Tensor) -> None:
        """``gather`` in host memory."""
        if len(whole):
            with self._dog.inside("start", "gather on the host"):
                _gather(whole, self.own(whole), group=self._sharing_on_host)

    # The tensor axis: by whoever has the model compute, or reads it whole

    @property
    def divides_tensors(self) -> bool:
        """Whether there is a tensor axis."""
        return self._tensor is not None

    @property
    def tensor_parts(self) -> int:
        """Processes on the tensor axis."""
        return len(self._axes.data)

    @property
    def tensor_position(self) -> int:
        """This process's place on the tensor axis; 0 where there is none."""
        return self._axes.tensor_position

    def alike(self, copy: torch.Tensor, *, roughly: bool) -> bool:
        """Whether the processes of a tensor axis have the same in it, to the last bit or as gradients; all learn it."""
        if self._tensor is None:
            return True
        here = copy.detach().float().cpu().contiguous()
        first = here.clone()
        with self._dog.inside("tensor axis", "comparison over the tensor axis"):
            dist.broadcast(first, group=self._tensor, group_src=0)
        same = torch.equal(here.view(torch.int32), first.view(torch.int32))
        if roughly and not same:
            size = first.norm()  # in fp16 the first ones may overflow, on all
            same = not size.isfinite() or bool((here - first).norm() <= ALIKE * size + NOTHING)
        differs = torch.tensor(not same, dtype=torch.uint8)
        with self._dog.inside("tensor axis", "comparison over the tensor axis"):
            dist.all_reduce(differs, dist.ReduceOp.MAX, group=self._tensor)
        return not differs

    def joined(self, share: Share | None, part: torch.Tensor) -> torch.Tensor:
        """The whole of a tensor on the host that the tensor axis divides; a copy of its own."""
        if share is None or self._tensor is None:
            return part.clone()
        most = part.new_zeros(share.at(0).shape)  # the first part is the largest
        most.narrow(share.dim, 0, part.shape[share.dim]).copy_(part)
        found = [torch.empty_like(most) for _ in range(share.parts)]
        with self._dog.inside("tensor axis", "whole tensors over the tensor axis"):
            dist.all_gather(found, most, group=self._tensor)
        parts = zip(found, share.sizes, strict=True)
        return torch.cat([tensor.narrow(share.dim, 0, size) for tensor, size in parts], share.dim)

    # Cores: before the lanes are made

    def sharing_cores(self) -> int:
        """Processes that may run on the same cores as this one, itself among them."""
        here = f"{watchdog.machine()} {sorted(os.sched_getaffinity(0))}"
        mine = [zlib.crc32(here.encode())]
        return self.tell_all(mine).count(mine)

    # Checkpoints: by the lane that writes them

    @property
    def number(self) -> int:
        """Of this process among all that save."""
        return self._axes.rank

    @property
    def places(self) -> list[tuple[int, int | None]]:
        """Of all that save, by number: ``Axes.places``."""
        return self._axes.places

    def tell_all(self, numbers: Sequence[int]) -> list[list[int]]:
        """What every process says, by its number; all say equally many."""
        here = torch.tensor(numbers, dtype=torch.int64)
        said = [torch.empty_like(here) for _ in self.places]
        with self._dog.inside("checkpoint", "checkpoint"):
            dist.all_gather(said, here, group=self._saving)
        return [numbers.tolist() for numbers in said]
