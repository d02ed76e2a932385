"""What a model has beside the parameters that units own: equal on all ranks at the start, each rank's own later on.

[Note: buffers of several ranks]
Ranks begin with the buffers of the first, as with its weights: where each builds the model from a seed of its own they
would differ, and with them what is trained. In training nothing makes them equal: what a module keeps of its batches,
as the means of a batch norm, is its rank's. So every rank saves its own, where they are not those of the first.
"""

import zlib
from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import nn

from offload.errors import OffloadError
from offload.ranks import Ranks

BUFFER = "buffer/"
"""What keys of a checkpoint begin with that are of buffers."""


def from_first(model: nn.Module, ranks: Ranks) -> None:
    """Have the first rank's buffers, and its parameters that no unit owns. [Note: buffers of several ranks]

    Raises OffloadError where the ranks have others, or of other shapes or types.
    """
    owned_by_none = (p for p in model.named_parameters() if not p[1].is_floating_point())
    found = {name: t for name, t in (*model.named_buffers(), *owned_by_none) if t.layout is torch.strided}
    described = repr([(name, t.dtype, tuple(t.shape)) for name, t in found.items()])
    own = torch.tensor(zlib.crc32(described.encode()))
    first = own.clone()
    ranks.from_first(first)
    if ranks.any_rank([not torch.equal(own, first)])[0]:  # a broadcast between other sizes would hang, or worse
        raise OffloadError(
            "the ranks' models have other buffers than each other, or of other shapes or types; build the same model "
            "in every process"
        )
    for tensor in found.values():
        if tensor.numel():
            data = _bytes_of(tensor)  # gloo does not know every type
            ranks.from_first(data)
            put(tensor, data.view(tensor.dtype).view(tensor.shape))


def put(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values into a tensor that may be expanded, as a mask often is; such a one has each element once."""
    target = target.detach()
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if size > 1 and stride == 0:
            target, values = target.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    target.copy_(values)


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> int:
    """A number that is another one where any name, type, shape or bit is."""
    found = blake2b(digest_size=8)
    for name, tensor in tensors.items():
        found.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        if tensor.numel():
            found.update(_bytes_of(tensor).numpy().data)
    return int.from_bytes(found.digest(), signed=True)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in host memory; its own memory where they are there, in their order."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
