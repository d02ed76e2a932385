"""Recurrent layers with the memory of cuDNN's, which runs all steps, layers and directions in one call.

[Note: What cuDNN keeps] Read off the allocator's events of a three-layer ``nn.LSTM`` with dropout on one H200 with
torch 2.11 and cuDNN 9, in fp32, autocast to bf16 and pure bf16, and explained to the last KiB.

- The reserve lives from forward to backward: for every step, layer and direction the gates and the cell state, for
  every layer but the last its output, and a bit an element for the dropout between layers.
- A workspace passes in forward and again in both halves of backward: the gates, once more, 8 MiB a layer, and the
  gates of one step.
- The weights of a layer lie in one buffer and so do their gradients. The buffer is made when the module moves to the
  device, but not in bf16, which PyTorch does not flatten: there a copy is made in every forward pass and kept for
  backward. Under autocast the weights are cast into such a buffer.
- With dropout, the first call makes the states of its random numbers.

Not measured: GRUs, counted with four gates because the reset gate acts on a product that backward needs apart; plain
RNNs, counted with one; several directions, projections, packed sequences (counted as if padded); whether the 8 MiB
go by layers; layers that are not trained, which keep no reserve.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from profiler.attention import Report
from profiler.hopper import MULTIPROCESSORS, THREADS_A_MULTIPROCESSOR

GATES = {"lstm": 4, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}
"""What cuDNN keeps of a step beside its states, in multiples of the hidden size."""
WORKSPACE_LAYER_BYTES = 8 << 20
DROPOUT_STATES_BYTES = MULTIPROCESSORS * THREADS_A_MULTIPROCESSOR * 24
"""A random number generator for every thread that the device can hold."""


def recurrent_kernels(report: Report) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Stand-ins for the operators of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN`` on fake tensors, with their names."""
    for kind in GATES:
        yield f"{kind}.input", _padded(kind, report)
        yield f"{kind}.data", _packed(kind, report)


def flattened_bytes(module: nn.Module) -> tuple[int, ...]:
    """The weights that a layer has left behind when they moved into one buffer, of other modules none."""
    weights = [*module.parameters(recurse=False)] if isinstance(module, nn.RNNBase) else []
    return tuple(w.nbytes for w in weights if w.dtype != torch.bfloat16)


class _Layers(NamedTuple):
    """Sizes of a call."""

    kind: str
    steps: int
    batch: int
    hidden: int
    layers: int
    directions: int
    dropout: bool
    train: bool

    @property
    def states(self) -> int:
        """Elements of one layer's and direction's states over all steps."""
        return self.steps * self.batch * self.hidden

    def reserve_bytes(self, out: int, element_bytes: int) -> int:
        """Kept for backward; ``out`` is the width of a direction's output."""
        kept = GATES[self.kind] + (self.kind == "lstm")
        between = self.steps * self.batch * (self.layers - 1) * self.directions * out
        masks = between // 8 if self.dropout else 0
        return (kept * self.layers * self.directions * self.states + between) * element_bytes + masks

    def workspace_bytes(self, element_bytes: int) -> int:
        """Taken for a moment in each direction."""
        parts = self.layers * self.directions
        gates = GATES[self.kind] * (parts * self.states + self.batch * self.hidden)
        return gates * element_bytes + parts * WORKSPACE_LAYER_BYTES


def _padded(kind: str, report: Report) -> Callable[..., Any]:
    def layer(
        x: torch.Tensor,
        hx: Any,
        params: Sequence[torch.Tensor],
        _: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[torch.Tensor, ...]:
        x = x.transpose(0, 1) if batch_first else x
        sizes = (x.shape[0], num_layers, bidirectional, dropout, train)
        y, *states = _run(kind, report, x, hx, params, *sizes)
        return (y.transpose(0, 1) if batch_first else y, *states)

    return layer


def _packed(kind: str, report: Report) -> Callable[..., Any]:
    def layer(
        x: torch.Tensor,
        batch_sizes: torch.Tensor,
        hx: Any,
        params: Sequence[torch.Tensor],
        _: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[torch.Tensor, ...]:
        return _run(kind, report, x, hx, params, len(batch_sizes), num_layers, bidirectional, dropout, train)

    return layer


def _run(
    kind: str,
    report: Report,
    x: torch.Tensor,
    states: Any,
    weights: Sequence[torch.Tensor],
    steps: int,
    layers: int,
    bidirectional: bool,
    dropout: float,
    train: bool,
) -> tuple[torch.Tensor, ...]:
    hx, cx = states if kind == "lstm" else (states, None)
    hidden = (hx if cx is None else cx).shape[2]
    call = _Layers(kind, steps, hx.shape[1], hidden, layers, 1 + bidirectional, train and dropout > 0, train)
    flops = 2 * x[..., 0].numel() * sum(w.numel() for w in weights if w.dim() == 2)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        weights = (_Flattened.apply(dtype, *weights),)
        cx = None if cx is None else cx.to(dtype)
        hx, x = hx.to(dtype), x.to(dtype)
    y, hy, cy = _Recurrent.apply(x, hx, cx, call, flops, report, *weights)
    return (y, hy) if cy is None else (y, hy, cy)


class _Flattened(torch.autograd.Function):
    """Weights cast into one buffer."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> torch.Tensor:
        ctx.likes = [(w.shape, w.dtype) for w in weights]
        return weights[0].new_empty(sum(w.numel() for w in weights), dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pieces = _pieces(gradient[0], [shape for shape, _ in ctx.likes])
        return (None, *(piece.to(dtype) for piece, (_, dtype) in zip(pieces, ctx.likes, strict=True)))


class _Recurrent(torch.autograd.Function):
    """Allocates what cuDNN would, and computes nothing.

    Shapes: x [steps, batch, width] or packed [rows, width], states [layers * directions, batch, hidden].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        hx: torch.Tensor,
        cx: torch.Tensor | None,
        call: _Layers,
        flops: int,
        report: Report,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        whole = x.contiguous()
        y = x.new_empty(*x.shape[:-1], call.directions * hx.shape[2])
        hy, cy = torch.empty_like(hx), None if cx is None else torch.empty_like(cx)
        flat = None
        if len(weights) > 1 and weights[0].dtype == torch.bfloat16:
            flat = weights[0].new_empty(sum(w.numel() for w in weights))
        workspace = _raw(x, call.workspace_bytes(x.element_size()))
        reserve = _raw(x, call.reserve_bytes(hx.shape[2], x.element_size()) if call.train else 0)
        ctx.save_for_backward(x, hx, cx, y, reserve, flat, *weights)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.flops, ctx.report = call, flops, report
        lasting = DROPOUT_STATES_BYTES if call.dropout else 0
        report("recurrent", flops, [whole, y, reserve, *weights], (call.batch, call.hidden), lasting)
        del workspace
        return y, hy, cy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, hx, cx, y, reserve, _, *weights = ctx.saved_tensors
        call = ctx.call
        dy, *dstates = gradients
        dy = torch.zeros_like(y) if dy is None else dy
        given = zip((hx, cx), dstates, strict=True)
        ends = [torch.zeros_like(state) for state, end in given if state is not None and end is None]
        whole, dy = x.contiguous(), dy.contiguous()
        dx, dhx, dcx = torch.empty_like(whole), torch.empty_like(hx), None if cx is None else torch.empty_like(cx)
        workspace = _raw(x, call.workspace_bytes(x.element_size()))
        moved = [dy, dx, whole, y, reserve, *weights, *weights]
        ctx.report("recurrent_backward", 2 * ctx.flops, moved, (call.batch, call.hidden))
        del workspace, whole, dy, moved
        whole = x.contiguous()
        dw = weights[0].new_empty(sum(w.numel() for w in weights))
        workspace = _raw(x, call.workspace_bytes(x.element_size()))
        del workspace, whole, ends
        return (dx, dhx, dcx, None, None, None, *_pieces(dw, [w.shape for w in weights]))


def _raw(like: torch.Tensor, size: int) -> torch.Tensor:
    return like.new_empty(size, dtype=torch.uint8)


def _pieces(flat: torch.Tensor, shapes: Sequence[torch.Size]) -> list[torch.Tensor]:
    parts = flat.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
