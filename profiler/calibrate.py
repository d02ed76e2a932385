"""Measures, on the CUDA device of this machine, what step times are predicted from.

Kernels are timed alone, on grids of sizes; no model is, so a prediction for a model is never fitted to it.
"""

import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import product

import torch

from profiler.calibrate_blocks import checkpoint_seconds, in_blocks
from profiler.calibrate_issue import issue_programs, issue_seconds, recurrent_issue_seconds
from profiler.calibrate_kernels import important_grids, other_grids
from profiler.calibrate_numbers import Grid, Numbers, Timed
from profiler.calibrate_timing import device_seconds, undisturbed
from profiler.calibrate_update import TENSORS, UPDATES, clearing_seconds, update, update_seconds
from profiler.calibration import Calibration, Rate
from profiler.device import Device, find_device
from profiler.errors import ProfilerError
from profiler.roofline import ideal_seconds

SECONDS, GRIDS_SECONDS = 42.0, 11.0
"""What everything may take; and what the grids may take where the rest, which comes first, left less."""
IMPORTANT_SECONDS = {"matmul": 2.0, "attention_causal": 2.5, "attention_masked": 1.0, "attention": 1.0}
"""What some grids at the beginning may take, by kind: each kernel of attention takes up to a second to be loaded."""
GRID_SECONDS, LEAST_GRID_SECONDS = 6.0, 0.3
"""What another grid may take: then the rest of its points, which come in a random order, is left out."""
SHARE = 4.0
"""A grid may take so many times what would be left for each, as most need less."""
UPDATE_BYTES = (4e6, 64e6, 1e9)
"""Of the parameters that optimizers are timed on."""

Say = Callable[[str], object]


def calibrate(say: Say = lambda _: None, seconds: float = SECONDS) -> Calibration:
    """Measure everything in so many seconds; ``say`` hears what is being measured.

    The grids get what is left of the time, in the order of their importance.

    A measurement that fails is skipped, and named in the result. Raises ProfilerError without a CUDA device, or with
    one that there is no description of.
    """
    if not torch.cuda.is_available():
        raise ProfilerError("calibrating needs a CUDA device, and PyTorch finds none here")
    name = torch.cuda.get_device_name()
    session = Session(find_device(name), say)
    end = time.perf_counter() + seconds
    with undisturbed():
        session.measure_issues()
        session.measure_updates()
        end = max(end, time.perf_counter() + GRIDS_SECONDS)
        for grid in important_grids():
            session.measure(grid, IMPORTANT_SECONDS.get(grid.name.partition("/")[0], GRID_SECONDS))
        waiting = list(other_grids())
        while waiting and (left := end - time.perf_counter()) > 0:
            share = SHARE * left / len(waiting)
            session.measure(waiting.pop(0), max(LEAST_GRID_SECONDS, min(GRID_SECONDS, share)))
    session.skipped += [f"{grid.name}: all points, for time" for grid in waiting]
    facts = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    return Calibration(name, session.rates, session.issue_seconds, facts, tuple(session.skipped))


class Session:
    """What has been measured so far."""

    def __init__(self, device: Device, say: Say) -> None:
        self.device, self.say = device, say
        self.rates: dict[str, Rate] = {}
        self.issue_seconds: dict[str, float] = {}
        self.skipped: list[str] = []

    def measure(self, grid: Grid, seconds: float = GRID_SECONDS) -> None:
        """Time a grid: one rate for each of the operations that are timed at its points."""
        self.say(grid.name)
        points = list(product(*grid.axes))
        found: dict[str, dict[int, tuple[float, float]]] = {}
        end, late = time.perf_counter() + seconds, 0
        for index in random.Random(0).sample(range(len(points)), len(points)):
            if time.perf_counter() > end:
                late += 1
                continue
            with self._guarded(f"{grid.name} at {points[index]}"):
                for timed in grid.prepare(*points[index]):
                    timed.run()
                    seconds = device_seconds(timed.run)
                    ideal = sum(ideal_seconds(part, self.device) for part in timed.ops)
                    found.setdefault(timed.name, {})[index] = ideal / seconds, seconds / len(timed.ops)
        if late:
            self.skipped.append(f"{grid.name}: {late} of {len(points)} points, for time")
        for name, row in found.items():
            fractions = tuple(row[index][0] if index in row else None for index in range(len(points)))
            self.rates[name] = Rate(grid.axes, fractions, min(seconds for _, seconds in row.values()))
        torch.cuda.empty_cache()

    def measure_updates(self) -> None:
        """The optimizers' and the clipping's passes over the parameters, and their cost a tensor on the CPU."""

        def prepare(name: str, size: float) -> Iterator[Timed]:
            run = update(name, TENSORS, int(size) // 4 // TENSORS)
            yield Timed(name, run, (Numbers(torch.float32, "cuda").op(name, 0, size),))

        for name in UPDATES:
            self.measure(Grid(name, (UPDATE_BYTES,), lambda size, name=name: prepare(name, size)))
            with self._guarded(f"the issue of {name}"):
                self.issue_seconds[name] = update_seconds(name)
        with self._guarded("the clearing of gradients"):
            self.issue_seconds["zero_grad"] = clearing_seconds()

    def measure_issues(self) -> None:
        """What it costs the CPU to issue operations of each kind."""
        known: dict[str, float] = {}
        for program in issue_programs():
            self.say(f"the issue of {program.name}")
            with self._guarded(f"the issue of {program.name}"):
                known.update(issue_seconds(program, known))
        self.say("the issue of blocks")
        with self._guarded("the issue of blocks"):
            known = in_blocks(known)
        with self._guarded("the issue of checkpoints"):
            known["checkpoint"] = checkpoint_seconds(known)
        with self._guarded("the issue of recurrent layers"):
            known.update(recurrent_issue_seconds())
        self.issue_seconds.update(known)

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """One measurement that fails must not end the calibration, and PyTorch's advice is not for who calibrates."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:  # noqa: BLE001
            self.skipped.append(f"{what}: {type(error).__name__}: {error}".splitlines()[0])
