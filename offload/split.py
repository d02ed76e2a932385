"""How the update of state on the host is shared by CPU and device: as planned, then by what it took."""

from dataclasses import dataclass

LEARNING_STEPS = 8
"""Steps after which the share stays as it is."""


@dataclass(frozen=True)
class Took:
    """What one of the engines did in a step."""

    elements: int
    seconds: float


class UpdateSplit:
    """The device's share of the elements, moved towards the one at which both engines end at once."""

    def __init__(self, device_share: float, *, learns: bool = True) -> None:
        self.device_share, self.learns = device_share, learns
        self._learned = 0

    def learn(self, host: Took, device: Took) -> bool:
        """What the last step took; half of the way to what would have been right, for the engines slow each other.

        Whether the share moved.
        """
        if not self.learns or self._learned >= LEARNING_STEPS or not (host.elements and device.elements):
            return False
        self._learned += 1
        host_rate, device_rate = host.elements / host.seconds, device.elements / device.seconds
        right = device_rate / (host_rate + device_rate)
        self.device_share += (right - self.device_share) / 2
        return True
