"""DTensors: PyTorch's tensors over several processes, seen from the one that has a part of each.

[Note: parameters that are DTensors]
The runtime moves plain memory. Of a parameter on a tensor mesh it knows the local tensor alone, and puts another in its
place as it assigns ``data`` of a plain one: the parameter stays the object that modules and optimizers know, and what
it says of itself as a whole (shape, placements) stays as it was. Autograd saves DTensors, and so it is their local
tensors that are kept as references.
"""

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Share:
    """What one process has of a tensor that is divided in one dimension, as ``torch.chunk`` divides."""

    dim: int
    parts: int
    position: int
    whole: torch.Size

    @property
    def sizes(self) -> list[int]:
        """Of every part in that dimension."""
        size = self.whole[self.dim]
        most = -(-size // self.parts)
        return [max(0, min(most, size - most * i)) for i in range(self.parts)]

    def at(self, position: int) -> "Share":
        """That of another process."""
        return replace(self, position=position)

    @property
    def shape(self) -> torch.Size:
        """Of this part."""
        return torch.Size((*self.whole[: self.dim], self.sizes[self.position], *self.whole[self.dim + 1 :]))

    def own(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of the whole tensor, a view."""
        return whole.narrow(self.dim, sum(self.sizes[: self.position]), self.sizes[self.position])


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_distributed(tensor: object) -> bool:
    """Whether it is a DTensor; asking imports nothing, which would take a second."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of it: of a plain tensor, the tensor; what a collective still brings is waited for."""
    if type(tensor) in _PLAIN:
        return tensor
    if is_distributed(tensor):
        tensor = tensor._local_tensor  # type: ignore[attr-defined]
    module = sys.modules.get("torch.distributed._functional_collectives")
    if module is not None and isinstance(tensor, module.AsyncCollectiveTensor):
        return tensor.trigger_wait()
    return tensor


class Distributed:
    """A DTensor that autograd saved, without its local tensor: of that it has what stands for it."""

    def __init__(self, local: Any, tensor: Any) -> None:
        self.local, self._spec = local, tensor._spec

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The DTensor with this one."""
        return _with_local(self._spec, local)


def show(parameter: torch.nn.Parameter, data: torch.Tensor) -> None:
    """Let a parameter's data, on this process, be ``data``."""
    if not is_distributed(parameter):
        parameter.data = data
        return
    held: Any = parameter
    if (held.dtype, held.device) != (data.dtype, data.device):
        # What it says of itself follows; assigning gives it no other local tensor.
        changed: Any = _with_local(held._spec, data)
        held.data, held._spec = changed, changed._spec
    held._local_tensor = data


def share_of(parameter: torch.Tensor) -> Share | None:
    """How a parameter is divided over its tensor mesh; None where every process has all of it."""
    if not is_distributed(parameter):
        return None
    held: Any = parameter
    (placement,), mesh = held.placements, held.device_mesh
    if not placement.is_shard():
        return None
    return Share(placement.dim, mesh.size(), mesh.get_local_rank(), held.shape)


def gradient_of(parameter: torch.Tensor) -> torch.Tensor | None:
    """This process's part of the gradient, divided as the parameter is: a partial sum is summed first."""
    gradient: Any = parameter.grad
    if gradient is None or not is_distributed(gradient):
        return gradient
    placements = parameter.placements  # type: ignore[attr-defined]
    if gradient.placements != placements:
        gradient = gradient.redistribute(placements=placements)
    return local_of(gradient)


def is_partial(gradient: Any) -> bool:
    """Whether it is a DTensor whose sum over its mesh is to be made."""
    return is_distributed(gradient) and any(p.is_partial() for p in gradient.placements)


def _with_local(spec: Any, local: torch.Tensor) -> torch.Tensor:
    """A DTensor of this spec, but for its type, which is that of the local tensor."""
    from torch.distributed.tensor import DTensor

    shape, stride = spec.shape, tuple(spec.stride)
    return DTensor.from_local(local, spec.mesh, spec.placements, run_check=False, shape=shape, stride=stride)
