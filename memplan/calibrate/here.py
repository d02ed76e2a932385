"""Which machine this is: its facts, their fingerprint, and the calibration kept for it."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from math import log2
from pathlib import Path

import psutil
import pynvml
import torch

from memplan.disks import mount_of
from memplan.errors import MachineError
from memplan.formatting import format_bytes
from memplan.gpus import find_gpus
from memplan.host import usable_cores
from memplan.rates import Rates

DISK = "disk"


def facts_here(nvme_dir: Path | None = None) -> dict[str, str]:
    """What rates depend on: GPUs and driver, CPU, memory, PyTorch, and the directory's disk if there is one."""
    names = _gpu_names()
    facts = {
        "gpus": ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none",
        "driver": _driver() if names else "none",
        "cpu": _cpu_model(),
        "cores": str(usable_cores()),
        # To a power of two: what the kernel keeps for itself differs from boot to boot.
        "memory": format_bytes(2 ** round(log2(psutil.virtual_memory().total))),
        "torch": torch.__version__,
    }
    return facts if nvme_dir is None else {**facts, DISK: _disk_of(nvme_dir)}


def fingerprint(facts: Mapping[str, str]) -> str:
    """Sixteen hexadecimal digits: the same for the same facts in whatever order, others for others."""
    return hashlib.sha256(json.dumps(sorted(facts.items())).encode()).hexdigest()[:16]


def without_disk(facts: Mapping[str, str]) -> dict[str, str]:
    """The same machine, whatever its disk."""
    return {name: fact for name, fact in facts.items() if name != DISK}


def cache_path(facts: Mapping[str, str]) -> Path:
    """Where the rates of a machine with these facts are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "memplan" / f"rates-{fingerprint(facts)}.json"


def load_cached(facts: Mapping[str, str]) -> Rates | None:
    """What was measured on a machine with these facts; ``None`` where nothing was, or by another version."""
    path = cache_path(facts)
    if not path.exists():
        return None
    with suppress(MachineError):
        return Rates.load(path)
    return None


def save_cached(rates: Rates, nvme_dir: Path | None = None) -> Path:
    """Keep them for this machine with its disk, and for plans that use none; returns the path of the first."""
    facts = facts_here(nvme_dir)
    path = cache_path(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for known in (without_disk(facts), facts):
        rates.save(cache_path(known))
    return path


def _gpu_names() -> list[str]:
    """By NVML, which makes no context; by CUDA where NVML sees others or none, as with slices of a GPU."""
    if not torch.cuda.is_available():
        return []
    names = [gpu.name for gpu in find_gpus() if gpu.name is not None]
    if len(names) == torch.cuda.device_count():
        return names
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _driver() -> str:
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"


def _disk_of(directory: Path) -> str:
    """Device and kind of the file system that a directory lies on."""
    mount = mount_of(directory)
    return f"{mount.device} {mount.kind}" if mount is not None else "unknown"


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
