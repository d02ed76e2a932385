"""Axes: which processes share a model's tensors, and which share its data.

[Note: tensor parallel]
A model whose parameters are DTensors on one axis of a 2-D mesh is trained over the other as any model is over its
ranks: a unit holds what this process has of every parameter, and ZeRO's stages divide that over the data axis. So a
plan's ``gpus`` are the ranks of the data axis, and its shapes those of the whole parameters. Processes of one tensor
axis compute together on the same batch; what only they must know is the norm of all gradients ([Note: the norm over a
tensor axis] in ``offload.ranks``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from offload.dtensors import is_distributed, share_of
from offload.errors import OffloadError
from offload.plan import Plan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Axes:
    """The processes of a training by their ranks: every line of the data axis, and every line across them."""

    data: tuple[tuple[int, ...], ...]
    """One line for each coordinate on the tensor axis."""
    rank: int

    @property
    def tensor(self) -> tuple[tuple[int, ...], ...]:
        """One line for each coordinate on the data axis."""
        return tuple(zip(*self.data, strict=True))

    @property
    def tensor_position(self) -> int:
        """This process's coordinate on the tensor axis."""
        return next(i for i, line in enumerate(self.data) if self.rank in line)

    @property
    def data_position(self) -> int:
        """This process's coordinate on the data axis."""
        return self.data[self.tensor_position].index(self.rank)

    @property
    def places(self) -> list[tuple[int, int | None]]:
        """Every process's coordinates on the data and the tensor axis; None where there is no tensor axis."""
        found = {rank: (d, t) for t, line in enumerate(self.data) for d, rank in enumerate(line)}
        return [(d, t if len(self.data) > 1 else None) for _, (d, t) in sorted(found.items())]


def axes_of(plan: Plan, model: nn.Module, mesh: "DeviceMesh | None") -> Axes | None:
    """Of these processes; None for one alone. Raises OffloadError where plan, model and mesh do not belong together."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    parameters = {name: p for name, p in model.named_parameters() if is_distributed(p)}
    if mesh is None:
        if parameters:
            raise OffloadError(
                f"parameter {min(parameters)} is a DTensor; give the engine the whole mesh too: "
                'mesh=init_device_mesh(device, (data, tensor), mesh_dim_names=("dp", "tp"))'
            )
        if world != plan.gpus:
            raise OffloadError(
                f"this plan is for {plan.gpus} GPUs, one process each, and torch.distributed has {world}; start "
                f"{plan.gpus} processes (torchrun --nproc-per-node ...), or plan with --gpus {world}"
            )
        return Axes((tuple(range(world)),), dist.get_rank()) if world > 1 else None
    axes = _of_mesh(mesh, parameters, world)
    if len(axes.data[0]) != plan.gpus:
        raise OffloadError(
            f"this plan is for {plan.gpus} ranks that share the data, and the mesh has {len(axes.data[0])} beside "
            f"{len(axes.data)} that share tensors; a plan's gpus are those of the data axis: plan with --gpus "
            f"{len(axes.data[0])}, or make another mesh"
        )
    if mesh.device_type != plan.device:
        raise OffloadError(f"the mesh is of {mesh.device_type} devices, and this plan is for {plan.device}")
    return axes


def _of_mesh(mesh: "DeviceMesh", parameters: dict[str, nn.Parameter], world: int) -> Axes:
    if mesh.ndim > 2 or sorted(mesh.mesh.flatten().tolist()) != list(range(world)):
        raise OffloadError(
            f"the mesh has {mesh.ndim} dimensions and {mesh.size()} of {world} processes; give the engine one of all "
            "processes, with an axis for data and, where parameters are DTensors, one for tensors"
        )
    lines = [_lines(mesh, dim) for dim in range(mesh.ndim)]
    if any(line != tuple(sorted(line)) for axis in lines for line in axis):
        raise OffloadError("the mesh's ranks do not rise along its axes, as those of init_device_mesh do; make it so")
    rank = dist.get_rank()
    if not parameters:
        if mesh.ndim > 1:
            raise OffloadError(
                f"no parameter of the model is a DTensor, so one axis of the mesh {mesh.mesh_dim_names} has no use: "
                'call parallelize_module(model, mesh["tp"], ...) before, or give the engine a mesh of one axis'
            )
        return Axes(lines[0], rank)
    own = {name: _own_mesh(name, parameter, mesh) for name, parameter in parameters.items()}
    (dim, first), *others = {dim: name for name, dim in own.items()}.items()
    if others:
        raise OffloadError(
            f"parameters {first} and {others[0][1]} are DTensors on different axes of the mesh; one axis must stay for "
            "data: leave that to the engine"
        )
    if mesh.ndim == 1:
        return Axes(tuple((r,) for r in lines[0][0]), rank)
    return Axes(lines[1 - dim], rank)


def _lines(mesh: "DeviceMesh", dim: int) -> tuple[tuple[int, ...], ...]:
    """The ranks along a dimension, a line for each coordinate of the other one."""
    ranks = mesh.mesh if mesh.ndim == 1 or dim == 1 else mesh.mesh.T
    return tuple(map(tuple, ranks.reshape(-1, mesh.size(dim)).tolist()))


def _own_mesh(name: str, parameter: Any, mesh: "DeviceMesh") -> int:
    """The axis that a parameter is on. Raises OffloadError for a DTensor that the runtime can not hold."""
    here, placements = parameter.device_mesh, parameter.placements
    if here.ndim == 1:
        ranks, names = tuple(here.mesh.tolist()), here.mesh_dim_names
        dims = [d for d in range(mesh.ndim) if ranks in _lines(mesh, d)]
        named = [d for d in dims if mesh.mesh_dim_names and names == (mesh.mesh_dim_names[d],)]
        if not dims:
            raise OffloadError(f"parameter {name} is on another mesh {here} than the engine's {mesh}; make one of both")
        (placement,) = placements
        if not (placement.is_replicate() or _is_plain_shard(placement)):
            raise OffloadError(f"parameter {name} is placed {placement!r}; only Shard and Replicate can be trained")
        share = share_of(parameter)
        if share is not None and not all(share.sizes):
            raise OffloadError(
                f"parameter {name} of shape {list(share.whole)} is divided over {share.parts} processes so that some "
                "have nothing of it; leave that module out of the parallel plan"
            )
        return (named or dims)[0]
    raise OffloadError(
        f"parameter {name} is a DTensor on {here.ndim} axes ({placements}); give parallelize_module one axis, "
        'mesh["tp"], and leave the other to the engine'
    )


def _is_plain_shard(placement: Any) -> bool:
    from torch.distributed.tensor import Shard

    return type(placement) is Shard


def check_tensor_parallel(axes: Axes | None, plan: Plan, model: nn.Module, refused: Sequence[tuple[bool, str]]) -> None:
    """Raise OffloadError for what does not go with DTensors; ``refused`` are pairs of (asked for, its sentence)."""
    if axes is None or not any(map(is_distributed, model.parameters())):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise OffloadError(f"{name} is on meta, and the model has DTensors: build it for real, then parallelize it")
    for name, buffer in model.named_buffers():
        if is_distributed(buffer):
            raise OffloadError(f"buffer {name} is a DTensor; the engine can hold those of parameters only")
    for name, parameter in model.named_parameters():
        if is_distributed(parameter) and not (parameter.is_floating_point() and parameter.numel()):
            raise OffloadError(f"parameter {name} is a DTensor without floating-point elements; make it a plain tensor")
    chunked = plan.loss_chunks > 1, "the loss in chunks (loss_chunks)"
    for asked, what in (chunked, *refused):
        if asked:
            raise OffloadError(f"{what} does not go with parameters that are DTensors; leave it out")
