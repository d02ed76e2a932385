"""How the update of state on the host is shared by CPU and device: as planned, then by what it took.

[Note: tries]
Both engines end at once where each has a share by its rate. But the device's rate is not one number: what comes ahead
costs it next to nothing, until more comes than the links carry in a backward pass, and then everything waits. So the
share moves towards where rates alone would put it, a few times, and the try at which the later of the two was over
soonest stays. Soonest for what there was to update: experts that no token came to, and layers that were left out, make
a step short whatever the share. The first step is no try, for kernels are compiled in it.
"""

from dataclasses import dataclass

TRIES = 5
"""Shares that are tried, the planned one among them."""


@dataclass(frozen=True)
class Took:
    """What one of the engines did in a step."""

    elements: int
    seconds: float


class UpdateSplit:
    """The device's share of the elements."""

    def __init__(self, device_share: float, *, learns: bool = True) -> None:
        self.device_share, self.learns = device_share, learns
        self._tried: list[tuple[float, float]] = []
        """Seconds until both had ended, by the elements that both updated, and the share."""
        self._moved = True
        """Whether the share was another before the step that is measured now, as in the first one."""

    def learn(self, host: Took, device: Took) -> bool:
        """What the last step took. Whether the share moved; the first step of all and after that teaches nothing."""
        if not self.learns or not (host.elements and device.elements):
            return False
        if self._moved:
            self._moved = False
            return False
        seconds_an_element = max(host.seconds, device.seconds) / (host.elements + device.elements)
        self._tried.append((seconds_an_element, self.device_share))
        if len(self._tried) < TRIES:
            host_rate, device_rate = host.elements / host.seconds, device.elements / device.seconds
            # Half of the way, for the engines slow each other.
            share = (self.device_share + device_rate / (host_rate + device_rate)) / 2
        else:
            share, self.learns = min(self._tried)[1], False
        self._moved, self.device_share = share != self.device_share, share
        return self._moved
