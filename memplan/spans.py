"""What the lanes of a step do, and when."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LANES = ("compute", "host_to_device", "device_to_host", "inputs", "nvme", "cpu_update", "collective")

Times = np.ndarray
"""Seconds, one entry a candidate."""


class Span(NamedTuple):
    """One thing that a lane does."""

    lane: str
    label: str
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True)
class Timeline:
    """One optimizer step in the steady state. It begins and ends when the CPU has read a loss."""

    seconds: float
    spans: tuple[Span, ...]
    """In order of their starts; the update beside this step's forward pass is that of the step before."""

    @property
    def busy_seconds(self) -> dict[str, float]:
        """By lane, those that do nothing left out."""
        busy = dict.fromkeys(LANES, 0.0)
        for span in self.spans:
            busy[span.lane] += span.end_seconds - span.start_seconds
        return {lane: seconds for lane, seconds in busy.items() if seconds > 0}
