"""What CUDA's reductions hold for a moment: partial results of the blocks that share an output.

[Note: Reductions] PyTorch's reduction kernel gives an output to several blocks where one would have too much to do and
the device would stay half empty. Each then writes what it has summed to a buffer of the caching allocator. The gradient
of a bias is such a sum, over all rows of a batch, and its buffer can be larger than the gradient of the activations: at
6304 rows of 3072 bf16 numbers it is 132 MiB. How the kernel splits its work is written down in ATen's ``Reduce.cuh``
(``setReduceConfig``); this file follows it for sums over dimensions that are not the fastest. A sum over the fastest
dimension needs one number a block, which is little.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from profiler.hopper import MULTIPROCESSORS, THREADS_A_MULTIPROCESSOR

SUMS = frozenset(
    f"aten::{name}" for name in ("sum", "mean", "linalg_vector_norm", "norm", "amax", "amin", "prod", "any", "all")
)
SOFTMAXES = frozenset(
    f"aten::{name}" for name in ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data")
)
"""Their kernels read rows that lie together, and copy what does not."""
LARGEST_BLOCK = 512
WARP = 32
VECTORS = (1, 2, 4)
FEWEST_VALUES, MOST_VALUES = 16, 256
"""That a thread should sum."""


@dataclass(frozen=True)
class _Problem:
    """A reduction with its dimensions merged as far as they are contiguous, in elements."""

    inputs: int
    """Summed for each output."""
    outputs: int
    width: int
    """Length of the fastest dimension that is kept."""
    vector: int
    """Outputs that a thread makes at once."""
    largest_vector: int
    """The same where their number is divisible by more."""


class PartialSums(NamedTuple):
    """The buffer for partial results of a reduction."""

    bytes: int
    """0 where no output is shared."""
    most_bytes: int
    """Of this reduction with no more outputs, at least: the fewer these are, the more blocks share each. Where a batch
    has so many that none is shared, a smaller one can need much."""


NOTHING = PartialSums(0, 0)


def reduction_scratch(func: Any, args: Any, kwargs: Any, out: Any) -> PartialSums:
    """What a reduction holds for a moment; nothing for other calls."""
    if func._schema.name not in SUMS or not isinstance(out, torch.Tensor) or not isinstance(args[0], torch.Tensor):
        return NOTHING
    problem = _problem(args[0], _summed(func, args, kwargs), out)
    if problem is None:
        return NOTHING
    # Sums are kept in fp32 for 16-bit numbers.
    size = max(4, args[0].element_size())
    # In a smaller batch the outputs may be divisible by more.
    vectors = [n for n in VECTORS if n <= problem.largest_vector]
    held, most = _partial_sums(problem, problem.vector)[0], max(_partial_sums(problem, n)[1] for n in vectors)
    return PartialSums(size * held, size * max(held, most))


def _partial_sums(problem: "_Problem", vector: int) -> tuple[int, int]:
    """How many are kept where a thread makes ``vector`` outputs, and at most with no more outputs than these."""
    block_threads = LARGEST_BLOCK // vector
    block_width = min(_power_below(problem.width // vector, block_threads), WARP)
    block_height = min(_power_below(problem.inputs, block_threads), block_threads // block_width)
    block_width = min(_power_below(problem.width // vector, block_threads), block_threads // block_height)
    grid = -(-problem.outputs // vector // block_width)
    values = -(-problem.inputs // block_height)
    if problem.inputs < min(block_height * FEWEST_VALUES, MOST_VALUES) or values < MOST_VALUES:
        return 0, 0
    resident = MULTIPROCESSORS * (THREADS_A_MULTIPROCESSOR // (block_width * block_height))
    fewest, most = -(-values // MOST_VALUES), -(-values // FEWEST_VALUES)
    sharing = max(min(-(-resident // grid), most), fewest) if 0 < grid <= resident else 1
    outputs = block_width * vector
    # However many blocks an output is given to, together they are hardly more than are resident.
    blocks = min(grid, resident)
    blocks = max(blocks * fewest if fewest > 1 else 0, min(resident + blocks, blocks * most))
    return problem.outputs * sharing * outputs if sharing > 1 else 0, outputs**2 * blocks


def softmax_scratch_bytes(func: Any, args: Any) -> int:
    """Bytes that a softmax, or its backward, holds for a moment; 0 for other calls.

    Contiguous copies of what does not lie together; in backward the product of gradient and output (ATen's
    ``SoftMax.cu``); in the safe softmax of attention one truth value a score, for rows that are all masked.
    """
    name = func._schema.name
    if name == "aten::_safe_softmax":
        return int(args[0].numel())
    if name not in SOFTMAXES:
        return 0
    read = [t for t in args[:2] if isinstance(t, torch.Tensor)]
    if name == "aten::_softmax_backward_data":
        read = read[1:]
        return read[0].numel() * read[0].element_size() * (1 if read[0].is_contiguous() else 2)
    return sum(t.numel() * t.element_size() for t in read if not t.is_contiguous())


def _summed(func: Any, args: Any, kwargs: Any) -> set[int]:
    """The dimensions that are summed; all where none is named."""
    names = [argument.name for argument in func._schema.arguments]
    dims = kwargs.get("dim")
    if dims is None and "dim" in names and names.index("dim") < len(args):
        dims = args[names.index("dim")]
    count = args[0].dim()
    if isinstance(dims, int):
        dims = [dims]
    return {d % count for d in dims} if dims and count else set(range(count))


def _problem(x: torch.Tensor, summed: set[int], out: torch.Tensor) -> _Problem | None:
    """None where the fastest dimension is summed, or nothing is."""
    dims = sorted(
        (stride, size, i in summed)
        for i, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
        if size > 1 and stride > 0
    )
    if not dims or dims[0][2] or not any(is_summed for _, _, is_summed in dims):
        return None
    # The kept dimensions that follow each other in memory count as one.
    width, step = 1, dims[0][0]
    for stride, size, is_summed in dims:
        if is_summed or stride != step * width:
            break
        width *= size
    others = [stride for stride, _, _ in dims if stride >= step * width]
    vector = largest = VECTORS[-1] if step == 1 else 1
    while any(n % vector for n in (width, *others)):
        vector //= 2
    return _Problem(x.numel() // out.numel(), out.numel(), width, vector, largest)


def _power_below(count: int, limit: int) -> int:
    """The largest power of two that is not above ``count``, at most ``limit``."""
    return limit if count >= limit else 1 << (max(count, 1).bit_length() - 1)
