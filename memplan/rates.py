"""How fast a machine does each thing a training step consists of: data, measured by a calibration or a reference."""

import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from memplan.errors import MachineError
from memplan.file_rules import CURVE, RATES, check_values
from offload.figures import POSITIVE, place, shown
from offload.plan import Precision
from profiler.calibration import Calibration
from profiler.errors import ProfilerError
from profiler.typed import parsed, without_schema

PLANNED = (Precision.FP32, Precision.AMP, Precision.BF16)
"""Precisions that plans are made for: nobody has measured an update in fp16 yet."""

SCHEMA = "memplan.rates/1"


@dataclass(frozen=True)
class Curve:
    """Bytes a second by the size of one transfer, both ascending in ``sizes_bytes``."""

    sizes_bytes: tuple[int, ...]
    bytes_per_second: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that do not ascend, or rates that are not positive and one a size."""
        sizes, rates = self.sizes_bytes, self.bytes_per_second
        ascending = all(a < b for a, b in pairwise((0, *sizes)))
        if not sizes or len(sizes) != len(rates) or not ascending or not all(map(POSITIVE.holds, rates)):
            told = f"a curve of sizes {shown(sizes)} and rates {shown(rates)} is none"
            raise ValueError(f"{told}: sizes ascend from above 0, and each has a rate above 0")

    @classmethod
    def flat(cls, bytes_per_second: float) -> "Curve":
        """The same at every size."""
        return cls((1,), (bytes_per_second,))

    def at(self, size_bytes: float) -> float:
        """Linear between the logarithms of the sizes, and that of the nearest size outside of them."""
        sizes, rates = self.sizes_bytes, self.bytes_per_second
        i = bisect_left(sizes, size_bytes)
        if i == 0:
            return rates[0]
        if i == len(sizes):
            return rates[-1]
        share = log(size_bytes / sizes[i - 1]) / log(sizes[i] / sizes[i - 1])
        return rates[i - 1] + share * (rates[i] - rates[i - 1])

    def scaled(self, factor: float) -> "Curve":
        """The same shape, so many times as fast."""
        return Curve(self.sizes_bytes, tuple(rate * factor for rate in self.bytes_per_second))


@dataclass(frozen=True)
class Rates:
    """What bounds each lane of a step. "Alone" is a lane while the others rest; the shares say what contention leaves.

    Figures by precision are of Adam's arithmetic as the runtime does it in that precision, a parameter.
    """

    compute_flops_per_second: Mapping[Precision, float]
    """Executed FLOPs that training sustains, where no calibration of kernels tells more."""
    device_bytes_per_second: float
    """Of the compute device's memory, read and written together."""
    call_seconds: float
    """What forward and backward of one small module take whatever its size: the framework's own time."""
    host_to_device: Curve
    """From pinned memory, alone."""
    device_to_host: Curve
    duplex_share: float
    """Of its rate alone, what each direction keeps while both are busy."""
    cpu_update_seconds: Mapping[Precision, float]
    """Of one element of state in host memory, by all cores together, as the runtime's update lane does it, alone."""
    cpu_update_beside_links: float
    """How many times longer it takes while weights stream to the device; at least 1."""
    links_beside_update: float
    """Of its rate alone, what the link to the device keeps while the CPU updates."""
    gpu_update_seconds: Mapping[Precision, float]
    """Of one element of state in the device's memory."""
    streamed_update_seconds: Mapping[Precision, float]
    """Of one element of state in host memory that the GPU updates, streaming it both ways; empty where unknown."""
    nvme_read_bytes_per_second: float
    """At the runtime's block and depth."""
    nvme_write_bytes_per_second: float
    collective: Curve
    """Bytes that each GPU sends to the others in one node while they send too, by the bytes of the whole tensor."""
    inter_node_bytes_per_second: float | None
    """The same between nodes, of each GPU; ``None`` where nobody said."""
    pinning_bytes_per_second: float
    source: str
    """Where the figures come from, one sentence."""
    cpu_update_beside_streamed: float = 1.0
    """How many times longer it takes while the GPU streams a share of its own; at least 1."""
    streamed_update_beside_cpu: float = 1.0
    """How many times longer a streamed update takes while the CPU updates its share; at least 1."""
    spread: float = 0.1
    """How far off a predicted step may be, as a share of it: wider where rates are assumed and not measured."""
    kernels: Calibration | None = None
    """What the GPU's kernels reach, for step times by operation."""
    fingerprint: str = ""
    """Of the machine that was measured; "" for a reference."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Names, versions and the date."""
    tables: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Everything else that was measured, for people: name -> rows of cells, the first row being the head."""
    skipped: tuple[str, ...] = ()
    """What was not measured, or not as usual, a sentence each; the figures are then a reference's."""
    machine: Mapping[str, Any] | None = None
    """The machine that was measured, so that plans can be made elsewhere for it; ``None`` where it is not known."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        kernels = self.kernels.to_dict() if self.kernels is not None else None
        path.write_text(
            json.dumps({"schema": SCHEMA, **asdict(replace(self, kernels=None)), "kernels": kernels}) + "\n"
        )

    @classmethod
    def load(cls, path: Path) -> "Rates":
        """Read what ``save`` wrote; raises MachineError for a file that this version can not read."""
        try:
            data = parsed(path)
        except OSError as error:
            raise MachineError(f"the calibration {path} can not be read: {error.strerror}") from error
        except ProfilerError as error:
            raise _foreign(str(path), error) from error
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str = "the calibration") -> "Rates":
        """The inverse of ``save``'s JSON; raises MachineError, naming ``source``, for values that can not be."""
        try:
            own = without_schema(data, SCHEMA)
        except ProfilerError as error:
            raise _foreign(source, error) from error
        check_values(own, RATES, cls, source)
        for name in ("host_to_device", "device_to_host", "collective"):
            check_values(own[name], CURVE, Curve, source, name)
            try:
                own[name] = Curve(*(tuple(own[name][part]) for part in ("sizes_bytes", "bytes_per_second")))
            except ValueError as error:
                raise MachineError(f"{source}: {name}: {error}") from error
        for name in ("compute_flops_per_second", "cpu_update_seconds", "gpu_update_seconds", "streamed_update_seconds"):
            if other := [key for key in own[name] if key not in list(Precision)]:
                known = ", ".join(Precision)
                raise MachineError(f"{source}: {place(name, other[0])} is of no precision that is known: {known}")
            own[name] = {Precision(key): value for key, value in own[name].items()}
        try:
            kernels = own.get("kernels")
            own["kernels"] = Calibration.from_dict(kernels, "kernels") if kernels is not None else None
        except ProfilerError as error:
            raise _foreign(source, error) from error
        own["tables"] = {name: tuple(tuple(row) for row in rows) for name, rows in own.get("tables", {}).items()}
        own["skipped"] = tuple(own.get("skipped", ()))
        return cls(**own)


def _foreign(source: str, error: ProfilerError) -> MachineError:
    return MachineError(
        f"{source} is not a calibration that this version can read ({error}); make it again: memplan calibrate"
    )
