"""Parameters that share memory with others: moved one by one they would come apart, and training with them.

Others are parameters, buffers, and tensors that modules have as plain attributes.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offload.dtensors import local_of
from offload.errors import OffloadError
from offload.released import lost_parameter


class _Place(NamedTuple):
    """The bytes from a tensor's first to behind its last; between them there may be some of others."""

    start: int
    stop: int
    name: str
    kind: str
    tensor: torch.Tensor

    @property
    def dense(self) -> bool:
        """Whether all bytes between are its own."""
        return self.stop - self.start == self.tensor.nbytes


def check_memory(model: nn.Module) -> None:
    """Raise OffloadError where a parameter has bytes of another parameter, of a buffer or of a module's attribute.

    One that several modules have is one parameter, and neighbours in one piece of memory (cuDNN's) share nothing.
    """
    if lost_parameter(model) is not None:
        return  # one number stands for all of them
    for places in _places(model).values():
        before: list[_Place] = []
        for place in sorted(places, key=lambda p: (p.start, p.stop)):
            before = [p for p in before if p.stop > place.start]
            for other in before:
                if "parameter" in (place.kind, other.kind) and _share(other, place):
                    _refuse(*sorted((other, place), key=lambda p: (p.kind != "parameter", p.name)))
            before.append(place)


def _places(model: nn.Module) -> dict[torch.device, list[_Place]]:
    """Of all tensors that have addresses, by device."""
    found: dict[torch.device, list[_Place]] = defaultdict(list)
    known: set[int] = set()
    named: list[tuple[str, str, torch.Tensor]] = [(name, "parameter", p) for name, p in model.named_parameters()]
    named += [(name, "buffer", b) for name, b in model.named_buffers()]
    for name, kind, tensor in (*named, *_attributes(model)):
        local = local_of(tensor.detach())
        absent = local.is_meta or local.layout is not torch.strided or is_traceable_wrapper_subclass(local)
        if id(tensor) in known or absent or not local.numel():
            continue
        known.add(id(tensor))  # a parameter may be registered as a buffer, too
        last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
        start = local.data_ptr()
        found[local.device].append(_Place(start, start + (last + 1) * local.itemsize, name, kind, local))
    return found


def _attributes(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            # Old weight_norm and spectral_norm write ``weight`` from ``weight_orig`` before every forward.
            if isinstance(value, torch.Tensor) and f"{key}_orig" not in module._parameters:
                yield f"{path}.{key}".removeprefix("."), "attribute", value


def _share(one: _Place, other: _Place) -> bool:
    """Whether two with bytes between the same two addresses have any byte in common: columns of a matrix have none."""
    if one.dense and other.dense:
        return True
    start = min(one.start, other.start)
    taken = torch.zeros(max(one.stop, other.stop) - start, dtype=torch.bool)

    def bytes_of(place: _Place) -> torch.Tensor:
        tensor, size = place.tensor, place.tensor.itemsize
        # What is repeated is there once.
        kept = [(n, step * size) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
        shape, stride = [n for n, _ in kept], [step for _, step in kept]
        return taken.as_strided((*shape, size), (*stride, 1), place.start - start)

    bytes_of(one).fill_(True)
    return bool(bytes_of(other).any())


def _refuse(one: _Place, other: _Place) -> None:
    instead = (
        f"make them one ({other.name} = {one.name}, not its .data)"
        if other.kind == "parameter"
        else f"read {one.name} where {other.name} is read"
    )
    raise OffloadError(
        f"{one.kind} {one.name} and {other.kind} {other.name} share memory, and would not any more when the engine "
        f"moves the parameter: {instead}, or give {other.name} numbers of its own with .clone()"
    )
