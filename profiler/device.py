"""Devices by name: what their makers say of memory and arithmetic, from the data files in ``profiler/devices``.

Rates are peaks without sparsity. On consumer cards they are those of 16-bit products summed in fp32, which is what
training uses and half of what is advertised. A class of arithmetic that a device has no units for is not listed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType

from profiler.errors import ProfilerError

FOLDER = Path(__file__).parent / "devices"

ARITHMETIC = ("fp32", "tf32", "bf16", "fp16", "fp8")
"""Classes of arithmetic; ``fp32`` is without tensor cores."""
KERNEL_SECONDS = 2e-6
"""What the shortest kernel takes, with its launch on the device: a round figure, until a calibration measures it."""


@dataclass(frozen=True)
class Device:
    """One accelerator as PyTorch sees it."""

    name: str
    aliases: tuple[str, ...]
    memory_bytes: int
    """As the maker states it, with 2**30 bytes to a GB; a little less is there for programs."""
    memory_bytes_per_second: float
    flops_per_second: Mapping[str, float]
    """By class of arithmetic (``ARITHMETIC``)."""
    sources: tuple[str, ...]
    """Documents that the figures are from."""
    context_bytes: int | None = None
    """What a CUDA context with PyTorch's libraries takes beside the caching allocator, where somebody measured it."""
    kernel_seconds: float = KERNEL_SECONDS
    """The least that any kernel takes."""
    usable_share: float = 0.965
    """Of ``memory_bytes``, the least that CUDA offers programs: after the correction of errors, where it takes memory,
    and what the driver keeps. From totals in out-of-memory messages of PyTorch that people published, by kind of card:
    stacked memory, memory that gives a sixteenth to the correction of errors, and the rest."""
    pcie_generation: int | None = None
    """Of the link to a usual host, with 16 lanes; ``None``: not known."""
    nvlink_bytes_per_second: float | None = None
    """To the other GPUs of a node, all links together, in one direction: half of what is advertised. AMD's links
    between GPUs count too. ``None`` where there are none, and where they are a bridge of cards that is bought apart."""
    c2c_bytes_per_second: float | None = None
    """To the host's processor over NVLink-C2C, in one direction; ``None`` where there is none."""

    def peak(self, arithmetic: str) -> float:
        """FLOPs per second of a class of arithmetic; without units for it, those of fp32."""
        return self.flops_per_second.get(arithmetic, self.flops_per_second["fp32"])


@cache
def devices() -> tuple[Device, ...]:
    """Every device that there is a description of, in the order of the files."""
    return tuple(_device(row) for path in sorted(FOLDER.glob("*.json")) for row in json.loads(path.read_text()))


def find_device(name: str) -> Device:
    """The device with this name or alias, however it is written; raises ProfilerError, with the nearest names."""
    known = {_plain(n): device for device in devices() for n in (device.name, *device.aliases)}
    plain = _plain(name)
    if plain in known:
        return known[plain]
    near = dict.fromkeys(known[n].name for n in get_close_matches(plain, known, n=6, cutoff=0.4))
    inside = dict.fromkeys(d.name for n, d in known.items() if plain and (plain in n or n in plain))
    nearest = list({**inside, **near})[:4] or [device.name for device in devices()]
    raise ProfilerError(f"there is no device {name!r}; the nearest names are {', '.join(nearest)}")


def _plain(name: str) -> str:
    """Letters and digits, without the makers' and families' names that people leave out."""
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "".join(w for w in words if w not in ("nvidia", "amd", "geforce", "instinct", "tesla", "graphics"))


def _device(row: dict[str, object]) -> Device:
    own: dict[str, object] = {**row, "flops_per_second": MappingProxyType(row["flops_per_second"])}  # type: ignore[arg-type]
    return Device(**{k: tuple(v) if isinstance(v, list) else v for k, v in own.items()})  # type: ignore[arg-type]
