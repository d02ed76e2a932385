"""The update on the host in one pass over memory: C, compiled once for this machine where a compiler is found.

The library is kept under the user's cache directory by a fingerprint of sources, flags and processor. Calls go through
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

from offload.native_moments import span
from offload.rules import UpdateStep
from offload.state import OptimizerState

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native_update.c", "native_moments.c"))
HEADERS = (Path(__file__).with_name("native_rules.h"),)
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
"""Sums and roots stay as IEEE 754 has them: nothing here lets the compiler reorder or approximate."""
BUILD_SECONDS = 60
MOST_MOMENTS = 2
"""Places for moments that every compiled rule has."""
FORMATS = {torch.float32: "", torch.bfloat16: "_bf16", torch.int8: "_8bit", torch.uint8: "_8bit"}
"""Of moments, as they end the names of functions."""


class NativeUpdate:
    """``update_in_torch`` on host memory, by the library at ``path``; raises OSError where it can not be loaded.

    With moments in bf16 or 8 bits it is ``over_moments`` of itself, to the last bit but for what a NaN's bits are.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))

    def __call__(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: OptimizerState,
        how: UpdateStep,
        clip: float | torch.Tensor,
    ) -> None:
        """Update a span of a unit in place, with this thread's number of threads."""
        weights = "fp32" if state.remainder is None else "split"
        moments = FORMATS[state.moments[0].dtype] if state.moments else ""
        update = getattr(self._library, f"memplan_{how.rule}_{weights}{moments}")
        update.restype = None
        scalars = (ctypes.c_float * len(how.scalars))(*how.scalars)
        factor, threads = float(clip), ctypes.c_int(torch.get_num_threads())
        if moments:
            update(ctypes.byref(span(weight, gradient, state, how.seed, factor)), scalars, threads)
            return
        numbers = [weight, *([] if state.remainder is None else [state.remainder]), gradient, *state.moments]
        places = [ctypes.c_void_p(t.data_ptr()) for t in numbers]
        places += [ctypes.c_void_p()] * (MOST_MOMENTS - len(state.moments))
        update(*places, ctypes.c_int64(len(weight)), ctypes.c_float(factor), scalars, threads)


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
    """The library for these sources, compiler and processor: found, or made aside and moved to its name."""
    processor = platform.processor() + platform.machine()
    with suppress(OSError):
        processor += next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=BUILD_SECONDS, check=True).stdout
    texts = (path.read_bytes() for path in (*SOURCES, *HEADERS))
    key = hashlib.sha256(b"\0".join((*texts, repr(FLAGS).encode(), version, processor.encode())))
    path = directory / f"update-{key.hexdigest()[:16]}.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as aside:
            made = Path(aside) / path.name
            command = [compiler, *FLAGS, "-shared", "-fPIC", *map(str, SOURCES), "-o", str(made), "-lm"]
            subprocess.run(command, capture_output=True, timeout=BUILD_SECONDS, check=True)
            made.replace(path)
    return path


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "memplan"
