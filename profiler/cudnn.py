"""What cuDNN's convolutions hold for a moment beside their inputs and outputs.

[Note: The workspace of a convolution] Read off the allocator's events of 20 networks on one H200 with torch 2.11 and
cuDNN 9, without benchmarking, in fp32 (through TF32), bf16 and fp16.

Rules, with hardly an exception there:

- Tensor cores want channels last. Of channels-first tensors cuDNN copies the input, the output and the weight, in
  one block, for each of the three directions: forward, the input's gradient, the weight's gradient. Grouped,
  transposed and one-dimensional convolutions do the same. A 1x1 weight is the same in both layouts.
- A pointwise convolution (1x1, stride 1) is a matrix product in either layout, and copies nothing, if a channel's
  positions are aligned to 8 bytes.
- Channels are padded to 16 bytes, so that the 3 of an image become 4 in fp32 and 8 in 16 bits.
- The weight's gradient of a pointwise convolution is a product for every sample, summed over the batch at the end:
  one fp32 weight a sample.
- Depthwise convolutions have kernels of their own, which take nothing.
- Before all that, PyTorch copies what is not contiguous in the layout that it has chosen: channels last if the input
  or the weight is.

Approximations:

- Other gradients of weights are split along the positions until every multiprocessor has a tile, of 128 x 128 in
  fp32 and of 64 x 64 in 16 bits or for few channels; each part is a sum in fp32. Which tiles, and so how many parts,
  cuDNN's heuristics decide; what was measured lies up to 8 MiB beside it, rarely more. Those of grouped convolutions
  are neglected.
- For a pointwise weight gradient it is the smaller of the two.
- Few channels and a small kernel are convolved directly; where the border lies is guessed.
"""

from typing import Any, NamedTuple

import torch

from profiler.hopper import MULTIPROCESSORS

aten = torch.ops.aten

CHANNELS_ALIGNMENT_BYTES = 16
POSITIONS_ALIGNMENT_BYTES = 8
DIRECT_KERNEL_ELEMENTS = 16
SUM_BYTES = 4


class Passing(NamedTuple):
    """Bytes of the blocks that a call takes and gives back before it returns."""

    around: tuple[int, ...] = ()
    """Taken before the outputs are."""
    after: tuple[tuple[int, ...], ...] = ()
    """Taken after each of the outputs, in their order, and given back before the next."""


class _Convolution(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor
    """The output or, as large, its gradient."""
    weight: torch.Tensor
    """[out, in / groups, ...]; transposed [in, out / groups, ...]."""
    stride: list[int]
    groups: int

    @property
    def channels_last(self) -> bool:
        """The layout that PyTorch chooses."""
        return _channels_last(self.x) or _channels_last(self.weight)

    @property
    def kernel(self) -> int:
        return self.weight[0, 0].numel()

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.weight.shape[1] == 1

    @property
    def plain_product(self) -> bool:
        row_bytes = self.x[0, 0].numel() * self.x.element_size()
        return self.kernel == 1 and max(self.stride) == 1 and row_bytes % POSITIONS_ALIGNMENT_BYTES == 0


def passing_blocks(func: Any, args: Any, out: Any) -> Passing:
    """What a convolution takes for a moment, nothing for other calls. See [Note: The workspace of a convolution]."""
    if func is aten.convolution.default:
        call = _Convolution(args[0], out, args[1], args[3], args[8])
        return Passing(_made_contiguous(call, call.x), (_in_one_layout(call, _copies_bytes(call)),))
    if func is aten.convolution_backward.default:
        call = _Convolution(args[1], args[0], args[2], args[4], args[9])
        for_input = _in_one_layout(call, _copies_bytes(call))
        steps = zip(out, (for_input, (_weight_gradient_bytes(call),)), strict=False)
        after = tuple(blocks for gradient, blocks in steps if gradient is not None)
        return Passing(_made_contiguous(call, call.y, call.x), after)
    return Passing()


def _made_contiguous(call: _Convolution, *tensors: torch.Tensor) -> tuple[int, ...]:
    fits = _channels_last if call.channels_last else torch.Tensor.is_contiguous
    return tuple(t.nbytes for t in tensors if not fits(t))


def _in_one_layout(call: _Convolution, workspace: int) -> tuple[int, ...]:
    """The workspace, after the copy of a weight that is not in the layout of the others."""
    return (*(() if call.depthwise else _made_contiguous(call, call.weight)), workspace)


def _copies_bytes(call: _Convolution) -> int:
    """Input, output and weight with their channels last, where they are not so already or have to be padded."""
    if call.depthwise or call.plain_product:
        return 0
    few = call.x.shape[1] * call.x.element_size() < CHANNELS_ALIGNMENT_BYTES
    padded = _padded_bytes(call.x)
    if (few and call.kernel <= DIRECT_KERNEL_ELEMENTS) or (call.channels_last and padded == call.x.nbytes):
        return 0
    weight = call.weight.nbytes * padded // call.x.nbytes if call.kernel > 1 else 0
    return padded + weight + (0 if call.channels_last else _padded_bytes(call.y))


def _weight_gradient_bytes(call: _Convolution) -> int:
    if call.depthwise:
        return 0
    sums = 0 if call.groups > 1 else _split_sums_bytes(call.weight)
    if not call.plain_product:
        return _copies_bytes(call) + sums
    if call.channels_last:
        return sums
    copies = _padded_bytes(call.x) + _padded_bytes(call.y)
    if call.x.element_size() < SUM_BYTES and copies > call.x.nbytes + call.y.nbytes:
        return copies + sums
    return min(call.x.shape[0] * call.weight.numel() * SUM_BYTES, copies + sums)


def _padded_bytes(tensor: torch.Tensor) -> int:
    channels = tensor.shape[1] * tensor.element_size()
    padded = -(-channels // CHANNELS_ALIGNMENT_BYTES) * CHANNELS_ALIGNMENT_BYTES
    return tensor.nbytes * padded // channels


def _split_sums_bytes(weight: torch.Tensor) -> int:
    """The tiles of all parts that the positions are split into, if they are."""
    rows, columns = weight.shape[0], weight[0].numel()
    side = 128 if weight.element_size() == SUM_BYTES and rows > 64 else 64
    tiles = -(-rows // side) * -(-columns // side)
    parts = MULTIPROCESSORS // tiles
    return parts * tiles * side * side * SUM_BYTES if parts > 1 else 0


def _channels_last(tensor: torch.Tensor) -> bool:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return layout is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=layout)
