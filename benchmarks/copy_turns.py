"""What a copy waits for on a GPU's copy engine while another stream always has more: the reason for patient lanes.

    python -m benchmarks.copy_turns

One thread copies pieces of state, four tensors each, to the host or from it, and keeps one or two of them under way;
meanwhile small and larger copies on another stream are timed. Median and longest milliseconds, and the rate of the
first stream.
"""

import argparse
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from benchmarks.common import save

MIB = 1 << 20
PIECE_BYTES = (32 * MIB, 32 * MIB, 64 * MIB, 64 * MIB)
"""Weights, what their masters have more, and two moments, of 16 Mi elements in bf16."""
OTHER_BYTES = (4, 32 * MIB)
"""A loss, and a gradient."""
WARM_SECONDS, SECONDS = 0.1, 0.3
BETWEEN_SECONDS = 2e-3


class Transfer:
    """Copies between pinned host memory and the device, one way, on a stream of its own."""

    def __init__(self, sizes_bytes: tuple[int, ...], *, to_host: bool) -> None:
        self.stream = torch.cuda.Stream()
        pairs = [
            (torch.zeros(n, dtype=torch.uint8, pin_memory=True), torch.zeros(n, dtype=torch.uint8, device="cuda"))
            for n in sizes_bytes
        ]
        self._pairs = pairs if to_host else [(there, here) for here, there in pairs]
        self.size_bytes = sum(sizes_bytes)

    def begin(self) -> torch.cuda.Event:
        """Once more; gives when it is over."""
        with torch.cuda.stream(self.stream):
            for target, source in self._pairs:
                target.copy_(source, non_blocking=True)
            over = torch.cuda.Event(blocking=True)
            over.record()
        return over


@dataclass
class Feeder:
    """A thread that always has so many pieces under way."""

    transfer: Transfer
    under_way: int
    moved_bytes: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until ``stop``."""
        waiting: deque[torch.cuda.Event] = deque()
        while not self._over.is_set():
            waiting.append(self.transfer.begin())
            self.moved_bytes += self.transfer.size_bytes
            while len(waiting) >= self.under_way:
                waiting.popleft().synchronize()

    def stop(self) -> None:
        """Begin no more."""
        self._over.set()


def measured(direction: str, under_way: int, other_bytes: int) -> dict[str, object]:
    """One row."""
    to_host = direction == "device_to_host"
    feeder, other = Feeder(Transfer(PIECE_BYTES, to_host=to_host), under_way), Transfer((other_bytes,), to_host=to_host)
    other.begin().synchronize()
    thread = threading.Thread(target=feeder.run)
    begun = time.perf_counter()
    thread.start()
    time.sleep(WARM_SECONDS)
    stopping = threading.Timer(SECONDS, feeder.stop)  # a copy may wait until the other stream has no more
    stopping.start()
    waited = []
    while stopping.is_alive():
        asked = time.perf_counter()
        other.begin().synchronize()
        waited.append(time.perf_counter() - asked)
        time.sleep(BETWEEN_SECONDS)
    thread.join()
    feeder.transfer.stream.synchronize()
    rate = feeder.moved_bytes / (time.perf_counter() - begun)
    return {
        "direction": direction,
        "pieces_under_way": under_way,
        "other_bytes": other_bytes,
        "copies": len(waited),
        "median_milliseconds": round(1e3 * statistics.median(waited), 2),
        "longest_milliseconds": round(1e3 * max(waited), 2),
        "state_gb_per_second": round(rate / 1e9, 1),
    }


def main() -> None:
    """Measure, print, save."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for direction in ("device_to_host", "host_to_device"):
        for under_way in (2, 1):
            for size in OTHER_BYTES:
                rows.append(measured(direction, under_way, size))
                print(rows[-1], flush=True)
    print(save("copy-turns", rows))


if __name__ == "__main__":
    main()
