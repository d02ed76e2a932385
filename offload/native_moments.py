"""What the compiled update is given where moments are in bf16 or 8 bits: the structures of ``native_moments.c``.

[Note: lines of a map]
Where a number lies between two of a map is found without a table of ratios. Within a decade the map's numbers are
evenly apart, so index by ratio is a line; the lines of two decades meet where the decades do, and each is steeper than
that of the next larger decade. So the lowest line at a ratio is that of its decade. Single precision is off by less
than a ten-thousandth of an index, and lines are drawn ``TOO_LOW``: what they say, rounded down, is the index or one
less, and one comparison with the map itself tells which.
"""

import ctypes
from functools import cache

import torch

from offload.moments import DECADES, code_map
from offload.state import OptimizerState

TOO_LOW = 2.0**-10
LINES = DECADES + 1
CODES = 256


class _Table(ctypes.Structure):
    _fields_ = [("numbers", ctypes.c_void_p), ("planes", ctypes.c_void_p)]


class _CodeMap(ctypes.Structure):
    _fields_ = [
        ("values", _Table),
        ("sizes", _Table),
        ("slopes", ctypes.c_float * LINES),
        ("offsets", ctypes.c_float * LINES),
        ("last", ctypes.c_int32),
    ]


class Span(ctypes.Structure):
    """What is updated."""

    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("remainder", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("moments", ctypes.c_void_p * 2),
        ("scales", ctypes.c_void_p * 2),
        ("maps", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
        ("clip", ctypes.c_float),
        ("seed", ctypes.c_uint32),
    ]


def span(weight: torch.Tensor, gradient: torch.Tensor, state: OptimizerState, seed: int, clip: float) -> Span:
    """Of these tensors, which must outlive it; of the seed its lowest 32 bits."""
    moments, scales = ((ctypes.c_void_p * 2)(*(t.data_ptr() for t in kept)) for kept in (state.moments, state.scales))
    remainder = None if state.remainder is None else state.remainder.data_ptr()
    maps = ctypes.addressof(_maps())
    return Span(
        weight.data_ptr(), remainder, gradient.data_ptr(), moments, scales, maps, len(weight), clip, seed % 2**32
    )


def lines(*, signed: bool) -> list[tuple[float, float]]:
    """Slopes and offsets, smallest decade first; the last one again where there is one less: [Note: lines of a map]."""
    # Beside a sign 0 comes before the first number of the smallest decade.
    last, before = (DECADES - 1, 0) if signed else (DECADES, 1)
    down = 0.5 + before + TOO_LOW
    found = [(2**k * 10.0 ** (last - k) / 0.9, 2**k * (1 - 0.1 / 0.9) - down) for k in range(last + 1)]
    return found + found[-1:] * (LINES - len(found))


@cache
def _maps() -> ctypes.Array[_CodeMap]:
    """Of signed numbers, and of squares."""
    found = []
    for dtype in (torch.int8, torch.uint8):
        known = code_map(dtype, torch.device("cpu"))
        slopes, offsets = zip(*lines(signed=dtype == torch.int8), strict=True)
        floats = ctypes.c_float * LINES
        tables = _table(known.values), _table(known.sizes)
        found.append(_CodeMap(*tables, floats(*slopes), floats(*offsets), len(known.sizes) - 2))
    return (_CodeMap * 2)(*found)


_TABLES: list[torch.Tensor] = []
"""What the maps point to."""


def _table(numbers: torch.Tensor) -> _Table:
    """With zeros behind the numbers where they are fewer than codes."""
    whole = torch.zeros(CODES)
    whole[: len(numbers)] = numbers
    planes = whole.view(torch.uint8).view(CODES, 4).T.contiguous()
    _TABLES.extend((whole, planes))
    return _Table(whole.data_ptr(), planes.data_ptr())
