"""Ranks: the processes that train one model together, and what they tell each other.

[Note: order of collectives]
Ranks must call collectives of one group in one order. There are four groups of the same ranks, each used by one thread
alone: gathers of weights in the order in which units are used, reductions of gradients in a fixed order, and on the
host, in step, what must be agreed on, and what is told of checkpoints. Gathers and reductions have lanes of their own,
so they overlap with computing. The watchdog is told of each one: [Note: who is to blame] in ``offload/watchdog.py``.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from offload import watchdog
from offload.errors import OffloadError
from offload.plan import Plan
from offload.shards import Shards

# Newer versions have other names for these two.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local_device(plan: Plan) -> torch.device:
    """The device of this process: on a node with several GPUs that of its local rank."""
    if plan.device == "cpu":
        return torch.device("cpu")
    return torch.device(plan.device, int(os.environ.get("LOCAL_RANK", "0")) if plan.gpus > 1 else 0)


class Ranks:
    """All ranks of a plan, and those that share a copy of the model with this one.

    Raises OffloadError where torch.distributed is not as the plan has it.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world != plan.gpus:
            raise OffloadError(
                f"this plan is for {plan.gpus} GPUs, one process each, and torch.distributed has {world}; start "
                f"{plan.gpus} processes (torchrun --nproc-per-node ...), or plan with --gpus {world}"
            )
        self.world, self.rank = world, dist.get_rank()
        self.shards = Shards.of(plan)
        self._begun = watchdog.current() is None
        self._dog = watchdog.current() or watchdog.begin()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL asks for the current one
        group = self.shards.group
        self.position = self.rank % group
        backend = "nccl" if device.type == "cuda" else "gloo"
        sharing = [list(range(first, first + group)) for first in range(0, world, group)]
        replicas = [list(range(position, world, group)) for position in range(group)]
        with self._dog.inside("start", "making the groups"):
            self._gathering, self._reducing = (self._own(sharing, backend, kind) for kind in ("gather", "reduce"))
            self._replicas = self._own(replicas, backend, "reduce") if group < world else None
            everybody = [list(range(world))]
            self._agreeing = self._own(everybody, "gloo", "start")
            self._sharing_on_host = self._own(sharing, "gloo", "start")
            self._saving = self._own(everybody, "gloo", "checkpoint")

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> "Ranks | None":
        """A plan's; None where it is for one."""
        return cls(plan, device) if plan.gpus > 1 else None

    def close(self) -> None:
        """Give the groups back."""
        if self._begun:
            watchdog.end()
        for group in (
            self._gathering,
            self._reducing,
            self._replicas,
            self._agreeing,
            self._sharing_on_host,
            self._saving,
        ):
            if group is not None:
                dist.destroy_process_group(group)

    def _own(self, sets: Sequence[list[int]], backend: str, kind: str) -> dist.ProcessGroup:
        """The group of the set that this rank is in; every rank makes all of them."""
        timeout = self._dog.backstop(kind)
        groups = [dist.new_group(ranks, timeout=timeout, backend=backend) for ranks in sets]
        return next(g for ranks, g in zip(sets, groups, strict=True) if self.rank in ranks)

    # Gathers: by the lane that does nothing else

    def gather(self, whole: torch.Tensor, unit: str) -> None:
        """Bring together what every rank has at its own place in ``whole``."""
        if len(whole):
            with self._dog.inside("gather", "gather", unit):
                _gather(whole, self.own(whole), group=self._gathering)

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's place in what is divided evenly."""
        size = len(whole) // self.shards.group
        return whole[self.position * size : (self.position + 1) * size]

    # Reductions: by the lane that does nothing else

    def reduce(self, gradients: torch.Tensor, unit: str) -> torch.Tensor:
        """Sum gradients over the ranks that share a copy, in place; returns what this rank has of the sum."""
        with self._dog.inside("reduce", "reduce", unit):
            if self.shards.zero_stage == 0:
                dist.all_reduce(gradients, group=self._reducing)
                return gradients
            own = self.own(gradients)
            _reduce_scatter(own, gradients, group=self._reducing)
            return own

    def sum_over_replicas(self, own: torch.Tensor, unit: str) -> None:
        """Sum what this rank has over the others that have the same, in place."""
        if self._replicas is not None:
            with self._dog.inside("reduce", "sum over replicas", unit):
                dist.all_reduce(own, group=self._replicas)

    def sum_over_parts(self, square_norm: torch.Tensor) -> torch.Tensor:
        """The sum of a scalar over the parts of one copy."""
        if self.shards.zero_stage >= 1:
            with self._dog.inside("reduce", "norm of the gradients"):
                dist.all_reduce(square_norm, group=self._reducing)
        return square_norm

    # Agreement: by the main thread

    def any_rank(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        told = torch.tensor(flags, dtype=torch.uint8)
        if len(told):
            with self._dog.inside("agreement", "agreement on the gradients"):
                dist.all_reduce(told, dist.ReduceOp.MAX, group=self._agreeing)
        return [bool(flag) for flag in told.tolist()]

    def from_first(self, tensor: torch.Tensor) -> None:
        """Have what the first rank has."""
        here = tensor.cpu()
        with self._dog.inside("start", "first values"):
            dist.broadcast(here, 0, group=self._agreeing)
        if here is not tensor:
            tensor.copy_(here)

    def gather_on_host(self, whole: torch.Tensor) -> None:
        """``gather`` in host memory."""
        if len(whole):
            with self._dog.inside("start", "gather on the host"):
                _gather(whole, self.own(whole), group=self._sharing_on_host)

    # Checkpoints: by the lane that writes them

    def tell_all(self, numbers: Sequence[int]) -> list[list[int]]:
        """What every rank says, by rank; all say equally many."""
        here = torch.tensor(numbers, dtype=torch.int64)
        said = [torch.empty_like(here) for _ in range(self.world)]
        with self._dog.inside("checkpoint", "checkpoint"):
            dist.all_gather(said, here, group=self._saving)
        return [numbers.tolist() for numbers in said]
