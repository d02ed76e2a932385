"""Packed sequences of fake tensors: PyTorch's own kernels read the lengths from memory, which fake ones lack."""

from typing import Any

import torch


def register_packing(library: torch.library.Library) -> None:
    """Take the place of the kernels that would read memory, for CPU tensors."""
    library.impl("_pack_padded_sequence_backward", _pack_backward, "AutogradCPU")
    library.impl("_pad_packed_sequence", _pad, "AutogradCPU")


def sizes_of_steps(sequences: torch.Tensor, lengths: torch.Tensor | None, batch_first: bool) -> torch.Tensor:
    """How many of the padded ``sequences`` ([batch, time, ...] or [time, batch, ...]) reach each step of time.

    ``lengths`` are real numbers, the longest first; without them all sequences are full.
    """
    batch, steps = sequences.shape[:2] if batch_first else (sequences.shape[1], sequences.shape[0])
    if lengths is None:
        return torch.full((steps,), batch)
    return (lengths[None, :] > torch.arange(int(lengths.max()))[:, None]).sum(1)


def _pack_backward(grad: torch.Tensor, size: Any, _sizes: torch.Tensor, _batch_first: bool) -> torch.Tensor:
    return grad.new_empty(size)


def _pad(
    data: torch.Tensor, batch_sizes: torch.Tensor, batch_first: bool, _value: Any, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    steps, batch = max(len(batch_sizes), length), int(batch_sizes[0].item())
    lengths = (batch_sizes[None, :] > torch.arange(batch)[:, None]).sum(1)
    out: torch.Tensor = _Padded.apply(data, (batch, steps) if batch_first else (steps, batch))
    return out, lengths


class _Padded(torch.autograd.Function):
    """Allocates what padding would."""

    @staticmethod
    def forward(ctx: Any, data: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.shape = data.shape
        return data.new_empty(*shape, *data.shape[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].new_empty(ctx.shape), None
