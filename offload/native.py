"""The update on the host in one pass over memory: C, compiled once for this machine where a compiler is found.

The library is kept under the user's cache directory by a fingerprint of source, flags and processor. Calls go through
ctypes, which lets go of the interpreter lock, so the threads that feed a GPU go on meanwhile.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from offload.optimizer import AdamWStep
from offload.state import AdamState

SOURCE = Path(__file__).with_name("native_update.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""Sums and roots stay as IEEE 754 has them: nothing here lets the compiler reorder or approximate."""
BUILD_SECONDS = 60


class _How(ctypes.Structure):
    """What the C side calls How."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in ("clip", "decay", "lerp", "beta2", "rest2", "correction2", "eps", "step_size")
    ]


class NativeUpdate:
    """``update_in_torch`` on host memory, by the library at ``path``; raises OSError where it can not be loaded."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        size, how, threads = ctypes.c_int64, ctypes.POINTER(_How), ctypes.c_int
        self._split, self._fp32 = library.memplan_adamw_split, library.memplan_adamw_fp32
        self._split.argtypes = [*(ctypes.c_void_p,) * 5, size, how, threads]
        self._fp32.argtypes = [*(ctypes.c_void_p,) * 4, size, how, threads]
        self._split.restype = self._fp32.restype = None

    def __call__(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: AdamState,
        how: AdamWStep,
        clip: float | torch.Tensor,
    ) -> None:
        """Update a span of a unit in place, with this thread's number of threads."""
        given = _How(
            float(clip),
            1 - how.learning_rate * how.weight_decay,
            1 - how.beta1,
            how.beta2,
            1 - how.beta2,
            how.correction2,
            how.eps,
            -how.step_size,
        )
        moments = state.exp_avg.data_ptr(), state.exp_avg_sq.data_ptr()
        end = len(weight), ctypes.byref(given), torch.get_num_threads()
        if state.remainder is None:
            self._fp32(weight.data_ptr(), gradient.data_ptr(), *moments, *end)
        else:
            self._split(weight.data_ptr(), state.remainder.data_ptr(), gradient.data_ptr(), *moments, *end)


@cache
def native_update() -> NativeUpdate | None:
    """The compiled update; ``None`` where there is no compiler that can make it."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        return NativeUpdate(_built(compiler, _cache_directory()))
    return None


def _built(compiler: str, directory: Path) -> Path:
    """The library for this source, compiler and processor: found, or made aside and moved to its name."""
    processor = platform.processor() + platform.machine()
    with suppress(OSError):
        processor += next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=True).stdout
    key = hashlib.sha256(b"\0".join((SOURCE.read_bytes(), repr(FLAGS).encode(), version, processor.encode())))
    path = directory / f"update-{key.hexdigest()[:16]}.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as aside:
            made = Path(aside) / path.name
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, timeout=BUILD_SECONDS, check=True)
            made.replace(path)
    return path


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "memplan"
