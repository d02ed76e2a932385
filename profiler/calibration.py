"""How much of a device's peak rates its kernels reach, and what issuing them costs the CPU: data, measured or assumed.

A rate is a fraction of the roofline: of the time that the larger of (FLOPs / peak FLOPs) and (bytes / bandwidth) would
take. It depends on the sizes of the operation, so it is kept on a grid and interpolated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise, product
from math import exp, log, prod
from pathlib import Path
from statistics import median
from typing import Any

from profiler.device import KERNEL_SECONDS
from profiler.errors import ProfilerError
from profiler.typed import parsed, place, typed, without_schema

SCHEMA = "memplan.calibration/2"


@dataclass(frozen=True)
class Rate:
    """The fraction of the roofline that a kind of operation reaches, by its sizes."""

    axes: tuple[tuple[float, ...], ...]
    """Ascending sizes, one axis a size of the operation; no axes for a rate that is the same everywhere."""
    fractions: tuple[float | None, ...]
    """One for each point of the grid, the last axis running fastest; ``None`` where nothing was measured."""
    least_seconds: float = 0.0
    """What the operation takes however small it is."""

    def seconds(self, ideal_seconds: float, sizes: Sequence[float] = ()) -> float:
        """Of an operation that would take ``ideal_seconds`` at the roofline."""
        return max(self.least_seconds, ideal_seconds / self.fraction(sizes))

    def fraction(self, sizes: Sequence[float] = ()) -> float:
        """Interpolated linearly between logarithms; outside of the grid, that of its edge; without sizes, the median.

        Corners that were not measured are left out; where none was, the nearest point counts.
        """
        if not self.axes:
            return self.fractions[0] or 1.0
        if len(sizes) != len(self.axes):  # an operation that was logged without its sizes
            return median(f for f in self.fractions if f is not None)
        places = [_place(axis, size) for axis, size in zip(self.axes, sizes, strict=True)]
        total = weights = 0.0
        for corner in product(*places):
            value = self.fractions[self._index([index for index, _ in corner])]
            weight = prod(share for _, share in corner)
            if value is not None and weight > 0:
                total += weight * log(value)
                weights += weight
        return (
            exp(total / weights) if weights else self._nearest([max(place, key=lambda p: p[1])[0] for place in places])
        )

    def _index(self, position: Sequence[int]) -> int:
        index = 0
        for axis, at in zip(self.axes, position, strict=True):
            index = index * len(axis) + at
        return index

    def _nearest(self, position: Sequence[int]) -> float:
        grid = product(*(range(len(axis)) for axis in self.axes))
        measured = [(p, f) for p, f in zip(grid, self.fractions, strict=True) if f is not None]
        return min(measured, key=lambda m: sum(abs(a - b) for a, b in zip(m[0], position, strict=True)))[1]


def _place(axis: Sequence[float], size: float) -> tuple[tuple[int, float], ...]:
    """The two points of an axis around a size, each with its weight."""
    if size <= axis[0]:
        return ((0, 1.0),)
    for at in range(1, len(axis)):
        if size <= axis[at]:
            share = log(size / axis[at - 1]) / log(axis[at] / axis[at - 1])
            return ((at - 1, 1 - share), (at, share))
    return ((len(axis) - 1, 1.0),)


@dataclass(frozen=True)
class Calibration:
    """What step times are predicted from, beside the device's own figures."""

    device: str
    """The device that it was measured on, as its driver names it; "" for assumptions."""
    rates: Mapping[str, Rate]
    """By kind of operation and dtype, "kind/dtype", or by kind alone for any other dtype."""
    issue_seconds: Mapping[str, float]
    """CPU time to issue one operation, by phase and kind, "phase/kind"; also "call" of a module, "gradient" and
    "zero_grad" of a parameter, "checkpoint" for each part of forward that backward repeats, "step"."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Versions and date."""
    skipped: tuple[str, ...] = ()
    """Measurements that failed, a sentence each."""

    def rate(self, kind: str, dtype: str = "") -> Rate:
        """The rate of a kind of operation: that of the dtype, of another 16-bit one, of the kind, or an assumed one."""
        other = {"float16": "bfloat16", "bfloat16": "float16"}.get(dtype, "float32")
        for source in (self, ASSUMED):
            for name in (f"{kind}/{dtype}", f"{kind}/{other}", f"{kind}/float32", kind):
                if name in source.rates:
                    return source.rates[name]
        return ASSUMED.rates["elementwise"]

    def issue(self, name: str) -> float:
        """CPU time of an issue, "phase/kind" or another name; an assumed one where it was not measured."""
        phase, _, _ = name.partition("/")
        for source in (self, ASSUMED):
            for known in (name, f"{phase}/elementwise"):
                if known in source.issue_seconds:
                    return source.issue_seconds[known]
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, fractions with four digits."""
        data = asdict(self)
        for rate in data["rates"].values():
            rate["fractions"] = [None if f is None else float(f"{f:.4g}") for f in rate["fractions"]]
        return {"schema": SCHEMA, **data}

    @classmethod
    def from_dict(cls, data: Any, at: str = "") -> "Calibration":
        """The inverse of ``to_dict``; raises ProfilerError for other data, naming the place inside of ``at``."""
        read = typed(cls, without_schema(data, SCHEMA), at)
        for name, rate in read.rates.items():
            if said := _no_grid(rate):
                raise ProfilerError(f"{place(place(at, 'rates'), name)} {said}")
        return read

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what ``save`` wrote, by itself or as the ``kernels`` of a machine's rates.

        Raises ProfilerError when the file is neither, or a machine's without a GPU.
        """
        try:
            data = parsed(path)
            inside = isinstance(data, dict) and "kernels" in data
            kernels = data["kernels"] if inside else data
            if kernels is not None:
                return cls.from_dict(kernels, "kernels" if inside else "")
        except (OSError, ProfilerError) as error:
            said = error.strerror if isinstance(error, OSError) else error
            raise ProfilerError(
                f"{path} is not a calibration that this version can read ({said}); make it again: memplan calibrate"
            ) from error
        raise ProfilerError(f"{path} was measured on a machine without a GPU, so it has no rates of kernels")


def _no_grid(rate: Rate) -> str | None:
    """Why nothing could be interpolated in it."""
    if any(not axis or axis[0] <= 0 or any(a >= b for a, b in pairwise(axis)) for axis in rate.axes):
        return "has an axis whose sizes do not ascend from above 0"
    if len(rate.fractions) != (points := prod(map(len, rate.axes))):
        return f"has {len(rate.fractions)} fractions; they must be as many as its axes have points, {points}"
    known = [fraction for fraction in rate.fractions if fraction is not None]
    return None if known and min(known) > 0 else "must have fractions, all above 0 or null"


def _constant(fraction: float, kernels: int = 1) -> Rate:
    return Rate((), (fraction,), kernels * KERNEL_SECONDS)


ASSUMED = Calibration(
    device="",
    rates={
        "matmul": _constant(0.65),
        "matmul_unaligned": _constant(0.4),
        "batched_matmul": _constant(0.5),
        "attention": _constant(0.45),
        "attention_backward": _constant(0.4, kernels=3),
        "attention_causal": _constant(0.4),
        "attention_causal_backward": _constant(0.35, kernels=3),
        "attention_masked": _constant(0.35),
        "attention_masked_backward": _constant(0.3, kernels=3),
        "attention_dropout": _constant(0.25),
        "attention_dropout_backward": _constant(0.3, kernels=3),
        "attention_causal_dropout": _constant(0.25),
        "attention_causal_dropout_backward": _constant(0.3, kernels=3),
        "convolution": _constant(0.4),
        "convolution_backward": _constant(0.35, kernels=2),
        "convolution_last": _constant(0.5),
        "convolution_last_backward": _constant(0.4, kernels=2),
        "patch_convolution": _constant(0.3),
        "patch_convolution_backward": _constant(0.2, kernels=2),
        "grouped_convolution": _constant(0.2),
        "grouped_convolution_backward": _constant(0.1, kernels=2),
        "grouped_convolution_last": _constant(0.2),
        "grouped_convolution_last_backward": _constant(0.1, kernels=2),
        "depthwise": _constant(0.2),
        "depthwise_backward": _constant(0.1, kernels=2),
        "depthwise_last": _constant(0.3),
        "depthwise_last_backward": _constant(0.2, kernels=2),
        "recurrent": _constant(0.1),
        "recurrent_backward": _constant(0.1),
        "elementwise": _constant(0.8),
        "elementwise_unlike": _constant(0.5),
        "elementwise_transposed": _constant(0.3),
        "copy": _constant(0.8),
        "copy_unlike": _constant(0.6),
        "copy_transposed": _constant(0.3),
        "padded": _constant(0.6, kernels=2),
        "reduction": _constant(0.7),
        "reduction_columns": _constant(0.5),
        "norm": _constant(0.6),
        "norm_backward": _constant(0.4, kernels=2),
        "batch_norm": _constant(0.3),
        "batch_norm_backward": _constant(0.3),
        "batch_norm_last": _constant(0.5),
        "batch_norm_last_backward": _constant(0.5),
        "softmax": _constant(0.7),
        "softmax_backward": _constant(0.7),
        "softmax_spatial": _constant(0.4),
        "softmax_spatial_backward": _constant(0.4),
        "loss": _constant(0.5),
        "embedding": _constant(0.6),
        "embedding_backward": _constant(0.3, kernels=6),
        "index": _constant(0.4),
        "index_backward": _constant(0.2, kernels=3),
        "pool": _constant(0.5),
        "pool_backward": _constant(0.3),
        "resample": _constant(0.1),
        "resample_backward": _constant(0.1, kernels=2),
        "dropout": _constant(0.7),
        "sort": _constant(0.02, kernels=6),
        "scan": _constant(0.1, kernels=3),
        # Of one pass over the parameters: their bytes, read once.
        "optimizer/adamw": _constant(0.8 / 22),
        "optimizer/adamw-fused": _constant(0.8 / 7),
        "optimizer/adamw-forloop": _constant(0.8 / 22),
        "optimizer/sgd": _constant(0.8 / 3),
        "optimizer/sgd-momentum": _constant(0.8 / 8),
        "optimizer/adafactor": _constant(0.8 / 20),
        "optimizer/lion": _constant(0.8 / 18),
        "optimizer/adamw-8bit": _constant(0.8 / 5),
        "clip": _constant(0.8 / 3),
    },
    issue_seconds={
        "zero_grad": 2e-6,
        "checkpoint": 300e-6,
        "forward/view": 3e-6,
        "forward/elementwise": 10e-6,
        "forward/copy": 14e-6,
        "forward/matmul": 18e-6,
        "forward/attention": 25e-6,
        "forward/convolution": 25e-6,
        "forward/norm": 20e-6,
        "forward/batch_norm": 35e-6,
        "forward/recurrent": 160e-6,
        "backward/view": 6e-6,
        "backward/elementwise": 14e-6,
        "backward/matmul": 8e-6,
        "backward/reduction": 8e-6,
        "backward/padded": 25e-6,
        "backward/norm_backward": 20e-6,
        "backward/batch_norm_backward": 25e-6,
        "backward/attention_backward": 30e-6,
        "backward/convolution_backward": 60e-6,
        "backward/embedding_backward": 40e-6,
        "backward/recurrent_backward": 800e-6,
        "call": 6e-6,
        "gradient": 0.5e-6,
        "step": 50e-6,
        "optimizer/adamw": 12e-6,
        "optimizer/adamw-fused": 4e-6,
        "optimizer/adamw-forloop": 75e-6,
        "optimizer/sgd": 3e-6,
        "optimizer/sgd-momentum": 5e-6,
        "optimizer/adafactor": 240e-6,
        "optimizer/lion": 50e-6,
        "optimizer/adamw-8bit": 20e-6,
        "clip": 8e-6,
    },
)
"""Round figures for an eager PyTorch program on a server: assumptions for any device, as none was measured for it."""
