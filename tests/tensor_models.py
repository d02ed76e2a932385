"""Small models that PyTorch's tensor parallelism can divide, and how."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F  # noqa: N812

from tests.models import GPT


class TensorBlock(nn.Module):
    """A block that computes with as many heads, and neurons, as its projections give it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj, self.up, self.down = (
            nn.Linear(width, width),
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        q, k, v = (p(y).unflatten(2, (-1, self.head_width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class TensorGPT(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(TensorBlock(32, 4) for _ in range(4))


class FrozenTensorGPT(TensorGPT):
    """The embedding, one whole block, a divided and a copied parameter of others are not trained."""

    def __init__(self) -> None:
        super().__init__()
        for module in (self.wte, self.h[1], self.h[2].q, self.h[3].ln_1):
            module.requires_grad_(False)


COLUMNS = {
    **{f"h.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")},
    **{f"h.*.{name}": RowwiseParallel() for name in ("proj", "down")},
}
"""Only the blocks' projections are divided; norms, embeddings and the head are plain tensors."""
SEQUENCE = {
    "wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    "wpe": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
    **{f"h.*.{name}": SequenceParallel() for name in ("ln_1", "ln_2")},
    **{f"h.*.{name}": ColwiseParallel(input_layouts=Shard(1)) for name in ("q", "k", "v", "up")},
    **{f"h.*.{name}": RowwiseParallel(output_layouts=Shard(1)) for name in ("proj", "down")},
    "ln_f": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
"""Everything is: between the projections each process has a part of the sequence, and norms see only that. The head and
the embedding have 61 rows, which two processes can not divide evenly."""


def divide(model: nn.Module, mesh: DeviceMesh, how: dict) -> nn.Module:
    """The model on the tensor axis of a mesh; SequenceParallel makes parameters anew, which are trained then."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    parallelize_module(model, mesh["tp"], how)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model
